/* Operations of self-distillation (DINO: Caron et al. 2021): unit rows, softmax with temperature
 * and centre, cross-entropy against given probabilities, and the slow copy of weights. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

static const double ns_per_element = 1.5;
static const real least_norm = (real)1e-12; /* as torch.nn.functional.normalize */

typedef struct Distill Distill;

/* An operation on rows r .. end - 1. */
typedef void Rows(const Distill *, size_t r, size_t end);

struct Distill {
    FvTiles split;
    Rows *rows;
    size_t width, n;
    real temperature, scale;
    const real *x, *centre, *y_in, *norm_in, *dy;
    real *y, *norm;
    double *loss;
    bool add;
};

static void tile(void *arg, size_t index, size_t thread) {
    const Distill *t = arg;
    (void)thread;
    size_t r = fv_split_start(&t->split, index);
    t->rows(t, r, r + fv_split_length(&t->split, index));
}

static void run_rows(FvBackend *backend, Distill *t, size_t count, Rows *rows) {
    t->split = fv_split_rows(count, t->width);
    t->rows = rows;
    fv_cpu_run(fv_cpu(backend), t->split.count, ns_per_element * (double)(count * t->width), tile,
               t);
}

/* --- unit rows ------------------------------------------------------------------------------ */

FV_INLINE void normalize_row(size_t n, const real *x, real *y, real *norm) {
    real length = (real)sqrt(fv_ddot(n, x, x));
    real r = 1 / (length > least_norm || length != length ? length : least_norm);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * r;
    *norm = length;
}

FV_SIMD static void normalize_rows(const Distill *t, size_t r, size_t end) {
    for (; r < end; r++)
        normalize_row(t->width, t->x + r * t->width, t->y + r * t->width, t->norm + r);
}

void fv_cpu_normalize(FvBackend *backend, size_t rows, size_t width, const real *x, real *y,
                      real *norm) {
    Distill t = {.width = width, .x = x, .y = y, .norm = norm};
    run_rows(backend, &t, rows, normalize_rows);
}

/* dx = (dy - y (y . dy)) / |x|; below the least norm y = x / least and dx = dy / least. */
FV_INLINE void normalize_back_row(size_t n, const real *y, real norm, const real *dy, real *dx,
                                  bool add) {
    bool small = norm <= least_norm;
    real r = 1 / (small ? least_norm : norm), dot = small ? 0 : fv_dot(n, y, dy);
    if (add)
        for (size_t i = 0; i < n; i++)
            dx[i] += r * (dy[i] - y[i] * dot);
    else
        for (size_t i = 0; i < n; i++)
            dx[i] = r * (dy[i] - y[i] * dot);
}

FV_SIMD static void normalize_back_rows(const Distill *t, size_t r, size_t end) {
    for (; r < end; r++)
        normalize_back_row(t->width, t->y_in + r * t->width, t->norm_in[r], t->dy + r * t->width,
                           t->y + r * t->width, t->add);
}

void fv_cpu_normalize_back(FvBackend *backend, size_t rows, size_t width, const real *y,
                           const real *norm, const real *dy, real *dx, bool add) {
    Distill t = {.width = width, .y_in = y, .norm_in = norm, .dy = dy, .y = dx, .add = add};
    run_rows(backend, &t, rows, normalize_back_rows);
}

/* --- softmax and cross-entropy -------------------------------------------------------------- */

/* p = softmax((x - centre) / temperature); the sum before division is returned, *max the shift. */
FV_INLINE real softmax_row(size_t n, const real *x, const real *centre, real r, real *p,
                           real *max_out) {
    for (size_t i = 0; i < n; i++)
        p[i] = (centre ? x[i] - centre[i] : x[i]) * r;
    real max = fv_max(n, p);
    for (size_t i = 0; i < n; i++)
        p[i] = fv_exp(p[i] - max);
    real sum = fv_sum(n, p), inverse = 1 / sum;
    for (size_t i = 0; i < n; i++)
        p[i] *= inverse;
    *max_out = max;
    return sum;
}

FV_SIMD static void softmax_rows(const Distill *t, size_t r, size_t end) {
    real max;
    for (; r < end; r++)
        softmax_row(t->width, t->x + r * t->width, t->centre, 1 / t->temperature,
                    t->y + r * t->width, &max);
}

void fv_cpu_softmax(FvBackend *backend, size_t rows, size_t width, double temperature,
                    const real *x, const real *centre, real *p) {
    Distill t = {
        .width = width, .temperature = (real)temperature, .x = x, .centre = centre, .y = p};
    run_rows(backend, &t, rows, softmax_rows);
}

/* loss = sum(target) log(sum exp(x / temperature)) - target . x / temperature */
FV_SIMD static void cross_entropy_rows(const Distill *t, size_t r, size_t end) {
    size_t n = t->width;
    for (; r < end; r++) {
        real max, *p = t->y + r * n;
        const real *x = t->x + r * n, *target = t->y_in + r * n;
        double sum = (double)softmax_row(n, x, NULL, 1 / t->temperature, p, &max);
        double weight = (double)fv_sum(n, target);
        t->loss[r] =
            weight * (log(sum) + (double)max) - fv_ddot(n, target, x) / (double)t->temperature;
    }
}

void fv_cpu_cross_entropy(FvBackend *backend, size_t rows, size_t width, double temperature,
                          const real *x, const real *target, real *p, double *loss) {
    Distill t = {.width = width,
                 .temperature = (real)temperature,
                 .x = x,
                 .y_in = target,
                 .y = p,
                 .loss = loss};
    run_rows(backend, &t, rows, cross_entropy_rows);
}

FV_SIMD static void cross_entropy_back_rows(const Distill *t, size_t r, size_t end) {
    size_t n = t->width;
    for (; r < end; r++) {
        const real *p = t->x + r * n, *target = t->y_in + r * n;
        real weight = fv_sum(n, target), *dx = t->y + r * n;
        for (size_t i = 0; i < n; i++)
            dx[i] = t->scale * (p[i] * weight - target[i]);
    }
}

void fv_cpu_cross_entropy_back(FvBackend *backend, size_t rows, size_t width, double temperature,
                               double scale, const real *p, const real *target, real *dx) {
    Distill t = {
        .width = width, .scale = (real)(scale / temperature), .x = p, .y_in = target, .y = dx};
    run_rows(backend, &t, rows, cross_entropy_back_rows);
}

/* --- the slow copy -------------------------------------------------------------------------- */

FV_SIMD static void approach_range(size_t n, real share, const real *x, real *y) {
    for (size_t i = 0; i < n; i++)
        y[i] += share * (x[i] - y[i]);
}

static void approach_tile(void *arg, size_t tile, size_t thread) {
    const Distill *t = arg;
    (void)thread;
    size_t first = fv_split_start(&t->split, tile);
    approach_range(fv_split_length(&t->split, tile), t->scale, t->x + first, t->y + first);
}

void fv_cpu_approach(FvBackend *backend, size_t n, double share, const real *x, real *y) {
    Distill t = {.split = fv_split_rows(n, 1), .scale = (real)share, .x = x, .y = y};
    fv_cpu_run(fv_cpu(backend), t.split.count, 0.3 * (double)n, approach_tile, &t);
}
