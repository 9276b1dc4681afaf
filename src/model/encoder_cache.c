#include "model/encoder_cache.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/memory.h"

typedef struct Slot {
    void *data; /* NULL: nobody has come with this clip */
    bool ready; /* filled, and safe to read */
} Slot;

struct FvEncoderCache {
    FvBackend *be;
    size_t clips, capacity, clip_bytes;
    pthread_mutex_t mutex; /* of what follows */
    size_t held;           /* clips that have memory */
    Slot *slots;           /* [clips] */
};

size_t fv_encoder_cache_clip_values(const FvModelConfig *c) {
    size_t tokens = fv_mul(c->frames, fv_patches(c) + 1);
    return fv_mul3(c->deep ? c->dino_layers : 1, tokens, c->dino_width);
}

size_t fv_encoder_cache_clip_bytes(const FvModelConfig *c, size_t operand_bytes) {
    return fv_mul(fv_encoder_cache_clip_values(c), c->deep ? operand_bytes : sizeof(real));
}

FvStatus fv_encoder_cache_create(FvBackend *be, size_t clips, size_t capacity, size_t clip_bytes,
                                 FvEncoderCache **out, FvError *err) {
    FvEncoderCache *cache = calloc(1, sizeof *cache);
    Slot *slots = calloc(clips ? clips : 1, sizeof *slots);
    if (!cache || !slots || pthread_mutex_init(&cache->mutex, NULL) != 0) {
        free(cache);
        free(slots);
        return FV_FAIL(err, FV_DEVICE, "out of memory for a table of %zu clips", clips);
    }
    cache->be = be;
    cache->clips = clips;
    cache->capacity = capacity < clips ? capacity : clips;
    cache->clip_bytes = clip_bytes;
    cache->slots = slots;
    *out = cache;
    return FV_OK;
}

void fv_encoder_cache_destroy(FvEncoderCache *cache) {
    if (!cache)
        return;
    for (size_t i = 0; i < cache->clips; i++)
        if (cache->slots[i].data)
            cache->be->ops->release(cache->be, cache->slots[i].data);
    pthread_mutex_destroy(&cache->mutex);
    free(cache->slots);
    free(cache);
}

const real *fv_encoder_cache_find(FvEncoderCache *cache, size_t clip) {
    pthread_mutex_lock(&cache->mutex);
    const Slot *slot = &cache->slots[clip];
    const real *values = slot->ready ? slot->data : NULL;
    pthread_mutex_unlock(&cache->mutex);
    return values;
}

real *fv_encoder_cache_reserve(FvEncoderCache *cache, size_t clip) {
    real *room = NULL;
    void *data;
    FvError ignored;
    pthread_mutex_lock(&cache->mutex);
    Slot *slot = &cache->slots[clip];
    if (!slot->data && cache->held < cache->capacity) {
        if (cache->be->ops->alloc(cache->be, cache->clip_bytes, &data, &ignored) == FV_OK) {
            slot->data = room = data;
            cache->held++;
        } else {
            cache->capacity = cache->held; /* others took the memory meanwhile */
        }
    }
    pthread_mutex_unlock(&cache->mutex);
    return room;
}

void fv_encoder_cache_publish(FvEncoderCache *cache, size_t clip) {
    pthread_mutex_lock(&cache->mutex);
    cache->slots[clip].ready = true;
    pthread_mutex_unlock(&cache->mutex);
}

size_t fv_encoder_cache_capacity(const FvEncoderCache *cache) {
    return cache->capacity;
}

size_t fv_encoder_cache_to_come(FvEncoderCache *cache) {
    pthread_mutex_lock(&cache->mutex);
    size_t bytes = fv_mul(cache->capacity - cache->held, cache->clip_bytes);
    pthread_mutex_unlock(&cache->mutex);
    return bytes;
}
