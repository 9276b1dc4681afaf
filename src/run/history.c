#include "run/history.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/memory.h"

static const char *const series_names[FV_SERIES_COUNT] = {
#define X(name, unit, text) "history.series." #name,
    FV_SERIES(X)
#undef X
};
static const char *const eval_names[FV_EVAL_COUNT] = {
#define X(name, unit, text) "history.eval." #name,
    FV_EVALS(X)
#undef X
};

enum { PASSES = 2 };

/* --- memory --------------------------------------------------------------------------------- */

/* Points every array into base; returns the bytes that takes (with base NULL it only measures). */
static size_t carve(FvHistory *h, void *base) {
    FvArena arena = {.base = base};
    size_t eval = fv_mul3(h->capacity_evals, h->clips, h->frames);
    size_t cls = fv_mul4(h->capacity_maps, PASSES, h->map_clips, h->frames);
    for (size_t i = 0; i < FV_SERIES_COUNT; i++)
        h->series[i] = fv_take_bytes(&arena, fv_mul(h->capacity_steps, sizeof(double)));
    h->eval_step = fv_take_bytes(&arena, fv_mul(h->capacity_evals, sizeof(int64_t)));
    for (size_t i = 0; i < FV_EVAL_COUNT; i++)
        h->eval[i] = fv_take_bytes(&arena, fv_mul(eval, sizeof(double)));
    h->map_step = fv_take_bytes(&arena, fv_mul(h->capacity_maps, sizeof(int64_t)));
    h->map = fv_take_bytes(&arena, fv_mul4(cls, h->grid, h->grid, sizeof(float)));
    h->cls = fv_take_bytes(&arena, fv_mul(cls, sizeof(float)));
    h->map_clip = fv_take_bytes(&arena, fv_mul(h->map_clips, sizeof(int64_t)));
    return arena.used;
}

static FvHistory sized(size_t steps, size_t evals, size_t maps, size_t clips, size_t frames,
                       size_t map_clips, size_t grid) {
    return (FvHistory){.capacity_steps = steps,
                       .capacity_evals = evals,
                       .capacity_maps = maps,
                       .clips = clips,
                       .frames = frames,
                       .map_clips = map_clips,
                       .grid = grid};
}

size_t fv_history_bytes(size_t steps, size_t evals, size_t maps, size_t clips, size_t frames,
                        size_t map_clips, size_t grid) {
    FvHistory h = sized(steps, evals, maps, clips, frames, map_clips, grid);
    return carve(&h, NULL);
}

FvStatus fv_history_create(size_t steps, size_t evals, size_t maps, size_t clips, size_t frames,
                           size_t map_clips, size_t grid, FvHistory *out, FvError *err) {
    FvHistory h = sized(steps, evals, maps, clips, frames, map_clips, grid);
    size_t bytes = carve(&h, NULL);
    h.block = calloc(1, fv_add(bytes, FV_ALIGN)); /* an empty history has a block, too */
    if (!h.block)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a history of %zu bytes", bytes);
    carve(&h, h.block);
    *out = h;
    return FV_OK;
}

void fv_history_free(FvHistory *h) {
    free(h->block);
    *h = (FvHistory){0};
}

/* --- tensors -------------------------------------------------------------------------------- */

static FvTensor tensor(const char *name, FvType type, const void *data, size_t rank,
                       const size_t *shape) {
    FvTensor t = {.name = name, .type = type, .rank = rank, .data = data, .count = 1};
    for (size_t i = 0; i < rank; i++) {
        t.shape[i] = shape[i];
        t.count *= shape[i];
    }
    return t;
}

size_t fv_history_tensors(const FvHistory *h, FvTensor out[FV_HISTORY_TENSORS]) {
    size_t n = 0;
    size_t eval[] = {h->evals, h->clips, h->frames};
    size_t map[] = {h->maps, PASSES, h->map_clips, h->frames, h->grid, h->grid};
    for (size_t i = 0; i < FV_SERIES_COUNT; i++)
        out[n++] = tensor(series_names[i], FV_F64, h->series[i], 1, &h->steps);
    out[n++] = tensor("history.eval_step", FV_I64, h->eval_step, 1, &h->evals);
    for (size_t i = 0; i < FV_EVAL_COUNT; i++)
        out[n++] = tensor(eval_names[i], FV_F64, h->eval[i], 3, eval);
    out[n++] = tensor("history.map_step", FV_I64, h->map_step, 1, &h->maps);
    out[n++] = tensor("history.map", FV_F32, h->map, 6, map);
    out[n++] = tensor("history.cls", FV_F32, h->cls, 4, map);
    out[n++] = tensor("history.map_clip", FV_I64, h->map_clip, 1, &h->map_clips);
    return n;
}

/* Rows of the tensor `name`, which must be in the file. */
static FvStatus count_rows(const FvTensorFile *f, const char *name, size_t most, size_t *rows,
                           FvError *err) {
    const FvTensor *t = fv_tensors_find(f, name);
    if (!t || t->rank == 0)
        return FV_FAIL(err, FV_DATA, "%s: holds no %s", fv_tensors_path(f), name);
    if (t->shape[0] > most)
        return FV_FAIL(err, FV_DATA, "%s: %s has %zu rows, this run at most %zu",
                       fv_tensors_path(f), name, t->shape[0], most);
    *rows = t->shape[0];
    return FV_OK;
}

static FvStatus check_tensor(const FvTensorFile *f, const FvTensor *wanted, FvError *err) {
    const FvTensor *t = fv_tensors_find(f, wanted->name);
    if (!t)
        return FV_FAIL(err, FV_DATA, "%s: holds no %s", fv_tensors_path(f), wanted->name);
    if (t->type != wanted->type || t->rank != wanted->rank ||
        memcmp(t->shape, wanted->shape, wanted->rank * sizeof *wanted->shape) != 0)
        return FV_FAIL(err, FV_DATA, "%s: %s has another type or shape than this run's",
                       fv_tensors_path(f), wanted->name);
    return FV_OK;
}

FvStatus fv_history_read(FvHistory *h, const FvTensorFile *f, FvError *err) {
    FvHistory fresh = *h; /* same arrays: nothing changes before everything is checked */
    FvTensor wanted[FV_HISTORY_TENSORS];
    FV_TRY(count_rows(f, series_names[0], h->capacity_steps, &fresh.steps, err));
    FV_TRY(count_rows(f, "history.eval_step", h->capacity_evals, &fresh.evals, err));
    FV_TRY(count_rows(f, "history.map_step", h->capacity_maps, &fresh.maps, err));
    size_t count = fv_history_tensors(&fresh, wanted);
    for (size_t i = 0; i < count; i++)
        FV_TRY(check_tensor(f, &wanted[i], err));
    for (size_t i = 0; i < count; i++) {
        const FvTensor *t = fv_tensors_find(f, wanted[i].name);
        memmove((char *)h->block + ((const char *)wanted[i].data - (const char *)h->block), t->data,
                fv_tensor_bytes(t));
    }
    *h = fresh;
    return FV_OK;
}

/* --- history.safetensors -------------------------------------------------------------------- */

static const char *const states[] = {[FV_JOB_WAITING] = "waiting",
                                     [FV_JOB_RUNNING] = "running",
                                     [FV_JOB_FINISHED] = "finished",
                                     [FV_JOB_STOPPED] = "stopped",
                                     [FV_JOB_FAILED] = "failed"};
enum { STATES = sizeof states / sizeof *states };

const char *fv_job_state_name(FvJobState state) {
    return states[state];
}

/* The numbers of the metadata: X(key, member of FvHistory h or FvJobInfo info) */
#define SIZES(X)                                                                                   \
    X("capacity_steps", h->capacity_steps)                                                         \
    X("capacity_evals", h->capacity_evals)                                                         \
    X("capacity_maps", h->capacity_maps)                                                           \
    X("clips", h->clips)                                                                           \
    X("frames", h->frames)                                                                         \
    X("map_clips", h->map_clips)                                                                   \
    X("grid", h->grid)                                                                             \
    X("parameters", info->parameters)                                                              \
    X("trained", info->trained)                                                                    \
    X("ranks", info->ranks)                                                                        \
    X("checkpoint_bytes", info->checkpoint_bytes)                                                  \
    X("restarts", info->restarts)
#define SECONDS(X)                                                                                 \
    X("seconds", info->seconds)                                                                    \
    X("checkpoint_seconds_last", info->checkpoint_seconds_last)

#define X(key, member) +1
enum { TEXTS = 4, METAS = TEXTS SIZES(X) SECONDS(X), DIGITS = 40 };
#undef X

FvStatus fv_history_save(const char *path, const FvHistory *h, const FvJobInfo *info,
                         const FvFence *fence, FvError *err) {
    FvMeta meta[METAS] = {{"format", "fovea-history-1"},
                          {"state", fv_job_state_name(info->state)},
                          {"why", info->why},
                          {"device", info->device}};
    char text[METAS][DIGITS];
    size_t n = TEXTS;
#define PUT(key, format, member)                                                                   \
    snprintf(text[n], DIGITS, format, member);                                                     \
    meta[n] = (FvMeta){key, text[n]};                                                              \
    n++;
#define X(key, member) PUT(key, "%zu", member)
    SIZES(X)
#undef X
#define X(key, member) PUT(key, "%.17g", member)
    SECONDS(X)
#undef X
#undef PUT
    FvTensor tensors[FV_HISTORY_TENSORS];
    size_t count = fv_history_tensors(h, tensors);
    return fv_tensors_replace(path, tensors, count, meta, n, fence, err);
}

static FvStatus get_text(const FvTensorFile *f, const char *key, const char **out, FvError *err) {
    *out = fv_tensors_metadata(f, key);
    if (!*out)
        return FV_FAIL(err, FV_DATA, "%s: is no history (no %s in its metadata)",
                       fv_tensors_path(f), key);
    return FV_OK;
}

static FvStatus get_size(const FvTensorFile *f, const char *key, size_t *out, FvError *err) {
    const char *text;
    char *end = NULL;
    FV_TRY(get_text(f, key, &text, err));
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end || *text == '-' || value > SIZE_MAX)
        return FV_FAIL(err, FV_DATA, "%s: %s is no size: %.40s", fv_tensors_path(f), key, text);
    *out = (size_t)value;
    return FV_OK;
}

static FvStatus get_seconds(const FvTensorFile *f, const char *key, double *out, FvError *err) {
    const char *text;
    char *end = NULL;
    FV_TRY(get_text(f, key, &text, err));
    *out = strtod(text, &end);
    if (end == text || *end)
        return FV_FAIL(err, FV_DATA, "%s: %s is no number: %.40s", fv_tensors_path(f), key, text);
    return FV_OK;
}

static FvStatus get_state(const FvTensorFile *f, FvJobState *out, FvError *err) {
    const char *text;
    FV_TRY(get_text(f, "state", &text, err));
    for (int i = 0; i < STATES; i++) {
        if (strcmp(text, states[i]) == 0) {
            *out = (FvJobState)i;
            return FV_OK;
        }
    }
    return FV_FAIL(err, FV_DATA, "%s: unknown state %.40s", fv_tensors_path(f), text);
}

static FvStatus get_info(const FvTensorFile *f, FvHistory *h, FvJobInfo *info, FvError *err) {
    const char *why, *device;
    FV_TRY(get_state(f, &info->state, err));
    FV_TRY(get_text(f, "why", &why, err));
    FV_TRY(get_text(f, "device", &device, err));
    snprintf(info->why, sizeof info->why, "%s", why);
    snprintf(info->device, sizeof info->device, "%s", device);
#define X(key, member) FV_TRY(get_size(f, key, &member, err));
    SIZES(X)
#undef X
#define X(key, member) FV_TRY(get_seconds(f, key, &member, err));
    SECONDS(X)
#undef X
    return FV_OK;
}

static FvStatus load(const FvTensorFile *f, FvHistory *h, FvJobInfo *info, FvError *err) {
    const char *checksum;
    FV_TRY(get_text(f, "checksum", &checksum, err));
    FV_TRY(fv_tensors_verify(f, err));
    FvHistory size = {0};
    FV_TRY(get_info(f, &size, info, err));
    FV_TRY(fv_history_create(size.capacity_steps, size.capacity_evals, size.capacity_maps,
                             size.clips, size.frames, size.map_clips, size.grid, h, err));
    FvStatus status = fv_history_read(h, f, err);
    if (status != FV_OK)
        fv_history_free(h);
    return status;
}

FvStatus fv_history_load(const char *path, FvHistory *h, FvJobInfo *info, bool *found,
                         FvError *err) {
    *found = false;
    if (access(path, R_OK) != 0)
        return errno == ENOENT
                   ? FV_OK
                   : FV_FAIL(err, FV_IO, "%s: cannot be read: %s", path, strerror(errno));
    FvTensorFile *f;
    FvHistory history = {0};
    FvJobInfo fresh = {0};
    FV_TRY(fv_tensors_open(path, &f, err));
    FvStatus status = load(f, &history, &fresh, err);
    fv_tensors_close(f);
    FV_TRY(status);
    *h = history;
    *info = fresh;
    *found = true;
    return FV_OK;
}
