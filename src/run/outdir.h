/* The folder of a study's results: one writer at a time, one study for its whole life. */
#ifndef FV_RUN_OUTDIR_H
#define FV_RUN_OUTDIR_H

#include "run/config.h"

/* Makes OUT, takes its lock (FV_IO when another fovea holds it), removes an earlier run's files
 * when `fresh`, and otherwise refuses (FV_USAGE) a study other than the one kept in
 * OUT/study.yaml. Keeps the resolved study there. *lock is for fv_outdir_close. */
FvStatus fv_outdir_open(const char *out, const FvStudy *, bool fresh, int *lock, FvError *err);
void fv_outdir_close(int lock);

#endif
