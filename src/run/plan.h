/* What a study will need, worked out before anything is allocated. */
#ifndef FV_RUN_PLAN_H
#define FV_RUN_PLAN_H

#include "model/model.h"
#include "run/comm.h"
#include "run/config.h"
#include "run/data.h"
#include "run/options.h"

typedef struct FvJobPlan { /* one job on one rank; bytes */
    FvModelConfig model;
    FvModelMemory memory;
    size_t parameters, trained;
    size_t history, evaluation, staging; /* host: records, evaluation buffers, checkpoint copy */
    size_t checkpoint;                   /* one checkpoint file */
} FvJobPlan;

/* max_text and held_out of procedural data follow from the configuration; of a file from `data`
 * (NULL: the file has not been opened, its own numbers are taken from the configuration). */
FvStatus fv_plan_job(const FvConfig *, size_t ranks, const FvDataInfo *data, FvJobPlan *,
                     FvError *err);

/* The memory that one job on one rank holds, all together. */
size_t fv_plan_bytes(const FvJobPlan *);

/* What the rank keeps of frozen encoders' outputs when all clips have come, with `left` bytes free
 * before the study: one cache for the experiments whose encoder, data and geometry are the same.
 * `reserve` of them for the jobs. info [experiments] as in fv_plan_job, or NULL. */
FvStatus fv_plan_caches(const FvStudy *, const FvDataInfo *const *info, size_t left, size_t reserve,
                        size_t *bytes, FvError *err);

/* The memory of rank 0, the one that holds most: `slots` times its largest job (largest_job bytes),
 * the clips, the caches, the records of all jobs (`histories` bytes) with results.h5 made of them,
 * and the workspaces of `threads`. */
size_t fv_plan_rank_bytes(size_t largest_job, size_t slots, size_t clips, size_t caches,
                          size_t histories, size_t threads);

/* --dry-run: jobs, groups, parameters, memory, disk and an estimate of time, measured on a few
 * steps of the first experiment when they fit the free memory. `left` as for fv_plan_caches. */
FvStatus fv_plan_print(const FvStudy *, const FvWorld *, const FvOptions *, size_t threads,
                       size_t left, const char *out, FvError *err);

#endif
