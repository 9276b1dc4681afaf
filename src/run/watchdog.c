#include "run/watchdog.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"

enum { TAG_WATCH = 200 };

static const double beat_seconds = 1; /* between a rank's messages */
static const double silence = 3;      /* seconds after which a rank does not answer */
static const double patience = 1.5;   /* limits until a rank acts that rank 0 has not helped */

typedef struct Place {
    FvActivity activity;
    size_t job;
    uint64_t step;
    double limit, since; /* since: of the clock of who keeps the table */
} Place;

typedef struct Beat {
    size_t slot;
    Place place;
    char host[FV_HOST];
    bool last; /* the rank has ended well */
} Beat;

_Static_assert(sizeof(Beat) <= FV_MESSAGE, "a message must fit the receive buffer");

struct FvWatchdog {
    const FvWorld *world;
    const FvGroup *group;
    const char *const *names;
    pthread_t thread;
    pthread_mutex_t lock; /* of `mine` and `stopping` */
    bool started, stopping;
    Place *mine; /* [slots] */
    /* rank 0: */
    Place *all;    /* [world size, slots] */
    double *heard; /* [world size]; infinite: it has ended */
    char (*hosts)[FV_HOST];
    size_t ended; /* ranks */
};

static bool same(const Place *a, const Place *b) {
    return a->activity == b->activity && a->job == b->job && a->step == b->step;
}

static void move_to(Place *to, const Place *from) {
    double since = same(to, from) ? to->since : fv_now();
    *to = *from;
    to->since = since;
}

void fv_watchdog_at(FvWatchdog *w, size_t slot, size_t job, uint64_t step, FvActivity activity,
                    double limit) {
    const Place now = {.activity = activity, .job = job, .step = step, .limit = limit};
    pthread_mutex_lock(&w->lock);
    move_to(&w->mine[slot], &now);
    pthread_mutex_unlock(&w->lock);
}

/* --- what went wrong ------------------------------------------------------------------------- */

static bool stands_still(const Place *p, double limits) {
    return p->activity != FV_IDLE && fv_now() - p->since > limits * p->limit;
}

_Noreturn static void give_up(const FvWatchdog *w, size_t rank, const char *host, const Place *p,
                              const char *doing) {
    fprintf(stderr,
            "fovea: rank %zu on %s hangs: %s, step %" PRIu64 ", no progress for %.0f seconds "
            "(watchdog): %s; the same command goes on from the checkpoints\n",
            rank, host, w->names[p->job], p->step + 1, fv_now() - p->since, doing);
    fv_world_abort(FV_DEVICE);
}

/* Of the ranks that work on the job: one that does not answer, or else one that computes while the
 * others wait for it, or else the first. */
_Noreturn static void blame(const FvWatchdog *w, size_t rank, size_t slot) {
    size_t first = rank - rank % w->group->size, slots = w->group->slots, guilty = rank;
    const char *doing = "it waits for the other ranks of its group";
    for (size_t r = first + w->group->size; r-- > first;)
        if (w->all[r * slots + slot].activity == FV_COMPUTING) {
            guilty = r;
            doing = "it computes, and never ends";
        }
    for (size_t r = first + w->group->size; r-- > first;)
        if (fv_now() - w->heard[r] > silence) {
            guilty = r;
            doing = "its process does not answer";
        }
    give_up(w, guilty, w->hosts[guilty], &w->all[guilty * slots + slot], doing);
}

/* --- the thread ------------------------------------------------------------------------------ */

static void hear(FvWatchdog *w, size_t rank, const Beat *beat) {
    w->heard[rank] = beat->last ? INFINITY : fv_now();
    w->ended += beat->last;
    snprintf(w->hosts[rank], FV_HOST, "%s", beat->host);
    if (!beat->last)
        move_to(&w->all[rank * w->group->slots + beat->slot], &beat->place);
}

static void tell(FvWatchdog *w, bool last) {
    FvError ignored; /* a rank 0 that cannot be reached is MPI's to tell */
    for (size_t slot = 0; slot < (last ? 1 : w->group->slots); slot++) {
        Beat beat = {.slot = slot, .last = last};
        snprintf(beat.host, sizeof beat.host, "%s", w->world->host);
        pthread_mutex_lock(&w->lock);
        beat.place = w->mine[slot];
        pthread_mutex_unlock(&w->lock);
        if (w->world->rank == 0)
            hear(w, 0, &beat);
        else
            fv_message_send(0, TAG_WATCH, &beat, sizeof beat, &ignored);
    }
}

static void listen(FvWatchdog *w) {
    Beat beat;
    size_t from;
    while (fv_message_poll(TAG_WATCH, &beat, sizeof beat, &from))
        hear(w, from, &beat);
}

/* A rank may go silent before it has told of a job; it has the time of the most patient one. */
static void look_for_silent(const FvWatchdog *w) {
    double limit = 0;
    for (size_t i = 0; i < w->world->size * w->group->slots; i++)
        limit = fmax(limit, w->all[i].limit);
    for (size_t r = 1; limit > 0 && r < w->world->size; r++) {
        double quiet = fv_now() - w->heard[r];
        if (quiet <= limit)
            continue;
        fprintf(stderr,
                "fovea: rank %zu on %s hangs: between two jobs, nothing heard for %.0f seconds "
                "(watchdog); the same command goes on from the checkpoints\n",
                r, w->hosts[r], quiet);
        fv_world_abort(FV_DEVICE);
    }
}

static void look_at_all(const FvWatchdog *w) {
    size_t slots = w->group->slots;
    for (size_t i = 0; i < w->world->size * slots; i++)
        if (stands_still(&w->all[i], 1))
            blame(w, i / slots, i % slots);
    look_for_silent(w);
}

/* Should rank 0 be the one that hangs. */
static void look_at_mine(FvWatchdog *w) {
    for (size_t slot = 0; slot < w->group->slots; slot++) {
        pthread_mutex_lock(&w->lock);
        Place p = w->mine[slot];
        pthread_mutex_unlock(&w->lock);
        if (stands_still(&p, patience))
            give_up(w, w->world->rank, w->world->host, &p, "and rank 0 does not answer");
    }
}

static bool is_stopping(FvWatchdog *w) {
    pthread_mutex_lock(&w->lock);
    bool stopping = w->stopping;
    pthread_mutex_unlock(&w->lock);
    return stopping;
}

static void *watch(void *argument) {
    FvWatchdog *w = argument;
    const struct timespec rest = {.tv_nsec = 50000000};
    for (double told = 0; !is_stopping(w); nanosleep(&rest, NULL)) {
        if (fv_now() - told >= beat_seconds) {
            tell(w, false);
            told = fv_now();
        }
        if (w->world->rank == 0)
            listen(w);
        if (w->world->rank == 0)
            look_at_all(w);
        else
            look_at_mine(w);
    }
    tell(w, true);
    for (; w->world->rank == 0 && w->ended < w->world->size; nanosleep(&rest, NULL))
        listen(w); /* no message may be left when MPI ends */
    return NULL;
}

static void destroy(FvWatchdog *w) {
    pthread_mutex_destroy(&w->lock);
    free(w->mine);
    free(w->all);
    free(w->heard);
    free(w->hosts);
    free(w);
}

FvStatus fv_watchdog_start(const FvWorld *world, const FvGroup *group, const char *const *names,
                           FvWatchdog **out, FvError *err) {
    size_t ranks = world->rank == 0 ? world->size : 1;
    FvWatchdog *w = calloc(1, sizeof *w);
    if (!w)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the watchdog");
    pthread_mutex_init(&w->lock, NULL); /* cannot fail on Linux */
    w->world = world;
    w->group = group;
    w->names = names;
    w->mine = calloc(group->slots, sizeof *w->mine);
    w->all = calloc(ranks, group->slots * sizeof *w->all);
    w->heard = calloc(ranks, sizeof *w->heard);
    w->hosts = calloc(ranks, sizeof *w->hosts);
    bool ready = w->mine && w->all && w->heard && w->hosts;
    for (size_t r = 0; ready && r < ranks; r++)
        w->heard[r] = fv_now();
    w->started = ready && pthread_create(&w->thread, NULL, watch, w) == 0;
    if (!w->started) {
        destroy(w);
        return FV_FAIL(err, FV_DEVICE, "no memory or thread for the watchdog");
    }
    *out = w;
    return FV_OK;
}

void fv_watchdog_stop(FvWatchdog *w) {
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stopping = true;
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    destroy(w);
}
