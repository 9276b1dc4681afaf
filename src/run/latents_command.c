#include "run/latents_command.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/clock.h"
#include "base/memory.h"
#include "model/config.h"
#include "model/taesd.h"
#include "run/bar.h"
#include "run/data_file.h"
#include "run/data_latents.h"
#include "run/files.h"
#include "run/partial.h"
#include "run/processor.h"
#include "run/safetensors.h"
#include "run/sha256.h"
#include "run/weights.h"

_Static_assert(sizeof(real) == sizeof(float), "latents are stored in single precision");

typedef struct Options {
    const char *clips, *vae;
    size_t threads; /* 0: all cores */
    bool replace, help;
} Options;

typedef struct Run {
    const Options *options;
    char path[FV_PATH]; /* of the data file: links are followed, so that a link stays one */
    char clips_sha256[FV_SHA256_TEXT], vae_sha256[FV_SHA256_TEXT];
    FvClipFile clips;
    FvBackend *be;
    FvTaesd *net;
    FvPartial partial;
    uint8_t *pixels; /* one clip [T, S, S, 3] */
    float *latents;  /* one clip [T, 4, S/8, S/8] */
    size_t computed; /* frames, by this process */
    double started;
    FvSignals signals;
    FvBar bar;
} Run;

/* --- command line ----------------------------------------------------------------------------- */

static void print_help(void) {
    puts(
        "usage: fovea latents clips.h5 --vae taesd_encoder.safetensors [options]\n"
        "\n"
        "Computes the latents that a study predicts (data=clips.h5) with TAESD's encoder and adds\n"
        "them to the file. Stopped or killed, the same command goes on where it was.\n"
        "\n"
        "  --vae FILE     the encoder's weights, safetensors\n"
        "  --replace      in place of latents that other weights made\n"
        "  --threads N    threads (all cores)\n"
        "  --help         this text");
}

static FvStatus parse(int argc, char **argv, Options *o, FvError *err) {
    enum { VAE = 256, REPLACE, THREADS, HELP };
    static const struct option table[] = {{"vae", required_argument, NULL, VAE},
                                          {"replace", no_argument, NULL, REPLACE},
                                          {"threads", required_argument, NULL, THREADS},
                                          {"help", no_argument, NULL, HELP},
                                          {NULL, 0, NULL, 0}};
    *o = (Options){0};
    optind = 0; /* a fresh scan */
    opterr = 0;
    for (int key; (key = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        char *end = NULL;
        if (key == VAE) {
            o->vae = optarg;
        } else if (key == REPLACE) {
            o->replace = true;
        } else if (key == HELP) {
            o->help = true;
        } else if (key == THREADS) {
            errno = 0;
            o->threads = strtoul(optarg, &end, 10);
            if (*end || errno || *optarg == '-' || o->threads < 1 || o->threads > 1024)
                return FV_FAIL(err, FV_USAGE,
                               "latents: --threads=%s: needs a whole number from 1 to 1024",
                               optarg);
        } else {
            return FV_FAIL(err, FV_USAGE,
                           "latents: option %s is not known or lacks its value: see fovea latents "
                           "--help",
                           argv[optind - 1]);
        }
    }
    if (o->help)
        return FV_OK;
    if (argc - optind != 1)
        return FV_FAIL(err, FV_USAGE, "latents: name one data file: see fovea latents --help");
    o->clips = argv[optind];
    if (!o->vae || !*o->vae)
        return FV_FAIL(err, FV_USAGE,
                       "latents: name the encoder's weights with --vae taesd_encoder.safetensors");
    return FV_OK;
}

/* --- weights ---------------------------------------------------------------------------------- */

static const char *file_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Names as published, "0.weight", or diffusers', "encoder.layers.0.weight" with the decoder beside
 * it. Every tensor must have its place. */
static FvStatus load_all(const FvTensorFile *file, FvTaesd *net, FvBackend *be, FvError *err) {
    static const char layers[] = "encoder.layers.";
    const char *path = fv_tensors_path(file);
    const FvParams *params = fv_taesd_params(net);
    bool whole = fv_tensors_find(file, "encoder.layers.0.weight") != NULL;
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        char name[sizeof layers + FV_PARAM_NAME];
        snprintf(name, sizeof name, "%s%s", whole ? layers : "", p->name);
        const FvTensor *t = fv_tensors_find(file, name);
        if (!t)
            return FV_FAIL(err, FV_DATA,
                           "%s: has no tensor %s: name TAESD's encoder, taesd_encoder.safetensors",
                           path, name);
        FV_TRY(fv_weights_check_tensor(file, t, p, false,
                                       "name TAESD's encoder, taesd_encoder.safetensors", err));
        FV_TRY(fv_weights_set(t, p, fv_taesd_params(net), be, err));
    }
    for (size_t i = 0; i < fv_tensors_count(file); i++) {
        const char *name = fv_tensors_at(file, i)->name;
        bool ours = !whole || strncmp(name, layers, strlen(layers)) == 0;
        if (whole && strncmp(name, "decoder.", 8) == 0)
            continue;
        if (!ours || !fv_params_find(params, name + (whole ? strlen(layers) : 0)))
            return FV_FAIL(err, FV_DATA,
                           "%s: tensor %.100s is no part of TAESD's encoder: name "
                           "taesd_encoder.safetensors",
                           path, name);
    }
    return FV_OK;
}

static FvStatus load_weights(Run *r, FvError *err) {
    FvTensorFile *file;
    FV_TRY(fv_tensors_open(r->options->vae, &file, err));
    FvStatus status = load_all(file, r->net, r->be, err);
    fv_tensors_close(file);
    return status;
}

/* --- computing -------------------------------------------------------------------------------- */

/* Pixels of one frame, and latents of one. */
static size_t frame_pixels(const Run *r) {
    return fv_mul3(r->clips.size, r->clips.size, 3);
}

static size_t frame_latents(const Run *r) {
    size_t side = r->clips.size / FV_LATENT_STRIDE;
    return fv_mul3(side, side, FV_LATENT_CHANNELS);
}

static double speed(const Run *r) { /* frames per second */
    return (double)r->computed / fmax(fv_now() - r->started, 1e-9);
}

static FvStatus encode_clip(Run *r, size_t clip, FvError *err) {
    size_t frames = r->clips.frames, n, step = fv_taesd_frames(r->net);
    FV_TRY(fv_clipfile_pixels(&r->clips, clip, 1, r->pixels, err));
    for (size_t t = 0; t < frames; t += n) {
        n = frames - t < step ? frames - t : step;
        FV_TRY(fv_taesd_encode(r->net, n, r->pixels + t * frame_pixels(r),
                               r->latents + t * frame_latents(r), err));
        r->computed += n;
        const char *signal = fv_signals_next(&r->signals);
        if (signal)
            return FV_FAIL(err, FV_STOPPED,
                           "latents: stopped by a signal (%s) after %zu of %zu clips: the same "
                           "command goes on",
                           signal, r->partial.records, r->clips.clips);
        fv_bar_show(&r->bar, clip, r->clips.clips, "clips, %.3g frames/s", speed(r));
    }
    for (size_t i = 0; i < frames * frame_latents(r); i++)
        if (!isfinite(r->latents[i]))
            return FV_FAIL(err, FV_DATA, "%s: gives latents of clip %zu that are not finite",
                           r->options->vae, clip);
    return FV_OK;
}

static FvStatus read_latents(void *context, size_t clip, const float **out, FvError *err) {
    Run *r = context;
    *out = r->latents;
    return fv_partial_read(&r->partial, clip, r->latents, err);
}

/* The rest of the clips, then the data file as a whole. */
static FvStatus compute(Run *r, FvError *err) {
    const FvClipFile *c = &r->clips;
    if (r->partial.records > 0)
        fprintf(stderr, "latents: going on after %zu of %zu clips\n", r->partial.records, c->clips);
    r->started = fv_now();
    for (size_t clip = r->partial.records; clip < c->clips; clip++) {
        FV_TRY(encode_clip(r, clip, err));
        FV_TRY(fv_partial_add(&r->partial, r->latents, err));
    }
    double rate = speed(r);
    char temporary[FV_PATH];
    FV_TRY(fv_path(err, temporary, sizeof temporary, "%s.latents-new", r->path));
    FvLatents latents = {.clips = c->clips,
                         .frames = c->frames,
                         .side = c->size / FV_LATENT_STRIDE,
                         .vae = file_name(r->options->vae),
                         .vae_sha256 = r->vae_sha256,
                         .read = read_latents,
                         .context = r};
    FV_TRY(fv_latents_write(r->path, r->clips_sha256, temporary, &latents, err));
    FvStatus status = fv_file_publish(temporary, r->path, err);
    if (status != FV_OK) {
        unlink(temporary); /* may have been renamed */
        return status;
    }
    FV_TRY(fv_partial_remove(&r->partial, err));
    fv_bar_clear(&r->bar);
    printf("%s: latents of %zu clips, %zu frames of %d x %zu x %zu, made with %s\n",
           r->options->clips, c->clips, c->frames, FV_LATENT_CHANNELS, latents.side, latents.side,
           latents.vae);
    if (r->computed > 0)
        printf("%zu frames, %.3g a second on %s\n", r->computed, rate, r->be->description);
    return FV_OK;
}

/* The key of kept work, but for its clips. */
#define KEY_BEGINS "fovea latents 1\nvae %s\n"

/* Network, weights, memory of one clip, and what an earlier run has kept. */
static FvStatus set_up(Run *r, const char *partial, FvError *err) {
    const FvClipFile *c = &r->clips;
    size_t threads = r->options->threads ? r->options->threads : fv_available_cores();
    FV_TRY(fv_cpu_backend_create(threads, &r->be, err));
    FV_TRY(fv_taesd_create(r->be, c->size, &r->net, err));
    FV_TRY(load_weights(r, err));
    size_t record = fv_mul3(c->frames, frame_latents(r), sizeof *r->latents);
    r->pixels = malloc(fv_mul(c->frames, frame_pixels(r)));
    r->latents = malloc(record);
    if (!r->pixels || !r->latents)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a clip of %zu frames", c->frames);
    FV_TRY(fv_sha256_file(r->path, r->clips_sha256, err));
    char key[FV_PARTIAL_KEY];
    snprintf(key, sizeof key, KEY_BEGINS "clips %s\n", r->vae_sha256, r->clips_sha256);
    return fv_partial_open(partial, key, record, &r->partial, err);
}

/* What a run that was killed between the last two steps has left: clips whose latents are there.
 * Work with other weights stays. */
static FvStatus remove_left(const char *partial, const char *made_with, FvError *err) {
    char begin[FV_PARTIAL_KEY];
    snprintf(begin, sizeof begin, KEY_BEGINS, made_with);
    return fv_partial_discard(partial, begin, err);
}

static FvStatus find_file(const char *name, char path[FV_PATH], FvError *err) {
    struct stat info;
    char *real_path =
        lstat(name, &info) == 0 && S_ISLNK(info.st_mode) ? realpath(name, NULL) : NULL;
    FvStatus status = fv_path(err, path, FV_PATH, "%s", real_path ? real_path : name);
    free(real_path);
    return status;
}

static FvStatus work(Run *r, FvError *err) {
    const Options *o = r->options;
    char partial[FV_PATH], made_with[FV_SHA256_TEXT];
    bool there;
    FV_TRY(find_file(o->clips, r->path, err));
    FV_TRY(fv_path(err, partial, sizeof partial, "%s.latents-partial", r->path));
    FV_TRY(fv_clipfile_open_frames(r->path, &r->clips, err));
    FV_TRY(fv_sha256_file(o->vae, r->vae_sha256, err));
    FV_TRY(fv_latents_there(&r->clips, &there, made_with, err));
    if (there)
        FV_TRY(remove_left(partial, made_with, err));
    if (there && strcmp(made_with, r->vae_sha256) == 0) {
        printf("%s: has the latents of %s already\n", o->clips, file_name(o->vae));
        return FV_OK;
    }
    if (there && !o->replace)
        return FV_FAIL(err, FV_USAGE,
                       "%s: has latents of other weights (SHA-256 %.12s, %s has %.12s): replace "
                       "them with --replace",
                       o->clips, *made_with ? made_with : "unknown", file_name(o->vae),
                       r->vae_sha256);
    FV_TRY(set_up(r, partial, err));
    return compute(r, err);
}

FvStatus fv_latents_command(int argc, char **argv, FvError *err) {
    Options options;
    FV_TRY(parse(argc, argv, &options, err));
    if (options.help) {
        print_help();
        return FV_OK;
    }
    Run r = {.options = &options,
             .clips = fv_clipfile_closed(),
             .partial.file = -1,
             .bar = fv_bar_start("latents"),
             .signals = fv_signals_hold()};
    FvStatus status = work(&r, err);
    if (status != FV_OK)
        fv_bar_clear(&r.bar);
    fv_partial_close(&r.partial);
    fv_clipfile_close(&r.clips);
    fv_taesd_destroy(r.net);
    fv_backend_destroy(r.be);
    free(r.pixels);
    free(r.latents);
    fv_signals_release(&r.signals);
    return status;
}
