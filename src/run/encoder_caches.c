#include "run/encoder_caches.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/memory.h"

typedef struct Entry {
    char key[512]; /* everything that the stored values depend on */
    FvEncoderCache *cache;
    struct Entry *next;
} Entry;

struct FvEncoderCaches {
    FvDevice device;
    pthread_mutex_t mutex; /* of what follows */
    FvBackend *be;         /* whose memory the caches are in; opened for the first */
    Entry *first;
};

FvStatus fv_encoder_caches_create(const FvDevice *device, FvEncoderCaches **out, FvError *err) {
    FvEncoderCaches *caches = calloc(1, sizeof *caches);
    if (!caches || pthread_mutex_init(&caches->mutex, NULL) != 0) {
        free(caches);
        return FV_FAIL(err, FV_DEVICE, "out of memory for the encoder's caches");
    }
    caches->device = *device;
    *out = caches;
    return FV_OK;
}

void fv_encoder_caches_destroy(FvEncoderCaches *caches) {
    if (!caches)
        return;
    while (caches->first) {
        Entry *entry = caches->first;
        caches->first = entry->next;
        fv_encoder_cache_destroy(entry->cache);
        free(entry);
    }
    fv_backend_destroy(caches->be);
    pthread_mutex_destroy(&caches->mutex);
    free(caches);
}

/* XXH3 of the encoder's weights, in the order of the table. */
static FvStatus hash_weights(const FvParams *params, FvBackend *be, uint64_t *out, FvError *err) {
    uint64_t hash = 0;
    FvStatus status = FV_OK;
    for (size_t i = 0; i < params->count && status == FV_OK; i++) {
        const FvParam *p = &params->list[i];
        if (strncmp(p->name, "dino.", 5) != 0)
            continue;
        real *values = malloc(fv_mul(p->count, sizeof *values));
        if (!values)
            return FV_FAIL(err, FV_DEVICE, "out of memory for the encoder's weights");
        status = fv_params_get(params, be, p, FV_BLOCK_W, values, err);
        hash = XXH3_64bits_withSeed(values, p->count * sizeof *values, hash);
        free(values);
    }
    *out = hash;
    return status;
}

/* The backend's description tells its arithmetic. */
static FvStatus key_of(const FvModelConfig *c, const FvParams *params, FvBackend *be,
                       const FvDataInfo *data, char *key, size_t size, FvError *err) {
    uint64_t weights;
    FV_TRY(hash_weights(params, be, &weights, err));
    snprintf(key, size,
             "%016" PRIx64
             " of %zu layers, %zu wide, %zu heads, MLP %zu, patch %zu; %s; %zu frames "
             "of %zu pixels; clips %zu + %zu of %s; %s",
             weights, c->dino_layers, c->dino_width, c->dino_heads, c->dino_mlp, c->patch,
             c->deep ? "inputs" : "features", c->frames, c->size, data->count[FV_TRAIN],
             data->count[FV_HELD_OUT], data->sha256, be->description);
    return FV_OK;
}

size_t fv_encoder_cache_fitting(size_t clips, size_t clip_bytes, size_t left) {
    size_t fit = left / 2 / (clip_bytes ? clip_bytes : 1);
    return fit < clips ? fit : clips;
}

/* What this rank may still take, without what its caches have not taken yet. */
static size_t memory_left(const FvEncoderCaches *caches, FvBackend *be) {
    size_t left = be->ops->memory_left(be) / caches->device.ranks;
    for (const Entry *e = caches->first; e; e = e->next) {
        size_t to_come = fv_encoder_cache_to_come(e->cache);
        left -= to_come < left ? to_come : left;
    }
    return left;
}

static FvStatus add_entry(FvEncoderCaches *caches, const FvModelConfig *c, const FvDataInfo *data,
                          size_t operand_bytes, const char *key, Entry **out, FvError *err) {
    size_t clips = data->count[FV_TRAIN] + data->count[FV_HELD_OUT];
    size_t clip_bytes = fv_encoder_cache_clip_bytes(c, operand_bytes);
    FvBackend *be = caches->be;
    if (!be)
        FV_TRY(fv_device_open(&caches->device, "auto", 1, &be, err));
    caches->be = be;
    Entry *entry = calloc(1, sizeof *entry);
    if (!entry)
        return FV_FAIL(err, FV_DEVICE, "out of memory for an encoder's cache");
    size_t room = fv_encoder_cache_fitting(clips, clip_bytes, memory_left(caches, be));
    FvStatus status = fv_encoder_cache_create(be, clips, room, clip_bytes, &entry->cache, err);
    if (status != FV_OK) {
        free(entry);
        return status;
    }
    snprintf(entry->key, sizeof entry->key, "%s", key);
    entry->next = caches->first;
    caches->first = entry;
    *out = entry;
    return FV_OK;
}

FvStatus fv_encoder_caches_attach(FvEncoderCaches *caches, FvModel *model, const FvModelConfig *c,
                                  FvBackend *be, const FvDataInfo *data, char *note,
                                  size_t note_size, FvError *err) {
    char key[sizeof(Entry){0}.key];
    FvStatus status = FV_OK;
    *note = '\0';
    FV_TRY(key_of(c, fv_model_params(model), be, data, key, sizeof key, err));
    pthread_mutex_lock(&caches->mutex);
    Entry *entry = caches->first;
    while (entry && strcmp(entry->key, key) != 0)
        entry = entry->next;
    if (!entry) {
        status = add_entry(caches, c, data, be->operand_bytes, key, &entry, err);
        if (status == FV_OK) {
            size_t room = fv_encoder_cache_capacity(entry->cache);
            snprintf(note, note_size,
                     "the frozen encoder's outputs are kept for %zu of %zu clips, %.1f MB", room,
                     data->count[FV_TRAIN] + data->count[FV_HELD_OUT],
                     (double)fv_encoder_cache_to_come(entry->cache) / 1e6);
        }
    }
    pthread_mutex_unlock(&caches->mutex);
    if (status == FV_OK)
        fv_model_use_cache(model, entry->cache);
    return status;
}
