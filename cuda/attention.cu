/* Multi-head attention with grouped key heads, and rotary embedding. The products are batched over
 * (batch, head), each operand given by a table of addresses; only the softmax has its own kernels.
 *
 * In bf16 mode products read rounded copies of q, k, v, the probabilities and the gradients; the
 * tensors and all sums stay in float. Copies of heads whose width is no multiple of 8 would begin
 * where tensor cores cannot read: such products are float's. */
#include <math.h>

#include "cuda/kernel.cuh"

/* SCORES: what a product leaves for the softmax; PROBS and DS: what the softmax leaves for products
 */
enum { Q, K, V, PROBS, OUT, SCORES, FORWARD_OPERANDS, DQ = FORWARD_OPERANDS, DK, DV, DS, OPERANDS };
enum { WARPS = FV_BLOCK / FV_WARP };

/* The slice of head h starts at base + b * batch + (h / share) * head, in bytes. */
typedef struct Operand {
    char *base;
    size_t batch, head, share;
} Operand;

typedef struct Operands {
    Operand at[OPERANDS];
} Operands;

/* Tensors to copy for products: of `keys` those that are padding become 0. */
template <typename T> struct Copies {
    unsigned count;
    struct {
        const float *from;
        T *to;
        size_t n;
        bool keys;
    } at[4];
};

typedef struct Attention {
    FvCuda *cuda;
    const FvAttention *a;
    bool backward, rounded;
    size_t group;                     /* query heads that share a key head */
    size_t queries, values, scores;   /* elements of q, of k, and of the probabilities */
    const void *base[OPERANDS];       /* the tensors, or what stands for them in products */
    void **table;                     /* these in the workspace, NULL where not used */
    __nv_bfloat16 *copy[SCORES], *ds; /* rounded; of the gradient of the scores */
    float *clean;                     /* K or V without what padding holds */
    float *dscores, *out;             /* out: before it is rounded into an operand tensor */
} Attention;

/* --- kernels ---------------------------------------------------------------------------------- */

/* table [operands, group, batch, kv_heads]: the members of a group stand apart, because the
 * gradients of their common key head must be added one after the other. */
static __global__ void fill_table(FvAttention a, Operands operands, int count, void **table) {
    size_t n = fv_thread(), pairs = a.batch * a.kv_heads;
    if (n >= a.batch * a.heads)
        return;
    size_t b = n % pairs / a.kv_heads;
    size_t h = n % a.kv_heads * (a.heads / a.kv_heads) + n / pairs;
    for (int i = 0; i < count; i++) {
        const Operand *o = &operands.at[i];
        table[i * a.batch * a.heads + n] = o->base + b * o->batch + h / o->share * o->head;
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

/* A row of blocks per tensor. A product multiplies padding by 0, which is not enough where it holds
 * infinities. */
template <typename T> static __global__ void copy_operands(FvAttention a, Copies<T> copies) {
    auto &c = copies.at[blockIdx.y];
    size_t i = fv_thread(), stride = a.kv_heads * a.width;
    if (i >= c.n)
        return;
    bool padding = c.keys && i / stride % a.keys < padding_of(a, i / stride / a.keys);
    fv_store(c.to + i, padding ? 0 : c.from[i]);
}

/* A warp per row, in place, and rounded to `copy` unless NULL. Each lane reads only what it wrote.
 */
static __global__ void softmax_rows(FvAttention a, float *probs, __nv_bfloat16 *copy) {
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
    for (size_t j = lane; j < a.keys; j += FV_WARP) {
        p[j] = j >= first && j < end ? expf(p[j] - max) * scale : 0;
        if (copy)
            fv_store(copy + n * a.keys + j, p[j]);
    }
}

/* A warp per row: ds holds the gradient of the probabilities and becomes that of the scores; or,
 * unless NULL, ds_copy does, rounded, and probs_copy becomes probs. Keys out of the causal limit
 * count with their probability 0, as in the CPU's; padding does not. */
static __global__ void softmax_back_rows(FvAttention a, const float *probs, float *ds,
                                         __nv_bfloat16 *ds_copy, __nv_bfloat16 *probs_copy) {
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
    for (size_t j = lane; j < a.keys; j += FV_WARP) {
        float slope = j >= first ? p[j] * (d[j] - dot) : 0;
        if (!ds_copy) {
            d[j] = slope;
            continue;
        }
        fv_store(ds_copy + n * a.keys + j, slope);
        fv_store(probs_copy + n * a.keys + j, p[j]);
    }
}

/* --- attention -------------------------------------------------------------------------------- */

/* A part of the workspace; base NULL: only counts. */
static void *take(char *base, size_t *used, size_t bytes) {
    void *part = base ? base + *used : NULL;
    *used += fv_cuda_aligned(bytes);
    return part;
}

/* Shares the workspace out; returns the bytes it takes. No size here can overflow: all but the
 * table's are those of tensors that exist. */
static size_t carve(Attention *t, char *base) {
    const FvAttention *a = t->a;
    size_t used = 0, count = t->backward ? OPERANDS : FORWARD_OPERANDS, short_ = sizeof *t->ds;
    t->table = (void **)take(base, &used, count * a->batch * a->heads * sizeof(void *));
    const size_t n[SCORES] = {t->queries, t->values, t->values, t->scores, t->queries};
    for (int i = 0; t->rounded && i < (t->backward ? SCORES : OUT); i++)
        t->copy[i] = (__nv_bfloat16 *)take(base, &used, n[i] * short_);
    if (!t->rounded && a->first)
        t->clean = (float *)take(base, &used, t->values * sizeof(float));
    if (t->backward)
        t->dscores = (float *)take(base, &used, t->scores * sizeof(float));
    if (t->backward && t->rounded)
        t->ds = (__nv_bfloat16 *)take(base, &used, t->scores * short_);
    if (!t->backward && !t->rounded && fv_cuda_is_operand(t->cuda, t->base[OUT]))
        t->out = (float *)take(base, &used, t->queries * sizeof(float));
    return used;
}

template <typename T> static void launch_copies(const Attention *t, const Copies<T> &copies) {
    size_t most = t->queries > t->values ? t->queries : t->values;
    if (copies.count > 0)
        FV_LAUNCH(t->cuda, copy_operands, dim3(fv_blocks(most, FV_BLOCK), copies.count), FV_BLOCK,
                  0, *t->a, copies);
}

/* Puts in place of the tensors what products read instead of them. */
static void copy_tensors(Attention *t) {
    Copies<__nv_bfloat16> rounded = {};
    for (int i = Q; t->rounded && i <= OUT; i++) {
        if (i == PROBS || (i == OUT && !t->backward))
            continue;
        bool keys = i == K || i == V;
        rounded.at[rounded.count++] = {(const float *)t->base[i], t->copy[i],
                                       keys ? t->values : t->queries, keys && t->a->first};
        t->base[i] = t->copy[i];
    }
    launch_copies(t, rounded);
    Copies<float> clean = {};
    int of = t->backward ? K : V; /* what probabilities or score gradients multiply */
    if (t->clean) {
        clean.at[clean.count++] = {(const float *)t->base[of], t->clean, t->values, true};
        t->base[of] = t->clean;
    }
    launch_copies(t, clean);
    t->base[SCORES] = t->backward ? t->dscores : t->base[PROBS];
    t->base[DS] = t->rounded ? (void *)t->ds : t->dscores;
    if (t->rounded)
        t->base[PROBS] = t->copy[PROBS];
    if (t->out)
        t->base[OUT] = t->out;
}

/* Whether an operand of the table is in bfloat16. */
static bool is_short(const Attention *t, int operand) {
    bool copied = operand <= PROBS || operand == DS || (operand == OUT && t->backward);
    return copied ? t->rounded : operand == OUT && fv_cuda_is_operand(t->cuda, t->base[OUT]);
}

static void tabulate(Attention *t) {
    const FvAttention *a = t->a;
    size_t heads = a->batch * a->heads, key_stride = a->kv_heads * a->width;
    Operands operands = {};
    int count = t->backward ? OPERANDS : FORWARD_OPERANDS;
    for (int i = 0; i < count; i++) {
        size_t each = is_short(t, i) ? sizeof(__nv_bfloat16) : sizeof(float);
        char *base = (char *)t->base[i];
        if (i == K || i == V || i == DK || i == DV)
            operands.at[i] = {base, a->keys * key_stride * each, a->width * each, t->group};
        else if (i == PROBS || i == SCORES || i == DS)
            operands.at[i] = {base, a->heads * a->rows * a->keys * each, a->rows * a->keys * each,
                              1};
        else
            operands.at[i] = {base, a->rows * a->heads * a->width * each, a->width * each, 1};
    }
    FV_LAUNCH(t->cuda, fill_table, fv_blocks(heads, FV_BLOCK), FV_BLOCK, 0, *a, operands, count,
              t->table);
}

/* Takes the workspace, makes the copies that products read, and fills the table for the tensors at
 * base[]; false when there is no memory. */
static bool prepare(Attention *t, FvCuda *cuda, const FvAttention *a, bool backward,
                    const void *const *base) {
    char *space;
    *t = {};
    t->cuda = cuda;
    t->a = a;
    t->backward = backward;
    for (int i = 0; i < (backward ? OPERANDS : FORWARD_OPERANDS); i++)
        t->base[i] = base[i];
    t->rounded = t->cuda->bf16 && a->width % 8 == 0;
    t->group = a->heads / a->kv_heads;
    t->queries = a->batch * a->rows * a->heads * a->width;
    t->values = a->batch * a->keys * a->kv_heads * a->width;
    t->scores = a->batch * a->heads * a->rows * a->keys;
    if (!fv_take_space(t->cuda, carve(t, NULL), &space))
        return false;
    carve(t, space);
    copy_tensors(t);
    tabulate(t);
    return true;
}

/* The products of `count` (batch, head) pairs from pair `from` of the table. */
static void multiply(const Attention *t, size_t from, size_t count, const FvGemm *gemm, int a,
                     int b, int c) {
    size_t heads = t->a->batch * t->a->heads;
    fv_cuda_gemm_batch(t->cuda, gemm, is_short(t, a), is_short(t, c), count,
                       t->table + a * heads + from, t->table + b * heads + from,
                       t->table + c * heads + from);
}

/* True when there are no products; what they would have given, `y`, is then 0. */
static bool is_empty(FvCuda *cuda, const FvAttention *a, float *y) {
    size_t n = a->batch * a->rows * a->heads * a->width;
    size_t each = fv_cuda_is_operand(cuda, y) ? cuda->base.operand_bytes : sizeof(float);
    if (n > 0 && a->keys == 0)
        cuda->base.ops->zero(&cuda->base, y, n * each);
    return n == 0 || a->keys == 0;
}

void fv_cuda_attention(FvBackend *backend, const FvAttention *a, const real *q, const real *k,
                       const real *v, real *probs, real *out) {
    FvCuda *cuda = fv_cuda(backend);
    const void *base[FORWARD_OPERANDS] = {q, k, v, probs, out, NULL};
    Attention t;
    if (!fv_are_floats(cuda, "attention", q, k, v, probs) || is_empty(cuda, a, out) ||
        !prepare(&t, cuda, a, false, base))
        return;
    size_t qs = a->heads * a->width, ks = a->kv_heads * a->width, heads = a->batch * a->heads;
    FvGemm scores = {false, true, a->rows, a->keys, a->width, qs, ks, a->keys, (float)a->scale, 0};
    FvGemm output = {false, false, a->rows, a->width, a->keys, a->keys, ks, qs, 1, 0};
    multiply(&t, 0, heads, &scores, Q, K, SCORES);
    FV_LAUNCH(cuda, softmax_rows, fv_blocks(heads * a->rows, WARPS), FV_BLOCK, 0, *a, probs,
              t.copy[PROBS]);
    multiply(&t, 0, heads, &output, PROBS, V, OUT);
    if (t.out)
        fv_cuda_round(cuda, t.queries, t.out, out);
}

void fv_cuda_attention_back(FvBackend *backend, const FvAttention *a, const real *q, const real *k,
                            const real *v, const real *probs, const real *dout, real *dq, real *dk,
                            real *dv) {
    FvCuda *cuda = fv_cuda(backend);
    const void *base[OPERANDS] = {q, k, v, probs, dout, NULL, dq, dk, dv, NULL};
    Attention t;
    if (is_empty(cuda, a, dq) || !prepare(&t, cuda, a, true, base))
        return;
    size_t qs = a->heads * a->width, ks = a->kv_heads * a->width, heads = a->batch * a->heads;
    float scale = (float)a->scale;
    FvGemm dprobs = {false, true, a->rows, a->keys, a->width, qs, ks, a->keys, 1, 0};
    FvGemm queries = {false, false, a->rows, a->width, a->keys, a->keys, ks, qs, scale, 0};
    FvGemm keys = {true, false, a->keys, a->width, a->rows, a->keys, qs, ks, scale, 1};
    FvGemm values = {true, false, a->keys, a->width, a->rows, a->keys, qs, ks, 1, 1};
    multiply(&t, 0, heads, &dprobs, OUT, V, SCORES);
    FV_LAUNCH(cuda, softmax_back_rows, fv_blocks(heads * a->rows, WARPS), FV_BLOCK, 0, *a, probs,
              t.dscores, t.ds, t.copy[PROBS]);
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
