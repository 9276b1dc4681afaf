/* What a user sees while the study runs: one live line per running experiment on a terminal, plain
 * lines now and then otherwise, and always in OUT/log.txt. Rank 0 only; thread-safe. */
#ifndef FV_RUN_PROGRESS_H
#define FV_RUN_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"
#include "run/history.h"

/* What a group root tells about a job. */
typedef struct FvProgress {
    size_t job;
    FvJobState state;
    size_t step, steps;
    double loss_fine, loss_coarse, ratio; /* running means */
    double rate;                          /* steps per second */
    char text[512];                       /* a line for the log, "" for none */
} FvProgress;

typedef struct FvDisplay FvDisplay;

/* names: of the jobs, as shown ("A_baseline seed 0"). live: stderr shows a terminal. */
FvStatus fv_display_create(const char *log_path, const char *const *names, size_t jobs, bool live,
                           FvDisplay **out, FvError *err);
void fv_display_destroy(FvDisplay *);

/* A line for people: to stderr and the log. */
void fv_display_log(FvDisplay *, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Takes in what a job tells; prints plain lines every few seconds and at every change of state. */
void fv_display_update(FvDisplay *, const FvProgress *);
/* Draws the live lines again; call a few times a second. */
void fv_display_draw(FvDisplay *);

/* Whether stderr, or mpirun's when it stands between, is a terminal. */
bool fv_display_is_live(bool by_mpirun);

#endif
