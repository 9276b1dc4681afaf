#include "run/data.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/config.h"
#include "run/data_file.h"
#include "run/processor.h"
#include "run/sha256.h"

enum {
    KEEP_BYTES = 1024 * 1024 * 1024, /* sets up to this size are held in memory */
    MAX_WORKERS = 8
};

/* Clips are numbered through both splits: rows of the file, or the training clips of the procedural
 * source followed by the held-out ones. */
struct FvData {
    FvDataInfo info;
    bool procedural, captions;
    bool pixels_only; /* neither held-out clips nor targets are needed */
    uint64_t seed;
    FvClipFile file;               /* the file source */
    size_t clips;                  /* of both splits */
    uint32_t *number[2];           /* [count of the split]: number of each of its clips */
    uint8_t *pixels;               /* [clips, T, S, S, 3], or NULL: drawn or read when asked for */
    real *latents;                 /* of the file, [clips, T, S/8, S/8, 4]; NULL as pixels is */
    int32_t *tokens, *token_count; /* [clips, max_tokens], [clips]; NULL without captions */
    double mean[FV_LATENT_CHANNELS], scale[FV_LATENT_CHANNELS]; /* block targets */
};

static size_t clip_pixels(const FvData *d) { /* bytes */
    return fv_mul(fv_mul3(d->info.size, d->info.size, 3), d->info.frames);
}

static size_t clip_latents(const FvData *d) { /* values */
    size_t side = d->info.size / FV_LATENT_STRIDE;
    return fv_mul4(d->info.frames, side, side, FV_LATENT_CHANNELS);
}

static bool file_latents(const FvData *d) {
    return !d->procedural && d->file.has_latents;
}

void fv_data_show_as(FvData *d, const char *source) {
    snprintf(d->info.source, sizeof d->info.source, "%s", source);
}

const FvDataInfo *fv_data_info(const FvData *d) {
    return &d->info;
}

/* --- where clips come from -------------------------------------------------------------------- */

static void draw(const FvData *d, size_t number, uint8_t *pixels, char *caption) {
    bool held_out = number >= d->info.count[FV_TRAIN];
    uint32_t index = (uint32_t)(held_out ? number - d->info.count[FV_TRAIN] : number);
    fv_clip_draw(d->seed, held_out ? FV_HELD_OUT : FV_TRAIN, index, d->info.frames, d->info.size,
                 pixels, NULL, caption, caption ? FV_CAPTION_TOKENS + 1 : 0);
}

static FvStatus read_pixels(const FvData *d, size_t number, uint8_t *pixels, FvError *err) {
    if (d->pixels)
        memcpy(pixels, d->pixels + number * clip_pixels(d), clip_pixels(d));
    else if (d->procedural)
        draw(d, number, pixels, NULL);
    else
        return fv_clipfile_pixels(&d->file, number, 1, pixels, err);
    return FV_OK;
}

static FvStatus read_latents(const FvData *d, size_t number, const uint8_t *pixels, real *latents,
                             FvError *err) {
    if (d->latents) {
        memcpy(latents, d->latents + number * clip_latents(d), clip_latents(d) * sizeof *latents);
        return FV_OK;
    }
    if (file_latents(d))
        return fv_clipfile_latents(&d->file, number, latents, err);
    fv_blocks(d->info.frames, d->info.size, pixels, latents);
    for (size_t i = 0; i < clip_latents(d); i++) {
        size_t c = i % FV_LATENT_CHANNELS;
        latents[i] = (real)((latents[i] - d->mean[c]) * d->scale[c]);
    }
    return FV_OK;
}

FvStatus fv_data_read(FvData *d, FvSplit split, uint32_t clip, FvBatch *batch, size_t slot,
                      FvError *err) {
    if (clip >= d->info.count[split] || slot >= batch->clips)
        return FV_FAIL(err, FV_DATA, "%s: clip %u asked for, the split has %zu", d->info.source,
                       (unsigned)clip, d->info.count[split]);
    size_t number = d->number[split][clip];
    uint8_t *pixels = batch->pixels + slot * clip_pixels(d);
    FV_TRY(read_pixels(d, number, pixels, err));
    if (!d->pixels_only)
        FV_TRY(read_latents(d, number, pixels, batch->latents + slot * clip_latents(d), err));
    int32_t *tokens = batch->tokens + slot * batch->max_text;
    memset(tokens, 0, batch->max_text * sizeof *tokens);
    batch->token_count[slot] = d->captions ? d->token_count[number] : 0;
    if (d->captions)
        memcpy(tokens, d->tokens + number * d->info.max_tokens,
               (size_t)d->token_count[number] * sizeof *tokens);
    batch->clip[slot] = clip;
    batch->number[slot] = split == FV_TRAIN ? clip : (uint32_t)d->info.count[FV_TRAIN] + clip;
    return FV_OK;
}

/* --- opening: work on every clip, over the processors that this rank may use -------------------
 */

typedef struct Work {
    FvData *data;
    atomic_size_t next; /* clip number */
    double *sums;       /* [clips, 2 x channels]: sums and sums of squares of the block values, or
                           NULL where the targets are in the file */
    pthread_mutex_t mutex;
    FvStatus status; /* of the first failure */
    FvError *err;
} Work;

static void add_sums(const real *blocks, size_t count, double *sums) {
    for (size_t i = 0; i < count; i++) {
        size_t c = i % FV_LATENT_CHANNELS;
        sums[c] += blocks[i];
        sums[FV_LATENT_CHANNELS + c] += (double)blocks[i] * blocks[i];
    }
}

/* One clip: drawn into memory where the source is procedural, its block sums taken. */
static FvStatus work_on(Work *w, size_t number, uint8_t *pixels, real *blocks, FvError *err) {
    FvData *d = w->data;
    if (d->procedural && (d->pixels || d->captions)) {
        char caption[FV_CAPTION_TOKENS + 1] = "";
        uint8_t *to = d->pixels ? d->pixels + number * clip_pixels(d) : pixels;
        draw(d, number, to, caption);
        for (size_t i = 0; d->captions && caption[i]; i++) {
            d->tokens[number * FV_CAPTION_TOKENS + i] = (unsigned char)caption[i];
            d->token_count[number]++;
        }
    }
    if (!w->sums)
        return FV_OK;
    const uint8_t *from = pixels;
    if (d->pixels)
        from = d->pixels + number * clip_pixels(d);
    else
        FV_TRY(read_pixels(d, number, pixels, err));
    fv_blocks(d->info.frames, d->info.size, from, blocks);
    add_sums(blocks, clip_latents(d), w->sums + number * 2 * FV_LATENT_CHANNELS);
    return FV_OK;
}

static void *worker(void *argument) {
    Work *w = argument;
    FvData *d = w->data;
    FvError err;
    FvStatus status = FV_OK;
    uint8_t *pixels = d->pixels ? NULL : malloc(clip_pixels(d));
    real *blocks = w->sums ? calloc(clip_latents(d), sizeof *blocks) : NULL;
    if ((!d->pixels && !pixels) || (w->sums && !blocks))
        status = FV_FAIL(&err, FV_DEVICE, "%s: out of memory for one clip", d->info.source);
    for (size_t i; status == FV_OK && (i = atomic_fetch_add(&w->next, 1)) < d->clips;)
        status = work_on(w, i, pixels, blocks, &err);
    free(pixels);
    free(blocks);
    if (status != FV_OK) {
        pthread_mutex_lock(&w->mutex);
        if (w->status == FV_OK) {
            w->status = status;
            if (w->err)
                *w->err = err;
        }
        pthread_mutex_unlock(&w->mutex);
    }
    return NULL;
}

static size_t worker_count(void) {
    size_t n = fv_available_cores();
    return n > MAX_WORKERS ? MAX_WORKERS : n;
}

static FvStatus work_on_all(FvData *d, double *sums, FvError *err) {
    Work w = {.data = d, .sums = sums, .err = err, .mutex = PTHREAD_MUTEX_INITIALIZER};
    pthread_t threads[MAX_WORKERS];
    size_t started = 0, wanted = worker_count();
    while (started + 1 < wanted && pthread_create(&threads[started], NULL, worker, &w) == 0)
        started++;
    worker(&w);
    for (size_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&w.mutex);
    return w.status;
}

/* Mean and deviation per channel of the training split's block values. The sums per clip are added
 * in the order of the clips, so the result does not depend on the workers. */
static void set_standard(FvData *d, const double *sums) {
    double total[2 * FV_LATENT_CHANNELS] = {0};
    for (size_t i = 0; i < d->info.count[FV_TRAIN]; i++)
        for (size_t c = 0; c < 2 * FV_LATENT_CHANNELS; c++)
            total[c] += sums[(size_t)d->number[FV_TRAIN][i] * 2 * FV_LATENT_CHANNELS + c];
    double n = (double)(d->info.count[FV_TRAIN] * clip_latents(d)) / FV_LATENT_CHANNELS;
    for (size_t c = 0; c < FV_LATENT_CHANNELS; c++) {
        d->mean[c] = total[c] / n;
        double variance = total[FV_LATENT_CHANNELS + c] / n - d->mean[c] * d->mean[c];
        /* 1e-6 of the range is rounding: a constant channel (grey videos) stays at 0 */
        d->scale[c] = variance > 1e-12 ? 1 / sqrt(variance) : 1;
    }
}

/* --- opening ---------------------------------------------------------------------------------- */

/* Bytes of pixels, latents and tokens; *keep tells whether pixels and latents are among them. */
static size_t held_bytes(const FvData *d, bool *keep) {
    size_t latents = file_latents(d) ? fv_mul(clip_latents(d), sizeof(real)) : 0;
    size_t clips = fv_mul(d->clips, fv_add(clip_pixels(d), latents));
    *keep = clips <= KEEP_BYTES;
    size_t text = fv_mul3(d->clips, d->info.max_tokens + (d->captions ? 1 : 0), sizeof(int32_t));
    return fv_add(fv_add(*keep ? clips : 0, text), fv_mul(d->clips, sizeof(uint32_t)));
}

/* Everything that is known before clips are read. A file is open afterwards. */
static FvStatus describe(FvData *d, const FvConfig *config, FvError *err) {
    d->procedural = !strcmp(config->data, "procedural");
    d->captions = !strcmp(config->text, "captions");
    d->seed = config->data_seed;
    d->info.frames = config->frames;
    d->info.size = config->image_size;
    if (d->info.size % FV_LATENT_STRIDE)
        return FV_FAIL(err, FV_USAGE, "image_size is %zu, it must be a multiple of %d",
                       d->info.size, FV_LATENT_STRIDE);
    snprintf(d->info.source, sizeof d->info.source, "%s", config->data);
    if (d->procedural) {
        if (!strcmp(config->latents, "file"))
            return FV_FAIL(err, FV_DATA,
                           "latents=file needs a clips.h5 with /latents, data is "
                           "procedural: set latents=blocks or data=FILE");
        d->info.count[FV_TRAIN] = config->clips_train;
        d->info.count[FV_HELD_OUT] = config->clips_held_out;
        d->clips = fv_add(config->clips_train, config->clips_held_out);
        d->info.max_tokens = d->captions ? FV_CAPTION_TOKENS : 0;
    } else {
        FV_TRY(fv_clipfile_open(config, &d->file, err));
        d->clips = d->file.clips;
        d->info.max_tokens = d->file.max_tokens;
    }
    snprintf(d->info.latents, sizeof d->info.latents, "%s", file_latents(d) ? "file" : "blocks");
    bool keep;
    d->info.bytes = held_bytes(d, &keep);
    return FV_OK;
}

/* Which clips belong to which split. */
static FvStatus number_clips(FvData *d, size_t batch, FvError *err) {
    int32_t *split = calloc(d->clips, sizeof *split);
    if (!split)
        return FV_FAIL(err, FV_DEVICE, "%s: out of memory for %zu clips", d->info.source, d->clips);
    FvStatus status = FV_OK;
    for (size_t i = d->info.count[FV_TRAIN]; d->procedural && i < d->clips; i++)
        split[i] = FV_HELD_OUT;
    if (!d->procedural)
        status = fv_clipfile_split(&d->file, split, err);
    d->info.count[FV_TRAIN] = d->info.count[FV_HELD_OUT] = 0;
    uint32_t *number = calloc(d->clips, sizeof *number);
    for (int s = FV_TRAIN; number && status == FV_OK && s <= FV_HELD_OUT; s++) {
        d->number[s] = s ? number + d->info.count[FV_TRAIN] : number;
        for (size_t i = 0; i < d->clips; i++)
            if (split[i] == s)
                d->number[s][d->info.count[s]++] = (uint32_t)i;
    }
    free(split);
    if (!number)
        return FV_FAIL(err, FV_DEVICE, "%s: out of memory for %zu clips", d->info.source, d->clips);
    d->number[FV_TRAIN] = number; /* the block behind both */
    FV_TRY(status);
    for (int s = FV_TRAIN; s <= (d->pixels_only ? FV_TRAIN : FV_HELD_OUT); s++)
        if (d->info.count[s] == 0)
            return FV_FAIL(err, FV_DATA,
                           "%s: no %s clips (/split is nowhere %d): prepare the file "
                           "again, from two videos or more",
                           d->info.source, s ? "held-out" : "training", s);
    if (batch > d->info.count[FV_TRAIN])
        return FV_FAIL(err, FV_DATA,
                       "%s: a step needs batch=%zu clips, there are %zu for training: "
                       "set a smaller batch or give more clips",
                       d->info.source, batch, d->info.count[FV_TRAIN]);
    return FV_OK;
}

static FvStatus allocate(FvData *d, FvError *err) {
    bool keep, ok = true;
    held_bytes(d, &keep);
    if (keep) {
        d->pixels = malloc(d->clips * clip_pixels(d));
        ok = d->pixels;
    }
    if (keep && file_latents(d)) {
        d->latents = malloc(d->clips * clip_latents(d) * sizeof *d->latents);
        ok = ok && d->latents;
    }
    if (d->captions) {
        d->tokens = calloc(d->clips, d->info.max_tokens * sizeof *d->tokens);
        d->token_count = calloc(d->clips, sizeof *d->token_count);
        ok = ok && d->tokens && d->token_count;
    }
    if (!ok)
        return FV_FAIL(err, FV_DEVICE, "%s: out of memory: %zu MiB needed", d->info.source,
                       d->info.bytes >> 20);
    return FV_OK;
}

/* What the file holds: whole where it is small enough, tokens always. */
static FvStatus load_file(FvData *d, size_t vocabulary, FvError *err) {
    if (d->captions)
        FV_TRY(fv_clipfile_tokens(&d->file, vocabulary, d->tokens, d->token_count, err));
    if (d->pixels)
        FV_TRY(fv_clipfile_pixels(&d->file, 0, d->clips, d->pixels, err));
    for (size_t i = 0; d->latents && i < d->clips; i++)
        FV_TRY(fv_clipfile_latents(&d->file, i, d->latents + i * clip_latents(d), err));
    return fv_sha256_file(d->info.source, d->info.sha256, err);
}

/* Tokens of drawn captions are their bytes. */
static FvStatus check_vocabulary(const FvData *d, size_t vocabulary, FvError *err) {
    for (size_t i = 0; d->captions && i < d->clips * d->info.max_tokens; i++)
        if ((size_t)d->tokens[i] >= vocabulary)
            return FV_FAIL(err, FV_DATA,
                           "procedural captions: token %d, the language model's "
                           "vocabulary has %zu tokens: set lm_vocab=256",
                           (int)d->tokens[i], vocabulary);
    return FV_OK;
}

/* Provenance of drawn clips: the recipe's parameters and the bytes of the first clip. */
static FvStatus sum_procedural(FvData *d, FvError *err) {
    uint8_t *pixels = malloc(clip_pixels(d));
    if (!pixels)
        return FV_FAIL(err, FV_DEVICE, "out of memory for one procedural clip");
    draw(d, 0, pixels, NULL);
    char recipe[192];
    int n =
        snprintf(recipe, sizeof recipe, "seed %llu train %zu held-out %zu frames %zu size %zu\n",
                 (unsigned long long)d->seed, d->info.count[FV_TRAIN], d->info.count[FV_HELD_OUT],
                 d->info.frames, d->info.size);
    FvSha256 sum;
    fv_sha256_start(&sum);
    fv_sha256_add(&sum, recipe, (size_t)n);
    fv_sha256_add(&sum, pixels, clip_pixels(d));
    fv_sha256_text(&sum, d->info.sha256);
    free(pixels);
    return FV_OK;
}

static FvStatus fill(FvData *d, const FvConfig *config, FvError *err) {
    FV_TRY(number_clips(d, config->batch, err));
    FV_TRY(allocate(d, err));
    if (!d->procedural)
        FV_TRY(load_file(d, config->lm_vocab, err));
    double *sums = NULL;
    if (!file_latents(d) && !d->pixels_only) {
        sums = calloc(fv_mul(d->clips, 2 * FV_LATENT_CHANNELS), sizeof *sums);
        if (!sums)
            return FV_FAIL(err, FV_DEVICE, "%s: out of memory for %zu clips", d->info.source,
                           d->clips);
    }
    FvStatus status = d->procedural || sums ? work_on_all(d, sums, err) : FV_OK;
    if (status == FV_OK && sums)
        set_standard(d, sums);
    free(sums);
    FV_TRY(status);
    if (d->procedural) {
        FV_TRY(check_vocabulary(d, config->lm_vocab, err));
        return sum_procedural(d, err);
    }
    if (d->pixels)
        fv_clipfile_close(&d->file);
    return FV_OK;
}

static FvData *create(void) {
    FvData *d = calloc(1, sizeof *d);
    if (d)
        d->file = (FvClipFile){
            .file = -1, .pixels = -1, .latents = -1, .tokens = -1, .token_count = -1, .split = -1};
    return d;
}

static FvStatus open_data(const FvConfig *config, bool pixels_only, FvData **out, FvError *err) {
    *out = NULL;
    FvData *d = create();
    if (!d)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    d->pixels_only = pixels_only;
    FvStatus status = describe(d, config, err);
    if (status == FV_OK)
        status = fill(d, config, err);
    if (status != FV_OK) {
        fv_data_close(d);
        return status;
    }
    *out = d;
    return FV_OK;
}

FvStatus fv_data_open(const FvConfig *config, FvData **out, FvError *err) {
    return open_data(config, false, out, err);
}

FvStatus fv_data_open_pixels(const FvConfig *config, FvData **out, FvError *err) {
    return open_data(config, true, out, err);
}

void fv_data_close(FvData *d) {
    if (!d)
        return;
    if (d->file.file >= 0)
        fv_clipfile_close(&d->file);
    free(d->number[FV_TRAIN]);
    free(d->pixels);
    free(d->latents);
    free(d->tokens);
    free(d->token_count);
    free(d);
}

static FvDataInfo look_at(const FvConfig *config) {
    FvDataInfo info = {0};
    FvData *d = create();
    if (d && describe(d, config, NULL) == FV_OK)
        info = d->info;
    fv_data_close(d);
    return info;
}

size_t fv_data_bytes(const FvConfig *config) {
    return look_at(config).bytes;
}

size_t fv_data_max_tokens(const FvConfig *config) {
    return look_at(config).max_tokens;
}
