/* A job's state on disk: weights, moments, what else belongs to it, and its step in one safetensors
 * file. The last two are kept; a damaged one is passed over for the one before. */
#ifndef FV_RUN_CHECKPOINT_H
#define FV_RUN_CHECKPOINT_H

#include <stdint.h>

#include "model/params.h"
#include "run/fence.h"
#include "run/safetensors.h"

typedef struct FvCheckpointer FvCheckpointer; /* host memory for one model's state */

/* folder: OUT/NAME/seed_N, made when missing. study: text that the file records and must match on
 * loading (a fingerprint of the resolved configuration). more: tensors beyond the parameters that
 * one checkpoint will hold at most. */
FvStatus fv_checkpointer_create(const char *folder, const char *study, const FvFence *, FvParams *,
                                FvBackend *, size_t more, FvCheckpointer **out, FvError *err);
void fv_checkpointer_destroy(FvCheckpointer *);
/* Host memory that one needs, for --dry-run. */
size_t fv_checkpointer_bytes(size_t parameters, size_t trained);

/* Writes checkpoint-STEP.safetensors, with `count` tensors of the caller's, and removes all but
 * this one and the one loaded or saved before; *bytes is its size. */
FvStatus fv_checkpoint_save(FvCheckpointer *, const FvTensor *more, size_t count, uint64_t step,
                            size_t *bytes, FvError *err);

/* Reads what the caller put into a checkpoint of `step`; FV_DATA when it does not fit. */
typedef FvStatus FvCheckpointReader(void *context, const FvTensorFile *, uint64_t step, FvError *);

/* Loads the newest whole checkpoint into the parameters, and hands it to `read`; *step is 0 when
 * there is none. The newest that was passed over, and why, is told in note ("" when none was). */
FvStatus fv_checkpoint_load(FvCheckpointer *, FvCheckpointReader *read, void *context,
                            uint64_t *step, char *note, size_t note_size, FvError *err);

/* Final weights alone: OUT/NAME/seed_N/model.safetensors. */
FvStatus fv_checkpoint_save_model(FvCheckpointer *, FvError *err);

#endif
