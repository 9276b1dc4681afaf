#include "run/prepare.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "base/memory.h"
#include "base/rng.h"
#include "run/bar.h"
#include "run/captions.h"
#include "run/data.h"
#include "run/data_writer.h"
#include "run/files.h"
#include "run/prepare_options.h"
#include "run/video.h"

typedef struct Video {
    char *path, *name; /* name: the path below the folder given, or the file's own name */
    bool named;        /* on the command line, not found in a folder */
    dev_t device;      /* with inode: the same file under two names counts once */
    ino_t inode;
    size_t first, clips;      /* its clips in the file */
    const FvCaption *caption; /* or NULL */
    uint64_t draw;            /* the videos with the lowest are held out */
} Video;

typedef struct Run {
    const FvPrepareOptions *options;
    Video *videos;
    size_t video_count, capacity;
    size_t clips, unreadable, too_short, others;
    FvCaptions captions;
    FvClipWriter *writer;
    uint8_t *pixels; /* one clip */
    FvSignals signals;
    FvBar bar;
} Run;

/* Looked for between frames. */
static FvStatus check_signals(const Run *r, FvError *err) {
    const char *signal = fv_signals_next(&r->signals);
    if (signal)
        return FV_FAIL(err, FV_STOPPED, "prepare: stopped by a signal (%s), %s is not written",
                       signal, r->options->output);
    return FV_OK;
}

/* --- which files ------------------------------------------------------------------------------ */

static FvStatus add_video(Run *r, const char *path, const char *name, bool named,
                          const struct stat *info, FvError *err) {
    for (size_t i = 0; i < r->video_count; i++)
        if (r->videos[i].device == info->st_dev && r->videos[i].inode == info->st_ino)
            return FV_OK;
    if (r->video_count == r->capacity) {
        size_t capacity = r->capacity ? 2 * r->capacity : 64;
        Video *grown = realloc(r->videos, capacity * sizeof *grown);
        if (!grown)
            return FV_FAIL(err, FV_DEVICE, "prepare: out of memory for the list of videos");
        r->videos = grown;
        r->capacity = capacity;
    }
    Video *v = &r->videos[r->video_count];
    *v = (Video){.path = strdup(path),
                 .name = strdup(name),
                 .named = named,
                 .device = info->st_dev,
                 .inode = info->st_ino};
    r->video_count++;
    if (!v->path || !v->name)
        return FV_FAIL(err, FV_DEVICE, "prepare: out of memory for the list of videos");
    return FV_OK;
}

/* In the order of bytes, not of the locale: the same everywhere. */
static int by_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Takes a file, or everything in a folder in the order of the names' bytes. Hidden files, and links
 * to folders (which could lead round in circles), are passed over. prefix: bytes of path before the
 * part that names the video. */
static FvStatus find_videos(Run *r, const char *path, size_t prefix, bool named, FvError *err) {
    struct stat info = {0};
    if ((named ? stat : lstat)(path, &info) != 0)
        return FV_FAIL(err, FV_DATA, "%s: %s: name videos or folders", path, strerror(errno));
    if (!named && S_ISLNK(info.st_mode) && (stat(path, &info) != 0 || S_ISDIR(info.st_mode)))
        return FV_OK;
    if (S_ISREG(info.st_mode))
        return add_video(r, path, path + prefix, named, &info, err);
    if (!S_ISDIR(info.st_mode))
        return FV_OK;
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, by_name);
    if (count < 0)
        return FV_FAIL(err, FV_DATA, "%s: %s", path, strerror(errno));
    FvStatus status = FV_OK;
    for (int i = 0; i < count; i++) {
        char below[FV_PATH];
        if (status == FV_OK && entries[i]->d_name[0] != '.') {
            const char *slash = path[strlen(path) - 1] == '/' ? "" : "/";
            status = fv_path(err, below, sizeof below, "%s%s%s", path, slash, entries[i]->d_name);
            if (status == FV_OK)
                status = find_videos(r, below, named ? strlen(path) + strlen(slash) : prefix, false,
                                     err);
        }
        free(entries[i]);
    }
    free(entries);
    return status;
}

/* Whether a file that cannot be read was meant to be a video: only then is it worth a line. */
static bool looks_like_video(const char *path) {
    static const char endings[][6] = {"3gp", "apng", "avi",  "flv",  "gif", "m2ts", "m4v",
                                      "mkv", "mov",  "mp4",  "mpeg", "mpg", "mts",  "ogv",
                                      "ts",  "vob",  "webm", "webp", "wmv", "y4m"};
    const char *dot = strrchr(path, '.');
    for (size_t i = 0; dot && i < sizeof endings / sizeof *endings; i++)
        if (!strcasecmp(dot + 1, endings[i]))
            return true;
    return false;
}

/* --- clips ------------------------------------------------------------------------------------ */

static void report(const Run *r, const Video *v, const char *what, const char *reason) {
    fv_bar_clear(&r->bar);
    fprintf(stderr, "prepare: %s: %s%s%s\n", v->path, what, *reason ? ": " : "", reason);
}

/* Cuts clips that do not overlap: each spans frames * stride frames of the video, whatever their
 * time stamps. Damage ends a video; the clips before it are good. */
static FvStatus cut_clips(Run *r, Video *v, FvVideo *video, FvError *err) {
    const FvPrepareOptions *o = r->options;
    size_t frame_bytes = o->size * o->size * 3, span = o->frames * o->stride;
    for (size_t frame = 0; !o->most || v->clips < o->most; frame++) {
        size_t place = frame % span; /* within the clip */
        bool taken = place % o->stride == 0, end = false;
        FvStatus status = fv_video_next(
            video, taken ? r->pixels + place / o->stride * frame_bytes : NULL, &end, err);
        if (status == FV_DATA) {
            report(r, v, "damaged, read up to there", err ? err->text : "");
            break;
        }
        FV_TRY(status);
        if (end)
            break;
        if (place == (o->frames - 1) * o->stride) {
            char source[FV_PATH];
            snprintf(source, sizeof source, "%.*s:%zu", (int)sizeof source - 24, v->name,
                     frame - place);
            FvClip clip = {.pixels = r->pixels, .source = source};
            if (v->caption) {
                clip.caption = v->caption->text;
                clip.tokens = v->caption->tokens;
                clip.token_count = v->caption->token_count;
            }
            FV_TRY(fv_clipwriter_add(r->writer, &clip, err));
            v->clips++;
            r->clips++;
        }
        FV_TRY(check_signals(r, err));
        fv_bar_show(&r->bar, (size_t)(v - r->videos), r->video_count, "files, %zu clips", r->clips);
    }
    return FV_OK;
}

static FvStatus take_video(Run *r, Video *v, FvError *err) {
    FvVideo *video;
    FvError why = {0};
    FvStatus status = fv_video_open(v->path, r->options->size, r->options->center, &video, &why);
    if (status == FV_DATA) {
        if (v->named || looks_like_video(v->path)) {
            report(r, v, "skipped, unreadable", why.text);
            r->unreadable++;
        } else {
            r->others++;
        }
        return FV_OK;
    }
    if (status != FV_OK)
        return FV_FAIL(err, status, "%s: %s", v->path, why.text);
    v->first = r->clips;
    status = cut_clips(r, v, video, err);
    fv_video_close(video);
    FV_TRY(status);
    if (v->clips == 0) {
        char need[64];
        snprintf(need, sizeof need, "a clip spans %zu frames",
                 (r->options->frames - 1) * r->options->stride + 1);
        report(r, v, "skipped, too short", need);
        r->too_short++;
    }
    return FV_OK;
}

/* Number of held-out videos among `videos` that gave clips: the share, but one at least for each
 * split where there are two videos. */
static size_t held_out_videos(double share, size_t videos) {
    if (share == 0 || videos < 2)
        return 0;
    size_t n = (size_t)lround(share * (double)videos);
    return n < 1 ? 1 : n > videos - 1 ? videos - 1 : n;
}

/* Holds out whole videos, so that no video is in both splits: those whose names draw the lowest
 * numbers from the seed. Returns how many. */
static size_t split_videos(Run *r, uint8_t *split) {
    size_t usable = 0;
    for (size_t i = 0; i < r->video_count; i++) {
        r->videos[i].draw = fv_stream(r->options->seed, r->videos[i].name);
        usable += r->videos[i].clips > 0;
    }
    size_t wanted = held_out_videos(r->options->held_out, usable);
    for (size_t k = 0; k < wanted; k++) {
        Video *lowest = NULL;
        for (size_t i = 0; i < r->video_count; i++) {
            Video *v = &r->videos[i];
            if (v->clips && !split[v->first] && (!lowest || v->draw < lowest->draw))
                lowest = v;
        }
        if (lowest) /* always: fewer are wanted than have clips */
            memset(split + lowest->first, FV_HELD_OUT, lowest->clips);
    }
    return wanted;
}

static void report_captions(const Run *r) {
    size_t with = 0, without = 0, unused = 0;
    for (size_t i = 0; i < r->video_count; i++) {
        with += r->videos[i].clips && r->videos[i].caption;
        without += r->videos[i].clips && !r->videos[i].caption;
    }
    for (size_t i = 0; i < r->captions.count; i++)
        unused += !r->captions.items[i].used;
    printf("captions: %zu videos have one, %zu have none; %zu captions name no video\n", with,
           without, unused);
}

static FvStatus finish_videos(Run *r, FvError *err) {
    const FvPrepareOptions *o = r->options;
    if (r->clips == 0)
        return FV_FAIL(err, FV_DATA,
                       "prepare: no clips: of %zu files %zu are unreadable, %zu too "
                       "short for %zu frames at stride %zu, %zu no videos",
                       r->video_count, r->unreadable, r->too_short, o->frames, o->stride,
                       r->others);
    uint8_t *split = calloc(r->clips, 1);
    if (!split)
        return FV_FAIL(err, FV_DEVICE, "prepare: out of memory for %zu clips", r->clips);
    size_t videos = split_videos(r, split), clips = 0;
    for (size_t i = 0; i < r->clips; i++)
        clips += split[i];
    FvClipWriter *writer = r->writer;
    r->writer = NULL;
    FvStatus status = fv_clipwriter_finish(writer, split, err);
    free(split);
    FV_TRY(status);
    fv_bar_clear(&r->bar);
    size_t usable = r->video_count - r->unreadable - r->too_short - r->others;
    printf("%s: %zu clips of %zu frames, %zu x %zu pixels, from %zu videos\n"
           "training: %zu clips of %zu videos, held out: %zu clips of %zu videos\n"
           "skipped: %zu unreadable, %zu too short, %zu other files\n",
           o->output, r->clips, o->frames, o->size, o->size, usable, r->clips - clips,
           usable - videos, clips, videos, r->unreadable, r->too_short, r->others);
    if (o->captions)
        report_captions(r);
    if (clips == 0)
        puts("note: no clip is held out, a study needs some: give two videos or more and a "
             "--held-out share");
    return FV_OK;
}

/* Before any video is decoded: what is wrong shows at once. */
static FvStatus load_captions(Run *r, FvError *err) {
    const FvPrepareOptions *o = r->options;
    FvCaptions *c = &r->captions;
    if (!o->captions)
        return FV_OK;
    FV_TRY(fv_captions_read(o->captions, c, err));
    bool any = false;
    for (size_t i = 0; i < r->video_count; i++) {
        r->videos[i].caption = fv_captions_find(c, r->videos[i].name);
        any = any || r->videos[i].caption;
    }
    if (!any && r->video_count)
        return FV_FAIL(
            err, FV_DATA,
            "%s: no caption is of a video: the first of %zu names is %.150s, that of the "
            "videos is %.150s",
            c->path, c->count, c->items[0].name, r->videos[0].name);
    if (o->tokenizer)
        fprintf(stderr, "prepare: %zu captions go through %s\n", c->count, o->tokenizer);
    FvStatus status = fv_captions_tokenize(c, o->tokenizer, o->max_tokens, err);
    FV_TRY(check_signals(r, err));
    return status;
}

static FvStatus prepare_videos(Run *r, FvError *err) {
    const FvPrepareOptions *o = r->options;
    FV_TRY(fv_video_available(err));
    for (size_t i = 0; i < o->input_count; i++) {
        const char *path = o->inputs[i];
        FV_TRY(find_videos(r, path, (size_t)(fv_file_name(path) - path), true, err));
    }
    FV_TRY(load_captions(r, err));
    FvClipSpec spec = {.frames = o->frames,
                       .size = o->size,
                       .stride = o->stride,
                       .seed = o->seed,
                       .crop = o->center ? "center" : "none",
                       .made_from = "videos",
                       .max_tokens = o->max_tokens,
                       .vocabulary = r->captions.vocabulary,
                       .tokenizer = o->tokenizer ? fv_file_name(o->tokenizer) : "bytes",
                       .tokenizer_sha256 = r->captions.tokenizer_sha256};
    FV_TRY(fv_clipwriter_create(o->output, &spec, &r->writer, err));
    for (size_t i = 0; i < r->video_count; i++) {
        FV_TRY(take_video(r, &r->videos[i], err));
        FV_TRY(check_signals(r, err));
    }
    return finish_videos(r, err);
}

static FvStatus add_drawn(Run *r, FvSplit split, uint32_t index, FvClipLabels *labels,
                          FvError *err) {
    const FvPrepareOptions *o = r->options;
    char source[64], caption[FV_CAPTION_TOKENS + 1];
    int32_t tokens[FV_CAPTION_TOKENS];
    fv_clip_draw(o->seed, split, index, o->frames, o->size, r->pixels, labels, caption,
                 sizeof caption);
    snprintf(source, sizeof source, "procedural:%s:%u", split ? "held-out" : "training",
             (unsigned)index);
    FvClip clip = {.pixels = r->pixels,
                   .source = source,
                   .caption = caption,
                   .tokens = tokens,
                   .token_count = strlen(caption),
                   .labels = labels};
    for (size_t i = 0; i < clip.token_count; i++)
        tokens[i] = (unsigned char)caption[i];
    FV_TRY(fv_clipwriter_add(r->writer, &clip, err));
    r->clips++;
    return check_signals(r, err);
}

/* The built-in clips as a file: training clips first, captions as bytes. */
static FvStatus prepare_procedural(Run *r, FvError *err) {
    const FvPrepareOptions *o = r->options;
    size_t all = o->clips[FV_TRAIN] + o->clips[FV_HELD_OUT];
    FvClipSpec spec = {.frames = o->frames,
                       .size = o->size,
                       .stride = 1,
                       .seed = o->seed,
                       .crop = "none",
                       .made_from = "procedural",
                       .max_tokens = FV_CAPTION_TOKENS,
                       .vocabulary = FV_BYTE_TOKENS,
                       .tokenizer = "bytes",
                       .tokenizer_sha256 = "",
                       .labels = o->masks};
    FV_TRY(fv_clipwriter_create(o->output, &spec, &r->writer, err));
    uint8_t *split = calloc(all, 1);
    FvClipLabels labels = {.masks = o->masks ? malloc(fv_mul3(o->frames, o->size, o->size)) : NULL};
    FvStatus status = FV_OK;
    if (!split || (o->masks && !labels.masks))
        status = FV_FAIL(err, FV_DEVICE, "prepare: out of memory for %zu clips", all);
    for (size_t i = 0; status == FV_OK && i < all; i++) {
        split[i] = i < o->clips[FV_TRAIN] ? FV_TRAIN : FV_HELD_OUT;
        size_t index = split[i] ? i - o->clips[FV_TRAIN] : i;
        status = add_drawn(r, (FvSplit)split[i], (uint32_t)index, o->masks ? &labels : NULL, err);
        fv_bar_show(&r->bar, i + 1, all, "clips");
    }
    if (status == FV_OK) {
        FvClipWriter *writer = r->writer;
        r->writer = NULL;
        status = fv_clipwriter_finish(writer, split, err);
    }
    free(labels.masks);
    free(split);
    FV_TRY(status);
    fv_bar_clear(&r->bar);
    printf("%s: %zu procedural clips of %zu frames, %zu x %zu pixels\n"
           "training: %zu clips, held out: %zu clips\n",
           o->output, all, o->frames, o->size, o->size, o->clips[FV_TRAIN], o->clips[FV_HELD_OUT]);
    return FV_OK;
}

static FvStatus run(const FvPrepareOptions *o, FvError *err) {
    Run r = {.options = o, .bar = fv_bar_start("prepare"), .signals = fv_signals_hold()};
    r.pixels = malloc(fv_mul4(o->frames, o->size, o->size, 3));
    FvStatus status;
    if (!r.pixels)
        status = FV_FAIL(err, FV_DEVICE,
                         "prepare: out of memory for a clip of %zu frames of %zu x "
                         "%zu pixels",
                         o->frames, o->size, o->size);
    else
        status = o->procedural ? prepare_procedural(&r, err) : prepare_videos(&r, err);
    if (status != FV_OK)
        fv_bar_clear(&r.bar);
    fv_clipwriter_abandon(r.writer);
    for (size_t i = 0; i < r.video_count; i++) {
        free(r.videos[i].path);
        free(r.videos[i].name);
    }
    free(r.videos);
    fv_captions_free(&r.captions);
    free(r.pixels);
    fv_signals_release(&r.signals);
    return status;
}

FvStatus fv_prepare(int argc, char **argv, FvError *err) {
    FvPrepareOptions options;
    FV_TRY(fv_prepare_parse(argc, argv, &options, err));
    if (options.help) {
        fv_prepare_print_help();
        return FV_OK;
    }
    return run(&options, err);
}
