/* The folder of a study's results: one writer at a time, one study for its whole life. */
#ifndef FV_RUN_OUTDIR_H
#define FV_RUN_OUTDIR_H

#include "run/config.h"
#include "run/fence.h"

/* Removes the files of a folder whose names begin with one of `names`, ended by NULL: a folder may
 * hold notes and figures of its owner's. */
FvStatus fv_outdir_clear(const char *folder, const char *const *names, FvError *err);

bool fv_outdir_has(const char *out, const char *name);

/* Makes OUT, takes it over as fv_fence_take and, unless `fresh`, refuses (FV_USAGE) a study other
 * than the one kept in OUT/study.yaml. Changes nothing else that is there. */
FvStatus fv_outdir_open(const char *out, const FvStudy *, bool fresh, FvFence *, int *lock,
                        FvError *err);

/* Once the study is known to run: removes an earlier run's files when `fresh`, and what killed
 * processes have left half written, and keeps the resolved study in OUT/study.yaml. */
FvStatus fv_outdir_keep(const char *out, const FvStudy *, bool fresh, FvError *err);

#endif
