/* The tiles of the current operation are handed out by one 64-bit ticket: the operation's number
 * in the high half, the tiles not yet claimed in the low half. A thread claims by compare and
 * exchange, so a claim can only succeed for the operation that is running, and `run` and `arg` are
 * read after it: they cannot change before the claimed tile is counted in `done`. */
#include "backend/pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/memory.h"

enum { SPIN_NS = 30000, SPINS_PER_CLOCK = 32 };

#define TILES_MAX ((size_t)UINT32_MAX)

typedef struct Worker {
    FvPool *pool;
    size_t thread;
    pthread_t id;
} Worker;

struct FvPool {
    _Alignas(FV_ALIGN) _Atomic uint64_t ticket;
    FvTile *run;
    void *arg;
    uint32_t tiles;
    _Alignas(FV_ALIGN) _Atomic uint32_t done; /* tiles finished; the caller may sleep on it */
    _Atomic bool caller_sleeps;
    _Alignas(FV_ALIGN) _Atomic uint32_t wake; /* workers sleep on it */
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
    size_t threads, started;
    Worker *workers;
};

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Returns at once when *word is no longer `seen`; may also return early for no reason, so callers
 * check their condition again. */
static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static bool tiles_left(FvPool *pool) {
    return (uint32_t)atomic_load(&pool->ticket) != 0;
}

/* Runs one tile of the current operation; false when none is left. */
static bool run_one(FvPool *pool, size_t thread) {
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    do {
        if ((uint32_t)ticket == 0)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket - 1,
                                                    memory_order_acq_rel, memory_order_acquire));
    uint32_t tiles = pool->tiles;
    pool->run(pool->arg, tiles - (uint32_t)ticket, thread);
    /* seq_cst against caller_sleeps: either the caller sees the last tile done or we see it asleep
     */
    if (atomic_fetch_add(&pool->done, 1) + 1 == tiles && atomic_load(&pool->caller_sleeps))
        futex_wake_all(&pool->done);
    return true;
}

static void sleep_until_work(FvPool *pool) {
    atomic_fetch_add(&pool->sleepers, 1);
    uint32_t seen = atomic_load(&pool->wake);
    if (!tiles_left(pool) && !atomic_load(&pool->stop))
        futex_wait(&pool->wake, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void *work(void *arg) {
    Worker *worker = arg;
    FvPool *pool = worker->pool;
    int64_t idle_since = now_ns();
    while (!atomic_load(&pool->stop)) {
        bool worked = false;
        while (run_one(pool, worker->thread))
            worked = true;
        if (worked)
            idle_since = now_ns();
        for (int i = 0; i < SPINS_PER_CLOCK && !tiles_left(pool); i++)
            pause_cpu();
        if (!tiles_left(pool) && now_ns() - idle_since > SPIN_NS) {
            sleep_until_work(pool);
            idle_since = now_ns();
        }
    }
    return NULL;
}

static void wake_workers(FvPool *pool) {
    if (atomic_load(&pool->sleepers) > 0) {
        atomic_fetch_add(&pool->wake, 1);
        futex_wake_all(&pool->wake);
    }
}

static FvStatus start_workers(FvPool *pool, FvError *err) {
    sigset_t all, old;
    sigfillset(&all);
    if (pthread_sigmask(SIG_SETMASK, &all, &old) != 0)
        return FV_FAIL(err, FV_DEVICE, "cannot block signals for the compute threads");
    int failed = 0;
    for (size_t i = 0; i + 1 < pool->threads && !failed; i++) {
        pool->workers[i] = (Worker){.pool = pool, .thread = i + 1};
        failed = pthread_create(&pool->workers[i].id, NULL, work, &pool->workers[i]);
        if (!failed)
            pool->started++;
    }
    int restored = pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (failed || restored)
        return FV_FAIL(err, FV_DEVICE,
                       "cannot start compute thread %zu of %zu: %s; use fewer threads",
                       pool->started + 2, pool->threads, strerror(failed ? failed : restored));
    return FV_OK;
}

FvStatus fv_pool_create(size_t threads, FvPool **out, FvError *err) {
    *out = NULL;
    if (threads == 0)
        return FV_FAIL(err, FV_USAGE, "the number of compute threads must be at least 1");
    FvPool *pool = aligned_alloc(FV_ALIGN, sizeof *pool);
    Worker *workers = calloc(threads, sizeof *workers);
    if (!pool || !workers) {
        free(pool);
        free(workers);
        return FV_FAIL(err, FV_DEVICE, "no memory for %zu compute threads; use fewer", threads);
    }
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->workers = workers;
    FvStatus status = start_workers(pool, err);
    if (status != FV_OK) {
        fv_pool_destroy(pool);
        return status;
    }
    *out = pool;
    return FV_OK;
}

void fv_pool_destroy(FvPool *pool) {
    if (!pool)
        return;
    atomic_store(&pool->stop, true);
    wake_workers(pool);
    for (size_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i].id, NULL);
    free(pool->workers);
    free(pool);
}

size_t fv_pool_threads(const FvPool *pool) {
    return pool->threads;
}

/* Waits for the tiles that other threads have claimed. */
static void wait_done(FvPool *pool, uint32_t tiles) {
    int64_t start = now_ns();
    for (;;) {
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            if (atomic_load_explicit(&pool->done, memory_order_acquire) == tiles)
                return;
            pause_cpu();
        }
        if (now_ns() - start < SPIN_NS)
            continue;
        atomic_store(&pool->caller_sleeps, true);
        uint32_t seen = atomic_load(&pool->done);
        if (seen != tiles)
            futex_wait(&pool->done, seen);
        atomic_store(&pool->caller_sleeps, false);
    }
}

/* One operation of at most TILES_MAX tiles, with workers. */
static void run_shared(FvPool *pool, uint32_t tiles, FvTile *run, void *arg) {
    pool->run = run;
    pool->arg = arg;
    pool->tiles = tiles;
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    uint64_t number = (atomic_load_explicit(&pool->ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&pool->ticket, number << 32 | tiles);
    wake_workers(pool);
    while (run_one(pool, 0))
        continue;
    wait_done(pool, tiles);
}

void fv_pool_run(FvPool *pool, size_t tiles, FvTile *run, void *arg) {
    if (pool->threads == 1 || tiles <= 1 || tiles > TILES_MAX) {
        for (size_t tile = 0; tile < tiles; tile++)
            run(arg, tile, 0);
        return;
    }
    run_shared(pool, (uint32_t)tiles, run, arg);
}
