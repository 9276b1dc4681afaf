#include "run/progress.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"

enum { BAR = 14, LINE = 768, WIDE = 118, SCREEN = 16384 };
static const double plain_seconds = 10; /* between plain lines of one job */

struct FvDisplay {
    pthread_mutex_t lock;
    FILE *log;
    char log_path[512];
    bool live, log_failed;
    size_t jobs, drawn; /* live lines now on the terminal */
    const char *const *names;
    FvProgress *progress;
    double *last_plain;
};

bool fv_display_is_live(bool by_mpirun) {
    if (!by_mpirun)
        return isatty(STDERR_FILENO);
    /* mpirun reads the ranks' output through pipes and ptys of its own */
    char link[64], target[128];
    snprintf(link, sizeof link, "/proc/%ld/fd/2", (long)getppid());
    ssize_t n = readlink(link, target, sizeof target - 1);
    if (n < 0)
        return false;
    target[n] = '\0';
    return strncmp(target, "/dev/pts/", 9) == 0 || strncmp(target, "/dev/tty", 8) == 0;
}

FvStatus fv_display_create(const char *log_path, const char *const *names, size_t jobs, bool live,
                           FvDisplay **out, FvError *err) {
    FvDisplay *d = calloc(1, sizeof *d);
    if (!d)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the display");
    d->progress = calloc(jobs, sizeof *d->progress);
    d->last_plain = calloc(jobs, sizeof *d->last_plain);
    d->log = fopen(log_path, "a");
    if (!d->progress || !d->last_plain || !d->log) {
        FvStatus status =
            d->log ? FV_FAIL(err, FV_DEVICE, "out of memory for the display")
                   : FV_FAIL(err, FV_IO, "%s: cannot be written: %s", log_path, strerror(errno));
        if (d->log)
            fclose(d->log);
        free(d->progress);
        free(d->last_plain);
        free(d);
        return status;
    }
    pthread_mutex_init(&d->lock, NULL);
    snprintf(d->log_path, sizeof d->log_path, "%s", log_path);
    d->names = names;
    d->jobs = jobs;
    d->live = live;
    for (size_t i = 0; i < jobs; i++) {
        d->progress[i].job = i;
        d->last_plain[i] = -plain_seconds;
    }
    *out = d;
    return FV_OK;
}

static void erase_live(FvDisplay *d) {
    for (; d->drawn > 0; d->drawn--)
        fputs("\033[1A\033[2K", stderr);
}

void fv_display_destroy(FvDisplay *d) {
    if (!d)
        return;
    erase_live(d);
    fclose(d->log);
    pthread_mutex_destroy(&d->lock);
    free(d->progress);
    free(d->last_plain);
    free(d);
}

/* To the log and, unless the live lines show the same, to stderr. The lock is held. */
static void put_line(FvDisplay *d, const char *text, bool shown) {
    char stamp[32];
    time_t seconds = time(NULL);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &utc);
    bool failed = fprintf(d->log, "%s %s\n", stamp, text) < 0 || fflush(d->log) != 0;
    erase_live(d);
    if (!shown)
        fprintf(stderr, "%s\n", text);
    if (failed && !d->log_failed)
        fprintf(stderr, "fovea: %s: cannot be written: %s\n", d->log_path, strerror(errno));
    d->log_failed = failed;
}

void fv_display_log(FvDisplay *d, const char *format, ...) {
    char text[LINE];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pthread_mutex_lock(&d->lock);
    put_line(d, text, false);
    pthread_mutex_unlock(&d->lock);
}

static void format_duration(double seconds, char *out, size_t size) {
    if (!(seconds >= 0) || seconds > 1e8) {
        snprintf(out, size, "--:--");
        return;
    }
    long s = lround(seconds);
    if (s >= 3600)
        snprintf(out, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(out, size, "%ld:%02ld", s / 60, s % 60);
}

static void format_job(const FvDisplay *d, const FvProgress *p, bool bar, char *out, size_t size) {
    char left[32], bars[BAR + 3] = "";
    format_duration(p->rate > 0 ? (double)(p->steps - p->step) / p->rate : -1, left, sizeof left);
    if (bar) {
        size_t full = p->steps ? BAR * p->step / p->steps : 0;
        memset(bars, '.', sizeof bars - 1);
        memset(bars + 1, '#', full);
        bars[0] = ' ';
        bars[BAR + 1] = '\0';
    }
    snprintf(out, size,
             "%-24s%s %zu/%zu  fine %.4f  coarse %.4f  ratio %.4f  %.1f steps/s  %s left",
             d->names[p->job], bars, p->step, p->steps, p->loss_fine, p->loss_coarse, p->ratio,
             p->rate, left);
}

void fv_display_update(FvDisplay *d, const FvProgress *p) {
    char line[LINE];
    pthread_mutex_lock(&d->lock);
    FvProgress *kept = &d->progress[p->job];
    bool changed = kept->state != p->state;
    *kept = *p;
    if (p->text[0]) {
        snprintf(line, sizeof line, "%s: %s", d->names[p->job], p->text);
        put_line(d, line, false);
    }
    if (changed && p->state != FV_JOB_RUNNING && p->state != FV_JOB_WAITING) {
        snprintf(line, sizeof line, "%s: %s after step %zu of %zu", d->names[p->job],
                 fv_job_state_name(p->state), p->step, p->steps);
        put_line(d, line, false);
    } else if (p->state == FV_JOB_RUNNING && p->step > 0 &&
               fv_now() - d->last_plain[p->job] >= plain_seconds) {
        d->last_plain[p->job] = fv_now();
        format_job(d, p, false, line, sizeof line);
        put_line(d, line, d->live);
    }
    pthread_mutex_unlock(&d->lock);
}

/* The whole picture goes out in one write: mpirun passes writes on one by one, and a terminal would
 * show the moments between. */
void fv_display_draw(FvDisplay *d) {
    if (!d->live)
        return;
    char line[LINE], screen[SCREEN];
    size_t done = 0, used = 0, lines = 0;
    pthread_mutex_lock(&d->lock);
    for (; d->drawn > 0 && used + 16 < sizeof screen; d->drawn--)
        used += (size_t)snprintf(screen + used, sizeof screen - used, "\033[1A\033[2K");
    for (size_t i = 0; i < d->jobs; i++) {
        const FvProgress *p = &d->progress[i];
        done += p->state == FV_JOB_FINISHED;
        if (p->state != FV_JOB_RUNNING || used + 2 * WIDE > sizeof screen)
            continue;
        format_job(d, p, true, line, sizeof line);
        used += (size_t)snprintf(screen + used, sizeof screen - used, "%.*s\n", WIDE, line);
        lines++;
    }
    if (lines > 0) {
        used += (size_t)snprintf(screen + used, sizeof screen - used, "%zu of %zu jobs done\n",
                                 done, d->jobs);
        d->drawn = lines + 1;
    }
    fwrite(screen, 1, used, stderr);
    fflush(stderr);
    pthread_mutex_unlock(&d->lock);
}
