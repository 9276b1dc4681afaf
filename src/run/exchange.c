#include "run/exchange.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/memory.h"

#ifdef FV_NCCL
#include "cuda/collective.h"
enum { HAS_NCCL = 1 };
#else
enum { HAS_NCCL = 0, FV_COLLECTIVE_ID = 128 };
#endif

/* Elements: what travels through the host at once, and what NCCL averages at once: large enough
 * for its full bandwidth, small enough that the first leave early. */
enum { PIECE = 4 << 20, BUCKET = 4 << 20 };

typedef enum Kind { ALONE, OVER_MPI, OVER_NCCL } Kind;

struct FvExchange {
    FvExchangeConfig config;
    Kind kind;
    char text[160];
    real *staging; /* [PIECE] of host_alloc, where the host cannot reach the backend's memory */
    real *g;       /* this step's gradients; from `averaged` on they are on their way */
    size_t averaged;
};

/* --- which way ------------------------------------------------------------------------------- */

typedef struct Seat {
    char host[FV_HOST], bus[sizeof((FvDevice *)0)->bus];
    bool gpu, nccl; /* computes on one; built with NCCL */
} Seat;

typedef struct Verdict {
    Kind kind;
    bool meet;     /* make a communicator with this id */
    bool refused;  /* nccl is asked for and cannot be */
    char why[128]; /* not NCCL, "" when it was not asked for */
    char id[FV_COLLECTIVE_ID];
} Verdict;

/* Why the group's ranks cannot use NCCL; "" when they can. */
static void obstacle(const FvGroup *g, const Seat *seats, char *why, size_t size) {
    why[0] = '\0';
    if (g->slots > 1)
        snprintf(why, size, "one job at a time can use NCCL, not --jobs-per-rank %zu", g->slots);
    for (size_t r = 0; r < g->size && !why[0]; r++) {
        if (!seats[r].nccl)
            snprintf(why, size, "rank %zu of the group has no NCCL in its build", r);
        else if (!seats[r].gpu)
            snprintf(why, size, "rank %zu of the group has no GPU", r);
        for (size_t s = 0; s < r && !why[0]; s++)
            if (strcmp(seats[s].host, seats[r].host) == 0 &&
                strcmp(seats[s].bus, seats[r].bus) == 0)
                snprintf(why, size, "ranks %zu and %zu of the group share the GPU %s of %s", s, r,
                         seats[r].bus, seats[r].host);
    }
}

/* On the root, for all. */
static FvStatus decide(const FvExchangeConfig *c, const Seat *seats, Verdict *out, FvError *err) {
    bool wanted = strcmp(c->comm, "nccl") == 0;
    obstacle(c->group, seats, out->why, sizeof out->why);
    out->kind = c->group->size > 1 ? OVER_MPI : ALONE;
    if (strcmp(c->comm, "mpi") == 0 || (c->group->size == 1 && !wanted)) {
        out->why[0] = '\0';
        return FV_OK;
    }
    out->refused = wanted && out->why[0];
    if (out->why[0])
        return FV_OK;
    out->kind = OVER_NCCL;
    out->meet = !c->link->collective;
#ifdef FV_NCCL
    return out->meet ? fv_collective_id(out->id, err) : FV_OK;
#else
    (void)err;
    return FV_OK;
#endif
}

static FvStatus agree(const FvExchangeConfig *c, Verdict *out, FvError *err) {
    const FvGroup *g = c->group;
    Seat mine = {.gpu = c->device->gpu, .nccl = HAS_NCCL};
    snprintf(mine.host, sizeof mine.host, "%s", c->world->host);
    snprintf(mine.bus, sizeof mine.bus, "%s", c->device->bus);
    Seat *seats = calloc(g->size, sizeof *seats);
    if (!seats)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the ranks of a group");
    FvStatus status = fv_group_gather(g, c->slot, &mine, sizeof mine, seats, err);
    if (status == FV_OK && g->rank == 0)
        status = decide(c, seats, out, err);
    free(seats);
    FV_TRY(status);
    return fv_group_broadcast(g, c->slot, out, sizeof *out, err);
}

static FvStatus meet(FvExchange *x, const Verdict *v, FvError *err) {
#ifdef FV_NCCL
    const FvExchangeConfig *c = &x->config;
    if (v->meet)
        FV_TRY(fv_collective_create(c->device->index, v->id, c->group->rank, c->group->size,
                                    &c->link->collective, err));
    char version[32];
    fv_collective_version(version, sizeof version);
    snprintf(x->text, sizeof x->text, "gradients over %s", version);
#else
    (void)x, (void)v, (void)err;
#endif
    return FV_OK;
}

FvStatus fv_exchange_create(const FvExchangeConfig *config, FvExchange **out, FvError *err) {
    Verdict verdict = {0};
    FV_TRY(agree(config, &verdict, err));
    if (verdict.refused)
        return FV_FAIL(err, FV_DEVICE, "comm=nccl: %s; use comm=auto or comm=mpi", verdict.why);
    FvExchange *x = calloc(1, sizeof *x);
    if (!x)
        return FV_FAIL(err, FV_DEVICE, "out of memory for averaging gradients");
    x->config = *config;
    x->kind = verdict.kind;
    FvStatus status = FV_OK;
    if (x->kind == OVER_NCCL)
        status = meet(x, &verdict, err);
    if (x->kind == OVER_MPI && config->device->gpu)
        snprintf(x->text, sizeof x->text, "gradients over MPI%s%s", verdict.why[0] ? ": " : "",
                 verdict.why);
    if (status == FV_OK && config->group->size > 1 && !config->backend->on_host)
        status = config->backend->ops->host_alloc(config->backend, PIECE * sizeof(real),
                                                  (void **)&x->staging, err);
    if (status != FV_OK) {
        fv_exchange_destroy(x);
        return status;
    }
    *out = x;
    return FV_OK;
}

void fv_exchange_destroy(FvExchange *x) {
    if (!x)
        return;
    if (x->staging)
        x->config.backend->ops->host_release(x->config.backend, x->staging);
    free(x);
}

void fv_link_close(FvLink *link) {
#ifdef FV_NCCL
    fv_collective_destroy(link->collective, link->failed);
#endif
    link->collective = NULL;
}

const char *fv_exchange_text(const FvExchange *x) {
    return x->text;
}

bool fv_exchange_queues(const FvExchange *x) {
    return x->kind != OVER_MPI;
}

/* --- over MPI -------------------------------------------------------------------------------- */

typedef FvStatus Travel(const FvGroup *, size_t slot, real *x, size_t count, FvError *);

static FvStatus broadcast(const FvGroup *g, size_t slot, real *x, size_t count, FvError *err) {
    return fv_group_broadcast(g, slot, x, count * sizeof *x, err);
}

/* Through pinned memory, in pieces, where MPI cannot read the backend's. */
static FvStatus travel(FvExchange *x, Travel *over, real *data, size_t count, FvError *err) {
    const FvExchangeConfig *c = &x->config;
    FvBackend *be = c->backend;
    if (be->on_host)
        return over(c->group, c->slot, data, count, err);
    for (size_t i = 0; i < count; i += PIECE) {
        size_t n = count - i < PIECE ? count - i : PIECE;
        be->ops->download(be, x->staging, data + i, n * sizeof *data);
        FV_TRY(be->ops->sync(be, err));
        FV_TRY(over(c->group, c->slot, x->staging, n, err));
        be->ops->upload(be, data + i, x->staging, n * sizeof *data);
    }
    return FV_OK;
}

FvStatus fv_exchange_share(FvExchange *x, real *data, size_t count, FvError *err) {
    return x->config.group->size == 1 ? FV_OK : travel(x, broadcast, data, count, err);
}

/* --- averages -------------------------------------------------------------------------------- */

static void average_from(FvExchange *x, size_t from) {
#ifdef FV_NCCL
    fv_collective_average(x->config.link->collective, x->config.backend, x->g + from,
                          x->averaged - from);
#endif
    x->averaged = from;
}

void fv_exchange_begin(FvExchange *x, real *g, size_t count) {
    x->g = g;
    x->averaged = count;
}

void fv_exchange_ready(void *exchange, size_t from) {
    FvExchange *x = exchange;
    if (x->kind == OVER_NCCL && x->averaged - from >= BUCKET)
        average_from(x, from);
}

FvStatus fv_exchange_finish(FvExchange *x, FvError *err) {
    if (x->kind == OVER_MPI)
        return travel(x, fv_group_average, x->g, x->averaged, err);
    if (x->kind == ALONE)
        return FV_OK;
    if (x->averaged > 0)
        average_from(x, 0);
#ifdef FV_NCCL
    fv_collective_join(x->config.link->collective, x->config.backend);
#endif
    return FV_OK;
}

/* --- waiting --------------------------------------------------------------------------------- */

/* A rank that has died leaves the others' kernels waiting for ever: NCCL finds out on the host. */
static FvStatus watch(FvExchange *x, size_t mark, FvError *err) {
    const FvExchangeConfig *c = &x->config;
    const struct timespec rest = {.tv_nsec = 20000};
    for (; !c->backend->ops->reached(c->backend, mark); nanosleep(&rest, NULL)) {
#ifdef FV_NCCL
        FV_TRY(fv_collective_check(c->link->collective, err));
#else
        (void)err;
#endif
    }
    return FV_OK;
}

FvStatus fv_exchange_wait(FvExchange *x, size_t mark, FvError *err) {
    FvStatus status = x->kind == OVER_NCCL ? watch(x, mark, err) : FV_OK;
    if (status != FV_OK) { /* its kernels would keep the GPU, and all who wait for it, for ever */
        x->config.link->failed = true;
        fv_link_close(x->config.link);
        return status;
    }
    return x->config.backend->ops->wait(x->config.backend, mark, err);
}
