/* Time that only goes forward. */
#ifndef FV_BASE_CLOCK_H
#define FV_BASE_CLOCK_H

#include <time.h>

/* Seconds of a clock; CLOCK_MONOTONIC since some moment in the past. */
static inline double fv_clock(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline double fv_now(void) {
    return fv_clock(CLOCK_MONOTONIC);
}

#endif
