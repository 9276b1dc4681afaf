/* Clips: drawn from a seed, or read from a clips.h5. Both splits, frames, targets, tokens. */
#ifndef FV_RUN_DATA_H
#define FV_RUN_DATA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/batch.h"
#include "run/config.h"

typedef enum FvSplit { FV_TRAIN = 0, FV_HELD_OUT = 1 } FvSplit;

typedef struct FvData
    FvData; /* one per rank and data set, shared by the rank's jobs; thread-safe */

typedef struct FvDataInfo {
    size_t count[2];      /* clips per FvSplit */
    size_t frames, size;  /* T, S */
    size_t max_tokens;    /* 0 when there are no captions */
    char source[FV_TEXT]; /* "procedural" or the file's path */
    char latents[16];     /* "blocks" or "file" */
    char sha256[65];      /* of the file; of the recipe's parameters and clip bytes of the first
                             clip for procedural clips */
    size_t bytes;         /* host memory held */
} FvDataInfo;

/* Opens (or draws) the clips that the config names, checks every shape against it before reading
 * anything large, and measures the block statistics over the training split where they are the
 * target. FV_DATA with file, dataset, what is there and what is needed. */
FvStatus fv_data_open(const FvConfig *, FvData **out, FvError *err);
/* What was opened is a copy of this file, under whose name it is recorded. */
void fv_data_show_as(FvData *, const char *source);
/* Training pixels alone: no held-out clips are needed, and a batch's latents stay as they are. */
FvStatus fv_data_open_pixels(const FvConfig *, FvData **out, FvError *err);
void fv_data_close(FvData *);
const FvDataInfo *fv_data_info(const FvData *);

/* Host memory that fv_data_open will hold for this config, without opening (for --dry-run). */
size_t fv_data_bytes(const FvConfig *);

/* Likewise: room that the study's captions need, 0 without captions or without the file. */
size_t fv_data_max_tokens(const FvConfig *);

/* Reads one clip into slot `slot` of a batch. */
FvStatus fv_data_read(FvData *, FvSplit, uint32_t clip, FvBatch *, size_t slot, FvError *err);

/* Clip numbers of training step `step` (0-based) over all ranks: epochs of permutations without
 * replacement, the incomplete last batch dropped; a function of seed, batch, count and step. */
typedef struct FvOrder {
    uint64_t seed;
    size_t count, batch;
    uint64_t epoch; /* of `permutation`; starts as UINT64_MAX */
    uint32_t *permutation;
} FvOrder;

FvStatus fv_order_create(uint64_t seed, size_t count, size_t batch, FvOrder *out, FvError *err);
void fv_order_free(FvOrder *);
/* Writes `batch` clip numbers. */
void fv_order_step(FvOrder *, uint64_t step, uint32_t *clips);

/* Batch memory for a model: `max_text` as in FvModelConfig. */
FvStatus fv_batch_create(size_t clips, const FvDataInfo *, size_t max_text, FvBatch *out,
                         FvError *err);
void fv_batch_free(FvBatch *);

/* Reads training batches ahead in a thread: rank `shard` of `shards` gets its share of each step,
 * starting with step `first`. */
typedef struct FvLoader FvLoader;
FvStatus fv_loader_start(FvData *, uint64_t seed, size_t batch, size_t shard, size_t shards,
                         size_t max_text, uint64_t first, FvLoader **out, FvError *err);
/* The next step's batch; valid until the call after the next. */
FvStatus fv_loader_next(FvLoader *, const FvBatch **out, FvError *err);
void fv_loader_stop(FvLoader *);

/* --- procedural clips (clips.c) ------------------------------------------------------------- */

enum { FV_CAPTION_TOKENS = 28 }; /* bytes of the longest caption, "purple triangle moving right" */

enum {
    FV_CLIP_OBJECTS = 6, /* the most in a clip, the beacon included */
    FV_NO_OBJECT = 255
};

/* What is drawn where. An object's number is its place from far to near, from 1 on; the nearest is
 * the beacon, the one before it is what the caption names. */
typedef struct FvClipLabels {
    uint8_t *masks; /* [frames, size, size], the caller's: number of the object that covers the
                       pixel, 0 the background */
    uint8_t objects[FV_CLIP_OBJECTS][2]; /* row i: colour and shape of object i + 1, or FV_NO_OBJECT
                                            where there are fewer */
} FvClipLabels;

/* Names of the colours and shapes in FvClipLabels; NULL past the last. */
const char *fv_clip_colour(size_t number);
const char *fv_clip_shape(size_t number);

/* Draws clip `index` of a split: pixels [frames, size, size, 3]; labels, or NULL; caption naming
 * one object, or NULL. Integer arithmetic only: the same bytes on every machine. */
void fv_clip_draw(uint64_t data_seed, FvSplit, uint32_t index, size_t frames, size_t size,
                  uint8_t *pixels, FvClipLabels *labels, char *caption, size_t caption_size);

/* --- targets (latents.c) -------------------------------------------------------------------- */

/* Means of Y, Cb, Cr and deviation of Y per 8 x 8 block (SPEC 3, targets (c)), not standardised:
 * pixels [frames, size, size, 3] -> out [frames, size/8, size/8, 4]. */
void fv_blocks(size_t frames, size_t size, const uint8_t *pixels, real *out);

#endif
