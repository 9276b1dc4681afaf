/* What a frozen encoder makes of each clip, kept for all jobs of a rank that read the same clips
 * through the same encoder. Thread-safe. A stored clip stays where it is, unchanged, until the
 * cache is destroyed. */
#ifndef FV_MODEL_ENCODER_CACHE_H
#define FV_MODEL_ENCODER_CACHE_H

#include "backend/backend.h"
#include "model/config.h"

typedef struct FvEncoderCache FvEncoderCache;

/* Values stored of one clip: [dino_layers][T, N + 1, D] when deep, else [T, N + 1, D]. */
size_t fv_encoder_cache_clip_values(const FvModelConfig *);
/* Their bytes: when deep they are operand tensors, of elements of operand_bytes (backend.h). */
size_t fv_encoder_cache_clip_bytes(const FvModelConfig *, size_t operand_bytes);

/* For clips 0 .. clips - 1, of which `capacity` are kept at most, those that come first. Their
 * memory is taken one by one from `be`, which computes nothing and outlives it. FV_DEVICE: no
 * memory. */
FvStatus fv_encoder_cache_create(FvBackend *be, size_t clips, size_t capacity, size_t clip_bytes,
                                 FvEncoderCache **out, FvError *err);
void fv_encoder_cache_destroy(FvEncoderCache *);

/* The clip's values, NULL when they are not stored. */
const real *fv_encoder_cache_find(FvEncoderCache *, size_t clip);

/* Room for a clip that is not stored, for the caller to fill and, when the backend is done with it
 * (sync), to publish. NULL when the cache is full or another job is filling the clip. */
real *fv_encoder_cache_reserve(FvEncoderCache *, size_t clip);
void fv_encoder_cache_publish(FvEncoderCache *, size_t clip);

/* Clips that it keeps at most, and bytes that it has not taken of what these need. */
size_t fv_encoder_cache_capacity(const FvEncoderCache *);
size_t fv_encoder_cache_to_come(FvEncoderCache *);

#endif
