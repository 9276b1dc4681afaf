/* Frames per second of the encoder at the study's seed scale (DINOv2 ViT-S/14, 224 pixels, random
 * weights and frames), its forward pass, and forward with backward:
 *
 *     bench_encoder THREADS SECONDS [FRAMES]
 *
 * FRAMES (8) at once. Built with the CUDA backend (build/gpu), it runs on the GPU in bf16. */
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/rng.h"
#include "model/encoder.h"

#ifdef FV_CUDA
#include "cuda/cuda_backend.h"

static FvStatus open_backend(size_t threads, FvBackend **out, FvError *err) {
    const FvCudaOptions options = {.bf16 = true};
    (void)threads;
    return fv_cuda_backend_create(&options, out, err);
}
#else
static FvStatus open_backend(size_t threads, FvBackend **out, FvError *err) {
    return fv_cpu_backend_create(threads, out, err);
}
#endif

typedef struct Bench {
    FvBackend *be;
    FvEncoder e;
    FvEncoderWeights w;
    FvParams params;
    void *memory, *gradients, *acts, *operands, *pixels, *dfeatures;
    size_t features; /* elements of dfeatures */
} Bench;

static FvStatus make(Bench *b, FvError *err) {
    const FvVit *v = &b->e.v;
    FvArena arena = {0};
    size_t bytes = v->frames * v->size * v->size * 3;
    FV_TRY(fv_encoder_weights_create(&b->w, v->layers, err));
    FV_TRY(fv_encoder_create(&b->e, err));
    fv_encoder_params(&b->w, v, b->e.trained ? FV_TRAINED : FV_FROZEN, false, "", &b->params);
    fv_encoder_carve(&b->e, &arena);
    b->features = v->frames * fv_vit_tokens(v) * v->width;
    FV_TRY(b->be->ops->alloc_weights(b->be, b->params.memory, &b->memory, err));
    FV_TRY(b->be->ops->alloc(b->be, b->params.trained_memory * sizeof(real), &b->gradients, err));
    FV_TRY(b->be->ops->alloc(b->be, arena.used, &b->acts, err));
    FV_TRY(b->be->ops->alloc_operands(b->be, arena.operands_used, &b->operands, err));
    FV_TRY(b->be->ops->alloc(b->be, bytes, &b->pixels, err));
    FV_TRY(b->be->ops->alloc(b->be, b->features * sizeof(real), &b->dfeatures, err));
    fv_params_bind(&b->params, b->memory, b->gradients, NULL, NULL);
    arena =
        (FvArena){.base = b->acts, .operands = b->operands, .operand_bytes = b->be->operand_bytes};
    fv_encoder_carve(&b->e, &arena);
    b->e.pos = b->w.pos;
    return fv_params_init(&b->params, b->be, 1, NULL, err);
}

/* Random values: on zeros processors run faster. */
static FvStatus fill(Bench *b, FvError *err) {
    const FvVit *v = &b->e.v;
    size_t bytes = v->frames * v->size * v->size * 3;
    uint8_t *pixels = malloc(bytes);
    real *d = malloc(b->features * sizeof *d);
    if (pixels && d) {
        for (size_t i = 0; i < bytes; i++)
            pixels[i] = (uint8_t)fv_random(1, i);
        for (size_t i = 0; i < b->features; i++)
            d[i] = (real)(fv_uniform(2, i) - 0.5);
        b->be->ops->upload(b->be, b->pixels, pixels, bytes);
        b->be->ops->upload(b->be, b->dfeatures, d, b->features * sizeof *d);
    }
    free(pixels);
    free(d);
    return pixels && d ? b->be->ops->sync(b->be, err) : FV_FAIL(err, FV_DEVICE, "out of memory");
}

static void pass(Bench *b) {
    fv_encoder_forward(&b->e, b->be, b->pixels);
    if (b->e.trained) {
        b->be->ops->copy(b->be, b->features, b->dfeatures, b->e.dfeatures);
        fv_encoder_backward(&b->e, b->be);
    }
}

/* Waits after every pass, as a step does. */
static FvStatus measure(Bench *b, double seconds, double *rate, FvError *err) {
    size_t frames = 0;
    double start = 0, now;
    pass(b); /* warms up */
    FV_TRY(b->be->ops->sync(b->be, err));
    start = fv_now();
    do {
        pass(b);
        FV_TRY(b->be->ops->sync(b->be, err));
        frames += b->e.v.frames;
        now = fv_now();
    } while (now - start < seconds);
    *rate = (double)frames / (now - start);
    return FV_OK;
}

static void release(Bench *b) {
    void *blocks[] = {b->memory, b->gradients, b->acts, b->operands, b->pixels, b->dfeatures};
    for (size_t i = 0; b->be && i < sizeof blocks / sizeof *blocks; i++)
        if (blocks[i])
            b->be->ops->release(b->be, blocks[i]);
    fv_params_free(&b->params);
    fv_encoder_free(&b->e);
    fv_encoder_weights_free(&b->w);
    fv_backend_destroy(b->be);
}

static FvStatus run(size_t threads, double seconds, size_t frames, bool trained, FvError *err) {
    Bench b = {.e = {.v = {frames, 224, 14, 384, 6, 12, 1536}, .whole = true, .trained = trained}};
    double rate = 0;
    b.e.w = &b.w;
    FvStatus status = open_backend(threads, &b.be, err);
    if (status == FV_OK)
        status = make(&b, err);
    if (status == FV_OK)
        status = fill(&b, err);
    if (status == FV_OK)
        status = measure(&b, seconds, &rate, err);
    if (status == FV_OK)
        printf("fovea %s threads %zu: %.2f frames/s\n", trained ? "both" : "encoder", threads,
               rate);
    release(&b);
    return status;
}

int main(int argc, char **argv) {
    FvError err = {0};
    size_t threads = argc > 1 ? (size_t)strtoul(argv[1], NULL, 10) : 1;
    double seconds = argc > 2 ? strtod(argv[2], NULL) : 5;
    size_t frames = argc > 3 ? (size_t)strtoul(argv[3], NULL, 10) : 8;
    FvStatus status = run(threads ? threads : 1, seconds, frames ? frames : 8, false, &err);
    if (status == FV_OK && argc > 3)
        status = run(threads ? threads : 1, seconds, frames ? frames : 8, true, &err);
    if (status != FV_OK)
        fprintf(stderr, "bench_encoder: %s\n", err.text);
    return (int)status;
}
