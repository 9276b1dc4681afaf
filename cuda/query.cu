/* The foveated query: one row of attention per frame and head, by one block. The block owns its
 * rows of probs, dk and dv, and its row of probs (ds in the backward pass) is also where the scores
 * are: a few kilobytes that stay in the cache, without a limit on the number of keys. It computes
 * in float in both modes; `out`, and k and v, may be operand tensors. */
#include <math.h>
#include <string.h>

#include "cuda/kernel.cuh"

enum { THREADS = FV_BLOCK, WARPS = THREADS / FV_WARP };

/* Of k and v: from a key to the next, and where a head's part of a frame starts. */
static __device__ size_t stride_of(const FvQuery &s) {
    return s.shared ? s.width : s.heads * s.width;
}
static __device__ size_t start_of(const FvQuery &s, size_t frame, size_t head) {
    return frame * s.keys * stride_of(s) + (s.shared ? 0 : head * s.width);
}

/* y[j] = scale * x . rows[j] + more[j] for every key, more NULL for 0; a warp per key. */
template <typename K>
static __device__ void dots(const FvQuery &s, float scale, const float *x, const K *rows,
                            const float *more, float *y) {
    size_t warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    for (size_t j = warp; j < s.keys; j += WARPS) {
        const K *row = rows + j * stride_of(s);
        float dot = 0;
        for (size_t i = lane; i < s.width; i += FV_WARP)
            dot += x[i] * fv_load(row + i);
        dot = fv_warp_sum(dot);
        if (lane == 0)
            y[j] = scale * dot + (more ? more[j] : 0);
    }
    __syncthreads();
}

/* y = scale * sum over keys of p[j] * rows[j], THREADS elements at once: each warp sums every
 * WARPS-th key, a lane per_lane elements so that as many loads are under way, then each thread adds
 * up one element. */
template <typename K, typename T>
static __device__ void weighted_sum(const FvQuery &s, float scale, const float *p, const K *rows,
                                    T *y) {
    constexpr size_t per_lane = (size_t)THREADS / (size_t)FV_WARP;
    __shared__ float part[WARPS][THREADS];
    size_t warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    for (size_t first = 0; first < s.width; first += THREADS) {
        float sum[per_lane] = {0};
        for (size_t j = warp; j < s.keys; j += WARPS)
            for (size_t c = 0; c < per_lane; c++) {
                size_t i = first + c * FV_WARP + lane;
                if (i < s.width)
                    sum[c] += p[j] * fv_load(rows + j * stride_of(s) + i);
            }
        for (size_t c = 0; c < per_lane; c++)
            part[warp][c * FV_WARP + lane] = sum[c];
        __syncthreads();
        float total = 0;
        for (size_t w = 0; w < WARPS; w++)
            total += part[w][threadIdx.x];
        if (first + threadIdx.x < s.width)
            fv_store(y + first + threadIdx.x, scale * total);
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

template <typename K, typename T>
static __global__ void query_forward(FvQuery s, const float *q, const K *k, const K *v,
                                     float *probs, T *out) {
    size_t n = blockIdx.x, frame = n / s.heads, head = n % s.heads;
    size_t at = start_of(s, frame, head);
    float *p = probs + n * s.keys;
    dots(s, (float)s.scale, q + n * s.width, k + at, NULL, p);
    if (s.top_k > 0 && s.top_k < s.keys)
        keep_largest(s.keys, s.top_k, p);
    softmax(s.keys, p);
    weighted_sum(s, 1, p, v + at, out + n * s.width);
}

/* call(k, v), of the type that their elements have. */
template <typename Call>
static void with_keys(FvCuda *cuda, const char *name, const real *k, const real *v, Call call) {
    bool is_short = fv_cuda_is_operand(cuda, k);
    if (is_short != fv_cuda_is_operand(cuda, v))
        fv_cuda_fail(cuda, name, "keys and values are of two types");
    else if (is_short)
        call((const __nv_bfloat16 *)k, (const __nv_bfloat16 *)v);
    else
        call(k, v);
}

void fv_cuda_query(FvBackend *backend, const FvQuery *s, const real *q, const real *k,
                   const real *v, real *probs, real *out) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_are_floats(cuda, "query", q, probs))
        return;
    with_keys(cuda, "query", k, v, [&](auto *keys, auto *values) {
        fv_with_elements(cuda, out, [&](auto *y) {
            FV_LAUNCH(cuda, query_forward, (unsigned)(s->frames * s->heads), THREADS, 0, *s, q,
                      keys, values, probs, y);
        });
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

template <typename K>
static __global__ void query_backward(FvQuery s, const float *q, const K *k, const K *v,
                                      const float *probs, const float *dout, const float *dprobs,
                                      float *scratch, float *dq, float *dk, float *dv) {
    size_t n = blockIdx.x, frame = n / s.heads, head = n % s.heads;
    size_t at = start_of(s, frame, head);
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
    if ((bytes > 0 && !ds) ||
        !fv_are_floats(cuda, "query_back", q, probs, dout, dprobs, dq, dk, dv))
        return;
    with_keys(cuda, "query_back", k, v, [&](auto *keys, auto *values) {
        FV_LAUNCH(cuda, query_backward, (unsigned)(s->frames * s->heads), THREADS, 0, *s, q, keys,
                  values, probs, dout, dprobs, ds, dq, dk, dv);
    });
}
