/* LayerNorm, RMSNorm and the rescaling of visual tokens; one row at a time. */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

static const double ns_per_element = 0.5;

typedef struct Norm {
    FvTiles split;
    size_t width;
    double eps; /* rescale: the target */
    const real *x, *gamma, *beta, *mean_in, *rstd_in, *dy;
    real *y, *mean, *rstd, *dgamma, *dbeta; /* dgamma, dbeta: partial sums [parts, width] */
    bool add;
} Norm;

/* --- LayerNorm ------------------------------------------------------------------------------ */

FV_SIMD static void layernorm_row(size_t n, real eps, const real *x, const real *gamma,
                                  const real *beta, real *y, real *mean_out, real *rstd_out) {
    real mean = fv_sum(n, x) / (real)n;
    FvLanes s = {0};
    size_t i = 0;
    for (; i + FV_LANES <= n; i += FV_LANES) {
        FvLanes d = *(const FvLanes *)(x + i) - mean;
        s += d * d;
    }
    real sum = fv_lanes_sum(&s);
    for (; i < n; i++)
        sum += (x[i] - mean) * (x[i] - mean);
    real rstd = 1 / (real)sqrt((double)(sum / (real)n + eps));
    for (i = 0; i < n; i++)
        y[i] = (x[i] - mean) * rstd * gamma[i] + beta[i];
    *mean_out = mean;
    *rstd_out = rstd;
}

static void layernorm_tile(void *arg, size_t tile, size_t thread) {
    const Norm *t = arg;
    (void)thread;
    size_t r = fv_split_start(&t->split, tile), end = r + fv_split_length(&t->split, tile);
    for (; r < end; r++)
        layernorm_row(t->width, (real)t->eps, t->x + r * t->width, t->gamma, t->beta,
                      t->y + r * t->width, t->mean + r, t->rstd + r);
}

void fv_cpu_layernorm(FvBackend *backend, size_t rows, size_t width, double eps, const real *x,
                      const real *gamma, const real *beta, real *y, real *mean, real *rstd) {
    Norm t = {.split = fv_split_rows(rows, width),
              .width = width,
              .eps = eps,
              .x = x,
              .gamma = gamma,
              .beta = beta,
              .y = y,
              .mean = mean,
              .rstd = rstd};
    fv_cpu_run(fv_cpu(backend), t.split.count, ns_per_element * (double)(rows * width),
               layernorm_tile, &t);
}

/* With h = (x - mean) rstd and g = gamma dy: dx = rstd (g - mean(g) - h mean(g h)). */
FV_SIMD static void layernorm_back_row(size_t n, const real *x, const real *gamma, real mean,
                                       real rstd, const real *dy, real *dx, bool add, real *dgamma,
                                       real *dbeta) {
    FvLanes sg = {0}, sgh = {0};
    size_t i = 0;
    for (; i + FV_LANES <= n; i += FV_LANES) {
        FvLanes g = *(const FvLanes *)(gamma + i) * *(const FvLanes *)(dy + i);
        sg += g;
        sgh += g * ((*(const FvLanes *)(x + i) - mean) * rstd);
    }
    real sum = fv_lanes_sum(&sg), dot = fv_lanes_sum(&sgh);
    for (; i < n; i++) {
        real g = gamma[i] * dy[i];
        sum += g;
        dot += g * ((x[i] - mean) * rstd);
    }
    sum /= (real)n;
    dot /= (real)n;
    for (i = 0; dgamma && i < n; i++)
        dgamma[i] += dy[i] * ((x[i] - mean) * rstd);
    for (i = 0; dbeta && i < n; i++)
        dbeta[i] += dy[i];
    if (add)
        for (i = 0; i < n; i++)
            dx[i] += rstd * (gamma[i] * dy[i] - sum - (x[i] - mean) * rstd * dot);
    else
        for (i = 0; i < n; i++)
            dx[i] = rstd * (gamma[i] * dy[i] - sum - (x[i] - mean) * rstd * dot);
}

static real *clear_part(real *parts, size_t tile, size_t width) {
    if (!parts)
        return NULL;
    return memset(parts + tile * width, 0, width * sizeof(real));
}

static void layernorm_back_tile(void *arg, size_t tile, size_t thread) {
    const Norm *t = arg;
    (void)thread;
    size_t r = fv_split_start(&t->split, tile), end = r + fv_split_length(&t->split, tile);
    real *dgamma = clear_part(t->dgamma, tile, t->width);
    real *dbeta = clear_part(t->dbeta, tile, t->width);
    for (; r < end; r++)
        layernorm_back_row(t->width, t->x + r * t->width, t->gamma, t->mean_in[r], t->rstd_in[r],
                           t->dy + r * t->width, t->y + r * t->width, t->add, dgamma, dbeta);
}

void fv_cpu_layernorm_back(FvBackend *backend, size_t rows, size_t width, const real *x,
                           const real *gamma, const real *mean, const real *rstd, const real *dy,
                           real *dx, bool add, real *dgamma, real *dbeta) {
    FvCpu *cpu = fv_cpu(backend);
    Norm t = {.split = fv_split_sums(rows, width),
              .width = width,
              .x = x,
              .gamma = gamma,
              .mean_in = mean,
              .rstd_in = rstd,
              .dy = dy,
              .y = dx,
              .add = add};
    size_t parts = t.split.count, values = fv_mul(parts, width);
    if (!fv_cpu_workspace(cpu, 0, fv_mul3(2, values, sizeof(real))))
        return;
    t.dgamma = dgamma ? cpu->shared.data : NULL;
    t.dbeta = dbeta ? (real *)cpu->shared.data + values : NULL;
    fv_cpu_run(cpu, parts, 2 * ns_per_element * (double)(rows * width), layernorm_back_tile, &t);
    if (dgamma)
        fv_cpu_add_parts(cpu, parts, width, width, t.dgamma, dgamma);
    if (dbeta)
        fv_cpu_add_parts(cpu, parts, width, width, t.dbeta, dbeta);
}

/* --- RMSNorm -------------------------------------------------------------------------------- */

FV_SIMD static void rmsnorm_row(size_t n, real eps, const real *x, const real *gamma, real *y,
                                real *rstd_out) {
    real rstd = 1 / (real)sqrt((double)(fv_dot(n, x, x) / (real)n + eps));
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * rstd * gamma[i];
    *rstd_out = rstd;
}

static void rmsnorm_tile(void *arg, size_t tile, size_t thread) {
    const Norm *t = arg;
    (void)thread;
    size_t r = fv_split_start(&t->split, tile), end = r + fv_split_length(&t->split, tile);
    for (; r < end; r++)
        rmsnorm_row(t->width, (real)t->eps, t->x + r * t->width, t->gamma, t->y + r * t->width,
                    t->rstd + r);
}

void fv_cpu_rmsnorm(FvBackend *backend, size_t rows, size_t width, double eps, const real *x,
                    const real *gamma, real *y, real *rstd) {
    Norm t = {.split = fv_split_rows(rows, width),
              .width = width,
              .eps = eps,
              .x = x,
              .gamma = gamma,
              .y = y,
              .rstd = rstd};
    fv_cpu_run(fv_cpu(backend), t.split.count, ns_per_element * (double)(rows * width),
               rmsnorm_tile, &t);
}

/* With h = x rstd and g = gamma dy: dx = rstd (g - h mean(g h)). */
FV_SIMD static void rmsnorm_back_row(size_t n, const real *x, const real *gamma, real rstd,
                                     const real *dy, real *dx, bool add, real *dgamma) {
    FvLanes s = {0};
    size_t i = 0;
    for (; i + FV_LANES <= n; i += FV_LANES)
        s += *(const FvLanes *)(gamma + i) * *(const FvLanes *)(dy + i) * *(const FvLanes *)(x + i);
    real dot = fv_lanes_sum(&s);
    for (; i < n; i++)
        dot += gamma[i] * dy[i] * x[i];
    dot *= rstd / (real)n;
    for (i = 0; dgamma && i < n; i++)
        dgamma[i] += dy[i] * (x[i] * rstd);
    if (add)
        for (i = 0; i < n; i++)
            dx[i] += rstd * (gamma[i] * dy[i] - x[i] * rstd * dot);
    else
        for (i = 0; i < n; i++)
            dx[i] = rstd * (gamma[i] * dy[i] - x[i] * rstd * dot);
}

static void rmsnorm_back_tile(void *arg, size_t tile, size_t thread) {
    const Norm *t = arg;
    (void)thread;
    size_t r = fv_split_start(&t->split, tile), end = r + fv_split_length(&t->split, tile);
    real *dgamma = clear_part(t->dgamma, tile, t->width);
    for (; r < end; r++)
        rmsnorm_back_row(t->width, t->x + r * t->width, t->gamma, t->rstd_in[r],
                         t->dy + r * t->width, t->y + r * t->width, t->add, dgamma);
}

void fv_cpu_rmsnorm_back(FvBackend *backend, size_t rows, size_t width, const real *x,
                         const real *gamma, const real *rstd, const real *dy, real *dx, bool add,
                         real *dgamma) {
    FvCpu *cpu = fv_cpu(backend);
    Norm t = {.split = fv_split_sums(rows, width),
              .width = width,
              .x = x,
              .gamma = gamma,
              .rstd_in = rstd,
              .dy = dy,
              .y = dx,
              .add = add};
    if (!fv_cpu_workspace(cpu, 0, fv_mul3(t.split.count, width, sizeof(real))))
        return;
    t.dgamma = dgamma ? cpu->shared.data : NULL;
    fv_cpu_run(cpu, t.split.count, 2 * ns_per_element * (double)(rows * width), rmsnorm_back_tile,
               &t);
    if (dgamma)
        fv_cpu_add_parts(cpu, t.split.count, width, width, t.dgamma, dgamma);
}

/* --- rescale -------------------------------------------------------------------------------- */

static const double rescale_eps = 1e-6;

/* Summed from the first element, so that a constant row deviates from its mean by exactly 0. */
FV_INLINE double row_mean(size_t n, const real *x) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] - (double)x[0];
    return (double)x[0] + sum / (double)n;
}

FV_SIMD static void rescale_row(size_t n, double target, const real *x, real *y, real *std_out) {
    double mean = row_mean(n, x), square = 0;
    for (size_t i = 0; i < n; i++)
        square += ((double)x[i] - mean) * ((double)x[i] - mean);
    double std = n > 1 ? sqrt(square / (double)(n - 1)) : 0;
    real r = (real)(target / (std + rescale_eps));
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * r;
    *std_out = (real)std;
}

void fv_cpu_rescale(FvBackend *backend, size_t rows, size_t width, double target, const real *x,
                    real *y, real *std) {
    (void)backend;
    for (size_t r = 0; r < rows; r++)
        rescale_row(width, target, x + r * width, y + r * width, std + r);
}

/* r = target / (std + eps): dx = r dy + (dy . x) dr/dstd dstd/dx, dstd/dx = (x - mean) / ((n - 1)
 * std). */
FV_SIMD static void rescale_back_row(size_t n, double target, const real *x, double std,
                                     const real *dy, real *dx) {
    double mean = row_mean(n, x), dot = fv_ddot(n, x, dy), slope = 0;
    double r = target / (std + rescale_eps);
    if (std > 0 || std != std)
        slope = -dot * r / (std + rescale_eps) / ((double)(n - 1) * std);
    for (size_t i = 0; i < n; i++)
        dx[i] = (real)(r * (double)dy[i] + slope * ((double)x[i] - mean));
}

void fv_cpu_rescale_back(FvBackend *backend, size_t rows, size_t width, double target,
                         const real *x, const real *std, const real *dy, real *dx) {
    (void)backend;
    for (size_t r = 0; r < rows; r++)
        rescale_back_row(width, target, x + r * width, (double)std[r], dy + r * width,
                         dx + r * width);
}
