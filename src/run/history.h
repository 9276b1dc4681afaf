/* Everything a job has measured: series, evaluations, attention maps. It lives in memory, in the
 * job's checkpoint and in OUT/NAME/seed_N/history.safetensors, from which results.h5 is made. */
#ifndef FV_RUN_HISTORY_H
#define FV_RUN_HISTORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "run/fence.h"
#include "run/safetensors.h"

/* X(name, unit, long name): one column per training step */
#define FV_SERIES(X)                                                                               \
    X(loss_fine, "1", "mean squared error of the fine pass, training batch")                       \
    X(loss_coarse, "1", "mean squared error of the coarse pass, training batch")                   \
    X(loss_total, "1", "training objective")                                                       \
    X(ratio, "1", "loss_fine / loss_coarse: below 1 the fine pass predicts better")                \
    X(feature_sim, "1", "mean cosine of coarse and fine features")                                 \
    X(entropy_fine, "nat", "entropy of the fine query's attention, last layer")                    \
    X(entropy_coarse, "nat", "entropy of the coarse query's attention, last layer")                \
    X(grad_norm, "1", "norm of the averaged gradient before clipping")                             \
    X(lr, "1", "learning rate")                                                                    \
    X(step_seconds, "s", "wall-clock time of the step")

/* X(name, unit, long name): per evaluation, held-out clip and frame */
#define FV_EVALS(X)                                                                                \
    X(loss_fine, "1", "mean squared error of the fine pass")                                       \
    X(loss_coarse, "1", "mean squared error of the coarse pass")                                   \
    X(cosine, "1", "cosine of coarse and fine features")                                           \
    X(entropy_fine, "nat", "entropy of the fine query's attention, last layer")                    \
    X(entropy_coarse, "nat", "entropy of the coarse query's attention, last layer")                \
    X(loss_copy, "1", "control: the previous latent as the prediction, zeros for frame 1")         \
    X(loss_fine_other, "1", "control: fine pass with the queries chosen for another clip")

enum {
#define X(name, unit, text) FV_SERIES_##name,
    FV_SERIES(X)
#undef X
        FV_SERIES_COUNT
};
enum {
#define X(name, unit, text) FV_EVAL_##name,
    FV_EVALS(X)
#undef X
        FV_EVAL_COUNT
};

typedef struct FvHistory {
    size_t capacity_steps, capacity_evals, capacity_maps; /* for the whole run: never grows */
    size_t clips, frames, map_clips, grid; /* held-out clips, T, clips with maps, G */
    size_t steps;                          /* rows of series filled */
    double *series[FV_SERIES_COUNT];       /* [capacity_steps] */
    size_t evals;
    int64_t *eval_step;          /* [capacity_evals]: steps done before the evaluation */
    double *eval[FV_EVAL_COUNT]; /* [capacity_evals, clips, frames] */
    size_t maps;
    int64_t *map_step; /* [capacity_maps] */
    float *map;        /* [capacity_maps, pass (0 coarse, 1 fine), map_clips, frames, grid, grid] */
    float *cls;        /* [capacity_maps, pass, map_clips, frames]: share of the CLS token */
    int64_t *map_clip; /* [map_clips]: clip number in the held-out split */
    void *block;       /* the one allocation behind all of them */
} FvHistory;

FvStatus fv_history_create(size_t steps, size_t evals, size_t maps, size_t clips, size_t frames,
                           size_t map_clips, size_t grid, FvHistory *out, FvError *err);
void fv_history_free(FvHistory *);
size_t fv_history_bytes(size_t steps, size_t evals, size_t maps, size_t clips, size_t frames,
                        size_t map_clips, size_t grid);

/* The filled part as tensors (names "history.series.loss_fine", "history.eval.loss_fine",
 * "history.map", ...) for a checkpoint or a history file; writes up to FV_HISTORY_TENSORS. */
enum { FV_HISTORY_TENSORS = FV_SERIES_COUNT + FV_EVAL_COUNT + 5 };
size_t fv_history_tensors(const FvHistory *, FvTensor out[FV_HISTORY_TENSORS]);

/* Reads such tensors back into a created history; FV_DATA when shapes do not fit or rows exceed
 * the capacity. */
FvStatus fv_history_read(FvHistory *, const FvTensorFile *, FvError *err);

/* What is written beside the history: the state that analysts and a later run need. */
typedef enum FvJobState {
    FV_JOB_WAITING,
    FV_JOB_RUNNING,
    FV_JOB_FINISHED,
    FV_JOB_STOPPED,
    FV_JOB_FAILED,
    FV_JOB_STATES
} FvJobState;
const char *fv_job_state_name(FvJobState); /* "waiting", "running", "finished", ... */

typedef struct FvJobInfo {
    FvJobState state;
    char why[512];              /* reason of a failure, else "" */
    size_t parameters, trained; /* counts */
    char device[160];           /* description of the device(s) */
    size_t ranks;
    double seconds; /* spent training, over all restarts */
    double checkpoint_seconds_last;
    size_t checkpoint_bytes;
    size_t restarts;
} FvJobInfo;

/* Writes (atomically) and reads OUT/NAME/seed_N/history.safetensors: history and info. Reading
 * creates the history with exactly the capacity stored; FV_DATA when the file is damaged, FV_IO
 * with err->text when it cannot be read; *found is false when there is none. */
FvStatus fv_history_save(const char *path, const FvHistory *, const FvJobInfo *, const FvFence *,
                         FvError *err);
FvStatus fv_history_load(const char *path, FvHistory *, FvJobInfo *, bool *found, FvError *err);

#endif
