/* A job's state on disk: weights, moments, history and step in one safetensors file. The last two
 * are kept; a damaged one is passed over for the one before. */
#ifndef FV_RUN_CHECKPOINT_H
#define FV_RUN_CHECKPOINT_H

#include <stdint.h>

#include "model/model.h"
#include "run/history.h"

typedef struct FvCheckpointer FvCheckpointer; /* host memory for one model's state */

/* folder: OUT/NAME/seed_N, made when missing. study: text that the file records and must match on
 * loading (a fingerprint of the resolved configuration). */
FvStatus fv_checkpointer_create(const char *folder, const char *study, FvModel *, FvBackend *,
                                FvCheckpointer **out, FvError *err);
void fv_checkpointer_destroy(FvCheckpointer *);
/* Host memory that one needs, for --dry-run. */
size_t fv_checkpointer_bytes(size_t parameters, size_t trained);

/* Writes checkpoint-STEP.safetensors and removes all but the last two; *bytes is its size. */
FvStatus fv_checkpoint_save(FvCheckpointer *, const FvHistory *, uint64_t step, size_t *bytes,
                            FvError *err);

/* Loads the newest whole checkpoint into model and history; *step is 0 when there is none. What
 * was passed over, and why, is told in note ("" when nothing was). */
FvStatus fv_checkpoint_load(FvCheckpointer *, FvHistory *, uint64_t *step, char *note,
                            size_t note_size, FvError *err);

/* Final weights alone: OUT/NAME/seed_N/model.safetensors. */
FvStatus fv_checkpoint_save_model(FvCheckpointer *, FvError *err);

/* Sets parameters by name from a safetensors file; shapes must match (FV_DATA). *count is how
 * many were set; none at all is FV_DATA too. */
FvStatus fv_weights_load(const char *path, FvModel *, FvBackend *, size_t *count, FvError *err);

#endif
