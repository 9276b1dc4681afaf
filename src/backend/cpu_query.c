/* The foveated query: one row of attention per frame and head. A tile is one frame. */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Query {
    const FvQuery *s;
    const real *q, *k, *v, *probs_in, *dout, *dprobs;
    real *probs, *out, *dq, *dk, *dv;
    FvCpu *cpu;
} Query;

static double cost_of(const FvQuery *s) {
    return (double)(s->frames * s->keys * s->heads) * (2 + 0.2 * (double)s->width);
}

#ifdef FV_DOUBLE
typedef uint64_t Order;
#else
typedef uint32_t Order;
#endif

/* The bits of a score as an integer that grows with it; 0 and -0 are equal. */
FV_INLINE Order order_of(real score) {
    const Order sign = (Order)1 << (8 * sizeof(Order) - 1);
    real positive_zero = score + 0;
    Order bits;
    memcpy(&bits, &positive_zero, sizeof bits);
    return bits & sign ? ~bits : bits | sign;
}

FV_INLINE size_t count_at_least(size_t keys, const Order *order, Order least) {
    Order count = 0;
    for (size_t j = 0; j < keys; j++)
        count += order[j] >= least;
    return (size_t)count;
}

/* Sets all but the top_k largest scores, top_k < keys, to -inf; of equal ones the lower index
 * stays. The top_k-th largest is found bit by bit: the same work whatever the scores. A NaN has
 * some place in that order; wherever it is, it stays and spoils the row, as it should. */
FV_SIMD static void keep_largest(size_t keys, size_t top_k, real *scores, Order *order) {
    for (size_t j = 0; j < keys; j++)
        order[j] = order_of(scores[j]);
    Order least = 0;
    for (Order bit = (Order)1 << (8 * sizeof(Order) - 1); bit > 0; bit >>= 1)
        if (count_at_least(keys, order, least | bit) >= top_k)
            least |= bit;
    size_t larger = least == (Order)-1 ? 0 : count_at_least(keys, order, least + 1);
    size_t equal = top_k - larger; /* to be kept of those that are the top_k-th largest */
    for (size_t j = 0; j < keys; j++) {
        bool keep = order[j] > least;
        if (order[j] == least && equal > 0) {
            keep = true;
            equal--;
        }
        if (!keep && scores[j] == scores[j])
            scores[j] = (real)-INFINITY;
    }
}

FV_SIMD static void scores_of(size_t keys, size_t width, size_t stride, real scale, const real *q,
                              const real *k, real *scores) {
    for (size_t j = 0; j < keys; j++)
        scores[j] = scale * fv_dot(width, q, k + j * stride);
}

FV_SIMD static void softmax(size_t n, real *p) {
    real max = fv_max(n, p);
    for (size_t j = 0; j < n; j++)
        p[j] = fv_exp(p[j] - max);
    real scale = 1 / fv_sum(n, p);
    for (size_t j = 0; j < n; j++)
        p[j] *= scale;
}

/* y = scale * sum over keys of p[j] * x[j] */
FV_SIMD static void weighted_sum(size_t keys, size_t width, size_t stride, real scale,
                                 const real *p, const real *x, real *y) {
    for (size_t i = 0; i < width; i++)
        y[i] = 0;
    for (size_t j = 0; j < keys; j++)
        for (size_t i = 0; i < width; i++)
            y[i] += scale * p[j] * x[j * stride + i];
}

/* y[j] += scale * p[j] * x for every key */
FV_SIMD static void spread(size_t keys, size_t width, size_t stride, real scale, const real *p,
                           const real *restrict x, real *restrict y) {
    for (size_t j = 0; j < keys; j++)
        for (size_t i = 0; i < width; i++)
            y[j * stride + i] += scale * p[j] * x[i];
}

/* With shared keys and values the heads of a frame are the rows of one product. */
static void shared_forward_tile(void *arg, size_t frame, size_t thread) {
    const Query *t = arg;
    const FvQuery *s = t->s;
    size_t rows = frame * s->heads, keys = frame * s->keys * s->width;
    real *probs = t->probs + rows * s->keys;
    fv_gemm(false, true, s->heads, s->keys, s->width, (real)s->scale, t->q + rows * s->width,
            s->width, t->k + keys, s->width, 0, probs, s->keys);
    for (size_t h = 0; h < s->heads; h++) {
        if (s->top_k > 0 && s->top_k < s->keys)
            keep_largest(s->keys, s->top_k, probs + h * s->keys, t->cpu->own[thread].data);
        softmax(s->keys, probs + h * s->keys);
    }
    fv_gemm(false, false, s->heads, s->width, s->keys, 1, probs, s->keys, t->v + keys, s->width, 0,
            t->out + rows * s->width, s->width);
}

static void forward_tile(void *arg, size_t frame, size_t thread) {
    const Query *t = arg;
    const FvQuery *s = t->s;
    size_t stride = s->heads * s->width;
    const real *k = t->k + frame * s->keys * stride, *v = t->v + frame * s->keys * stride;
    for (size_t h = 0; h < s->heads; h++) {
        real *p = t->probs + (frame * s->heads + h) * s->keys;
        real *out = t->out + frame * stride + h * s->width;
        scores_of(s->keys, s->width, stride, (real)s->scale, t->q + frame * stride + h * s->width,
                  k + h * s->width, p);
        if (s->top_k > 0 && s->top_k < s->keys)
            keep_largest(s->keys, s->top_k, p, t->cpu->own[thread].data);
        softmax(s->keys, p);
        weighted_sum(s->keys, s->width, stride, 1, p, v + h * s->width, out);
    }
}

void fv_cpu_query(FvBackend *backend, const FvQuery *s, const real *q, const real *k, const real *v,
                  real *probs, real *out) {
    Query t = {.s = s, .q = q, .k = k, .v = v, .probs = probs, .out = out, .cpu = fv_cpu(backend)};
    if (!fv_cpu_workspace(t.cpu, fv_mul(s->keys, sizeof(Order)), 0))
        return;
    fv_cpu_run(t.cpu, s->frames, cost_of(s), s->shared ? shared_forward_tile : forward_tile, &t);
}

/* ds holds dp, the gradient of the probabilities, on entry and that of the scores on return */
FV_SIMD static void softmax_back(size_t keys, const real *p, const real *dprobs, real *ds) {
    for (size_t j = 0; dprobs && j < keys; j++)
        ds[j] += dprobs[j];
    real dot = fv_dot(keys, p, ds);
    for (size_t j = 0; j < keys; j++)
        ds[j] = p[j] * (ds[j] - dot);
}

static void shared_backward_tile(void *arg, size_t frame, size_t thread) {
    const Query *t = arg;
    const FvQuery *s = t->s;
    size_t rows = frame * s->heads, keys = frame * s->keys * s->width;
    real *ds = t->cpu->own[thread].data;
    fv_gemm(false, true, s->heads, s->keys, s->width, 1, t->dout + rows * s->width, s->width,
            t->v + keys, s->width, 0, ds, s->keys);
    for (size_t h = 0; h < s->heads; h++) {
        size_t probs = (rows + h) * s->keys;
        softmax_back(s->keys, t->probs_in + probs, t->dprobs ? t->dprobs + probs : NULL,
                     ds + h * s->keys);
    }
    fv_gemm(false, false, s->heads, s->width, s->keys, (real)s->scale, ds, s->keys, t->k + keys,
            s->width, 0, t->dq + rows * s->width, s->width);
}

static void backward_tile(void *arg, size_t frame, size_t thread) {
    const Query *t = arg;
    const FvQuery *s = t->s;
    size_t stride = s->heads * s->width, at = frame * s->keys * stride;
    real *ds = t->cpu->own[thread].data, scale = (real)s->scale;
    for (size_t h = 0; h < s->heads; h++) {
        size_t row = frame * stride + h * s->width, probs = (frame * s->heads + h) * s->keys;
        const real *q = t->q + row, *dout = t->dout + row, *p = t->probs_in + probs;
        size_t head = at + h * s->width;
        real *dq = t->dq + row;
        scores_of(s->keys, s->width, stride, 1, dout, t->v + head, ds);
        softmax_back(s->keys, p, t->dprobs ? t->dprobs + probs : NULL, ds);
        weighted_sum(s->keys, s->width, stride, scale, ds, t->k + head, dq);
        if (t->dk) {
            spread(s->keys, s->width, stride, scale, ds, q, t->dk + head);
            spread(s->keys, s->width, stride, 1, p, dout, t->dv + head);
        }
    }
}

void fv_cpu_query_back(FvBackend *backend, const FvQuery *s, const real *q, const real *k,
                       const real *v, const real *probs, const real *dout, const real *dprobs,
                       real *dq, real *dk, real *dv) {
    Query t = {.s = s,
               .q = q,
               .k = k,
               .v = v,
               .probs_in = probs,
               .dout = dout,
               .dprobs = dprobs,
               .dq = dq,
               .dk = dk,
               .dv = dv,
               .cpu = fv_cpu(backend)};
    size_t heads = s->shared ? s->heads : 1; /* whose scores are held at once */
    if (!fv_cpu_workspace(t.cpu, fv_mul3(heads, s->keys, sizeof(real)), 0))
        return;
    fv_cpu_run(t.cpu, s->frames, 2 * cost_of(s), s->shared ? shared_backward_tile : backward_tile,
               &t);
}
