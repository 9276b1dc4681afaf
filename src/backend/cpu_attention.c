/* Multi-head attention with grouped key heads, and rotary embedding. A tile is one key head of one
 * batch entry: the query heads that share it go in order, so that its gradient has a fixed order.
 */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Attention {
    const FvAttention *a;
    const real *q, *k, *v, *probs_in, *dout;
    real *probs, *out, *dq, *dk, *dv;
    FvCpu *cpu;
} Attention;

static double cost_of(const FvAttention *a, double products) {
    const double ns_per_product = 0.02, ns_per_prob = 1;
    double probs = (double)(a->batch * a->heads * a->rows * a->keys);
    return probs * (products * (double)a->width * ns_per_product + ns_per_prob);
}

/* Keys of a batch entry that are padding. No product reads them: whatever is there, infinities
 * included, stays without effect. */
static size_t padding_of(const FvAttention *a, size_t batch) {
    return a->first ? fv_min((size_t)a->first[batch], a->keys) : 0;
}

/* End of the keys that a row sees. */
static size_t visible_end(const FvAttention *a, size_t row) {
    size_t end = row + a->keys + 1;
    return a->causal ? fv_min(end > a->rows ? end - a->rows : 0, a->keys) : a->keys;
}

static void clear_rows(size_t rows, size_t width, size_t stride, real *x) {
    for (size_t r = 0; r < rows; r++)
        memset(x + r * stride, 0, width * sizeof *x);
}

FV_SIMD static void softmax_row(size_t keys, size_t first, size_t end, real *p) {
    memset(p, 0, first * sizeof *p);
    for (size_t j = end; j < keys; j++)
        p[j] = 0;
    if (first >= end)
        return;
    real max = fv_max(end - first, p + first);
    for (size_t j = first; j < end; j++)
        p[j] = fv_exp(p[j] - max);
    real scale = 1 / fv_sum(end - first, p + first);
    for (size_t j = first; j < end; j++)
        p[j] *= scale;
}

static void forward_tile(void *arg, size_t tile, size_t thread) {
    const Attention *t = arg;
    const FvAttention *a = t->a;
    (void)thread;
    size_t b = tile / a->kv_heads, g = tile % a->kv_heads, group = a->heads / a->kv_heads;
    size_t qs = a->heads * a->width, ks = a->kv_heads * a->width;
    size_t first = padding_of(a, b), keys = a->keys - first;
    size_t key_at = (b * a->keys + first) * ks + g * a->width;
    for (size_t h = g * group; h < (g + 1) * group; h++) {
        size_t at = b * a->rows * qs + h * a->width;
        real *probs = t->probs + (b * a->heads + h) * a->rows * a->keys;
        if (keys > 0)
            fv_gemm(false, true, a->rows, keys, a->width, (real)a->scale, t->q + at, qs,
                    t->k + key_at, ks, 0, probs + first, a->keys);
        for (size_t i = 0; i < a->rows; i++)
            softmax_row(a->keys, first, visible_end(a, i), probs + i * a->keys);
        if (keys > 0)
            fv_gemm(false, false, a->rows, a->width, keys, 1, probs + first, a->keys, t->v + key_at,
                    ks, 0, t->out + at, qs);
        else
            clear_rows(a->rows, a->width, qs, t->out + at);
    }
}

void fv_cpu_attention(FvBackend *backend, const FvAttention *a, const real *q, const real *k,
                      const real *v, real *probs, real *out) {
    Attention t = {.a = a, .q = q, .k = k, .v = v, .probs = probs, .out = out};
    fv_cpu_run(fv_cpu(backend), a->batch * a->kv_heads, cost_of(a, 2), forward_tile, &t);
}

/* Softmax backward: dp holds the gradient of the probabilities and becomes that of the scores. */
FV_SIMD static void softmax_back_row(size_t keys, const real *p, real *dp) {
    real dot = fv_dot(keys, p, dp);
    for (size_t j = 0; j < keys; j++)
        dp[j] = p[j] * (dp[j] - dot);
}

/* One query head; `first` keys are padding. */
static void backward_head(const Attention *t, size_t at, size_t key_at, size_t first,
                          const real *probs, real *ds) {
    const FvAttention *a = t->a;
    size_t qs = a->heads * a->width, ks = a->kv_heads * a->width, keys = a->keys - first;
    if (keys == 0) {
        clear_rows(a->rows, a->width, qs, t->dq + at);
        return;
    }
    fv_gemm(false, true, a->rows, keys, a->width, 1, t->dout + at, qs, t->v + key_at, ks, 0, ds,
            keys);
    for (size_t i = 0; i < a->rows; i++)
        softmax_back_row(keys, probs + i * a->keys, ds + i * keys);
    fv_gemm(false, false, a->rows, a->width, keys, (real)a->scale, ds, keys, t->k + key_at, ks, 0,
            t->dq + at, qs);
    fv_gemm(true, false, keys, a->width, a->rows, (real)a->scale, ds, keys, t->q + at, qs, 1,
            t->dk + key_at, ks);
    fv_gemm(true, false, keys, a->width, a->rows, 1, probs, a->keys, t->dout + at, qs, 1,
            t->dv + key_at, ks);
}

static void backward_tile(void *arg, size_t tile, size_t thread) {
    const Attention *t = arg;
    const FvAttention *a = t->a;
    size_t b = tile / a->kv_heads, g = tile % a->kv_heads, group = a->heads / a->kv_heads;
    size_t first = padding_of(a, b);
    size_t key_at = (b * a->keys + first) * a->kv_heads * a->width + g * a->width;
    for (size_t h = g * group; h < (g + 1) * group; h++)
        backward_head(t, (b * a->rows * a->heads + h) * a->width, key_at, first,
                      t->probs_in + (b * a->heads + h) * a->rows * a->keys + first,
                      t->cpu->own[thread].data);
}

void fv_cpu_attention_back(FvBackend *backend, const FvAttention *a, const real *q, const real *k,
                           const real *v, const real *probs, const real *dout, real *dq, real *dk,
                           real *dv) {
    Attention t = {.a = a,
                   .q = q,
                   .k = k,
                   .v = v,
                   .probs_in = probs,
                   .dout = dout,
                   .dq = dq,
                   .dk = dk,
                   .dv = dv,
                   .cpu = fv_cpu(backend)};
    if (!fv_cpu_workspace(t.cpu, fv_mul3(a->rows, a->keys, sizeof(real)), 0))
        return;
    fv_cpu_run(t.cpu, a->batch * a->kv_heads, cost_of(a, 4), backward_tile, &t);
}

/* --- rotary embedding (Su et al. 2021), in the rotate-half layout of Hugging Face's Llama ----- */

/* Row p of the table: cos, then sin, of p * theta^(-2 i / width) for i < width / 2. */
static bool prepare_rope(FvCpu *cpu, size_t width, size_t positions, double theta) {
    FvRope *r = &cpu->rope;
    if (r->width == width && r->theta == theta && r->positions >= positions)
        return true;
    r->positions = 0;
    if (!fv_cpu_grow(cpu, &r->table, fv_mul3(positions, width, sizeof(real))))
        return false;
    real *table = r->table.data;
    size_t half = width / 2;
    for (size_t p = 0; p < positions; p++)
        for (size_t i = 0; i < half; i++) {
            double angle = (double)p * pow(theta, -2.0 * (double)i / (double)width);
            table[p * width + i] = (real)cos(angle);
            table[p * width + half + i] = (real)sin(angle);
        }
    *r = (FvRope){theta, width, positions, r->table};
    return true;
}

FV_SIMD static void rotate(size_t heads, size_t width, const real *table, real sign, real *x) {
    size_t half = width / 2;
    for (size_t h = 0; h < heads; h++, x += width)
        for (size_t i = 0; i < half; i++) {
            real c = table[i], s = sign * table[half + i], a = x[i], b = x[half + i];
            x[i] = a * c - b * s;
            x[half + i] = b * c + a * s;
        }
}

void fv_cpu_rope(FvBackend *backend, size_t batch, size_t rows, size_t heads, size_t width,
                 size_t row0, const int32_t *first, double theta, bool inverse, real *x) {
    FvCpu *cpu = fv_cpu(backend);
    if (!prepare_rope(cpu, width, row0 + rows, theta))
        return;
    const real *table = cpu->rope.table.data;
    for (size_t b = 0; b < batch; b++)
        for (size_t r = 0; r < rows; r++) {
            size_t padding = first ? (size_t)first[b] : 0, row = row0 + r;
            if (row >= padding) /* padding rows stand nowhere */
                rotate(heads, width, table + (row - padding) * width, inverse ? -1 : 1,
                       x + (b * rows + r) * heads * width);
        }
}
