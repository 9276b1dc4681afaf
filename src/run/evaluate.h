/* Held-out evaluation and attention maps: forward passes without update. */
#ifndef FV_RUN_EVALUATE_H
#define FV_RUN_EVALUATE_H

#include "model/model.h"
#include "run/comm.h"
#include "run/data.h"
#include "run/history.h"
#include "run/watchdog.h"

typedef struct FvEvaluator FvEvaluator; /* memory for one job's evaluations */

FvStatus fv_evaluator_create(FvModel *, FvData *, const FvModelConfig *, const FvGroup *,
                             size_t slot, size_t map_clips, FvEvaluator **out, FvError *err);
/* Told before each batch, and before the wait for the other ranks. */
typedef void FvProgressCall(void *context, FvActivity);
void fv_evaluator_watch(FvEvaluator *, FvProgressCall *, void *context);
void fv_evaluator_destroy(FvEvaluator *);

/* Appends to the root's history: all held-out clips, shared out over the group's ranks. */
FvStatus fv_evaluate(FvEvaluator *, FvHistory *, size_t step, FvError *err);
/* Appends attention maps of the fixed clips; the root alone computes them. */
FvStatus fv_map(FvEvaluator *, FvHistory *, size_t step, FvError *err);

/* The held-out clip behind map clip i of `count`: evenly spread. */
uint32_t fv_map_clip(size_t i, size_t count, size_t held_out);

#endif
