#include "run/coordinator.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "base/clock.h"
#include "run/files.h"

enum { TAG_TO_ROOT = 100, TAG_REPLY = 1000 /* + slot */ };

/* Seconds. results.h5 is rewritten every publish_seconds, or less often where that would take more
 * than most_share of a core, but so that with a history's own age it is at most 10 seconds old, or
 * long_share of a long run. */
static const double publish_seconds = 4, publish_seconds_most = 6, draw_seconds = 0.25;
static const double most_share = 0.01, long_share = 0.01;

typedef enum FvMessageKind { ASK, TELL, DONE } FvMessageKind;

typedef struct FvMessage {
    FvMessageKind kind;
    size_t slot;         /* ASK: of the asking group root */
    FvProgress progress; /* TELL */
} FvMessage;

_Static_assert(sizeof(FvMessage) <= FV_MESSAGE, "a message must fit the receive buffer");

struct FvCoordinator {
    FvCoordinatorConfig c;
    size_t jobs;
    /* rank 0: */
    pthread_mutex_t lock; /* hand-out and states */
    pthread_t thread;
    bool started, ending;
    size_t groups_done, next;
    FvJobState *state;
    FvJobRecord *records;
    struct timespec *loaded; /* change time of the history file in `records` */
    FvError write_error;     /* the last publication's */
    double publish_cost;     /* seconds of processor time */
    double last_publish, start;
};

void fv_job_folder(const char *out, const FvStudy *study, size_t job, char *path, size_t size) {
    snprintf(path, size, "%s/%s/seed_%llu", out, study->experiments[job / study->seed_count].name,
             (unsigned long long)study->seeds[job % study->seed_count]);
}

/* --- results -------------------------------------------------------------------------------- */

/* Reads the job's history if its file has changed. A rename replaces the file whole, so what is
 * read is whole; a file that cannot be read leaves the record as it was. */
static FvStatus refresh(FvCoordinator *c, size_t job, FvError *err) {
    char folder[FV_PATH], path[FV_PATH];
    struct stat info;
    fv_job_folder(c->c.out, c->c.study, job, folder, sizeof folder - 64);
    snprintf(path, sizeof path, "%.*s/history.safetensors", FV_PATH - 64, folder);
    if (stat(path, &info) != 0)
        return FV_OK;
    FvJobRecord *r = &c->records[job];
    if (r->present && info.st_mtim.tv_sec == c->loaded[job].tv_sec &&
        info.st_mtim.tv_nsec == c->loaded[job].tv_nsec)
        return FV_OK;
    FvJobRecord fresh = {0};
    FV_TRY(fv_history_load(path, &fresh.history, &fresh.info, &fresh.present, err));
    if (!fresh.present)
        return FV_OK;
    if (r->present)
        fv_history_free(&r->history);
    *r = fresh;
    c->loaded[job] = info.st_mtim;
    return FV_OK;
}

static FvStatus publish(FvCoordinator *c, FvError *err) {
    double start = fv_clock(CLOCK_THREAD_CPUTIME_ID);
    for (size_t j = 0; j < c->jobs; j++)
        FV_TRY(refresh(c, j, err));
    FV_TRY(fv_results_write(c->c.out, c->c.study, c->records, c->c.map_pixels, c->c.data,
                            &c->c.provenance, c->c.fence, err));
    c->publish_cost = fv_clock(CLOCK_THREAD_CPUTIME_ID) - start;
    c->last_publish = fv_now();
    return FV_OK;
}

static bool publish_due(const FvCoordinator *c) {
    double most = fmax(publish_seconds_most, long_share * (fv_now() - c->start));
    double pause = fmin(c->publish_cost / most_share, most);
    return fv_now() - c->last_publish >= fmax(pause, publish_seconds);
}

/* The run goes on without its shop window: histories and checkpoints have their own files. */
static void try_publish(FvCoordinator *c) {
    FvError err = {0};
    if (publish(c, &err) == FV_OK) {
        c->write_error.status = FV_OK;
        return;
    }
    if (c->write_error.status == FV_OK)
        fv_display_log(c->c.display, "fovea: %s (trying again)", err.text);
    c->write_error = err;
    c->last_publish = fv_now();
}

/* --- hand-out ------------------------------------------------------------------------------- */

static size_t next_job(FvCoordinator *c) {
    size_t job = FV_NO_JOB;
    pthread_mutex_lock(&c->lock);
    while (!*c->c.stop && c->next < c->jobs && job == FV_NO_JOB) {
        size_t j = c->next++;
        if ((!c->c.wanted || c->c.wanted[j]) && c->state[j] != FV_JOB_FINISHED)
            job = j;
    }
    pthread_mutex_unlock(&c->lock);
    return job;
}

static void take_in(FvCoordinator *c, const FvProgress *p) {
    pthread_mutex_lock(&c->lock);
    c->state[p->job] = p->state;
    pthread_mutex_unlock(&c->lock);
    fv_display_update(c->c.display, p);
}

static void answer_messages(FvCoordinator *c) {
    FvMessage m;
    size_t from;
    while (fv_message_poll(TAG_TO_ROOT, &m, sizeof m, &from)) {
        if (m.kind == TELL) {
            take_in(c, &m.progress);
        } else if (m.kind == DONE) {
            pthread_mutex_lock(&c->lock);
            c->groups_done++;
            pthread_mutex_unlock(&c->lock);
        } else {
            size_t job = next_job(c);
            FvError err = {0};
            if (fv_message_send(from, TAG_REPLY + (int)m.slot, &job, sizeof job, &err) != FV_OK)
                fv_display_log(c->c.display, "fovea: %s", err.text);
        }
    }
}

static void *serve(void *context) {
    FvCoordinator *c = context;
    double drawn = 0;
    for (bool ending = false; !ending;) {
        if (c->c.world->size > 1)
            answer_messages(c);
        if (fv_now() - drawn >= draw_seconds) {
            fv_display_draw(c->c.display);
            drawn = fv_now();
        }
        if (publish_due(c))
            try_publish(c);
        struct timespec pause = {.tv_nsec = 5 * 1000 * 1000};
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&c->lock);
        ending = c->ending && c->groups_done == c->c.group->count;
        pthread_mutex_unlock(&c->lock);
    }
    return NULL;
}

/* --- life ----------------------------------------------------------------------------------- */

static FvStatus start_on_root(FvCoordinator *c, FvError *err) {
    c->state = calloc(c->jobs, sizeof *c->state);
    c->records = calloc(c->jobs, sizeof *c->records);
    c->loaded = calloc(c->jobs, sizeof *c->loaded);
    if (!c->state || !c->records || !c->loaded)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %zu jobs", c->jobs);
    pthread_mutex_init(&c->lock, NULL);
    FV_TRY(publish(c, err));
    for (size_t j = 0; j < c->jobs; j++) {
        const FvJobRecord *r = &c->records[j];
        if (!r->present || r->info.state != FV_JOB_FINISHED)
            continue;
        FvProgress p = {.job = j,
                        .state = FV_JOB_FINISHED,
                        .step = r->history.steps,
                        .steps = r->history.capacity_steps};
        take_in(c, &p);
    }
    if (pthread_create(&c->thread, NULL, serve, c) != 0)
        return FV_FAIL(err, FV_DEVICE, "the coordinator's thread could not be started");
    c->started = true;
    return FV_OK;
}

FvStatus fv_coordinator_start(const FvCoordinatorConfig *config, FvCoordinator **out,
                              FvError *err) {
    FvCoordinator *c = calloc(1, sizeof *c);
    if (!c)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the coordinator");
    c->c = *config;
    c->start = fv_now();
    c->jobs = config->study->experiment_count * config->study->seed_count;
    FvStatus status = config->world->rank == 0 ? start_on_root(c, err) : FV_OK;
    if (status != FV_OK) {
        fv_coordinator_destroy(c);
        return status;
    }
    *out = c;
    return FV_OK;
}

FvStatus fv_coordinator_next(FvCoordinator *c, size_t slot, size_t *job, FvError *err) {
    if (c->c.world->rank == 0) {
        *job = next_job(c);
        return FV_OK;
    }
    FvMessage m = {.kind = ASK, .slot = slot};
    FV_TRY(fv_message_send(0, TAG_TO_ROOT, &m, sizeof m, err));
    fv_message_wait(0, TAG_REPLY + (int)slot, job, sizeof *job);
    return FV_OK;
}

void fv_coordinator_report(FvCoordinator *c, const FvProgress *progress) {
    if (c->c.world->rank == 0) {
        take_in(c, progress);
        return;
    }
    FvMessage m = {.kind = TELL, .progress = *progress};
    FvError ignored; /* a lost report costs a line on the screen */
    (void)fv_message_send(0, TAG_TO_ROOT, &m, sizeof m, &ignored);
}

static FvStatus study_status(const FvCoordinator *c) {
    bool failed = false, open = false;
    for (size_t j = 0; j < c->jobs; j++) {
        if (c->c.wanted && !c->c.wanted[j])
            continue;
        failed = failed || c->state[j] == FV_JOB_FAILED;
        open = open || c->state[j] == FV_JOB_STOPPED || c->state[j] == FV_JOB_WAITING;
    }
    return open && *c->c.stop ? FV_STOPPED : failed ? FV_JOB : FV_OK;
}

FvStatus fv_coordinator_finish(FvCoordinator *c, FvError *err) {
    if (c->c.world->rank != 0) {
        FvMessage m = {.kind = DONE};
        return fv_message_send(0, TAG_TO_ROOT, &m, sizeof m, err);
    }
    pthread_mutex_lock(&c->lock);
    c->groups_done++;
    c->ending = true;
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    c->started = false;
    char end[32];
    time_t seconds = time(NULL);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    strftime(end, sizeof end, "%Y-%m-%dT%H:%M:%SZ", &utc);
    c->c.provenance.end_time = end;
    FvStatus status = publish(c, err);
    c->c.provenance.end_time = "";
    return status != FV_OK ? status : study_status(c);
}

const FvJobRecord *fv_coordinator_records(const FvCoordinator *c) {
    return c->records;
}

void fv_coordinator_destroy(FvCoordinator *c) {
    if (!c)
        return;
    for (size_t j = 0; c->records && j < c->jobs; j++)
        if (c->records[j].present)
            fv_history_free(&c->records[j].history);
    free(c->records);
    free(c->state);
    free(c->loaded);
    free(c);
}
