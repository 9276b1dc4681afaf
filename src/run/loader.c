/* Which clips a step takes, the memory they go to, and the thread that reads ahead. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/rng.h"
#include "model/config.h"
#include "run/data.h"

/* --- order ------------------------------------------------------------------------------------ */

FvStatus fv_order_create(uint64_t seed, size_t count, size_t batch, FvOrder *out, FvError *err) {
    *out = (FvOrder){.seed = seed, .count = count, .batch = batch, .epoch = UINT64_MAX};
    if (batch == 0 || batch > count || count > UINT32_MAX)
        return FV_FAIL(err, FV_DATA, "a step needs %zu clips (batch), there are %zu for training",
                       batch, count);
    out->permutation = calloc(count, sizeof *out->permutation);
    if (!out->permutation)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the order of %zu clips", count);
    return FV_OK;
}

void fv_order_free(FvOrder *o) {
    free(o->permutation);
    *o = (FvOrder){0};
}

void fv_order_step(FvOrder *o, uint64_t step, uint32_t *clips) {
    uint64_t steps_per_epoch = o->count / o->batch, epoch = step / steps_per_epoch;
    if (epoch != o->epoch) {
        fv_permutation(fv_random(fv_stream(o->seed, "order"), epoch), o->count, o->permutation);
        o->epoch = epoch;
    }
    memcpy(clips, o->permutation + step % steps_per_epoch * o->batch, o->batch * sizeof *clips);
}

/* --- batches ---------------------------------------------------------------------------------- */

/* Pixels come first: their address is that of the one block behind the batch. */
static void carve(FvArena *arena, size_t clips, const FvDataInfo *info, size_t max_text,
                  FvBatch *b) {
    size_t side = info->size / FV_LATENT_STRIDE, frames = fv_mul(clips, info->frames);
    b->pixels = fv_take_bytes(arena, fv_mul4(frames, info->size, info->size, 3));
    b->latents = fv_take(arena, fv_mul4(frames, side, side, FV_LATENT_CHANNELS));
    b->tokens = fv_take_bytes(arena, fv_mul3(clips, max_text, sizeof *b->tokens));
    b->token_count = fv_take_bytes(arena, fv_mul(clips, sizeof *b->token_count));
    b->clip = fv_take_bytes(arena, fv_mul(clips, sizeof *b->clip));
    b->number = fv_take_bytes(arena, fv_mul(clips, sizeof *b->number));
}

FvStatus fv_batch_create(size_t clips, const FvDataInfo *info, size_t max_text, FvBatch *out,
                         FvError *err) {
    *out = (FvBatch){.clips = clips, .max_text = max_text};
    if (clips == 0 || max_text < info->max_tokens)
        return FV_FAIL(err, FV_DATA,
                       "%s: captions have up to %zu tokens, the batch holds %zu clips "
                       "with up to %zu",
                       info->source, info->max_tokens, clips, max_text);
    FvArena arena = {0};
    carve(&arena, clips, info, max_text, out);
    arena.base = aligned_alloc(FV_ALIGN, arena.used);
    if (!arena.base)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a batch of %zu clips: %zu MiB", clips,
                       arena.used >> 20);
    memset(arena.base, 0, arena.used);
    arena.used = 0;
    carve(&arena, clips, info, max_text, out);
    return FV_OK;
}

void fv_batch_free(FvBatch *b) {
    free(b->pixels);
    *b = (FvBatch){0};
}

/* --- reading ahead ---------------------------------------------------------------------------- */

enum { RING = 5, HELD = 2 }; /* batches; of them in use: a step's and that of the step before it */

struct FvLoader {
    FvData *data;
    FvOrder order;
    size_t share, offset; /* clips of this shard per step; the first of them in the step's list */
    uint64_t first;       /* step */
    uint32_t *clips;      /* [batch]: the reader's list of the step */
    FvBatch ring[RING];
    pthread_t thread;
    bool running, mutex_ready, change_ready; /* what stop has to undo */
    pthread_mutex_t mutex;
    pthread_cond_t change; /* of anything below */
    uint64_t read, taken;  /* batches since the start; batch i lies at ring[i % RING] */
    bool stop;
    FvStatus status; /* of the reader: the first failure, after which it has ended */
    FvError error;
};

static bool has_room(const FvLoader *l) {
    return l->read - (l->taken < HELD ? 0 : l->taken - HELD) < RING;
}

static FvStatus read_batch(FvLoader *l, uint64_t index, FvError *err) {
    fv_order_step(&l->order, l->first + index, l->clips);
    FvBatch *batch = &l->ring[index % RING];
    for (size_t i = 0; i < l->share; i++)
        FV_TRY(fv_data_read(l->data, FV_TRAIN, l->clips[l->offset + i], batch, i, err));
    return FV_OK;
}

static void *read_ahead(void *argument) {
    FvLoader *l = argument;
    pthread_mutex_lock(&l->mutex);
    while (!l->stop && l->status == FV_OK) {
        if (!has_room(l)) {
            pthread_cond_wait(&l->change, &l->mutex);
            continue;
        }
        uint64_t index = l->read;
        FvError err;
        pthread_mutex_unlock(&l->mutex);
        FvStatus status = read_batch(l, index, &err);
        pthread_mutex_lock(&l->mutex);
        if (status == FV_OK) {
            l->read++;
        } else {
            l->status = status;
            l->error = err;
        }
        pthread_cond_broadcast(&l->change);
    }
    pthread_mutex_unlock(&l->mutex);
    return NULL;
}

/* Signals stay with the threads that handle them. */
static int start_thread(FvLoader *l) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&l->thread, NULL, read_ahead, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

static FvStatus prepare_loader(FvLoader *l, uint64_t seed, size_t batch, size_t max_text,
                               FvError *err) {
    const FvDataInfo *info = fv_data_info(l->data);
    FV_TRY(fv_order_create(seed, info->count[FV_TRAIN], batch, &l->order, err));
    for (size_t i = 0; i < RING; i++)
        FV_TRY(fv_batch_create(l->share, info, max_text, &l->ring[i], err));
    l->clips = calloc(batch, sizeof *l->clips);
    l->mutex_ready = pthread_mutex_init(&l->mutex, NULL) == 0;
    l->change_ready = pthread_cond_init(&l->change, NULL) == 0;
    if (!l->clips || !l->mutex_ready || !l->change_ready)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the loader");
    l->running = start_thread(l) == 0;
    if (!l->running)
        return FV_FAIL(err, FV_DEVICE, "no thread to read clips: raise the limit of processes");
    return FV_OK;
}

FvStatus fv_loader_start(FvData *data, uint64_t seed, size_t batch, size_t shard, size_t shards,
                         size_t max_text, uint64_t first, FvLoader **out, FvError *err) {
    *out = NULL;
    if (shards == 0 || shard >= shards || batch % shards)
        return FV_FAIL(err, FV_USAGE, "batch=%zu cannot be shared equally by %zu ranks", batch,
                       shards);
    FvLoader *l = calloc(1, sizeof *l);
    if (!l)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the loader");
    l->data = data;
    l->share = batch / shards;
    l->offset = shard * l->share;
    l->first = first;
    FvStatus status = prepare_loader(l, seed, batch, max_text, err);
    if (status != FV_OK) {
        fv_loader_stop(l);
        return status;
    }
    *out = l;
    return FV_OK;
}

FvStatus fv_loader_next(FvLoader *l, const FvBatch **out, FvError *err) {
    *out = NULL;
    pthread_mutex_lock(&l->mutex);
    while (l->taken == l->read && l->status == FV_OK)
        pthread_cond_wait(&l->change, &l->mutex);
    FvStatus status = FV_OK;
    if (l->taken < l->read) {
        *out = &l->ring[l->taken++ % RING];
        pthread_cond_broadcast(&l->change);
    } else {
        status = l->status;
        if (err)
            *err = l->error;
    }
    pthread_mutex_unlock(&l->mutex);
    return status;
}

void fv_loader_stop(FvLoader *l) {
    if (!l)
        return;
    if (l->running) {
        pthread_mutex_lock(&l->mutex);
        l->stop = true;
        pthread_cond_broadcast(&l->change);
        pthread_mutex_unlock(&l->mutex);
        pthread_join(l->thread, NULL);
    }
    if (l->mutex_ready)
        pthread_mutex_destroy(&l->mutex);
    if (l->change_ready)
        pthread_cond_destroy(&l->change);
    for (size_t i = 0; i < RING; i++)
        fv_batch_free(&l->ring[i]);
    fv_order_free(&l->order);
    free(l->clips);
    free(l);
}
