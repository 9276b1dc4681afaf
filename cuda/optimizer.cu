/* Gradient norm, AdamW (as PyTorch's), and the search for values that are not finite, over all
 * parameters at once: up to 10^8 elements and more. */
#include <math.h>

#include "cuda/kernel.cuh"

/* Enough blocks to fill any GPU several times over; the threads of a grid step through the rest
 * together. */
static const unsigned most_blocks = 4096;

static unsigned grid_blocks(size_t n) {
    unsigned blocks = fv_blocks(n, FV_BLOCK);
    return blocks < most_blocks ? blocks : most_blocks;
}

static __device__ size_t grid_threads(void) {
    return (size_t)gridDim.x * blockDim.x;
}

template <typename T> static __device__ bool is_finite(T x) {
    return x - x == 0;
}

/* --- norm ------------------------------------------------------------------------------------ */

static __global__ void sum_squares(size_t n, const float *x, double *part) {
    double sum = 0;
    for (size_t i = fv_thread(); i < n; i += grid_threads())
        sum += (double)x[i] * (double)x[i];
    sum = fv_block_sum(sum);
    if (threadIdx.x == 0)
        part[blockIdx.x] = sum;
}

static __global__ void root_of_sum(size_t parts, const double *part, double *norm) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < parts; i += blockDim.x)
        sum += part[i];
    sum = fv_block_sum(sum);
    if (threadIdx.x == 0) {
        norm[0] = sqrt(sum);
        norm[1] += 0 * norm[0]; /* NaN from the first bad one on */
    }
}

void fv_cuda_norm(FvBackend *backend, size_t n, const real *x, double *norm) {
    FvCuda *cuda = fv_cuda(backend);
    double *part = (double *)fv_cuda_workspace(cuda, most_blocks * sizeof *part);
    if (!part)
        return;
    unsigned parts = grid_blocks(n);
    FV_LAUNCH(cuda, sum_squares, parts, FV_BLOCK, 0, n, x, part);
    FV_LAUNCH(cuda, root_of_sum, 1, FV_BLOCK, 0, parts, part, norm);
}

/* --- AdamW ----------------------------------------------------------------------------------- */

typedef struct Update {
    double clip_norm, weight_decay;
    float beta1, beta2, rest1, rest2, eps; /* rest: 1 - beta */
} Update;

/* copy: of p, rounded for products, or NULL */
static __global__ void update(Update u, const double *rates, size_t n, const double *norm,
                              const float *g, float *p, float *m, float *v, __nv_bfloat16 *copy) {
    if (!is_finite(norm[0] + norm[1]))
        return;
    double clip = u.clip_norm / (norm[0] + 1e-6);
    float scale = (float)(clip < 1 ? clip : 1), decay = (float)(1 - rates[0] * u.weight_decay);
    float step = (float)(rates[0] / rates[1]), correction = (float)(1 / sqrt(rates[2]));
    for (size_t i = fv_thread(); i < n; i += grid_threads()) {
        float d = g[i] * scale;
        float mean = u.beta1 * m[i] + u.rest1 * d, square = u.beta2 * v[i] + u.rest2 * d * d;
        m[i] = mean;
        v[i] = square;
        p[i] = p[i] * decay - step * mean / (sqrtf(square) * correction + u.eps);
        if (copy)
            fv_store(copy + i, p[i]);
    }
}

void fv_cuda_adamw(FvBackend *backend, const FvAdamW *a, const double *rates, size_t n,
                   const double *norm, const real *g, real *p, real *m, real *v) {
    Update u;
    u.clip_norm = a->clip_norm;
    u.weight_decay = a->weight_decay;
    u.beta1 = (float)a->beta1;
    u.beta2 = (float)a->beta2;
    u.rest1 = (float)(1 - a->beta1);
    u.rest2 = (float)(1 - a->beta2);
    u.eps = (float)a->eps;
    FV_LAUNCH(fv_cuda(backend), update, grid_blocks(n), FV_BLOCK, 0, u, rates, n, norm, g, p, m, v,
              (__nv_bfloat16 *)fv_cuda_copy_of(fv_cuda(backend), p));
}

/* --- values that are not finite -------------------------------------------------------------- */

/* Elements from the first bad one to the end, 0 without one: the largest is the answer. */
typedef unsigned long long Rest;

template <typename T> static __global__ void search_part(size_t n, const T *x, Rest *part) {
    Rest rest = 0;
    for (size_t i = fv_thread(); i < n && rest == 0; i += grid_threads())
        if (!is_finite(fv_load(x + i)))
            rest = n - i;
    rest = fv_block_max(rest);
    if (threadIdx.x == 0)
        part[blockIdx.x] = rest;
}

static __global__ void largest(size_t parts, const Rest *part, Rest *out) {
    Rest rest = 0;
    for (size_t i = threadIdx.x; i < parts; i += blockDim.x)
        rest = part[i] > rest ? part[i] : rest;
    rest = fv_block_max(rest);
    if (threadIdx.x == 0)
        *out = rest;
}

/* After a failure n, and sync() reports it. */
size_t fv_cuda_first_nonfinite(FvBackend *backend, size_t n, const real *x) {
    FvCuda *cuda = fv_cuda(backend);
    Rest rest = 0, *part = (Rest *)fv_cuda_workspace(cuda, (most_blocks + 1) * sizeof *part);
    if (!part)
        return n;
    unsigned parts = grid_blocks(n);
    fv_with_elements(cuda, (real *)(uintptr_t)x, [&](auto *elements) {
        FV_LAUNCH(cuda, search_part, parts, FV_BLOCK, 0, n, elements, part);
    });
    FV_LAUNCH(cuda, largest, 1, FV_BLOCK, 0, parts, part, part + most_blocks);
    fv_cuda_ok(cuda,
               cudaMemcpyAsync(&rest, part + most_blocks, sizeof rest, cudaMemcpyDeviceToHost,
                               cuda->stream),
               "copying from the GPU");
    fv_cuda_ok(cuda, cudaStreamSynchronize(cuda->stream), "waiting for the GPU");
    return n - (size_t)rest;
}
