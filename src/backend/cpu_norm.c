/* Normalisation of rows: LayerNorm, RMSNorm, and rescaling to a given deviation. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Norm {
    FvSplit split; /* of the rows */
    size_t width;
    real eps, target;
    const real *x, *gamma, *beta, *dy;
    const real *mean_in, *rstd_in;
    real *y, *mean, *rstd; /* y: output, or dx */
    bool add;
    real *part; /* [parts][sums * width]: gradients of gamma, then of beta */
    size_t sums;
} Norm;

static double norm_ns(size_t rows, size_t width) {
    return (double)rows * (10 + 0.25 * (double)width);
}

/* A tile's own partial sums, cleared; NULL when no parameter is trained. */
static real *tile_part(const Norm *o, size_t tile) {
    if (!o->part)
        return NULL;
    real *part = o->part + tile * o->sums * o->width;
    memset(part, 0, o->sums * o->width * sizeof(real));
    return part;
}

/* --- LayerNorm ------------------------------------------------------------------------------- */

FV_SIMD
static void layernorm_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Norm *o = arg;
    size_t width = o->width, begin = fv_split_start(&o->split, tile);
    size_t end = begin + fv_split_length(&o->split, tile);
    for (size_t r = begin; r < end; r++) {
        const real *x = o->x + r * width;
        real *y = o->y + r * width;
        real mean = fv_sum(width, x) / (real)width;
        for (size_t c = 0; c < width; c++)
            y[c] = x[c] - mean;
        real rstd = 1 / (real)sqrt(fv_dot(width, y, y) / (real)width + o->eps);
        for (size_t c = 0; c < width; c++)
            y[c] = y[c] * rstd * o->gamma[c] + o->beta[c];
        o->mean[r] = mean;
        o->rstd[r] = rstd;
    }
}

void fv_cpu_layernorm(FvBackend *backend, size_t rows, size_t width, double eps, const real *x,
                      const real *gamma, const real *beta, real *y, real *mean, real *rstd) {
    Norm o = {.split = fv_split_rows(rows, width),
              .width = width,
              .eps = (real)eps,
              .x = x,
              .gamma = gamma,
              .beta = beta,
              .y = y,
              .mean = mean,
              .rstd = rstd};
    fv_cpu_run(fv_cpu(backend), o.split.count, norm_ns(rows, width), layernorm_tile, &o);
}

/* dx of one row: rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma. `g` and `xhat` are the
 * thread's workspace, [width] each. */
FV_INLINE void layernorm_back_row(const Norm *o, size_t r, real *g, real *xhat, real *dgamma,
                                  real *dbeta) {
    size_t width = o->width;
    const real *x = o->x + r * width, *dy = o->dy + r * width;
    real *dx = o->y + r * width, mean = o->mean_in[r], rstd = o->rstd_in[r];
    for (size_t c = 0; c < width; c++) {
        xhat[c] = (x[c] - mean) * rstd;
        g[c] = dy[c] * o->gamma[c];
    }
    if (dgamma)
        for (size_t c = 0; c < width; c++) {
            dgamma[c] += dy[c] * xhat[c];
            dbeta[c] += dy[c];
        }
    real g_mean = fv_sum(width, g) / (real)width, gx_mean = fv_dot(width, g, xhat) / (real)width;
    if (o->add)
        for (size_t c = 0; c < width; c++)
            dx[c] += rstd * (g[c] - g_mean - xhat[c] * gx_mean);
    else
        for (size_t c = 0; c < width; c++)
            dx[c] = rstd * (g[c] - g_mean - xhat[c] * gx_mean);
}

/* The workspaces of the threads, for tiles that know their thread's number. */
typedef struct NormBack {
    Norm norm;
    const FvScratch *own;
} NormBack;

FV_SIMD
static void layernorm_back_tile(void *arg, size_t tile, size_t thread) {
    const NormBack *back = arg;
    const Norm *o = &back->norm;
    size_t begin = fv_split_start(&o->split, tile);
    size_t end = begin + fv_split_length(&o->split, tile);
    real *g = back->own[thread].data, *xhat = g + o->width, *part = tile_part(o, tile);
    for (size_t r = begin; r < end; r++)
        layernorm_back_row(o, r, g, xhat, part, part ? part + o->width : NULL);
}

/* Workspace, tiles and partial sums of a backward pass. */
static void run_back(FvCpu *cpu, NormBack *back, size_t rows, FvTile *run, real *dgamma,
                     real *dbeta) {
    Norm *o = &back->norm;
    size_t parts = dgamma || dbeta ? o->split.count : 0;
    if (!fv_cpu_workspace(cpu, fv_mul3(2, o->width, sizeof(real)),
                          fv_mul4(parts, o->sums, o->width, sizeof(real))))
        return;
    back->own = cpu->own;
    o->part = parts ? cpu->shared.data : NULL;
    fv_cpu_run(cpu, o->split.count, 1.5 * norm_ns(rows, o->width), run, back);
    if (parts == 0)
        return;
    fv_cpu_add_parts(cpu, parts, o->width, o->sums * o->width, o->part, dgamma);
    fv_cpu_add_parts(cpu, parts, o->width, o->sums * o->width, o->part + o->width, dbeta);
}

void fv_cpu_layernorm_back(FvBackend *backend, size_t rows, size_t width, const real *x,
                           const real *gamma, const real *mean, const real *rstd, const real *dy,
                           real *dx, bool add, real *dgamma, real *dbeta) {
    NormBack back = {.norm = {.split = fv_split_sums(rows, width),
                              .width = width,
                              .x = x,
                              .gamma = gamma,
                              .mean_in = mean,
                              .rstd_in = rstd,
                              .dy = dy,
                              .y = dx,
                              .add = add,
                              .sums = 2}};
    run_back(fv_cpu(backend), &back, rows, layernorm_back_tile, dgamma, dbeta);
}

/* --- RMSNorm --------------------------------------------------------------------------------- */

FV_SIMD
static void rmsnorm_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Norm *o = arg;
    size_t width = o->width, begin = fv_split_start(&o->split, tile);
    size_t end = begin + fv_split_length(&o->split, tile);
    for (size_t r = begin; r < end; r++) {
        const real *x = o->x + r * width;
        real *y = o->y + r * width;
        real rstd = 1 / (real)sqrt(fv_dot(width, x, x) / (real)width + o->eps);
        for (size_t c = 0; c < width; c++)
            y[c] = x[c] * rstd * o->gamma[c];
        o->rstd[r] = rstd;
    }
}

void fv_cpu_rmsnorm(FvBackend *backend, size_t rows, size_t width, double eps, const real *x,
                    const real *gamma, real *y, real *rstd) {
    Norm o = {.split = fv_split_rows(rows, width),
              .width = width,
              .eps = (real)eps,
              .x = x,
              .gamma = gamma,
              .y = y,
              .rstd = rstd};
    fv_cpu_run(fv_cpu(backend), o.split.count, norm_ns(rows, width), rmsnorm_tile, &o);
}

/* dx = rstd (g - xhat mean(g xhat)), g = dy gamma, xhat = x rstd */
FV_SIMD
static void rmsnorm_back_tile(void *arg, size_t tile, size_t thread) {
    const NormBack *back = arg;
    const Norm *o = &back->norm;
    size_t width = o->width, begin = fv_split_start(&o->split, tile);
    size_t end = begin + fv_split_length(&o->split, tile);
    real *g = back->own[thread].data, *xhat = g + width, *part = tile_part(o, tile);
    for (size_t r = begin; r < end; r++) {
        const real *x = o->x + r * width, *dy = o->dy + r * width;
        real *dx = o->y + r * width, rstd = o->rstd_in[r];
        for (size_t c = 0; c < width; c++) {
            xhat[c] = x[c] * rstd;
            g[c] = dy[c] * o->gamma[c];
        }
        if (part)
            for (size_t c = 0; c < width; c++)
                part[c] += dy[c] * xhat[c];
        real gx_mean = fv_dot(width, g, xhat) / (real)width;
        for (size_t c = 0; c < width; c++)
            dx[c] = (o->add ? dx[c] : 0) + rstd * (g[c] - xhat[c] * gx_mean);
    }
}

void fv_cpu_rmsnorm_back(FvBackend *backend, size_t rows, size_t width, const real *x,
                         const real *gamma, const real *rstd, const real *dy, real *dx, bool add,
                         real *dgamma) {
    NormBack back = {.norm = {.split = fv_split_sums(rows, width),
                              .width = width,
                              .x = x,
                              .gamma = gamma,
                              .rstd_in = rstd,
                              .dy = dy,
                              .y = dx,
                              .add = add,
                              .sums = 1}};
    run_back(fv_cpu(backend), &back, rows, rmsnorm_back_tile, dgamma, NULL);
}

/* --- rescale --------------------------------------------------------------------------------- */

static const real rescale_eps = (real)1e-6;

/* Mean of a row, measured from its first element, so that a constant row deviates by exactly 0. */
FV_INLINE real shifted_mean(size_t width, const real *x) {
    real sum = 0;
    for (size_t c = 0; c < width; c++)
        sum += x[c] - x[0];
    return x[0] + sum / (real)width;
}

static void rescale_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Norm *o = arg;
    size_t width = o->width, begin = fv_split_start(&o->split, tile);
    size_t end = begin + fv_split_length(&o->split, tile);
    for (size_t r = begin; r < end; r++) {
        const real *x = o->x + r * width;
        real mean = shifted_mean(width, x), squares = 0;
        for (size_t c = 0; c < width; c++)
            squares += (x[c] - mean) * (x[c] - mean);
        real std = width > 1 ? (real)sqrt(squares / (real)(width - 1)) : 0;
        real factor = o->target / (std + rescale_eps);
        for (size_t c = 0; c < width; c++)
            o->y[r * width + c] = x[c] * factor;
        o->rstd[r] = std;
    }
}

void fv_cpu_rescale(FvBackend *backend, size_t rows, size_t width, double target, const real *x,
                    real *y, real *std) {
    Norm o = {.split = fv_split_rows(rows, width),
              .width = width,
              .target = (real)target,
              .x = x,
              .y = y,
              .rstd = std};
    fv_cpu_run(fv_cpu(backend), o.split.count, 4 * norm_ns(rows, width), rescale_tile, &o);
}

/* r = target / (s + eps), ds/dx = (x - mean) / ((n - 1) s), so
 * dx = r dy - r (x . dy) / (s + eps) * (x - mean) / ((n - 1) s); only r dy where s = 0 */
static void rescale_back_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Norm *o = arg;
    size_t width = o->width, begin = fv_split_start(&o->split, tile);
    size_t end = begin + fv_split_length(&o->split, tile);
    for (size_t r = begin; r < end; r++) {
        const real *x = o->x + r * width, *dy = o->dy + r * width;
        real std = o->rstd_in[r], factor = o->target / (std + rescale_eps);
        real mean = shifted_mean(width, x), slope = 0;
        if (std != 0)
            slope = factor * fv_dot(width, x, dy) / (std + rescale_eps) / ((real)(width - 1) * std);
        for (size_t c = 0; c < width; c++)
            o->y[r * width + c] = factor * dy[c] - slope * (x[c] - mean);
    }
}

void fv_cpu_rescale_back(FvBackend *backend, size_t rows, size_t width, double target,
                         const real *x, const real *std, const real *dy, real *dx) {
    Norm o = {.split = fv_split_rows(rows, width),
              .width = width,
              .target = (real)target,
              .x = x,
              .rstd_in = std,
              .dy = dy,
              .y = dx};
    fv_cpu_run(fv_cpu(backend), o.split.count, 4 * norm_ns(rows, width), rescale_back_tile, &o);
}
