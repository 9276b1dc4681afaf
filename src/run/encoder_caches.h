/* The rank's stores of what frozen encoders make of the clips: one for each encoder (its weights),
 * data set and geometry, shared by all jobs of the rank. */
#ifndef FV_RUN_ENCODER_CACHES_H
#define FV_RUN_ENCODER_CACHES_H

#include "model/model.h"
#include "run/data.h"
#include "run/device.h"

typedef struct FvEncoderCaches FvEncoderCaches; /* thread-safe */

/* Takes no memory to speak of before the first cache is asked for. reserve: bytes that are left to
 * jobs that have not taken theirs. FV_DEVICE: no memory. */
FvStatus fv_encoder_caches_create(const FvDevice *, size_t reserve, FvEncoderCaches **out,
                                  FvError *err);
/* Frees the caches: no model uses one any more. */
void fv_encoder_caches_destroy(FvEncoderCaches *);

/* Gives the model, whose weights are those of its job and whose encoder's outputs are stored
 * (fv_encoder_stored), the cache of its encoder and data. The first model makes it; `note` then
 * tells how much it will hold, else it is "". */
FvStatus fv_encoder_caches_attach(FvEncoderCaches *, FvModel *, const FvModelConfig *, FvBackend *,
                                  const FvDataInfo *, char *note, size_t note_size, FvError *err);

/* Clips that a new cache keeps: all of them, or as many as fit half of what is left of the rank's
 * share of the memory. */
size_t fv_encoder_cache_fitting(size_t clips, size_t clip_bytes, size_t left);

#endif
