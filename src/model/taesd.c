#include "model/taesd.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/memory.h"
#include "model/config.h"

enum {
    LAYERS = 15,
    WIDTH = 64, /* channels between the first and the last convolution */
    CONVS = 3,  /* of a block */
    BUFFERS = 3,
    MAX_FRAMES = 16,                /* at a time */
    BUDGET_BYTES = 64 * 1024 * 1024 /* of activations, where one frame does not need more */
};

typedef struct Layer { /* a block has three convolutions, any other layer one */
    FvWeight w[CONVS], b[CONVS];
} Layer;

struct FvTaesd {
    FvBackend *be;
    size_t size, frames; /* frames: at a time */
    FvParams params;
    Layer layer[LAYERS];
    void *weights, *activations; /* in the backend's memory */
    real *buffer[BUFFERS];       /* [frames, size * size, WIDTH] each */
    real *host;                  /* [frames, size * size, 3] */
};

/* 0 and 14 are plain convolutions, these halve the image and have no bias, all others are blocks.
 */
static bool halves(size_t layer) {
    return layer == 2 || layer == 6 || layer == 10;
}

static bool is_block(size_t layer) {
    return layer != 0 && layer != LAYERS - 1 && !halves(layer);
}

static void add_conv(FvTaesd *t, size_t layer, size_t conv) {
    char stem[FV_PARAM_NAME / 2], name[FV_PARAM_NAME];
    size_t in = layer == 0 ? 3 : WIDTH, out = layer == LAYERS - 1 ? FV_LATENT_CHANNELS : WIDTH;
    if (is_block(layer)) /* activations are numbered too */
        snprintf(stem, sizeof stem, "%zu.conv.%zu", layer, 2 * conv);
    else
        snprintf(stem, sizeof stem, "%zu", layer);
    snprintf(name, sizeof name, "%s.weight", stem);
    fv_params_add(&t->params, &t->layer[layer].w[conv], FV_FROZEN, FV_INIT_CONSTANT, 0, name,
                  (size_t[]){out, in, 3, 3}, true);
    snprintf(name, sizeof name, "%s.bias", stem);
    if (!halves(layer))
        fv_params_add(&t->params, &t->layer[layer].b[conv], FV_FROZEN, FV_INIT_CONSTANT, 0, name,
                      (size_t[]){out, 0}, false);
}

static FvStatus allocate(FvTaesd *t, FvError *err) {
    size_t image = fv_mul(t->size, t->size);
    size_t frame = fv_mul4(BUFFERS, image, WIDTH, sizeof(real));
    t->frames = frame < BUDGET_BYTES ? BUDGET_BYTES / frame : 1;
    if (t->frames > MAX_FRAMES)
        t->frames = MAX_FRAMES;
    const FvOps *ops = t->be->ops;
    FV_TRY(ops->alloc_weights(t->be, t->params.memory, &t->weights, err));
    fv_params_bind(&t->params, t->weights, NULL, NULL, NULL);
    FvArena arena = {0};
    for (int pass = 0; pass < 2; pass++) { /* measures, then carves */
        for (size_t i = 0; i < BUFFERS; i++)
            t->buffer[i] = fv_take(&arena, fv_mul3(t->frames, image, WIDTH));
        if (pass == 0)
            FV_TRY(ops->alloc(t->be, arena.used, &t->activations, err));
        arena = (FvArena){.base = t->activations};
    }
    t->host = calloc(fv_mul3(t->frames, image, 3), sizeof(real));
    if (!t->host)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a frame of %zu x %zu pixels", t->size,
                       t->size);
    return FV_OK;
}

FvStatus fv_taesd_create(FvBackend *be, size_t size, FvTaesd **out, FvError *err) {
    *out = NULL;
    if (size == 0 || size % FV_LATENT_STRIDE)
        return FV_FAIL(err, FV_DATA, "frames of %zu x %zu pixels: TAESD needs a multiple of %d",
                       size, size, FV_LATENT_STRIDE);
    FvTaesd *t = calloc(1, sizeof *t);
    if (!t)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    t->be = be;
    t->size = size;
    for (size_t i = 0; i < LAYERS; i++)
        for (size_t conv = 0; conv < (is_block(i) ? CONVS : 1); conv++)
            add_conv(t, i, conv);
    FvStatus status = t->params.out_of_memory
                          ? FV_FAIL(err, FV_DEVICE, "out of memory for the table of parameters")
                          : allocate(t, err);
    if (status != FV_OK) {
        fv_taesd_destroy(t);
        return status;
    }
    *out = t;
    return FV_OK;
}

void fv_taesd_destroy(FvTaesd *t) {
    if (!t)
        return;
    if (t->weights)
        t->be->ops->release(t->be, t->weights);
    if (t->activations)
        t->be->ops->release(t->be, t->activations);
    fv_params_free(&t->params);
    free(t->host);
    free(t);
}

FvParams *fv_taesd_params(FvTaesd *t) {
    return &t->params;
}

size_t fv_taesd_frames(const FvTaesd *t) {
    return t->frames;
}

/* x = relu(x + conv(relu(conv(relu(conv(x)))))); a, b scratch */
static void block(const FvTaesd *t, const FvConv *s, const Layer *l, real *x, real *a, real *b) {
    FvBackend *be = t->be;
    size_t rows = fv_mul3(s->frames, s->height, s->width), n = fv_mul(rows, WIDTH);
    be->ops->conv(be, s, x, l->w[0].w, l->b[0].w, a);
    be->ops->relu(be, n, a, a);
    be->ops->conv(be, s, a, l->w[1].w, l->b[1].w, b);
    be->ops->relu(be, n, b, b);
    be->ops->conv(be, s, b, l->w[2].w, l->b[2].w, a);
    be->ops->residual(be, rows, WIDTH, x, NULL, a, x);
    be->ops->relu(be, n, x, x);
}

/* Up to t->frames frames, from buffer 0 [frames, size * size, 3]; returns where the latents are,
 * [frames, size/8 * size/8, 4]. */
static const real *forward(const FvTaesd *t, size_t frames) {
    FvBackend *be = t->be;
    real *x = t->buffer[1], *y = t->buffer[0], *z = t->buffer[2];
    FvConv s = {.frames = frames, .height = t->size, .width = t->size, .in = 3, .out = WIDTH};
    for (size_t i = 0; i < LAYERS - 1; i++) {
        const Layer *l = &t->layer[i];
        s.stride = halves(i) ? 2 : 1;
        if (i == 0) {
            be->ops->conv(be, &s, y, l->w[0].w, l->b[0].w, x);
            s.in = WIDTH;
        } else if (halves(i)) {
            be->ops->conv(be, &s, x, l->w[0].w, NULL, y);
            s.height = s.width = fv_conv_side(s.height, s.stride);
            real *old = x;
            x = y;
            y = old;
        } else {
            block(t, &s, l, x, y, z);
        }
    }
    const Layer *last = &t->layer[LAYERS - 1];
    s.out = FV_LATENT_CHANNELS;
    be->ops->conv(be, &s, x, last->w[0].w, last->b[0].w, y);
    return y;
}

FvStatus fv_taesd_encode(FvTaesd *t, size_t frames, const uint8_t *pixels, real *latents,
                         FvError *err) {
    const FvOps *ops = t->be->ops;
    size_t image = fv_mul3(t->size, t->size, 3), side = t->size / FV_LATENT_STRIDE;
    size_t area = fv_mul(side, side);
    for (size_t first = 0, n; first < frames; first += n) {
        n = frames - first < t->frames ? frames - first : t->frames;
        for (size_t i = 0; i < n * image; i++)
            t->host[i] = (real)pixels[first * image + i] / 255;
        ops->upload(t->be, t->buffer[0], t->host, fv_mul3(n, image, sizeof(real)));
        const real *out = forward(t, n);
        ops->download(t->be, t->host, out, fv_mul4(n, area, FV_LATENT_CHANNELS, sizeof(real)));
        FV_TRY(ops->sync(t->be, err));
        for (size_t f = 0; f < n; f++)
            for (size_t c = 0; c < FV_LATENT_CHANNELS; c++)
                for (size_t i = 0; i < area; i++)
                    *latents++ = t->host[(f * area + i) * FV_LATENT_CHANNELS + c];
    }
    return FV_OK;
}
