/* Multi-head attention with grouped key heads, and rotary embedding. The products are batched over
 * (batch, head), each operand given by a table of addresses; only the softmax has its own kernels.
 */
#include <math.h>

#include "cuda/kernel.cuh"

enum { Q, K, V, PROBS, OUT, FORWARD_OPERANDS, DQ = FORWARD_OPERANDS, DK, DV, DS, OPERANDS };
enum { WARPS = FV_BLOCK / FV_WARP };

/* The slice of head h starts at base + b * batch + (h / share) * head. */
typedef struct Operand {
    const float *base;
    size_t batch, head, share;
} Operand;

typedef struct Operands {
    Operand at[OPERANDS];
} Operands;

typedef struct Attention {
    FvCuda *cuda;
    const FvAttention *a;
    size_t group; /* query heads that share a key head */
    float **table;
    float *ds; /* gradient of the scores [batch, heads, rows, keys], backward only */
} Attention;

/* --- kernels ---------------------------------------------------------------------------------- */

/* table [operands, group, batch, kv_heads]: the members of a group stand apart, because the
 * gradients of their common key head must be added one after the other. */
static __global__ void fill_table(FvAttention a, Operands operands, int count, float **table) {
    size_t n = fv_thread(), pairs = a.batch * a.kv_heads;
    if (n >= a.batch * a.heads)
        return;
    size_t b = n % pairs / a.kv_heads;
    size_t h = n % a.kv_heads * (a.heads / a.kv_heads) + n / pairs;
    for (int i = 0; i < count; i++) {
        const Operand *o = &operands.at[i];
        table[i * a.batch * a.heads + n] = (float *)o->base + b * o->batch + h / o->share * o->head;
    }
}

static __device__ size_t padding_of(const FvAttention &a, size_t batch) {
    size_t first = a.first ? (size_t)a.first[batch] : 0;
    return first < a.keys ? first : a.keys;
}

/* End of the keys that a row sees. */
static __device__ size_t visible_end(const FvAttention &a, size_t row) {
    size_t end = row + a.keys + 1;
    end = end > a.rows ? end - a.rows : 0;
    return a.causal && end < a.keys ? end : a.keys;
}

/* y = x with the padding keys 0. A product multiplies them by 0, which is not enough where they
 * hold infinities. */
static __global__ void clear_padding(FvAttention a, const float *x, float *y) {
    size_t i = fv_thread(), stride = a.kv_heads * a.width;
    if (i >= a.batch * a.keys * stride)
        return;
    size_t key = i / stride % a.keys;
    y[i] = key < padding_of(a, i / stride / a.keys) ? 0 : x[i];
}

/* A warp per row, in place. Each lane reads only what it wrote. */
static __global__ void softmax_rows(FvAttention a, float *probs) {
    size_t n = fv_thread() / FV_WARP, lane = threadIdx.x % FV_WARP;
    if (n >= a.batch * a.heads * a.rows)
        return;
    float *p = probs + n * a.keys;
    size_t first = padding_of(a, n / a.rows / a.heads), end = visible_end(a, n % a.rows);
    float max = -INFINITY, sum = 0;
    for (size_t j = lane; j < end; j += FV_WARP)
        if (j >= first)
            max = fmaxf(max, p[j]); /* passes over a NaN, which spoils the sum */
    max = fv_warp_max(max);
    for (size_t j = lane; j < end; j += FV_WARP)
        sum += j >= first ? expf(p[j] - max) : 0;
    float scale = 1 / fv_warp_sum(sum);
    for (size_t j = lane; j < a.keys; j += FV_WARP)
        p[j] = j >= first && j < end ? expf(p[j] - max) * scale : 0;
}

/* A warp per row: ds holds the gradient of the probabilities and becomes that of the scores. Keys
 * out of the causal limit count with their probability 0, as in the CPU's; padding does not. */
static __global__ void softmax_back_rows(FvAttention a, const float *probs, float *ds) {
    size_t n = fv_thread() / FV_WARP, lane = threadIdx.x % FV_WARP;
    if (n >= a.batch * a.heads * a.rows)
        return;
    const float *p = probs + n * a.keys;
    float *d = ds + n * a.keys;
    size_t first = padding_of(a, n / a.rows / a.heads);
    float dot = 0;
    for (size_t j = lane; j < a.keys; j += FV_WARP)
        dot += j >= first ? p[j] * d[j] : 0;
    dot = fv_warp_sum(dot);
    for (size_t j = lane; j < a.keys; j += FV_WARP)
        d[j] = j >= first ? p[j] * (d[j] - dot) : 0;
}

/* --- attention -------------------------------------------------------------------------------- */

static size_t part_bytes(size_t bytes) { /* of the workspace: starts at a multiple of 256 */
    return (bytes + 255) / 256 * 256;
}

/* Takes the workspace and fills the table for the operands at base[]; false when there is none. No
 * size here can overflow: all but the table's are those of tensors that exist. */
static bool prepare(Attention *t, FvBackend *backend, const FvAttention *a, bool backward,
                    const float *const *base) {
    size_t heads = a->batch * a->heads, key_stride = a->kv_heads * a->width;
    size_t values = a->batch * a->keys * key_stride;
    int count = backward ? OPERANDS : FORWARD_OPERANDS;
    size_t table_bytes = part_bytes((size_t)count * heads * sizeof(float *));
    size_t clean_bytes = a->first ? part_bytes(values * sizeof(float)) : 0;
    size_t ds_bytes = backward ? heads * a->rows * a->keys * sizeof(float) : 0;
    FvCuda *cuda = fv_cuda(backend);
    char *space = (char *)fv_cuda_workspace(cuda, table_bytes + clean_bytes + ds_bytes);
    if (!space)
        return false;
    float *clean = (float *)(space + table_bytes);
    *t = Attention{cuda, a, a->heads / a->kv_heads, (float **)space,
                   (float *)(space + table_bytes + clean_bytes)};

    Operands operands = {};
    for (int i = 0; i < count; i++) {
        if (i == K || i == V || i == DK || i == DV)
            operands.at[i] = Operand{base[i], a->keys * key_stride, a->width, t->group};
        else if (i == PROBS || i == DS)
            operands.at[i] = Operand{i == DS ? t->ds : base[i], a->heads * a->rows * a->keys,
                                     a->rows * a->keys, 1};
        else
            operands.at[i] = Operand{base[i], a->rows * a->heads * a->width, a->width, 1};
    }
    if (a->first) { /* of the tensor that probabilities or score gradients multiply */
        int of = backward ? K : V;
        FV_LAUNCH(cuda, clear_padding, fv_blocks(values, FV_BLOCK), FV_BLOCK, 0, *a, base[of],
                  clean);
        operands.at[of].base = clean;
    }
    FV_LAUNCH(cuda, fill_table, fv_blocks(heads, FV_BLOCK), FV_BLOCK, 0, *a, operands, count,
              t->table);
    return true;
}

/* The products of `count` (batch, head) pairs from pair `from` of the table. */
static void multiply(const Attention *t, size_t from, size_t count, const FvGemm *gemm, int a,
                     int b, int c) {
    size_t heads = t->a->batch * t->a->heads;
    fv_cuda_gemm_batch(t->cuda, gemm, count, t->table + a * heads + from,
                       t->table + b * heads + from, t->table + c * heads + from);
}

/* True when there are no products; what they would have given, `y`, is then 0. */
static bool is_empty(FvBackend *backend, const FvAttention *a, float *y) {
    size_t n = a->batch * a->rows * a->heads * a->width;
    if (n > 0 && a->keys == 0)
        backend->ops->zero(backend, y, n * sizeof(float));
    return n == 0 || a->keys == 0;
}

void fv_cuda_attention(FvBackend *backend, const FvAttention *a, const real *q, const real *k,
                       const real *v, real *probs, real *out) {
    const float *base[FORWARD_OPERANDS] = {q, k, v, probs, out};
    Attention t;
    if (is_empty(backend, a, out) || !prepare(&t, backend, a, false, base))
        return;
    size_t qs = a->heads * a->width, ks = a->kv_heads * a->width, heads = a->batch * a->heads;
    FvGemm scores = {false, true, a->rows, a->keys, a->width, qs, ks, a->keys, (float)a->scale, 0};
    FvGemm output = {false, false, a->rows, a->width, a->keys, a->keys, ks, qs, 1, 0};
    multiply(&t, 0, heads, &scores, Q, K, PROBS);
    FV_LAUNCH(t.cuda, softmax_rows, fv_blocks(heads * a->rows, WARPS), FV_BLOCK, 0, *a, probs);
    multiply(&t, 0, heads, &output, PROBS, V, OUT);
}

void fv_cuda_attention_back(FvBackend *backend, const FvAttention *a, const real *q, const real *k,
                            const real *v, const real *probs, const real *dout, real *dq, real *dk,
                            real *dv) {
    const float *base[OPERANDS] = {q, k, v, probs, dout, dq, dk, dv, NULL};
    Attention t;
    if (is_empty(backend, a, dq) || !prepare(&t, backend, a, true, base))
        return;
    size_t qs = a->heads * a->width, ks = a->kv_heads * a->width, heads = a->batch * a->heads;
    float scale = (float)a->scale;
    FvGemm dprobs = {false, true, a->rows, a->keys, a->width, qs, ks, a->keys, 1, 0};
    FvGemm queries = {false, false, a->rows, a->width, a->keys, a->keys, ks, qs, scale, 0};
    FvGemm keys = {true, false, a->keys, a->width, a->rows, a->keys, qs, ks, scale, 1};
    FvGemm values = {true, false, a->keys, a->width, a->rows, a->keys, qs, ks, 1, 1};
    multiply(&t, 0, heads, &dprobs, OUT, V, DS);
    FV_LAUNCH(t.cuda, softmax_back_rows, fv_blocks(heads * a->rows, WARPS), FV_BLOCK, 0, *a, probs,
              t.ds);
    multiply(&t, 0, heads, &queries, DS, K, DQ);
    size_t pairs = a->batch * a->kv_heads;
    for (size_t member = 0; member < t.group; member++) {
        multiply(&t, member * pairs, pairs, &keys, DS, Q, DK);
        multiply(&t, member * pairs, pairs, &values, PROBS, OUT, DV);
    }
}

/* --- rotary embedding (Su et al. 2021), in the rotate-half layout of Hugging Face's Llama ----- */

/* A thread per (row, pair of elements), for all heads, which share the angle. The angle is taken in
 * double, as positions times frequencies lose too many bits in float. */
static __global__ void rotate(size_t batch, size_t rows, size_t heads, size_t width, size_t row0,
                              const int32_t *first, double theta, double sign, float *x) {
    size_t n = fv_thread(), half = width / 2, i = n % half, line = n / half;
    if (line >= batch * rows)
        return;
    size_t padding = first ? (size_t)first[line / rows] : 0, row = row0 + line % rows;
    if (row < padding) /* padding rows stand nowhere */
        return;
    double angle = (double)(row - padding) * pow(theta, -2.0 * (double)i / (double)width);
    float c = (float)cos(angle), s = (float)(sign * sin(angle));
    float *low = x + line * heads * width + i, *high = low + half;
    for (size_t h = 0; h < heads; h++, low += width, high += width) {
        float a = *low, b = *high;
        *low = a * c - b * s;
        *high = b * c + a * s;
    }
}

void fv_cuda_rope(FvBackend *backend, size_t batch, size_t rows, size_t heads, size_t width,
                  size_t row0, const int32_t *first, double theta, bool inverse, real *x) {
    size_t pairs = batch * rows * (width / 2);
    FV_LAUNCH(fv_cuda(backend), rotate, fv_blocks(pairs, FV_BLOCK), FV_BLOCK, 0, batch, rows, heads,
              width, row0, first, theta, inverse ? -1.0 : 1.0, x);
}
