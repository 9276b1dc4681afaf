#include "run/bar.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

FvBar fv_bar_start(const char *command) {
    return (FvBar){.command = command, .terminal = isatty(STDERR_FILENO) == 1};
}

void fv_bar_show(FvBar *bar, size_t done, size_t all, const char *format, ...) {
    enum { WIDTH = 30 };
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    time_t tick = bar->terminal ? now.tv_sec * 10 + now.tv_nsec / 100000000 : now.tv_sec / 10;
    if (bar->shown == tick)
        return;
    bool first = bar->shown == 0;
    bar->shown = tick;
    if (!bar->terminal && first)
        return;
    int filled = all ? (int)(WIDTH * done / all) : 0;
    if (bar->terminal)
        fprintf(stderr, "\r[%.*s%*s] %zu/%zu ", filled, "##############################",
                WIDTH - filled, "", done, all);
    else
        fprintf(stderr, "%s: %zu/%zu ", bar->command, done, all);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputs(bar->terminal ? "\033[K" : "\n", stderr);
}

void fv_bar_clear(const FvBar *bar) {
    if (bar->terminal)
        fputs("\r\033[K", stderr);
}

FvSignals fv_signals_hold(void) {
    FvSignals s;
    sigemptyset(&s.set);
    sigaddset(&s.set, SIGINT);
    sigaddset(&s.set, SIGTERM);
    sigaddset(&s.set, SIGHUP);
    sigaddset(&s.set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &s.set, &s.before);
    return s;
}

void fv_signals_release(const FvSignals *s) {
    pthread_sigmask(SIG_SETMASK, &s->before, NULL);
}

const char *fv_signals_next(const FvSignals *s) {
    struct timespec at_once = {0};
    int signal = sigtimedwait(&s->set, NULL, &at_once);
    return signal > 0 ? strsignal(signal) : NULL;
}
