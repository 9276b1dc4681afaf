/* Hands jobs to rank groups as they become free, collects what they tell, and keeps results.h5
 * fresh. Rank 0 runs it in a thread of its own; group roots talk to it by messages. */
#ifndef FV_RUN_COORDINATOR_H
#define FV_RUN_COORDINATOR_H

#include <signal.h>

#include "run/comm.h"
#include "run/progress.h"
#include "run/results.h"

typedef struct FvCoordinator FvCoordinator;

typedef struct FvCoordinatorConfig {
    const FvWorld *world;
    const FvGroup *group;
    const FvStudy *study;
    const char *out;
    const FvFence *fence;
    const volatile sig_atomic_t *stop; /* set: no job is handed out any more */
    /* rank 0 only: */
    const bool *wanted; /* [jobs] by --only; NULL: all */
    FvDisplay *display;
    FvProvenance provenance;
    const FvDataInfo *const *data;    /* [experiments] */
    const uint8_t *const *map_pixels; /* [experiments] */
} FvCoordinatorConfig;

#define FV_NO_JOB ((size_t)-1)

FvStatus fv_coordinator_start(const FvCoordinatorConfig *, FvCoordinator **out, FvError *err);

/* For a group's root: the next job for one of its slots, FV_NO_JOB when there is none left. */
FvStatus fv_coordinator_next(FvCoordinator *, size_t slot, size_t *job, FvError *err);
/* For a group's root: tells how a job stands. */
void fv_coordinator_report(FvCoordinator *, const FvProgress *);

/* For a group's root, when all its slots have ended. On rank 0 it waits for the other groups,
 * writes results.h5 for the last time and returns the study's status: FV_JOB when a job failed,
 * FV_STOPPED when one was stopped, FV_IO when results could not be written. */
FvStatus fv_coordinator_finish(FvCoordinator *, FvError *err);

/* Rank 0, after fv_coordinator_finish: the jobs' records, valid until destroyed. */
const FvJobRecord *fv_coordinator_records(const FvCoordinator *);
void fv_coordinator_destroy(FvCoordinator *);

/* OUT/NAME/seed_N of a job. */
void fv_job_folder(const char *out, const FvStudy *, size_t job, char *path, size_t size);

#endif
