#include "model/params.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/rng.h"

/* Every parameter starts on a cache line; the padding stays zero in all four blocks. */
static size_t padded(size_t count) {
    const size_t line = FV_ALIGN / sizeof(real);
    return fv_mul(fv_add(count, line - 1) / line, line);
}

void fv_params_add(FvParams *table, FvWeight *weight, FvRole role, FvInit init, double value,
                   const char *name, const size_t *dims, bool channels_last) {
    if (table->count == table->capacity) {
        size_t capacity = table->capacity ? 2 * table->capacity : 64;
        FvParam *list = realloc(table->list, fv_mul(capacity, sizeof *list));
        if (!list) {
            table->out_of_memory = true;
            return;
        }
        table->list = list;
        table->capacity = capacity;
    }
    FvParam *p = &table->list[table->count++];
    *p = (FvParam){.count = 1, .init = init, .value = value, .role = role, .weight = weight};
    snprintf(p->name, sizeof p->name, "%s", name);
    p->channels_last = channels_last;
    for (; p->rank < FV_PARAM_RANK && dims[p->rank]; p->rank++) {
        p->shape[p->rank] = dims[p->rank];
        p->count = fv_mul(p->count, dims[p->rank]);
    }
    p->offset = table->memory;
    table->memory = fv_add(table->memory, padded(p->count));
    table->total = fv_add(table->total, p->count);
    if (role == FV_TRAINED) {
        p->slot = table->trained_memory;
        table->trained_memory = fv_add(table->trained_memory, padded(p->count));
        table->trained = fv_add(table->trained, p->count);
    }
}

void fv_params_bind(FvParams *table, real *w, real *g, real *m, real *v) {
    table->w = w;
    table->g = g;
    table->m = m;
    table->v = v;
    for (size_t i = 0; i < table->count; i++) {
        FvParam *p = &table->list[i];
        p->weight->w = w + p->offset;
        p->weight->g = p->role == FV_TRAINED ? g + p->slot : NULL;
    }
}

FvStatus fv_params_init(FvParams *table, FvBackend *be, uint64_t seed, const bool *set,
                        FvError *err) {
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (set && set[i])
            continue;
        real *values = calloc(p->count, sizeof *values);
        if (!values)
            return FV_FAIL(err, FV_DEVICE, "out of memory for the start values of %s", p->name);
        uint64_t key = fv_stream(seed, p->name);
        for (size_t j = 0; j < p->count; j++) {
            double x = p->value;
            if (p->init == FV_INIT_NORMAL)
                x *= fv_normal(key, j);
            else if (p->init == FV_INIT_UNIFORM)
                x *= 2.0 * fv_uniform(key, j) - 1.0;
            values[j] = (real)x;
        }
        FvStatus status = fv_params_set(table, be, p, FV_BLOCK_W, values, err);
        free(values);
        FV_TRY(status);
    }
    return FV_OK;
}

const FvParam *fv_params_find(const FvParams *table, const char *name) {
    for (size_t i = 0; i < table->count; i++)
        if (strcmp(table->list[i].name, name) == 0)
            return &table->list[i];
    return NULL;
}

static real *block_of(const FvParams *table, const FvParam *p, FvBlock block) {
    switch (block) {
    case FV_BLOCK_W:
        return table->w + p->offset;
    case FV_BLOCK_G:
        return table->g + p->slot;
    case FV_BLOCK_M:
        return table->m + p->slot;
    case FV_BLOCK_V:
        return table->v + p->slot;
    }
    return NULL;
}

/* [a, c, s] to [a, s, c], or back: the two layouts of a convolution. */
static void swap_channels(const FvParam *p, bool to_memory, const real *from, real *to) {
    const size_t *d = p->shape;
    size_t a = p->rank == 4 ? d[0] : 1;
    size_t c = d[p->rank - 3], s = d[p->rank - 2] * d[p->rank - 1];
    for (size_t i = 0; i < a; i++)
        for (size_t j = 0; j < c; j++)
            for (size_t k = 0; k < s; k++) {
                size_t file = (i * c + j) * s + k, memory = (i * s + k) * c + j;
                to[to_memory ? memory : file] = from[to_memory ? file : memory];
            }
}

FvStatus fv_params_get(const FvParams *table, FvBackend *be, const FvParam *p, FvBlock block,
                       real *out, FvError *err) {
    const real *from = block_of(table, p, block);
    if (!p->channels_last) {
        be->ops->download(be, out, from, p->count * sizeof(real));
        return FV_OK;
    }
    real *memory = calloc(p->count, sizeof *memory);
    if (!memory)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", p->name);
    be->ops->download(be, memory, from, p->count * sizeof(real));
    swap_channels(p, false, memory, out);
    free(memory);
    return FV_OK;
}

FvStatus fv_params_set(FvParams *table, FvBackend *be, const FvParam *p, FvBlock block,
                       const real *values, FvError *err) {
    real *to = block_of(table, p, block);
    if (!p->channels_last) {
        be->ops->upload(be, to, values, p->count * sizeof(real));
        if (block == FV_BLOCK_W)
            be->ops->weights_changed(be, p->count, to);
        return FV_OK;
    }
    real *memory = calloc(p->count, sizeof *memory);
    if (!memory)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", p->name);
    swap_channels(p, true, values, memory);
    be->ops->upload(be, to, memory, p->count * sizeof(real));
    if (block == FV_BLOCK_W)
        be->ops->weights_changed(be, p->count, to);
    free(memory);
    return FV_OK;
}

/* Trained parameters that are neighbours in the table are neighbours in all blocks: each run of
 * them is one call. */
void fv_params_update(FvParams *table, FvBackend *be, const FvAdamW *adamw, const double *rates,
                      const double *norm) {
    for (size_t i = 0; i < table->count;) {
        const FvParam *p = &table->list[i++];
        if (p->role != FV_TRAINED)
            continue;
        size_t n = padded(p->count);
        while (i < table->count && table->list[i].role == FV_TRAINED)
            n += padded(table->list[i++].count);
        be->ops->adamw(be, adamw, rates, n, norm, table->g + p->slot, table->w + p->offset,
                       table->m + p->slot, table->v + p->slot);
    }
}

void fv_params_free(FvParams *table) {
    free(table->list);
    *table = (FvParams){0};
}
