/* GELU and SwiGLU, forward and backward. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Elements {
    FvSplit split;
    const real *x, *up, *dy;
    real *y, *dup;
} Elements;

FV_SIMD
static void gelu_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Elements *o = arg;
    size_t start = fv_split_start(&o->split, tile), n = fv_split_length(&o->split, tile);
    const real *x = o->x + start;
    real *y = o->y + start;
    for (size_t i = 0; i < n; i++)
        y[i] = fv_gelu(x[i]);
}

void fv_cpu_gelu(FvBackend *backend, size_t n, const real *x, real *y) {
    Elements o = {.split = fv_split_rows(n, 2), .x = x, .y = y};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.8 * (double)n, gelu_tile, &o);
}

FV_SIMD
static void gelu_back_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Elements *o = arg;
    size_t start = fv_split_start(&o->split, tile), n = fv_split_length(&o->split, tile);
    const real *x = o->x + start, *dy = o->dy + start;
    real *dx = o->y + start;
    for (size_t i = 0; i < n; i++)
        dx[i] = dy[i] * fv_gelu_slope(x[i]);
}

void fv_cpu_gelu_back(FvBackend *backend, size_t n, const real *x, const real *dy, real *dx) {
    Elements o = {.split = fv_split_rows(n, 2), .x = x, .dy = dy, .y = dx};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.8 * (double)n, gelu_back_tile, &o);
}

FV_SIMD
static void swiglu_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Elements *o = arg;
    size_t start = fv_split_start(&o->split, tile), n = fv_split_length(&o->split, tile);
    const real *gate = o->x + start, *up = o->up + start;
    real *y = o->y + start;
    for (size_t i = 0; i < n; i++)
        y[i] = gate[i] * fv_sigmoid(gate[i]) * up[i];
}

void fv_cpu_swiglu(FvBackend *backend, size_t n, const real *gate, const real *up, real *y) {
    Elements o = {.split = fv_split_rows(n, 2), .x = gate, .up = up, .y = y};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.7 * (double)n, swiglu_tile, &o);
}

/* silu'(g) = s + g s (1 - s), s the sigmoid */
FV_SIMD
static void swiglu_back_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Elements *o = arg;
    size_t start = fv_split_start(&o->split, tile), n = fv_split_length(&o->split, tile);
    const real *gate = o->x + start, *up = o->up + start, *dy = o->dy + start;
    real *dgate = o->y + start, *dup = o->dup + start;
    for (size_t i = 0; i < n; i++) {
        real g = gate[i], d = dy[i], s = fv_sigmoid(g), silu = g * s;
        real slope = s + silu * (1 - s);
        real u = up[i];
        dup[i] = d * silu;
        dgate[i] = d * u * slope;
    }
}

void fv_cpu_swiglu_back(FvBackend *backend, size_t n, const real *gate, const real *up,
                        const real *dy, real *dgate, real *dup) {
    Elements o = {
        .split = fv_split_rows(n, 2), .x = gate, .up = up, .dy = dy, .y = dgate, .dup = dup};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.8 * (double)n, swiglu_back_tile, &o);
}
