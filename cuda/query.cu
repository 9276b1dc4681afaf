/* The foveated query: one row of attention per frame and head, by one block. The block owns its
 * rows of probs, dk and dv, and its row of probs (ds in the backward pass) is also where the scores
 * are: a few kilobytes that stay in the cache, without a limit on the number of keys. It computes
 * in float in both modes; only `out` may be an operand tensor. */
#include <math.h>
#include <string.h>

#include "cuda/kernel.cuh"

enum { THREADS = FV_BLOCK, WARPS = THREADS / FV_WARP };

/* y[j] = scale * x . rows[j] + more[j] for every key, more NULL for 0; a warp per key. */
static __device__ void dots(const FvQuery &s, float scale, const float *x, const float *rows,
                            const float *more, float *y) {
    size_t warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    for (size_t j = warp; j < s.keys; j += WARPS) {
        const float *row = rows + j * s.heads * s.width;
        float dot = 0;
        for (size_t i = lane; i < s.width; i += FV_WARP)
            dot += x[i] * row[i];
        dot = fv_warp_sum(dot);
        if (lane == 0)
            y[j] = scale * dot + (more ? more[j] : 0);
    }
    __syncthreads();
}

/* y = scale * sum over keys of p[j] * rows[j]: each warp sums every WARPS-th key for 32 elements,
 * then the first warp adds up. */
template <typename T>
static __device__ void weighted_sum(const FvQuery &s, float scale, const float *p,
                                    const float *rows, T *y) {
    __shared__ float part[WARPS][FV_WARP];
    size_t warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    for (size_t i = lane; i - lane < s.width; i += FV_WARP) {
        float sum = 0;
        if (i < s.width)
            for (size_t j = warp; j < s.keys; j += WARPS)
                sum += p[j] * rows[j * s.heads * s.width + i];
        part[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && i < s.width) {
            for (size_t w = 1; w < WARPS; w++)
                sum += part[w][lane];
            fv_store(y + i, scale * sum);
        }
        __syncthreads(); /* part is free again */
    }
}

/* The place of key j as an integer: larger for a larger score, 0 and -0 being equal, and of equal
 * scores for the lower index. No two keys have the same. */
static __device__ uint64_t place_of(const float *scores, size_t j) {
    const uint32_t sign = (uint32_t)1 << 31;
    float positive_zero = scores[j] + 0.0f;
    uint32_t bits;
    memcpy(&bits, &positive_zero, sizeof bits);
    bits = bits & sign ? ~bits : bits | sign;
    return (uint64_t)bits << 32 | ~(uint32_t)j;
}

/* Sets all but the top_k largest scores, top_k < keys, to -inf. The last to stay is the key with
 * top_k - 1 places above its own. Counting them for every key is quadratic, but needs no barrier:
 * for some hundred keys it is faster than to find that place bit by bit. A NaN has some place;
 * wherever it is, it stays and spoils the row, as it should. */
static __device__ void keep_largest(size_t keys, size_t top_k, float *scores) {
    __shared__ uint64_t last;
    for (size_t j = threadIdx.x; j < keys; j += THREADS) {
        uint64_t place = place_of(scores, j);
        size_t above = 0;
        for (size_t i = 0; i < keys; i++)
            above += place_of(scores, i) > place;
        if (above == top_k - 1)
            last = place;
    }
    __syncthreads();
    for (size_t j = threadIdx.x; j < keys; j += THREADS)
        if (place_of(scores, j) < last && scores[j] == scores[j])
            scores[j] = -INFINITY;
}

static __device__ void softmax(size_t keys, float *p) {
    float max = -INFINITY, sum = 0;
    for (size_t j = threadIdx.x; j < keys; j += THREADS)
        max = fmaxf(max, p[j]); /* passes over a NaN, which spoils the sum */
    max = fv_block_max(max);
    for (size_t j = threadIdx.x; j < keys; j += THREADS)
        sum += expf(p[j] - max);
    float scale = 1 / fv_block_sum(sum);
    for (size_t j = threadIdx.x; j < keys; j += THREADS)
        p[j] = expf(p[j] - max) * scale;
    __syncthreads();
}

template <typename T>
static __global__ void query_forward(FvQuery s, const float *q, const float *k, const float *v,
                                     float *probs, T *out) {
    size_t n = blockIdx.x, frame = n / s.heads, head = n % s.heads;
    size_t at = (frame * s.keys * s.heads + head) * s.width; /* of k and v */
    float *p = probs + n * s.keys;
    dots(s, (float)s.scale, q + n * s.width, k + at, NULL, p);
    if (s.top_k > 0 && s.top_k < s.keys)
        keep_largest(s.keys, s.top_k, p);
    softmax(s.keys, p);
    weighted_sum(s, 1, p, v + at, out + n * s.width);
}

void fv_cuda_query(FvBackend *backend, const FvQuery *s, const real *q, const real *k,
                   const real *v, real *probs, real *out) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_are_floats(cuda, "query", q, k, v, probs))
        return;
    fv_with_elements(cuda, out, [&](auto *y) {
        FV_LAUNCH(cuda, query_forward, (unsigned)(s->frames * s->heads), THREADS, 0, *s, q, k, v,
                  probs, y);
    });
}

/* dk[j] += scale * ds[j] * q; dv[j] += p[j] * dout. When dk is dv, both go to the same address:
 * one thread adds them, one after the other. */
static __device__ void spread(const FvQuery &s, const float *ds, const float *p, const float *q,
                              const float *dout, float *dk, float *dv) {
    float scale = (float)s.scale;
    size_t warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    for (size_t j = warp; j < s.keys; j += WARPS)
        for (size_t i = lane; i < s.width; i += FV_WARP) {
            size_t at = j * s.heads * s.width + i;
            dk[at] += scale * ds[j] * q[i];
            dv[at] += p[j] * dout[i];
        }
}

static __global__ void query_backward(FvQuery s, const float *q, const float *k, const float *v,
                                      const float *probs, const float *dout, const float *dprobs,
                                      float *scratch, float *dq, float *dk, float *dv) {
    size_t n = blockIdx.x, frame = n / s.heads, head = n % s.heads;
    size_t at = (frame * s.keys * s.heads + head) * s.width; /* of k, v, dk and dv */
    const float *p = probs + n * s.keys;
    float *ds = scratch + n * s.keys;
    dots(s, 1, dout + n * s.width, v + at, dprobs ? dprobs + n * s.keys : NULL, ds);
    float dot = 0;
    for (size_t j = threadIdx.x; j < s.keys; j += THREADS)
        dot += p[j] * ds[j];
    dot = fv_block_sum(dot);
    for (size_t j = threadIdx.x; j < s.keys; j += THREADS)
        ds[j] = p[j] * (ds[j] - dot);
    __syncthreads();
    weighted_sum(s, (float)s.scale, ds, k + at, dq + n * s.width);
    if (dk)
        spread(s, ds, p, q + n * s.width, dout + n * s.width, dk + at, dv + at);
}

void fv_cuda_query_back(FvBackend *backend, const FvQuery *s, const real *q, const real *k,
                        const real *v, const real *probs, const real *dout, const real *dprobs,
                        real *dq, real *dk, real *dv) {
    FvCuda *cuda = fv_cuda(backend);
    size_t bytes = s->frames * s->heads * s->keys * sizeof(float);
    float *ds = bytes > 0 ? (float *)fv_cuda_workspace(cuda, bytes) : NULL;
    if (bytes > 0 && !ds)
        return;
    FV_LAUNCH(cuda, query_backward, (unsigned)(s->frames * s->heads), THREADS, 0, *s, q, k, v,
              probs, dout, dprobs, ds, dq, dk, dv);
}
