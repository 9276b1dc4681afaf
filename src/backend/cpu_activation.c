/* GELU, ReLU and SwiGLU. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Map {
    FvTiles split;
    const real *x, *u, *dy;
    real *y, *z;
} Map;

FV_SIMD static void gelu_range(size_t n, const real *restrict x, real *restrict y) {
    for (size_t i = 0; i < n; i++)
        y[i] = fv_gelu(x[i]);
}

FV_SIMD static void gelu_back_range(size_t n, const real *x, const real *dy, real *dx) {
    for (size_t i = 0; i < n; i++)
        dx[i] = dy[i] * fv_gelu_slope(x[i]);
}

FV_SIMD static void relu_range(size_t n, const real *x, real *y) {
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] < 0 ? 0 : x[i]; /* a comparison that lets NaN pass */
}

FV_SIMD static void relu_back_range(size_t n, const real *x, const real *dy, real *dx) {
    for (size_t i = 0; i < n; i++)
        dx[i] = x[i] > 0 ? dy[i] : 0;
}

FV_SIMD static void swiglu_range(size_t n, const real *gate, const real *up, real *y) {
    for (size_t i = 0; i < n; i++)
        y[i] = gate[i] * fv_sigmoid(gate[i]) * up[i];
}

FV_SIMD static void swiglu_back_range(size_t n, const real *gate, const real *up, const real *dy,
                                      real *dgate, real *dup) {
    for (size_t i = 0; i < n; i++) {
        real s = fv_sigmoid(gate[i]), d = dy[i], g = gate[i];
        dgate[i] = d * up[i] * (s + g * s * (1 - s));
        dup[i] = d * g * s;
    }
}

static void gelu_tile(void *arg, size_t tile, size_t thread) {
    const Map *m = arg;
    (void)thread;
    size_t at = fv_split_start(&m->split, tile), n = fv_split_length(&m->split, tile);
    if (m->dy)
        gelu_back_range(n, m->x + at, m->dy + at, m->y + at);
    else
        gelu_range(n, m->x + at, m->y + at);
}

static void relu_tile(void *arg, size_t tile, size_t thread) {
    const Map *m = arg;
    (void)thread;
    size_t at = fv_split_start(&m->split, tile), n = fv_split_length(&m->split, tile);
    if (m->dy)
        relu_back_range(n, m->x + at, m->dy + at, m->y + at);
    else
        relu_range(n, m->x + at, m->y + at);
}

static void swiglu_tile(void *arg, size_t tile, size_t thread) {
    const Map *m = arg;
    (void)thread;
    size_t at = fv_split_start(&m->split, tile), n = fv_split_length(&m->split, tile);
    if (m->dy)
        swiglu_back_range(n, m->x + at, m->u + at, m->dy + at, m->y + at, m->z + at);
    else
        swiglu_range(n, m->x + at, m->u + at, m->y + at);
}

static void run(FvBackend *backend, size_t n, FvTile *tile, Map *m) {
    const double ns_per_element = 1.0;
    m->split = fv_split_rows(n, 1);
    fv_cpu_run(fv_cpu(backend), m->split.count, ns_per_element * (double)n, tile, m);
}

void fv_cpu_gelu(FvBackend *backend, size_t n, const real *x, real *y) {
    Map m = {.x = x, .y = y};
    run(backend, n, gelu_tile, &m);
}

void fv_cpu_gelu_back(FvBackend *backend, size_t n, const real *x, const real *dy, real *dx) {
    Map m = {.x = x, .dy = dy, .y = dx};
    run(backend, n, gelu_tile, &m);
}

void fv_cpu_relu(FvBackend *backend, size_t n, const real *x, real *y) {
    Map m = {.x = x, .y = y};
    run(backend, n, relu_tile, &m);
}

void fv_cpu_relu_back(FvBackend *backend, size_t n, const real *x, const real *dy, real *dx) {
    Map m = {.x = x, .dy = dy, .y = dx};
    run(backend, n, relu_tile, &m);
}

void fv_cpu_swiglu(FvBackend *backend, size_t n, const real *gate, const real *up, real *y) {
    Map m = {.x = gate, .u = up, .y = y};
    run(backend, n, swiglu_tile, &m);
}

void fv_cpu_swiglu_back(FvBackend *backend, size_t n, const real *gate, const real *up,
                        const real *dy, real *dgate, real *dup) {
    Map m = {.x = gate, .u = up, .dy = dy, .y = dgate, .z = dup};
    run(backend, n, swiglu_tile, &m);
}
