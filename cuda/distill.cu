/* Operations of self-distillation: unit rows, softmax with temperature and centre, cross-entropy
 * against given probabilities. */
#include <math.h>

#include "cuda/kernel.cuh"

/* --- unit rows: a warp takes a row, a few hundred elements ----------------------------------- */

#define LEAST_NORM 1e-12f /* as torch.nn.functional.normalize */

static __global__ void normalize_row(size_t rows, size_t n, const float *x, float *y, float *norm) {
    size_t r = fv_thread() / FV_WARP, lane = threadIdx.x % FV_WARP;
    if (r >= rows)
        return;
    double squares = 0; /* those of lengths near the least are no floats */
    for (size_t i = r * n + lane; i < (r + 1) * n; i += FV_WARP)
        squares += (double)x[i] * (double)x[i];
    float length = (float)sqrt(fv_warp_sum(squares));
    float scale = 1 / (length <= LEAST_NORM ? LEAST_NORM : length);
    for (size_t i = r * n + lane; i < (r + 1) * n; i += FV_WARP)
        y[i] = x[i] * scale;
    if (lane == 0)
        norm[r] = length;
}

void fv_cuda_normalize(FvBackend *backend, size_t rows, size_t width, const real *x, real *y,
                       real *norm) {
    FV_LAUNCH(fv_cuda(backend), normalize_row, fv_blocks(rows * FV_WARP, FV_BLOCK), FV_BLOCK, 0,
              rows, width, x, y, norm);
}

/* dx = (dy - y (y . dy)) / |x|; below the least norm y = x / least and dx = dy / least. */
static __global__ void normalize_back_row(size_t rows, size_t n, const float *y, const float *norm,
                                          const float *dy, float *dx, bool add) {
    size_t r = fv_thread() / FV_WARP, lane = threadIdx.x % FV_WARP;
    if (r >= rows)
        return;
    float dot = 0;
    for (size_t i = r * n + lane; i < (r + 1) * n; i += FV_WARP)
        dot += y[i] * dy[i];
    dot = fv_warp_sum(dot);
    bool small = norm[r] <= LEAST_NORM;
    float scale = 1 / (small ? LEAST_NORM : norm[r]);
    for (size_t i = r * n + lane; i < (r + 1) * n; i += FV_WARP) {
        float d = scale * (small ? dy[i] : dy[i] - y[i] * dot);
        dx[i] = add ? dx[i] + d : d;
    }
}

void fv_cuda_normalize_back(FvBackend *backend, size_t rows, size_t width, const real *y,
                            const real *norm, const real *dy, real *dx, bool add) {
    FV_LAUNCH(fv_cuda(backend), normalize_back_row, fv_blocks(rows * FV_WARP, FV_BLOCK), FV_BLOCK,
              0, rows, width, y, norm, dy, dx, add);
}

/* --- softmax and cross-entropy: a block takes a row, thousands of elements ------------------- */

/* Whole warps that give each element of a row a thread, at most 16. */
static unsigned row_block(size_t width) {
    return (unsigned)(width < 512 ? (width + FV_WARP - 1) / FV_WARP * FV_WARP : 512);
}

/* p = softmax((x - centre) * scale) of a row, scale > 0; the sum before division is returned, *max
 * is the largest x - centre. Multiplying the difference from it, not each term, makes the largest
 * exponent exactly 0 however the compiler fuses. A thread reads back only what it wrote. */
static __device__ float softmax_row(size_t n, float scale, const float *x, const float *centre,
                                    float *p, float *max) {
    float most = -INFINITY, sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        float d = centre ? x[i] - centre[i] : x[i];
        most = d > most || d != d ? d : most; /* a NaN stays */
    }
    most = fv_block_max(most);
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        p[i] = expf(((centre ? x[i] - centre[i] : x[i]) - most) * scale);
        sum += p[i];
    }
    sum = fv_block_sum(sum);
    float inverse = 1 / sum;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x)
        p[i] *= inverse;
    *max = most;
    return sum;
}

static __global__ void softmax_rows(size_t n, float scale, const float *x, const float *centre,
                                    float *p) {
    size_t first = blockIdx.x * n;
    float max;
    softmax_row(n, scale, x + first, centre, p + first, &max);
}

void fv_cuda_softmax(FvBackend *backend, size_t rows, size_t width, double temperature,
                     const real *x, const real *centre, real *p) {
    FV_LAUNCH(fv_cuda(backend), softmax_rows, (unsigned)rows, row_block(width), 0, width,
              (float)(1 / temperature), x, centre, p);
}

/* loss = sum(target) log(sum exp((x - max) / temperature)) - target . (x - max) / temperature */
static __global__ void cross_entropy_row(size_t n, double scale, const float *x,
                                         const float *target, float *p, double *loss) {
    size_t first = blockIdx.x * n;
    float max;
    float sum = softmax_row(n, (float)scale, x + first, NULL, p + first, &max);
    double weight = 0, dot = 0;
    for (size_t i = first + threadIdx.x; i < first + n; i += blockDim.x) {
        weight += (double)target[i];
        dot += (double)target[i] * ((double)x[i] - (double)max);
    }
    weight = fv_block_sum(weight);
    dot = fv_block_sum(dot);
    if (threadIdx.x == 0)
        loss[blockIdx.x] = weight * log((double)sum) - dot * scale;
}

void fv_cuda_cross_entropy(FvBackend *backend, size_t rows, size_t width, double temperature,
                           const real *x, const real *target, real *p, double *loss) {
    FV_LAUNCH(fv_cuda(backend), cross_entropy_row, (unsigned)rows, row_block(width), 0, width,
              1 / temperature, x, target, p, loss);
}

static __global__ void cross_entropy_back_row(size_t n, float scale, const float *p,
                                              const float *target, float *dx) {
    size_t first = blockIdx.x * n, end = first + n;
    float weight = 0;
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x)
        weight += target[i];
    weight = fv_block_sum(weight);
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x)
        dx[i] = scale * (p[i] * weight - target[i]);
}

void fv_cuda_cross_entropy_back(FvBackend *backend, size_t rows, size_t width, double temperature,
                                double scale, const real *p, const real *target, real *dx) {
    FV_LAUNCH(fv_cuda(backend), cross_entropy_back_row, (unsigned)rows, row_block(width), 0, width,
              (float)(scale / temperature), p, target, dx);
}
