#include "run/attend.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/memory.h"
#include "model/model.h"
#include "run/bar.h"
#include "run/config.h"
#include "run/data.h"
#include "run/files.h"
#include "run/hdf5_lock.h"
#include "run/processor.h"
#include "run/results_hdf5.h"
#include "run/safetensors.h"
#include "run/video.h"
#include "run/weights.h"

typedef struct Options {
    const char *run, *video, *output;
    size_t stride, clips, threads; /* clips: at most so many; threads 0: all cores */
    bool center, help;
} Options;

typedef struct Attend {
    const Options *options;
    char out[FV_PATH], name[FV_NAME]; /* of OUT/NAME */
    uint64_t seed;
    bool seed_given;
    FvConfig config;
    FvModelConfig c; /* one clip at a time */
    FvBackend *be;
    FvModel *model;
    FvBatch batch;
    FvVideo *video;
    size_t clips;      /* done */
    double *attention; /* of one pass [T, 1 + N] */
    int64_t *start;    /* [clips]: first frame in the video */
    uint8_t *pixels;   /* [clips, T, S, S, 3] */
    float *map, *cls;  /* [clips, pass, T, N], [clips, pass, T] */
    FvSignals signals;
} Attend;

/* --- command line ----------------------------------------------------------------------------- */

static void print_help(void) {
    puts(
        "usage: fovea attend OUT/NAME[/seed_N] VIDEO [options]\n"
        "\n"
        "Where a trained experiment looks in a video: frames and the attention of both passes, as\n"
        "an HDF5 file that `fovea-attend FILE` draws (`make attend RUN=OUT/NAME VIDEO=FILE` does\n"
        "both).\n"
        "\n"
        "  -o, --output FILE       the file to write (NAME_VIDEO.h5 in OUT)\n"
        "      --stride N          takes every Nth frame of the video (2)\n"
        "      --clips N           at most N clips of the model's length (8)\n"
        "      --crop center|none  the centred square, or all of it squeezed (center)\n"
        "      --threads N         threads (all cores)\n"
        "      --help              this text");
}

static FvStatus parse_count(const char *name, const char *text, size_t high, size_t *out,
                            FvError *err) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (end == text || *end || *text == '-' || errno || v < 1 || v > high)
        return FV_FAIL(err, FV_USAGE, "attend: --%s=%s: needs a whole number from 1 to %zu", name,
                       text, high);
    *out = (size_t)v;
    return FV_OK;
}

static FvStatus parse(int argc, char **argv, Options *o, FvError *err) {
    enum { STRIDE = 256, CLIPS, CROP, THREADS, HELP };
    static const struct option table[] = {{"output", required_argument, NULL, 'o'},
                                          {"stride", required_argument, NULL, STRIDE},
                                          {"clips", required_argument, NULL, CLIPS},
                                          {"crop", required_argument, NULL, CROP},
                                          {"threads", required_argument, NULL, THREADS},
                                          {"help", no_argument, NULL, HELP},
                                          {NULL, 0, NULL, 0}};
    *o = (Options){.stride = 2, .clips = 8, .center = true};
    optind = 0; /* a fresh scan */
    opterr = 0;
    for (int key; (key = getopt_long(argc, argv, "o:", table, NULL)) != -1;) {
        if (key == 'o') {
            o->output = optarg;
        } else if (key == STRIDE) {
            FV_TRY(parse_count("stride", optarg, 100000, &o->stride, err));
        } else if (key == CLIPS) {
            FV_TRY(parse_count("clips", optarg, 4096, &o->clips, err));
        } else if (key == THREADS) {
            FV_TRY(parse_count("threads", optarg, 1024, &o->threads, err));
        } else if (key == CROP && (!strcmp(optarg, "center") || !strcmp(optarg, "none"))) {
            o->center = *optarg == 'c';
        } else if (key == HELP) {
            o->help = true;
        } else {
            return FV_FAIL(err, FV_USAGE,
                           "attend: %s is not known or lacks its value: see fovea attend --help",
                           argv[optind - 1]);
        }
    }
    if (o->help)
        return FV_OK;
    if (argc - optind != 2)
        return FV_FAIL(err, FV_USAGE, "attend: name OUT/NAME and a video: see fovea attend --help");
    o->run = argv[optind];
    o->video = argv[optind + 1];
    return FV_OK;
}

/* --- which run -------------------------------------------------------------------------------- */

/* Cuts the last part off a path: "" where there is none before it. */
static const char *cut_last(char *path) {
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/')
        path[--length] = '\0';
    char *slash = strrchr(path, '/');
    if (!slash)
        return "";
    *slash = '\0';
    return slash + 1;
}

/* OUT/NAME/seed_N or OUT/NAME as its parts. */
static FvStatus split_run(Attend *a, FvError *err) {
    FV_TRY(fv_path(err, a->out, sizeof a->out, "%s", a->options->run));
    const char *last = cut_last(a->out);
    if (strncmp(last, "seed_", 5) == 0 && last[5]) {
        char *end;
        a->seed = strtoull(last + 5, &end, 10);
        a->seed_given = *end == '\0';
        last = cut_last(a->out);
    }
    if (!*last || !*a->out || strlen(last) >= sizeof a->name)
        return FV_FAIL(err, FV_USAGE, "attend: %s: name an experiment's folder, OUT/NAME",
                       a->options->run);
    snprintf(a->name, sizeof a->name, "%s", last);
    return FV_OK;
}

static FvStatus take_experiment(Attend *a, const FvStudy *study, FvError *err) {
    FvNearest nearest = {a->name, NULL, 0};
    for (size_t e = 0; e < study->experiment_count; e++) {
        fv_nearest_offer(&nearest, study->experiments[e].name);
        if (strcmp(study->experiments[e].name, a->name) != 0)
            continue;
        a->config = study->experiments[e].config;
        if (!a->seed_given)
            a->seed = study->seeds[0];
        if (!a->config.vision)
            return FV_FAIL(err, FV_USAGE, "attend: %s has vision off: it looks nowhere", a->name);
        /* nothing is trained here: no room for gradients of what can be frozen */
        a->config.freeze_dino = a->config.freeze_lm = true;
        a->config.batch = 1;
        return fv_config_model(&a->config, 1, 1, &a->c, err);
    }
    return FV_FAIL(err, FV_USAGE, "attend: the study in %s has no experiment \"%s\"%s%s%s", a->out,
                   a->name, nearest.name ? "; did you mean \"" : "",
                   nearest.name ? nearest.name : "", nearest.name ? "\"?" : "");
}

static FvStatus find_run(Attend *a, FvError *err) {
    char path[FV_PATH];
    FvStudy study;
    FV_TRY(split_run(a, err));
    FV_TRY(fv_path(err, path, sizeof path, "%s/study.yaml", a->out));
    FV_TRY(fv_study_load(path, NULL, 0, "small", &study, err));
    FvStatus status = take_experiment(a, &study, err);
    fv_study_free(&study);
    return status;
}

/* --- model ------------------------------------------------------------------------------------ */

static FvStatus set_weights(const FvTensorFile *file, FvModel *model, FvBackend *be, FvError *err) {
    FvParams *params = fv_model_params(model);
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        const FvTensor *t = fv_tensors_find(file, p->name);
        if (!t)
            return FV_FAIL(err, FV_DATA, "%s: lacks %s: is not of this run", fv_tensors_path(file),
                           p->name);
        FV_TRY(fv_weights_check_tensor(file, t, p, false, "is not of this run", err));
        FV_TRY(fv_weights_set(t, p, params, be, err));
    }
    return FV_OK;
}

static FvStatus load_model(Attend *a, FvError *err) {
    char path[FV_PATH];
    FvTensorFile *file;
    FvError why = {0};
    FV_TRY(fv_path(err, path, sizeof path, "%s/%s/seed_%" PRIu64 "/model.safetensors", a->out,
                   a->name, a->seed));
    FvStatus status = fv_tensors_open(path, &file, &why);
    if (status != FV_OK)
        return FV_FAIL(err, status, "attend: %s (written when the run has finished)", why.text);
    size_t threads = a->options->threads ? a->options->threads : fv_available_cores();
    status = fv_cpu_backend_create(threads, &a->be, err);
    if (status == FV_OK)
        status = fv_model_create(&a->c, a->be, &a->model, err);
    if (status == FV_OK)
        status = set_weights(file, a->model, a->be, err);
    fv_tensors_close(file);
    return status;
}

/* Memory of one clip, and of all clips that may come. */
static FvStatus make_room(Attend *a, FvError *err) {
    size_t frames = a->c.frames, clips = a->options->clips, patches = fv_patches(&a->c);
    size_t rows = fv_mul3(clips, FV_PASSES, frames);
    FvDataInfo info = {.frames = frames, .size = a->c.size};
    FV_TRY(fv_batch_create(1, &info, a->c.max_text, &a->batch, err));
    a->attention = malloc(fv_mul3(frames, patches + 1, sizeof *a->attention));
    a->start = malloc(fv_mul(clips, sizeof *a->start));
    a->pixels = malloc(fv_mul(fv_mul(clips, frames), fv_mul3(a->c.size, a->c.size, 3)));
    a->map = malloc(fv_mul3(rows, patches, sizeof *a->map));
    a->cls = malloc(fv_mul(rows, sizeof *a->cls));
    if (!a->attention || !a->start || !a->pixels || !a->map || !a->cls)
        return FV_FAIL(err, FV_DEVICE, "attend: out of memory for %zu clips: fewer with --clips",
                       clips);
    return FV_OK;
}

/* --- looking ---------------------------------------------------------------------------------- */

/* Both passes over the clip whose pixels lie in place. The latents, which stay zero, are read by
 * the prediction head alone. */
static FvStatus look(Attend *a, FvError *err) {
    size_t frames = a->c.frames, patches = fv_patches(&a->c);
    size_t bytes = frames * a->c.size * a->c.size * 3;
    memcpy(a->batch.pixels, a->pixels + a->clips * bytes, bytes);
    FV_TRY(fv_model_load(a->model, &a->batch, err));
    fv_model_encode(a->model);
    fv_model_coarse(a->model);
    fv_model_fine(a->model);
    for (size_t pass = 0; pass < FV_PASSES; pass++) {
        fv_model_attention(a->model, (FvPass)pass, a->attention);
        for (size_t t = 0; t < frames; t++) {
            const double *from = a->attention + t * (patches + 1);
            size_t row = (a->clips * FV_PASSES + pass) * frames + t;
            a->cls[row] = (float)from[0];
            for (size_t n = 0; n < patches; n++)
                a->map[row * patches + n] = (float)from[1 + n];
        }
    }
    a->clips++;
    return FV_OK;
}

/* Clips one after the other; frames that are left over at the end are not shown. */
static FvStatus watch(Attend *a, FvError *err) {
    const Options *o = a->options;
    size_t frame_bytes = a->c.size * a->c.size * 3, span = a->c.frames * o->stride;
    bool end = false;
    for (size_t frame = 0; a->clips < o->clips; frame++) {
        size_t place = frame % span;
        uint8_t *to = a->pixels + (a->clips * a->c.frames + place / o->stride) * frame_bytes;
        FvError why = {0};
        FvStatus status = fv_video_next(a->video, place % o->stride ? NULL : to, &end, &why);
        if (status == FV_DATA && a->clips > 0)
            break; /* damaged from here on: what is before it is good */
        if (status != FV_OK)
            return FV_FAIL(err, status, "attend: %s: %s", o->video, why.text);
        if (end)
            break;
        if (place == 0)
            a->start[a->clips] = (int64_t)frame;
        if (place == (a->c.frames - 1) * o->stride)
            FV_TRY(look(a, err));
        const char *signal = fv_signals_next(&a->signals);
        if (signal)
            return FV_FAIL(err, FV_STOPPED, "attend: stopped by a signal (%s)", signal);
    }
    if (a->clips == 0)
        return FV_FAIL(err, FV_DATA, "attend: %s: too short: a clip spans %zu frames (--stride)",
                       o->video, (a->c.frames - 1) * o->stride + 1);
    return FV_OK;
}

/* --- file ------------------------------------------------------------------------------------- */

static void put_about(FvH5 *h, const Attend *a) {
    fv_h5_put_text(h, h->file, "format", "fovea-attention");
    fv_h5_put_int(h, h->file, "format_version", 1);
    fv_h5_put_text(h, h->file, "experiment", a->name);
    fv_h5_put_int(h, h->file, "seed", (int64_t)a->seed);
    fv_h5_put_text(h, h->file, "video", fv_file_name(a->options->video));
    fv_h5_put_int(h, h->file, "stride", (int64_t)a->options->stride);
}

static void put_columns(FvH5 *h, const Attend *a, FvAxis axis[]) {
    enum { CLIP, PASS, FRAME, Y, X, PIXEL_Y, PIXEL_X, RGB };
    const FvColumn columns[] = {
        {.name = "map",
         .unit = "1",
         .text = "query's attention to the patches, last layer, mean over heads",
         .kind = FV_H5_F32,
         .data = a->map,
         .packed = true,
         .chunk_rank = 4,
         .axes = {&axis[CLIP], &axis[PASS], &axis[FRAME], &axis[Y], &axis[X]}},
        {.name = "cls",
         .unit = "1",
         .text = "query's attention to the CLS token; map and cls add up to 1",
         .kind = FV_H5_F32,
         .data = a->cls,
         .axes = {&axis[CLIP], &axis[PASS], &axis[FRAME]}},
        {.name = "pixels",
         .unit = "1",
         .text = "frames, 0 to 255",
         .kind = FV_H5_U8,
         .data = a->pixels,
         .packed = true,
         .chunk_rank = 4,
         .axes = {&axis[CLIP], &axis[FRAME], &axis[PIXEL_Y], &axis[PIXEL_X], &axis[RGB]}},
    };
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
        fv_h5_column(h, h->file, &columns[i]);
}

/* values: numbers from 0 on, as many as the longest axis of the file has. */
static void put_file(FvH5 *h, const Attend *a, const int64_t *values) {
    static const char *const passes[] = {"coarse", "fine"}, *const colours[] = {"red", "green",
                                                                                "blue"};
    size_t grid = fv_grid(&a->c), size = a->c.size;
    const struct {
        const char *name, *unit, *text;
        FvH5Kind kind;
        const void *data;
        size_t size;
    } axes[] = {
        {"clip", "1", "first frame of the clip in the video", FV_H5_I64, a->start, a->clips},
        {"pass", NULL, "pass", FV_H5_TEXT, passes, FV_PASSES},
        {"frame", "1", "frame of the clip", FV_H5_I64, values + 1, a->c.frames},
        {"y", "1", "row of the patch", FV_H5_I64, values, grid},
        {"x", "1", "column of the patch", FV_H5_I64, values, grid},
        {"pixel_y", "pixel", "row of the frame", FV_H5_I64, values, size},
        {"pixel_x", "pixel", "column of the frame", FV_H5_I64, values, size},
        {"rgb", NULL, "colour channel", FV_H5_TEXT, colours, 3},
    };
    FvAxis axis[sizeof axes / sizeof *axes];
    for (size_t i = 0; i < sizeof axes / sizeof *axes; i++)
        axis[i] = fv_h5_axis(h, h->file,
                             &(FvColumn){.name = axes[i].name,
                                         .unit = axes[i].unit,
                                         .text = axes[i].text,
                                         .kind = axes[i].kind,
                                         .data = axes[i].data},
                             axes[i].size);
    put_about(h, a);
    put_columns(h, a, axis);
    for (size_t i = 0; i < sizeof axes / sizeof *axes; i++)
        fv_h5_close_axis(h, &axis[i]);
}

static FvStatus write_file(const Attend *a, const char *path, FvError *err) {
    size_t most = a->c.frames + 1 > a->c.size ? a->c.frames + 1 : a->c.size;
    int64_t *values = malloc(fv_mul(most, sizeof *values));
    if (!values)
        return FV_FAIL(err, FV_DEVICE, "attend: out of memory");
    for (size_t i = 0; i < most; i++)
        values[i] = (int64_t)i;
    FvH5 h;
    void *image = NULL;
    size_t size = 0;
    fv_hdf5_lock();
    fv_h5_begin(&h);
    put_file(&h, a, values);
    FvStatus status = fv_h5_finish(&h, path, &image, &size, err);
    fv_hdf5_unlock();
    if (status == FV_OK)
        status = fv_file_write(path, &(FvBytes){image, size}, 1, err);
    free(image);
    free(values);
    return status;
}

/* NAME_VIDEO.h5, the video's ending left out, in OUT; or what the user named. */
static FvStatus output_path(const Attend *a, char path[FV_PATH], FvError *err) {
    if (a->options->output)
        return fv_path(err, path, FV_PATH, "%s", a->options->output);
    const char *video = fv_file_name(a->options->video), *dot = strrchr(video, '.');
    int length = (int)(dot && dot > video ? (size_t)(dot - video) : strlen(video));
    return fv_path(err, path, FV_PATH, "%s/%s_%.*s.h5", a->out, a->name, length, video);
}

static FvStatus work(Attend *a, FvError *err) {
    char path[FV_PATH];
    FvError why = {0};
    FV_TRY(find_run(a, err));
    FV_TRY(output_path(a, path, err));
    FvStatus status =
        fv_video_open(a->options->video, a->c.size, a->options->center, &a->video, &why);
    if (status != FV_OK)
        return FV_FAIL(err, status, "attend: %s: %s", a->options->video, why.text);
    FV_TRY(load_model(a, err));
    FV_TRY(make_room(a, err));
    FV_TRY(watch(a, err));
    FV_TRY(write_file(a, path, err));
    printf("%s: %s seed %" PRIu64 ", %zu clips of %zu frames; draw it with fovea-attend\n", path,
           a->name, a->seed, a->clips, a->c.frames);
    return FV_OK;
}

FvStatus fv_attend(int argc, char **argv, FvError *err) {
    Options options;
    FV_TRY(parse(argc, argv, &options, err));
    if (options.help) {
        print_help();
        return FV_OK;
    }
    Attend a = {.options = &options, .signals = fv_signals_hold()};
    FvStatus status = work(&a, err);
    if (a.video)
        fv_video_close(a.video);
    fv_model_destroy(a.model);
    fv_backend_destroy(a.be);
    fv_batch_free(&a.batch);
    free(a.attention);
    free(a.start);
    free(a.pixels);
    free(a.map);
    free(a.cls);
    fv_signals_release(&a.signals);
    return status;
}
