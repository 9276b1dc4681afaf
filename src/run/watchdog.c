#include "run/watchdog.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"

enum { TAG_BEAT = 200, TAG_ANSWER = 201 };

static const double beat_seconds = 1; /* between a rank's messages */
static const double silence = 3;      /* seconds after which a rank does not answer */

typedef struct Place {
    FvActivity activity;
    size_t job;
    uint64_t step, calls;
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
    bool stopping, everywhere;
    Place *mine;   /* [slots] */
    FvPost **post; /* rank 0: an answer to each rank [world size]; others: a beat a slot [slots] */
    double
        *heard; /* rank 0: from each rank [world size]; others: from rank 0. Infinite: it ended */
    /* rank 0: */
    Place *all; /* [world size, slots] */
    char (*hosts)[FV_HOST];
    size_t ended; /* ranks */
};

static bool is_root(const FvWatchdog *w) {
    return w->world->rank == 0;
}

void fv_watchdog_at(FvWatchdog *w, size_t slot, size_t job, uint64_t step, FvActivity activity,
                    double limit) {
    pthread_mutex_lock(&w->lock);
    w->mine[slot] = (Place){.activity = activity,
                            .job = job,
                            .step = step,
                            .calls = w->mine[slot].calls + 1,
                            .limit = limit,
                            .since = fv_now()};
    pthread_mutex_unlock(&w->lock);
}

/* --- what went wrong ------------------------------------------------------------------------- */

_Noreturn static void give_up(const FvWatchdog *w, size_t rank, const Place *p, double seconds,
                              const char *doing) {
    char where[96] = "between two jobs";
    if (p && p->activity != FV_IDLE)
        snprintf(where, sizeof where, "%s, step %" PRIu64, w->names[p->job], p->step + 1);
    fprintf(
        stderr,
        "fovea: rank %zu on %s hangs: %s, no progress for %.0f seconds (watchdog): %s; the same "
        "command goes on from the checkpoints\n",
        rank, w->hosts ? w->hosts[rank] : "another host", where, seconds, doing);
    fv_world_abort(FV_DEVICE);
}

/* Of the ranks that work on the job: one that does not answer, or else one that computes while the
 * others wait for it, or else the first. */
_Noreturn static void blame(const FvWatchdog *w, size_t group, size_t slot, double seconds) {
    size_t first = group * w->group->size, slots = w->group->slots, guilty = first;
    const char *doing = "it and the other ranks of its group wait for each other";
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
    give_up(w, guilty, &w->all[guilty * slots + slot], seconds, doing);
}

/* A group stands still when none of its ranks comes on: the others wait for one that saves. */
static void look_at_groups(const FvWatchdog *w) {
    size_t size = w->group->size, slots = w->group->slots;
    for (size_t i = 0; i < w->group->count * slots; i++) {
        size_t group = i / slots, slot = i % slots;
        double latest = 0, limit = 0;
        for (size_t r = group * size; r < (group + 1) * size; r++) {
            const Place *p = &w->all[r * slots + slot];
            latest = fmax(latest, p->since);
            limit = fmax(limit, p->activity == FV_IDLE ? 0 : p->limit);
        }
        if (limit > 0 && fv_now() - latest > limit)
            blame(w, group, slot, fv_now() - latest);
    }
}

/* What a rank works on, in the first slot that has a job. */
static const Place *work_of(const FvWatchdog *w, size_t rank) {
    const Place *p = &w->all[rank * w->group->slots];
    for (size_t slot = 0; slot < w->group->slots; slot++)
        if (p[slot].activity != FV_IDLE)
            return &p[slot];
    return p;
}

/* A rank may also go silent between two jobs; it has the time of the most patient one. */
static void look_for_silent(const FvWatchdog *w) {
    double limit = 0;
    for (size_t i = 0; i < w->world->size * w->group->slots; i++)
        limit = fmax(limit, w->all[i].limit);
    for (size_t r = 1; limit > 0 && r < w->world->size; r++)
        if (fv_now() - w->heard[r] > limit)
            give_up(w, r, work_of(w, r), fv_now() - w->heard[r], "its process does not answer");
}

/* On the other ranks: rank 0 itself may be the one. */
static void look_at_root(FvWatchdog *w) {
    double limit = 0;
    pthread_mutex_lock(&w->lock);
    for (size_t slot = 0; slot < w->group->slots; slot++)
        limit = fmax(limit, w->mine[slot].limit);
    pthread_mutex_unlock(&w->lock);
    if (limit > 0 && fv_now() - *w->heard > limit)
        give_up(w, 0, NULL, fv_now() - *w->heard, "its process does not answer");
}

/* --- messages -------------------------------------------------------------------------------- */

static Beat beat_of(FvWatchdog *w, size_t slot, bool last) {
    Beat beat = {.slot = slot, .last = last};
    snprintf(beat.host, sizeof beat.host, "%s", w->world->host);
    pthread_mutex_lock(&w->lock);
    beat.place = w->mine[slot];
    pthread_mutex_unlock(&w->lock);
    return beat;
}

static void hear(FvWatchdog *w, size_t rank, const Beat *beat) {
    w->heard[rank] = beat->last ? INFINITY : fv_now();
    w->ended += beat->last;
    snprintf(w->hosts[rank], FV_HOST, "%s", beat->host);
    Place *p = &w->all[rank * w->group->slots + beat->slot];
    double since = p->calls == beat->place.calls ? p->since : fv_now();
    if (!beat->last) {
        *p = beat->place;
        p->since = since;
    }
}

/* A message that the other side has not taken yet is not followed by another: a process that is
 * stopped must not stop those that write to it. */
static void tell(FvWatchdog *w) {
    for (size_t slot = 0; slot < w->group->slots; slot++) {
        Beat beat = beat_of(w, slot, false);
        if (is_root(w))
            hear(w, 0, &beat);
        else
            fv_post_send(w->post[slot], 0, TAG_BEAT, &beat, sizeof beat);
    }
    const Beat answer = {0};
    for (size_t r = 1; is_root(w) && r < w->world->size; r++)
        fv_post_send(w->post[r], r, TAG_ANSWER, &answer, sizeof answer);
}

static void listen(FvWatchdog *w) {
    Beat beat;
    size_t from;
    while (is_root(w) && fv_message_poll(TAG_BEAT, &beat, sizeof beat, &from))
        hear(w, from, &beat);
    while (!is_root(w) && fv_message_poll(TAG_ANSWER, &beat, sizeof beat, &from))
        *w->heard = beat.last ? INFINITY : fv_now();
}

/* No message may be on its way when MPI ends: every rank says its last word, then rank 0 does. */
static void say_goodbye(FvWatchdog *w) {
    const struct timespec rest = {.tv_nsec = 5000000};
    const Beat answer = {.last = true};
    Beat beat = beat_of(w, 0, true);
    FvError ignored;
    if (is_root(w))
        hear(w, 0, &beat);
    else
        fv_message_send(0, TAG_BEAT, &beat, sizeof beat, &ignored);
    for (; is_root(w) && w->ended < w->world->size; nanosleep(&rest, NULL))
        listen(w);
    for (size_t r = 1; is_root(w) && r < w->world->size; r++)
        fv_message_send(r, TAG_ANSWER, &answer, sizeof answer, &ignored);
    for (; !is_root(w) && isfinite(*w->heard); nanosleep(&rest, NULL))
        listen(w);
}

/* --- the thread ------------------------------------------------------------------------------ */

/* While this process was suspended nobody could come on. */
static void forgive(FvWatchdog *w, double gap) {
    size_t ranks = is_root(w) ? w->world->size : 1;
    for (size_t r = 0; r < ranks; r++)
        w->heard[r] += gap;
    for (size_t i = 0; is_root(w) && i < ranks * w->group->slots; i++)
        w->all[i].since += gap;
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
    double told = 0, turn = fv_now();
    for (; !is_stopping(w); nanosleep(&rest, NULL)) {
        double now = fv_now();
        if (now - turn > silence)
            forgive(w, now - turn);
        turn = now;
        if (now - told >= beat_seconds) {
            tell(w);
            told = now;
        }
        listen(w);
        if (is_root(w)) {
            look_at_groups(w);
            look_for_silent(w);
        } else {
            look_at_root(w);
        }
    }
    if (w->everywhere)
        say_goodbye(w);
    return NULL;
}

static size_t post_count(const FvWatchdog *w) {
    return is_root(w) ? w->world->size : w->group->slots;
}

static void destroy(FvWatchdog *w) {
    for (size_t i = 0; w->post && i < post_count(w); i++)
        fv_post_destroy(w->post[i], w->everywhere);
    pthread_mutex_destroy(&w->lock);
    free(w->post);
    free(w->mine);
    free(w->all);
    free(w->heard);
    free(w->hosts);
    free(w);
}

static bool make_tables(FvWatchdog *w) {
    size_t ranks = is_root(w) ? w->world->size : 1;
    w->mine = calloc(w->group->slots, sizeof *w->mine);
    w->heard = calloc(ranks, sizeof *w->heard);
    w->post = calloc(post_count(w), sizeof *w->post);
    if (is_root(w)) {
        w->all = calloc(ranks, w->group->slots * sizeof *w->all);
        w->hosts = calloc(ranks, sizeof *w->hosts);
    }
    bool ready = w->mine && w->heard && w->post && (!is_root(w) || (w->all && w->hosts));
    for (size_t i = 0; ready && i < post_count(w); i++)
        ready = (w->post[i] = fv_post_create()) != NULL;
    for (size_t r = 0; ready && r < ranks; r++)
        w->heard[r] = fv_now();
    return ready;
}

FvStatus fv_watchdog_start(const FvWorld *world, const FvGroup *group, const char *const *names,
                           FvWatchdog **out, FvError *err) {
    FvWatchdog *w = calloc(1, sizeof *w);
    if (!w)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the watchdog");
    pthread_mutex_init(&w->lock, NULL); /* cannot fail on Linux */
    w->world = world;
    w->group = group;
    w->names = names;
    if (!make_tables(w) || pthread_create(&w->thread, NULL, watch, w) != 0) {
        destroy(w);
        return FV_FAIL(err, FV_DEVICE, "no memory or thread for the watchdog");
    }
    *out = w;
    return FV_OK;
}

void fv_watchdog_stop(FvWatchdog *w, bool everywhere) {
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stopping = true;
    w->everywhere = everywhere;
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    destroy(w);
}
