/* Gradient norm, AdamW (Loshchilov and Hutter 2019, as PyTorch's), and the search for values that
 * are not finite. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

#ifdef FV_DOUBLE
#define FV_SQRT sqrt
#else
#define FV_SQRT sqrtf
#endif

enum { CHUNK = 32768 }; /* elements per tile */

typedef struct Update {
    size_t n;
    const real *g;
    real *p, *m, *v;
    double *part;
    real scale, beta1, beta2, rest1, rest2, decay, step, eps, correction; /* rest: 1 - beta */
} Update;

static size_t chunk_length(size_t n, size_t tile) {
    return fv_min(CHUNK, n - tile * CHUNK);
}

FV_SIMD static double squares(size_t n, const real *x) {
    return fv_ddot(n, x, x);
}

static void norm_tile(void *arg, size_t tile, size_t thread) {
    const Update *t = arg;
    (void)thread;
    t->part[tile] = squares(chunk_length(t->n, tile), t->g + tile * CHUNK);
}

void fv_cpu_norm(FvBackend *backend, size_t n, const real *x, double *norm) {
    FvCpu *cpu = fv_cpu(backend);
    size_t tiles = fv_ceil_div(n, CHUNK);
    norm[0] = 0;
    if (!fv_cpu_workspace(cpu, 0, fv_mul(tiles, sizeof(double))))
        return;
    Update t = {.n = n, .g = x, .part = cpu->shared.data};
    fv_cpu_run(cpu, tiles, 0.2 * (double)n, norm_tile, &t);
    for (size_t i = 0; i < tiles; i++)
        norm[0] += t.part[i];
    norm[0] = sqrt(norm[0]);
    norm[1] += 0 * norm[0];
}

FV_SIMD static void adamw_range(const Update *t, size_t n, const real *restrict g, real *restrict p,
                                real *restrict m, real *restrict v) {
    real scale = t->scale, beta1 = t->beta1, beta2 = t->beta2, decay = t->decay, step = t->step;
    real eps = t->eps, correction = t->correction, rest1 = t->rest1, rest2 = t->rest2;
    for (size_t i = 0; i < n; i++) {
        real d = g[i] * scale;
        m[i] = beta1 * m[i] + rest1 * d;
        v[i] = beta2 * v[i] + rest2 * d * d;
        real root = FV_SQRT(v[i]);
        p[i] = p[i] * decay - step * m[i] / (root * correction + eps);
    }
}

static void adamw_tile(void *arg, size_t tile, size_t thread) {
    const Update *t = arg;
    (void)thread;
    size_t at = tile * CHUNK;
    adamw_range(t, chunk_length(t->n, tile), t->g + at, t->p + at, t->m + at, t->v + at);
}

void fv_cpu_adamw(FvBackend *backend, const FvAdamW *a, const double *rates, size_t n,
                  const double *norm, const real *g, real *p, real *m, real *v) {
    if (!isfinite(norm[0] + norm[1]))
        return;
    double clip = a->clip_norm / (norm[0] + 1e-6);
    Update t = {.n = n,
                .g = g,
                .p = p,
                .m = m,
                .v = v,
                .scale = (real)(clip < 1 ? clip : 1),
                .beta1 = (real)a->beta1,
                .beta2 = (real)a->beta2,
                .rest1 = (real)(1 - a->beta1),
                .rest2 = (real)(1 - a->beta2),
                .decay = (real)(1 - rates[0] * a->weight_decay),
                .step = (real)(rates[0] / rates[1]),
                .eps = (real)a->eps,
                .correction = (real)(1 / sqrt(rates[2]))};
    fv_cpu_run(fv_cpu(backend), fv_ceil_div(n, CHUNK), 1.5 * (double)n, adamw_tile, &t);
}

size_t fv_cpu_first_nonfinite(FvBackend *backend, size_t n, const real *x) {
    (void)backend;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return i;
    return n;
}
