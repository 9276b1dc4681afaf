/* Times every operation of the backend at the shapes of the small and the seed scale, with one
 * thread and with two, beside the speed of a 1024^3 matrix product in the same run.
 *
 *     bench_ops [NAME]       only operations whose name contains NAME
 *
 * Part of `make bench`. Best of several rounds: other work on the machine only ever adds time. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cblas.h>

#include "backend/backend.h"
#include "base/rng.h"
#include "run/processor.h"

typedef struct Bench {
    FvBackend *be;
    const FvOps *ops;
    real *t[8];       /* random tensors, large enough for every shape */
    double sums[512]; /* of frames and rows */
} Bench;

enum { ELEMENTS = 6500000 }; /* the largest tensors: 4112 x 1536, 16 x 6 x 257 x 257 */

typedef struct Shape {
    size_t a, b, c, d, e; /* meaning by operation, see the calls */
} Shape;

typedef void Run(Bench *, const Shape *);

/* --- calls ------------------------------------------------------------------------------------ */

static void add(Bench *b, const Shape *s) {
    b->ops->add(b->be, s->a * s->b, b->t[0], b->t[7]);
}

static void residual(Bench *b, const Shape *s) {
    b->ops->residual(b->be, s->a, s->b, b->t[0], b->t[1], b->t[2], b->t[7]);
}

static void residual_back(Bench *b, const Shape *s) {
    b->ops->residual_back(b->be, s->a, s->b, b->t[0], b->t[1], b->t[2], b->t[7], b->t[6]);
}

static void gelu(Bench *b, const Shape *s) {
    b->ops->gelu(b->be, s->a * s->b, b->t[0], b->t[7]);
}

static void gelu_back(Bench *b, const Shape *s) {
    b->ops->gelu_back(b->be, s->a * s->b, b->t[0], b->t[1], b->t[7]);
}

static void swiglu(Bench *b, const Shape *s) {
    b->ops->swiglu(b->be, s->a * s->b, b->t[0], b->t[1], b->t[7]);
}

static void layernorm(Bench *b, const Shape *s) {
    b->ops->layernorm(b->be, s->a, s->b, 1e-6, b->t[0], b->t[1], b->t[2], b->t[7], b->t[5],
                      b->t[6]);
}

static void layernorm_back(Bench *b, const Shape *s) {
    b->ops->layernorm_back(b->be, s->a, s->b, b->t[0], b->t[1], b->t[2], b->t[3], b->t[4], b->t[7],
                           false, b->t[5], b->t[6]);
}

static void rmsnorm_back(Bench *b, const Shape *s) {
    b->ops->rmsnorm_back(b->be, s->a, s->b, b->t[0], b->t[1], b->t[2], b->t[3], b->t[7], false,
                         b->t[6]);
}

static void linear(Bench *b, const Shape *s) { /* rows, in, out */
    b->ops->linear(b->be, s->a, s->b, s->c, b->t[0], b->t[1], b->t[2], b->t[7]);
}

static void linear_back(Bench *b, const Shape *s) {
    b->ops->linear_back(b->be, s->a, s->b, s->c, b->t[0], b->t[1], b->t[2], b->t[7], false, b->t[6],
                        b->t[5]);
}

static FvAttention attention_of(const Shape *s) { /* batch, rows = keys, heads, kv heads, width */
    return (FvAttention){s->a, s->b, s->b, s->c, s->d, s->e, 0.1, false, NULL};
}

static void attention(Bench *b, const Shape *s) {
    FvAttention a = attention_of(s);
    b->ops->attention(b->be, &a, b->t[0], b->t[1], b->t[2], b->t[7], b->t[6]);
}

static void attention_back(Bench *b, const Shape *s) {
    FvAttention a = attention_of(s);
    b->ops->attention_back(b->be, &a, b->t[0], b->t[1], b->t[2], b->t[3], b->t[4], b->t[5], b->t[6],
                           b->t[7]);
}

static void query(Bench *b, const Shape *s) { /* frames, keys, heads, width, top_k */
    FvQuery q = {s->a, s->b, s->c, s->d, 0.1, s->e, false};
    b->ops->query(b->be, &q, b->t[0], b->t[1], b->t[2], b->t[7], b->t[6]);
}

static void query_back(Bench *b, const Shape *s) {
    FvQuery q = {s->a, s->b, s->c, s->d, 0.1, s->e, false};
    b->ops->query_back(b->be, &q, b->t[0], b->t[1], b->t[2], b->t[3], b->t[4], NULL, b->t[5],
                       b->t[6], b->t[7]);
}

static void rope(Bench *b, const Shape *s) { /* batch, rows, heads, width */
    b->ops->rope(b->be, s->a, s->b, s->c, s->d, 0, NULL, 10000, false, b->t[7]);
}

static void conv(Bench *b, const Shape *s) { /* frames, side, in, out */
    FvConv c = {s->a, s->b, s->b, s->c, s->d, 1};
    b->ops->conv(b->be, &c, b->t[0], b->t[1], b->t[2], b->t[7]);
}

static void conv_back(Bench *b, const Shape *s) {
    FvConv c = {s->a, s->b, s->b, s->c, s->d, 1};
    b->ops->conv_back(b->be, &c, b->t[0], b->t[1], b->t[2], b->t[7], false, b->t[6], b->t[5]);
}

static void film_back(Bench *b, const Shape *s) { /* frames, positions, channels */
    b->ops->film_back(b->be, s->a, s->b, s->c, b->t[0], b->t[1], b->t[2], b->t[7], false, b->t[6]);
}

static void patchify(Bench *b, const Shape *s) { /* frames, size, patch */
    b->ops->patchify(b->be, s->a, s->b, s->c, (const uint8_t *)b->t[0], b->t[7]);
}

static void tokens_back(Bench *b, const Shape *s) { /* frames, patches, width */
    b->ops->tokens_back(b->be, s->a, s->b, s->c, b->t[0], b->t[7], b->t[6], b->t[5]);
}

static void mse(Bench *b, const Shape *s) {
    b->ops->mse(b->be, s->a, s->b, b->t[0], b->t[1], b->sums);
}

static void entropy(Bench *b, const Shape *s) { /* frames, heads, keys */
    b->ops->entropy(b->be, s->a, s->b, s->c, b->t[4], b->sums);
}

static void norm(Bench *b, const Shape *s) {
    b->ops->norm(b->be, s->a, b->t[0], b->sums);
}

static void adamw(Bench *b, const Shape *s) {
    FvAdamW a = {1e-6, 0.9, 0.999, 1e-8, 0.01, 1, 9};
    double norm[2] = {1, 0}, rates[FV_RATES];
    fv_adamw_rates(&a, rates);
    b->ops->adamw(b->be, &a, rates, s->a, norm, b->t[0], b->t[5], b->t[6], b->t[4]);
}

/* --- what is timed ---------------------------------------------------------------------------- */

typedef struct Case {
    const char *name, *scale;
    Run *run;
    Shape shape;
    double flops; /* of matrix products; 0 where memory and function values are the work */
} Case;

#define LINEAR(scale, rows, in, out)                                                               \
    {"linear", scale, linear, {rows, in, out, 0, 0}, 2.0 * (rows) * (in) * (out)}, {               \
        "linear_back", scale, linear_back, {rows, in, out, 0, 0}, 4.0 * (rows) * (in) * (out)      \
    }
#define CONV(scale, frames, side, in, out)                                                         \
    {"conv",                                                                                       \
     scale,                                                                                        \
     conv,                                                                                         \
     {frames, side, in, out, 0},                                                                   \
     18.0 * (frames) * (side) * (side) * (in) * (out)},                                            \
    {                                                                                              \
        "conv_back", scale, conv_back, {frames, side, in, out, 0},                                 \
            36.0 * (frames) * (side) * (side) * (in) * (out)                                       \
    }
#define ATTENTION(scale, batch, rows, heads, kv, width)                                            \
    {"attention",                                                                                  \
     scale,                                                                                        \
     attention,                                                                                    \
     {batch, rows, heads, kv, width},                                                              \
     4.0 * (batch) * (rows) * (rows) * (heads) * (width)},                                         \
    {                                                                                              \
        "attention_back", scale, attention_back, {batch, rows, heads, kv, width},                  \
            8.0 * (batch) * (rows) * (rows) * (heads) * (width)                                    \
    }
#define PLAIN(name, scale, ...)                                                                    \
    { #name, scale, name, {__VA_ARGS__ }, 0 }

static const Case cases[] = {
    PLAIN(patchify, "small", 16, 64, 8, 0, 0),
    LINEAR("small", 1024, 192, 64),
    PLAIN(tokens_back, "small", 16, 64, 64, 0, 0),
    PLAIN(layernorm, "small", 1040, 64, 0, 0, 0),
    PLAIN(layernorm_back, "small", 1040, 64, 0, 0, 0),
    LINEAR("small", 1040, 64, 64),
    LINEAR("small", 1040, 64, 256),
    LINEAR("small", 1040, 256, 64),
    ATTENTION("small", 16, 65, 4, 4, 16),
    PLAIN(residual, "small", 1040, 64, 0, 0, 0),
    PLAIN(residual_back, "small", 1040, 64, 0, 0, 0),
    PLAIN(add, "small", 1040, 64, 0, 0, 0),
    PLAIN(gelu, "small", 1040, 256, 0, 0, 0),
    PLAIN(gelu_back, "small", 1040, 256, 0, 0, 0),
    PLAIN(query, "small", 16, 65, 4, 16, 0),
    PLAIN(query, "small", 16, 65, 4, 16, 8),
    PLAIN(query_back, "small", 16, 65, 4, 16, 0),
    LINEAR("small", 16, 64, 256),
    LINEAR("small", 20, 64, 64),
    LINEAR("small", 20, 64, 192),
    ATTENTION("small", 2, 10, 4, 2, 16),
    PLAIN(rope, "small", 2, 10, 4, 16, 0),
    PLAIN(rmsnorm_back, "small", 20, 64, 0, 0, 0),
    PLAIN(swiglu, "small", 20, 192, 0, 0, 0),
    LINEAR("small", 16, 64, 512),
    LINEAR("small", 16, 512, 256),
    CONV("small", 16, 8, 4, 32),
    CONV("small", 16, 8, 32, 64),
    CONV("small", 16, 8, 64, 128),
    CONV("small", 16, 8, 128, 64),
    CONV("small", 16, 8, 64, 32),
    CONV("small", 16, 8, 32, 4),
    PLAIN(film_back, "small", 16, 64, 128, 0, 0),
    PLAIN(mse, "small", 16, 256, 0, 0, 0),
    PLAIN(entropy, "small", 16, 4, 65, 0, 0),
    PLAIN(norm, "small", 900000, 0, 0, 0, 0),
    PLAIN(adamw, "small", 900000, 0, 0, 0, 0),
    LINEAR("seed", 4112, 384, 384),
    LINEAR("seed", 4112, 384, 1536),
    LINEAR("seed", 4112, 1536, 384),
    LINEAR("seed", 20, 576, 1536),
    ATTENTION("seed", 16, 257, 6, 6, 64),
    PLAIN(layernorm, "seed", 4112, 384, 0, 0, 0),
    PLAIN(layernorm_back, "seed", 4112, 384, 0, 0, 0),
    PLAIN(gelu_back, "seed", 2056, 1536, 0, 0, 0),
    PLAIN(query, "seed", 16, 257, 6, 64, 0),
    PLAIN(query, "seed", 16, 257, 6, 64, 32),
    PLAIN(query_back, "seed", 16, 257, 6, 64, 0),
    CONV("seed", 16, 28, 4, 64),
    CONV("seed", 16, 28, 64, 128),
    CONV("seed", 16, 28, 128, 256),
    CONV("seed", 16, 28, 256, 128),
    CONV("seed", 16, 28, 64, 4),
    PLAIN(norm, "seed", 4000000, 0, 0, 0, 0),
    PLAIN(adamw, "seed", 4000000, 0, 0, 0, 0),
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of one call: best of rounds of at least 1 ms, for about 30 ms. */
static double seconds_of(Bench *b, const Case *c) {
    c->run(b, &c->shape);
    double start = now();
    c->run(b, &c->shape);
    double once = now() - start, best = once;
    int calls = (int)fmax(1, 1e-3 / fmax(once, 1e-7));
    for (double end = now() + 30e-3; now() < end;) {
        start = now();
        for (int i = 0; i < calls; i++)
            c->run(b, &c->shape);
        best = fmin(best, (now() - start) / calls);
    }
    return best;
}

/* GFLOP/s of one core */
static double gemm_peak(Bench *b) {
    enum { N = 1024 };
    double best = INFINITY;
    for (int i = 0; i < 8; i++) {
        double start = now();
#ifdef FV_DOUBLE
        cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, N, N, N, 1, b->t[0], N, b->t[1], N, 0,
                    b->t[7], N);
#else
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, N, N, N, 1, b->t[0], N, b->t[1], N, 0,
                    b->t[7], N);
#endif
        best = fmin(best, now() - start);
    }
    return 2e-9 * N * N * N / best;
}

static bool start(Bench *b, size_t threads) {
    FvError err;
    if (fv_cpu_backend_create(threads, &b->be, &err) != FV_OK) {
        fprintf(stderr, "bench_ops: %s\n", err.text);
        return false;
    }
    b->ops = b->be->ops;
    for (int i = 0; i < 8; i++) {
        void *p;
        if (b->ops->alloc(b->be, ELEMENTS * sizeof(real), &p, &err) != FV_OK) {
            fprintf(stderr, "bench_ops: %s\n", err.text);
            return false;
        }
        b->t[i] = p;
        for (size_t k = 0; k < ELEMENTS; k++) /* positive and below 1: roots and logs are defined */
            b->t[i][k] = (real)fv_uniform((uint64_t)i, k);
    }
    return true;
}

static void stop(Bench *b) {
    for (int i = 0; i < 8; i++)
        b->ops->release(b->be, b->t[i]);
    fv_backend_destroy(b->be);
}

int main(int argc, char **argv) {
    enum { CASES = sizeof cases / sizeof *cases };
    fv_settle_blas(argv); /* the kernels that the program uses */
    const char *only = argc > 1 ? argv[1] : "";
    static double seconds[2][CASES];
    double peak = 0;
    for (size_t threads = 1; threads <= 2; threads++) {
        Bench b = {0};
        if (!start(&b, threads))
            return EXIT_FAILURE;
        if (threads == 1)
            printf("%s; %s\n", b.be->description, fv_cpu_blas_name());
        peak = fmax(peak, gemm_peak(&b));
        for (size_t i = 0; i < CASES; i++)
            if (strstr(cases[i].name, only))
                seconds[threads - 1][i] = seconds_of(&b, &cases[i]);
        stop(&b);
    }
    printf("1024^3 matrix product: %.0f GFLOP/s a core\n", peak);
    printf("%-16s %-6s %-24s %12s %12s %7s %12s\n", "operation", "scale", "shape", "1 thread us",
           "2 threads us", "faster", "of 2 peaks");
    for (size_t i = 0; i < CASES; i++) {
        const Case *c = &cases[i];
        if (!strstr(c->name, only))
            continue;
        char shape[64];
        snprintf(shape, sizeof shape, "%zu %zu %zu %zu %zu", c->shape.a, c->shape.b, c->shape.c,
                 c->shape.d, c->shape.e);
        printf("%-16s %-6s %-24s %12.1f %12.1f %7.2f", c->name, c->scale, shape,
               1e6 * seconds[0][i], 1e6 * seconds[1][i], seconds[0][i] / seconds[1][i]);
        if (c->flops > 0)
            printf(" %11.0f%%", 100 * c->flops / seconds[1][i] / (2e9 * peak));
        printf("\n");
    }
    return EXIT_SUCCESS;
}
