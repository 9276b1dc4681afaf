/* A study from command line to ranking table. */
#ifndef FV_RUN_EXECUTE_H
#define FV_RUN_EXECUTE_H

#include <signal.h>

#include "run/comm.h"
#include "run/options.h"

/* What a study run is given: the options, the program's own words for provenance. */
typedef struct FvInvocation {
    FvOptions options;
    FvWorld world;
    const char *study_path;              /* options.study or the default */
    const char *command_line, *revision; /* as recorded in results.h5 */
    const volatile sig_atomic_t *stop;   /* set by the signal handler */
} FvInvocation;

/* Collective over the world; every rank returns the same status. *speaker: this rank's err is the
 * one to print. *abort: the other ranks of this rank's group are waiting in a collective that this
 * rank will not reach, so the caller must end the world. */
FvStatus fv_execute(const FvInvocation *, bool *speaker, bool *abort, FvError *err);

#endif
