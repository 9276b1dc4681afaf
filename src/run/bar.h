/* What commands share that work for a while: a progress bar, and signals that are looked for
 * between steps instead of caught. */
#ifndef FV_RUN_BAR_H
#define FV_RUN_BAR_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <time.h>

typedef struct FvBar {
    const char *command; /* starts every plain line */
    bool terminal;       /* stderr is one: progress is a line that is written over */
    time_t shown;        /* when progress was last printed */
} FvBar;

FvBar fv_bar_start(const char *command);

/* On a terminal a bar, about ten times a second; otherwise a line every ten seconds. The format
 * tells what is counted: "3/10 " comes before it. */
void fv_bar_show(FvBar *, size_t done, size_t all, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Takes the place of the bar, so that what is printed next starts a line. */
void fv_bar_clear(const FvBar *);

typedef struct FvSignals {
    sigset_t set, before;
} FvSignals;

/* Holds INT, TERM, HUP and USR1 back, for this thread and those it starts: nothing has to be undone
 * in a handler. */
FvSignals fv_signals_hold(void);
void fv_signals_release(const FvSignals *);
/* The name of one that came, used up by this call; NULL when none did. */
const char *fv_signals_next(const FvSignals *);

#endif
