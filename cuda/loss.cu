/* Losses and measures; sums in double. A block sums a frame, a warp a row of features: the order
 * of a sum depends on its length alone. */
#include <math.h>

#include "cuda/kernel.cuh"

/* --- mean squared error ---------------------------------------------------------------------- */

static __global__ void square_error(size_t n, const float *x, const float *target, double *loss) {
    size_t first = blockIdx.x * n;
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        double d = (double)x[first + i] - (double)target[first + i];
        sum += d * d;
    }
    sum = fv_block_sum(sum);
    if (threadIdx.x == 0)
        loss[blockIdx.x] = sum / (double)n;
}

void fv_cuda_mse(FvBackend *backend, size_t frames, size_t n, const real *x, const real *target,
                 double *loss) {
    FV_LAUNCH(fv_cuda(backend), square_error, (unsigned)frames, FV_BLOCK, 0, n, x, target, loss);
}

static __global__ void square_error_back(size_t n, float scale, const float *x, const float *target,
                                         float *dx) {
    size_t i = fv_thread();
    if (i < n)
        dx[i] = scale * (x[i] - target[i]);
}

void fv_cuda_mse_back(FvBackend *backend, size_t frames, size_t n, double scale, const real *x,
                      const real *target, real *dx) {
    size_t all = frames * n;
    float slope = (float)(2 * scale / (double)n);
    FV_LAUNCH(fv_cuda(backend), square_error_back, fv_blocks(all, FV_BLOCK), FV_BLOCK, 0, all,
              slope, x, target, dx);
}

/* --- cosine ---------------------------------------------------------------------------------- */

#define LEAST_NORMS 1e-8 /* of |x||y| */

typedef struct Products {
    double xx, yy, xy;
} Products;

/* Of two rows, for every lane of a warp. */
static __device__ Products row_products(size_t n, const float *x, const float *y) {
    Products p = {0, 0, 0};
    for (size_t i = threadIdx.x % FV_WARP; i < n; i += FV_WARP) {
        double a = (double)x[i], b = (double)y[i];
        p.xx += a * a;
        p.yy += b * b;
        p.xy += a * b;
    }
    p.xx = fv_warp_sum(p.xx);
    p.yy = fv_warp_sum(p.yy);
    p.xy = fv_warp_sum(p.xy);
    return p;
}

static __global__ void cosine_row(size_t rows, size_t n, const float *x, const float *y,
                                  double *cosine) {
    size_t r = fv_thread() / FV_WARP;
    if (r >= rows)
        return;
    Products p = row_products(n, x + r * n, y + r * n);
    double norms = sqrt(p.xx) * sqrt(p.yy);
    if (threadIdx.x % FV_WARP == 0)
        cosine[r] = p.xy / (norms < LEAST_NORMS ? LEAST_NORMS : norms);
}

void fv_cuda_cosine(FvBackend *backend, size_t rows, size_t width, const real *x, const real *y,
                    double *cosine) {
    FV_LAUNCH(fv_cuda(backend), cosine_row, fv_blocks(rows * FV_WARP, FV_BLOCK), FV_BLOCK, 0, rows,
              width, x, y, cosine);
}

/* dx += a y - b x, dy += a x - c y */
static __global__ void cosine_back_row(size_t rows, size_t n, double scale, const float *x,
                                       const float *y, float *dx, float *dy) {
    size_t r = fv_thread() / FV_WARP, at = r * n;
    if (r >= rows)
        return;
    Products p = row_products(n, x + at, y + at);
    double norms = sqrt(p.xx) * sqrt(p.yy), a = scale / LEAST_NORMS, b = 0, c = 0;
    if (!(norms < LEAST_NORMS)) {
        a = scale / norms;
        b = a * p.xy / p.xx;
        c = a * p.xy / p.yy;
    }
    for (size_t i = at + threadIdx.x % FV_WARP; i < at + n; i += FV_WARP) {
        dx[i] += (float)(a * (double)y[i] - b * (double)x[i]);
        dy[i] += (float)(a * (double)x[i] - c * (double)y[i]);
    }
}

void fv_cuda_cosine_back(FvBackend *backend, size_t rows, size_t width, double scale, const real *x,
                         const real *y, real *dx, real *dy) {
    FV_LAUNCH(fv_cuda(backend), cosine_back_row, fv_blocks(rows * FV_WARP, FV_BLOCK), FV_BLOCK, 0,
              rows, width, scale, x, y, dx, dy);
}

/* --- entropy --------------------------------------------------------------------------------- */

static __global__ void frame_entropy(size_t heads, size_t keys, const float *probs,
                                     double *entropy) {
    size_t n = heads * keys, first = blockIdx.x * n;
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) {
        double p = (double)probs[first + i];
        if (p != 0) /* 0 log 0 = 0 */
            sum -= p * log(p);
    }
    sum = fv_block_sum(sum);
    if (threadIdx.x == 0)
        entropy[blockIdx.x] = sum / (double)heads;
}

void fv_cuda_entropy(FvBackend *backend, size_t frames, size_t heads, size_t keys,
                     const real *probs, double *entropy) {
    FV_LAUNCH(fv_cuda(backend), frame_entropy, (unsigned)frames, FV_BLOCK, 0, heads, keys, probs,
              entropy);
}

static __global__ void frame_entropy_back(size_t n, size_t heads, size_t keys, const float *probs,
                                          const double *dentropy, float *dprobs) {
    size_t i = fv_thread();
    if (i >= n)
        return;
    double p = (double)probs[i], slope = p != 0 ? -(log(p) + 1) / (double)heads : 0;
    dprobs[i] = (float)(dentropy[i / (heads * keys)] * slope);
}

void fv_cuda_entropy_back(FvBackend *backend, size_t frames, size_t heads, size_t keys,
                          const real *probs, const double *dentropy, real *dprobs) {
    size_t n = frames * heads * keys;
    FV_LAUNCH(fv_cuda(backend), frame_entropy_back, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, heads,
              keys, probs, dentropy, dprobs);
}

/* A thread takes a clip: there are few, of few frames. */
static __global__ void clip_hinge(size_t clips, size_t frames, const double *fine,
                                  const double *coarse, double margin, double slope, double *hinge,
                                  double *dfine, double *dcoarse) {
    size_t c = fv_thread(), first = c * frames;
    if (c >= clips)
        return;
    double difference = 0;
    for (size_t t = first; t < first + frames; t++)
        difference += fine[t] - coarse[t];
    double value = difference / (double)frames + margin;
    bool active = !(value <= 0); /* NaN stays visible */
    hinge[c] = active ? value : 0;
    for (size_t t = first; t < first + frames; t++) {
        dfine[t] = active ? slope : 0;
        dcoarse[t] = -dfine[t];
    }
}

void fv_cuda_entropy_hinge(FvBackend *backend, size_t clips, size_t frames, const double *fine,
                           const double *coarse, double margin, double weight, double *hinge,
                           double *dfine, double *dcoarse) {
    double slope = weight / (double)(clips * frames);
    FV_LAUNCH(fv_cuda(backend), clip_hinge, fv_blocks(clips, FV_WARP), FV_WARP, 0, clips, frames,
              fine, coarse, margin, slope, hinge, dfine, dcoarse);
}
