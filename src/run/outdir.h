/* The folder of a study's results: one writer at a time, one study for its whole life. */
#ifndef FV_RUN_OUTDIR_H
#define FV_RUN_OUTDIR_H

#include "run/config.h"

/* Takes the lock of a folder; FV_IO when another fovea holds it. For fv_outdir_close. */
FvStatus fv_outdir_lock(const char *out, int *lock, FvError *err);

/* Removes the files of a folder whose names begin with one of `names`, ended by NULL: a folder may
 * hold notes and figures of its owner's. */
FvStatus fv_outdir_clear(const char *folder, const char *const *names, FvError *err);

bool fv_outdir_has(const char *out, const char *name);

/* Makes OUT, takes its lock (FV_IO when another fovea holds it) and, unless `fresh`, refuses
 * (FV_USAGE) a study other than the one kept in OUT/study.yaml. Changes nothing that is there.
 * *lock is for fv_outdir_close. */
FvStatus fv_outdir_open(const char *out, const FvStudy *, bool fresh, int *lock, FvError *err);

/* Once the study is known to run: removes an earlier run's files when `fresh`, and what killed
 * processes have left half written, and keeps the resolved study in OUT/study.yaml. */
FvStatus fv_outdir_keep(const char *out, const FvStudy *, bool fresh, FvError *err);
void fv_outdir_close(int lock);

#endif
