/* Ends a run in which a rank hangs, which would leave the others waiting for ever. Every rank tells
 * rank 0 once a second where its jobs stand, and hears from it; rank 0 names the rank to blame when
 * no rank of a group has come on for longer than the job's limit. */
#ifndef FV_RUN_WATCHDOG_H
#define FV_RUN_WATCHDOG_H

#include <stdint.h>

#include "run/comm.h"

typedef struct FvWatchdog FvWatchdog;

/* What a job does, in one of a rank's slots: waiting is for other ranks of its group. */
typedef enum FvActivity { FV_IDLE, FV_COMPUTING, FV_WAITING } FvActivity;

/* names [jobs] as messages show them; all live as long as the watchdog. FV_DEVICE: no memory or no
 * thread. */
FvStatus fv_watchdog_start(const FvWorld *, const FvGroup *, const char *const *names,
                           FvWatchdog **out, FvError *);
/* Every call is progress. limit: seconds until the next. */
void fv_watchdog_at(FvWatchdog *, size_t slot, size_t job, uint64_t step, FvActivity, double limit);
/* everywhere: collective, at the end of a run in which every rank has started one; else at once. */
void fv_watchdog_stop(FvWatchdog *, bool everywhere);

#endif
