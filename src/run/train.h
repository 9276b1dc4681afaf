/* One job: an experiment under one seed, trained by one rank group from wherever its files left
 * off to its last step. */
#ifndef FV_RUN_TRAIN_H
#define FV_RUN_TRAIN_H

#include <pthread.h>

#include "run/coordinator.h"
#include "run/data.h"
#include "run/device.h"
#include "run/encoder_caches.h"
#include "run/exchange.h"
#include "run/watchdog.h"

/* What the jobs of a rank share. */
typedef struct FvRun {
    const FvWorld *world;
    const FvGroup *group;
    const FvStudy *study;
    const char *out;
    const FvFence *fence;
    FvCoordinator *coordinator;
    FvData *const *data; /* [experiments]; experiments with equal data share one */
    FvDevice device;
    FvEncoderCaches *caches;
    FvLink *link;
    FvWatchdog *watchdog;
    pthread_mutex_t *device_lock; /* one job at a time opens, records on or closes the device */
    size_t threads;               /* per job, on a processor */
    const volatile sig_atomic_t *stop;
} FvRun;

/* Trains job `job` in slot `slot`; collective over the group. FV_JOB: this job failed (a value
 * that is not finite), others may go on. FV_STOPPED: checkpointed after a signal. Anything else
 * concerns the whole run. */
FvStatus fv_train(const FvRun *, size_t slot, size_t job, FvError *err);

/* Evaluations and maps that a configuration makes over its steps. */
size_t fv_eval_count(const FvConfig *);
size_t fv_map_count(const FvConfig *);

#endif
