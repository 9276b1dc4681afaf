/* LayerNorm, RMSNorm, the rescaling of visual tokens and the residual connection: a warp per row,
 * except for the gradients of the parameters, which are sums over the rows. */
#include "cuda/kernel.cuh"

enum { ROW_WARPS = 4, ROW_BLOCK = ROW_WARPS * FV_WARP };

/* Row of this warp, the same in all its lanes: a warp beyond the last row leaves as a whole. */
static __device__ inline size_t warp_row(void) {
    return fv_thread() / FV_WARP;
}

static __device__ inline size_t warp_lane(void) {
    return threadIdx.x % FV_WARP;
}

/* --- residual -------------------------------------------------------------------------------- */

/* y = (x +) scale * a for one row per block of the grid's x; x, scale NULL: 0, 1 */
static __global__ void scale_add(size_t width, const float *x, const float *scale, const float *a,
                                 float *y) {
    size_t column = (size_t)blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= width)
        return;
    size_t i = (size_t)blockIdx.x * width + column;
    float v = scale ? scale[column] * a[i] : a[i];
    y[i] = x ? x[i] + v : v;
}

void fv_cuda_residual(FvBackend *backend, size_t rows, size_t width, const real *x,
                      const real *scale, const real *a, real *y) {
    FV_LAUNCH(fv_cuda(backend), scale_add, dim3((unsigned)rows, fv_blocks(width, ROW_BLOCK)),
              ROW_BLOCK, 0, width, x, scale, a, y);
}

void fv_cuda_residual_back(FvBackend *backend, size_t rows, size_t width, const real *scale,
                           const real *a, const real *dy, real *da, real *dscale) {
    FvCuda *cuda = fv_cuda(backend);
    if (dscale)
        fv_cuda_add_columns(cuda, rows, width, dy, a, nullptr, nullptr, dscale);
    FV_LAUNCH(cuda, scale_add, dim3((unsigned)rows, fv_blocks(width, ROW_BLOCK)), ROW_BLOCK, 0,
              width, nullptr, scale, dy, da);
}

/* --- LayerNorm ------------------------------------------------------------------------------- */

template <typename T>
static __global__ void layernorm(size_t rows, size_t width, float eps, const float *x,
                                 const float *gamma, const float *beta, T *y, float *mean_out,
                                 float *rstd_out) {
    size_t row = warp_row(), lane = warp_lane();
    if (row >= rows)
        return;
    x += row * width;
    y += row * width;
    float sum = 0, square = 0;
    for (size_t i = lane; i < width; i += FV_WARP)
        sum += x[i];
    float mean = fv_warp_sum(sum) / (float)width;
    for (size_t i = lane; i < width; i += FV_WARP)
        square += (x[i] - mean) * (x[i] - mean);
    float rstd = 1 / sqrtf(fv_warp_sum(square) / (float)width + eps);
    for (size_t i = lane; i < width; i += FV_WARP)
        fv_store(y + i, (x[i] - mean) * rstd * gamma[i] + beta[i]);
    if (lane == 0) {
        mean_out[row] = mean;
        rstd_out[row] = rstd;
    }
}

void fv_cuda_layernorm(FvBackend *backend, size_t rows, size_t width, double eps, const real *x,
                       const real *gamma, const real *beta, real *y, real *mean, real *rstd) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_are_floats(cuda, "layernorm", x, gamma, beta, mean, rstd))
        return;
    fv_with_elements(cuda, y, [&](auto *out) {
        FV_LAUNCH(cuda, layernorm, fv_blocks(rows, ROW_WARPS), ROW_BLOCK, 0, rows, width,
                  (float)eps, x, gamma, beta, out, mean, rstd);
    });
}

/* With h = (x - mean) rstd and g = gamma dy: dx = rstd (g - mean(g) - h mean(g h)). */
static __global__ void layernorm_back(size_t rows, size_t width, const float *x, const float *gamma,
                                      const float *mean_in, const float *rstd_in, const float *dy,
                                      float *dx, bool add) {
    size_t row = warp_row(), lane = warp_lane();
    if (row >= rows)
        return;
    x += row * width;
    dy += row * width;
    dx += row * width;
    float mean = mean_in[row], rstd = rstd_in[row], sum = 0, dot = 0;
    for (size_t i = lane; i < width; i += FV_WARP) {
        float g = gamma[i] * dy[i];
        sum += g;
        dot += g * ((x[i] - mean) * rstd);
    }
    sum = fv_warp_sum(sum) / (float)width;
    dot = fv_warp_sum(dot) / (float)width;
    for (size_t i = lane; i < width; i += FV_WARP) {
        float d = rstd * (gamma[i] * dy[i] - sum - (x[i] - mean) * rstd * dot);
        dx[i] = add ? dx[i] + d : d;
    }
}

void fv_cuda_layernorm_back(FvBackend *backend, size_t rows, size_t width, const real *x,
                            const real *gamma, const real *mean, const real *rstd, const real *dy,
                            real *dx, bool add, real *dgamma, real *dbeta) {
    FvCuda *cuda = fv_cuda(backend);
    if (dgamma)
        fv_cuda_add_columns(cuda, rows, width, dy, x, mean, rstd, dgamma);
    if (dbeta)
        fv_cuda_add_columns(cuda, rows, width, dy, nullptr, nullptr, nullptr, dbeta);
    FV_LAUNCH(cuda, layernorm_back, fv_blocks(rows, ROW_WARPS), ROW_BLOCK, 0, rows, width, x, gamma,
              mean, rstd, dy, dx, add);
}

/* --- RMSNorm --------------------------------------------------------------------------------- */

template <typename T>
static __global__ void rmsnorm(size_t rows, size_t width, float eps, const float *x,
                               const float *gamma, T *y, float *rstd_out) {
    size_t row = warp_row(), lane = warp_lane();
    if (row >= rows)
        return;
    x += row * width;
    y += row * width;
    float square = 0;
    for (size_t i = lane; i < width; i += FV_WARP)
        square += x[i] * x[i];
    float rstd = 1 / sqrtf(fv_warp_sum(square) / (float)width + eps);
    for (size_t i = lane; i < width; i += FV_WARP)
        fv_store(y + i, x[i] * rstd * gamma[i]);
    if (lane == 0)
        rstd_out[row] = rstd;
}

void fv_cuda_rmsnorm(FvBackend *backend, size_t rows, size_t width, double eps, const real *x,
                     const real *gamma, real *y, real *rstd) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_are_floats(cuda, "rmsnorm", x, gamma, rstd))
        return;
    fv_with_elements(cuda, y, [&](auto *out) {
        FV_LAUNCH(cuda, rmsnorm, fv_blocks(rows, ROW_WARPS), ROW_BLOCK, 0, rows, width, (float)eps,
                  x, gamma, out, rstd);
    });
}

/* With h = x rstd and g = gamma dy: dx = rstd (g - h mean(g h)). */
static __global__ void rmsnorm_back(size_t rows, size_t width, const float *x, const float *gamma,
                                    const float *rstd_in, const float *dy, float *dx, bool add) {
    size_t row = warp_row(), lane = warp_lane();
    if (row >= rows)
        return;
    x += row * width;
    dy += row * width;
    dx += row * width;
    float rstd = rstd_in[row], dot = 0;
    for (size_t i = lane; i < width; i += FV_WARP)
        dot += gamma[i] * dy[i] * x[i];
    dot = fv_warp_sum(dot) * (rstd / (float)width);
    for (size_t i = lane; i < width; i += FV_WARP) {
        float d = rstd * (gamma[i] * dy[i] - x[i] * rstd * dot);
        dx[i] = add ? dx[i] + d : d;
    }
}

void fv_cuda_rmsnorm_back(FvBackend *backend, size_t rows, size_t width, const real *x,
                          const real *gamma, const real *rstd, const real *dy, real *dx, bool add,
                          real *dgamma) {
    FvCuda *cuda = fv_cuda(backend);
    if (dgamma)
        fv_cuda_add_columns(cuda, rows, width, dy, x, nullptr, rstd, dgamma);
    FV_LAUNCH(cuda, rmsnorm_back, fv_blocks(rows, ROW_WARPS), ROW_BLOCK, 0, rows, width, x, gamma,
              rstd, dy, dx, add);
}

/* --- rescale --------------------------------------------------------------------------------- */

#define RESCALE_EPS 1e-6

/* Summed from the first element, so that a constant row deviates from its mean by exactly 0. */
static __device__ inline double row_mean(size_t n, const float *x) {
    double sum = 0, first = (double)x[0];
    for (size_t i = warp_lane(); i < n; i += FV_WARP)
        sum += (double)x[i] - first;
    return first + fv_warp_sum(sum) / (double)n;
}

static __global__ void rescale(size_t rows, size_t width, double target, const float *x, float *y,
                               float *std_out) {
    size_t row = warp_row(), lane = warp_lane();
    if (row >= rows)
        return;
    x += row * width;
    y += row * width;
    double mean = row_mean(width, x), square = 0;
    for (size_t i = lane; i < width; i += FV_WARP)
        square += ((double)x[i] - mean) * ((double)x[i] - mean);
    square = fv_warp_sum(square);
    double std = width > 1 ? sqrt(square / (double)(width - 1)) : 0;
    float r = (float)(target / (std + RESCALE_EPS));
    for (size_t i = lane; i < width; i += FV_WARP)
        y[i] = x[i] * r;
    if (lane == 0)
        std_out[row] = (float)std;
}

void fv_cuda_rescale(FvBackend *backend, size_t rows, size_t width, double target, const real *x,
                     real *y, real *std) {
    FV_LAUNCH(fv_cuda(backend), rescale, fv_blocks(rows, ROW_WARPS), ROW_BLOCK, 0, rows, width,
              target, x, y, std);
}

/* r = target / (std + eps): dx = r dy + (dy . x) dr/dstd dstd/dx, dstd/dx = (x - mean) / ((n - 1)
 * std). */
static __global__ void rescale_back(size_t rows, size_t width, double target, const float *x,
                                    const float *std_in, const float *dy, float *dx) {
    size_t row = warp_row(), lane = warp_lane();
    if (row >= rows)
        return;
    x += row * width;
    dy += row * width;
    dx += row * width;
    double mean = row_mean(width, x), std = (double)std_in[row], dot = 0, slope = 0;
    for (size_t i = lane; i < width; i += FV_WARP)
        dot += (double)x[i] * (double)dy[i];
    dot = fv_warp_sum(dot);
    double r = target / (std + RESCALE_EPS);
    if (std > 0 || std != std)
        slope = -dot * r / (std + RESCALE_EPS) / ((double)(width - 1) * std);
    for (size_t i = lane; i < width; i += FV_WARP)
        dx[i] = (float)(r * (double)dy[i] + slope * ((double)x[i] - mean));
}

void fv_cuda_rescale_back(FvBackend *backend, size_t rows, size_t width, double target,
                          const real *x, const real *std, const real *dy, real *dx) {
    FV_LAUNCH(fv_cuda(backend), rescale_back, fv_blocks(rows, ROW_WARPS), ROW_BLOCK, 0, rows, width,
              target, x, std, dy, dx);
}
