/* Frames per second of the encoder's forward pass at the study's seed scale (DINOv2 ViT-S/14, 224
 * pixels, 8 frames at once, random weights): bench_encoder THREADS SECONDS */
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "model/encoder.h"

static FvStatus run(size_t threads, double seconds, FvError *err) {
    FvEncoderWeights w = {0};
    FvParams params = {0};
    FvArena arena = {0};
    FvEncoder e = {.v = {8, 224, 14, 384, 6, 12, 1536}, .w = &w, .whole = true};
    FvBackend *be;
    void *memory, *acts, *operands, *pixels;
    size_t frames = 0, bytes = e.v.frames * e.v.size * e.v.size * 3;
    FV_TRY(fv_cpu_backend_create(threads, &be, err));
    FV_TRY(fv_encoder_weights_create(&w, e.v.layers, err));
    FV_TRY(fv_encoder_create(&e, err));
    fv_encoder_params(&w, &e.v, FV_FROZEN, false, "", &params);
    fv_encoder_carve(&e, &arena);
    FV_TRY(be->ops->alloc_weights(be, params.memory, &memory, err));
    FV_TRY(be->ops->alloc(be, arena.used, &acts, err));
    FV_TRY(be->ops->alloc_operands(be, arena.operands_used, &operands, err));
    FV_TRY(be->ops->alloc(be, bytes, &pixels, err));
    fv_params_bind(&params, memory, NULL, NULL, NULL);
    arena = (FvArena){.base = acts, .operands = operands, .operand_bytes = be->operand_bytes};
    fv_encoder_carve(&e, &arena);
    e.pos = w.pos;
    FV_TRY(fv_params_init(&params, be, 1, NULL, err));
    fv_encoder_forward(&e, be, pixels); /* warms up */
    FV_TRY(be->ops->sync(be, err));
    double start = fv_now(), now;
    do {
        fv_encoder_forward(&e, be, pixels);
        FV_TRY(be->ops->sync(be, err));
        frames += e.v.frames;
        now = fv_now();
    } while (now - start < seconds);
    printf("fovea encoder threads %zu: %.2f frames/s\n", threads, (double)frames / (now - start));
    be->ops->release(be, memory);
    be->ops->release(be, acts);
    be->ops->release(be, operands);
    be->ops->release(be, pixels);
    fv_params_free(&params);
    fv_encoder_free(&e);
    fv_encoder_weights_free(&w);
    fv_backend_destroy(be);
    return FV_OK;
}

int main(int argc, char **argv) {
    FvError err;
    size_t threads = argc > 1 ? (size_t)strtoul(argv[1], NULL, 10) : 1;
    FvStatus status = run(threads ? threads : 1, argc > 2 ? strtod(argv[2], NULL) : 5, &err);
    if (status != FV_OK)
        fprintf(stderr, "bench_encoder: %s\n", err.text);
    return (int)status;
}
