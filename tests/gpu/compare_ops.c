/* Every operation on the GPU beside the same on the CPU, on the same random values, at the shapes
 * of the study's seed scale:
 *
 *     compare_ops [--bf16] [--small]
 *
 * One line per tensor: ||gpu - cpu|| / ||cpu||. Results are NaN before each call, so that an
 * element that is not written fails, as every NaN does. Exit status 1 when anything is above its
 * tolerance.
 * --small: shapes of a few rows, for running the kernels on the CPU or under compute-sanitizer. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/memory.h"
#include "base/rng.h"
#include "cuda/cuda_backend.h"

/* Sums in float of random terms: rounding grows with the root of their number, 64 units in the last
 * place at 4096 terms, and the CPU's error is of the same size: 8e-6. */
static const double float_tolerance = 1e-5;

/* bf16 rounds the operands of products alone, to 8 significant bits: each by 2^-9 of it at most, so
 * a term by 2^-8. Twice that: no room is needed for sums, whose errors partly cancel. */
static const double product = 0x1p-7;

enum { CPU, GPU, SIDES, TENSORS = 512 };

typedef struct Compare {
    FvBackend *be[SIDES];
    bool bf16, small;
    void *kept[SIDES][TENSORS];
    size_t count, compared, failed;
    uint64_t next; /* random number */
} Compare;

/* The same tensor on both sides: n values, real or (wide) double. */
typedef struct Pair {
    void *at[SIDES];
    size_t n, size;
} Pair;

static void stop(const char *what, const FvError *err) {
    fprintf(stderr, "compare_ops: %s: %s\n", what, err->text);
    exit(2);
}

static Pair place(Compare *c, size_t n, size_t size, const void *values) {
    Pair p = {.n = n, .size = size};
    FvError err = {0};
    for (int s = 0; s < SIDES; s++) {
        if (c->count == TENSORS || c->be[s]->ops->alloc(c->be[s], fv_mul(n, size), &p.at[s], &err))
            stop("memory", &err);
        c->be[s]->ops->upload(c->be[s], p.at[s], values, n * size);
        c->kept[s][c->count] = p.at[s];
    }
    c->count++;
    return p;
}

static void *host(size_t n, size_t size) {
    void *p = malloc(fv_mul(n ? n : 1, size));
    if (!p)
        exit(2);
    return p;
}

static Pair given(Compare *c, size_t n, double deviation) {
    real *x = host(n, sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (real)(deviation * fv_normal(0xc0de, c->next++));
    Pair p = place(c, n, sizeof *x, x);
    free(x);
    return p;
}

static Pair squares(Compare *c, size_t n) { /* second moments are not negative */
    real *x = host(n, sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (real)fv_uniform(0xc0de, c->next++);
    Pair p = place(c, n, sizeof *x, x);
    free(x);
    return p;
}

static Pair unwritten(Compare *c, size_t n, size_t size) {
    void *x = host(n, size);
    memset(x, 0xff, n * size);
    Pair p = place(c, n, size, x);
    free(x);
    return p;
}

/* NaN in every type that a backend keeps operands in: all bits are set. */
static Pair operand(Compare *c, size_t n) {
    Pair p = {.n = n};
    FvError err = {0};
    for (int s = 0; s < SIDES; s++) {
        size_t bytes = n * c->be[s]->operand_bytes;
        void *x = host(n, c->be[s]->operand_bytes);
        memset(x, 0xff, bytes);
        if (c->count == TENSORS || c->be[s]->ops->alloc_operands(c->be[s], n, &p.at[s], &err))
            stop("memory", &err);
        c->be[s]->ops->upload(c->be[s], p.at[s], x, bytes);
        c->kept[s][c->count] = p.at[s];
        free(x);
    }
    c->count++;
    return p;
}

static Pair made(Compare *c, size_t n) {
    return unwritten(c, n, sizeof(real));
}

static Pair made_wide(Compare *c, size_t n) {
    return unwritten(c, n, sizeof(double));
}

static double value(const Pair *p, const void *x, size_t i) {
    return p->size == sizeof(double) ? ((const double *)x)[i] : (double)((const real *)x)[i];
}

static void check(Compare *c, const char *name, Pair p, double bf16_tolerance) {
    void *x[SIDES];
    FvError err = {0};
    for (int s = 0; s < SIDES; s++) {
        x[s] = host(p.n, p.size);
        c->be[s]->ops->download(c->be[s], x[s], p.at[s], p.n * p.size);
        if (c->be[s]->ops->sync(c->be[s], &err) != FV_OK)
            stop(name, &err);
    }
    double off = 0, all = 0;
    for (size_t i = 0; i < p.n; i++) {
        double a = value(&p, x[GPU], i), b = value(&p, x[CPU], i);
        off += (a - b) * (a - b);
        all += b * b;
    }
    double error = sqrt(off / all), tolerance = c->bf16 ? bf16_tolerance : float_tolerance;
    bool good = error <= tolerance; /* all 0: NaN, which tells nothing */
    printf("%-26s %10zu %9.1e of %7.1e%s\n", name, p.n, error, tolerance, good ? "" : "  FAILED");
    c->compared++;
    c->failed += !good;
    for (int s = 0; s < SIDES; s++)
        free(x[s]);
}

static void release(Compare *c) {
    for (int s = 0; s < SIDES; s++)
        for (size_t i = 0; i < c->count; i++)
            c->be[s]->ops->release(c->be[s], c->kept[s][i]);
    c->count = 0;
}

/* Runs a call on both sides: `o` the table, `be` the backend, R(p) and W(p) their tensors. */
#define EACH(...)                                                                                  \
    for (int s = 0; s < SIDES; s++) {                                                              \
        FvBackend *be = c->be[s];                                                                  \
        const FvOps *o = be->ops;                                                                  \
        __VA_ARGS__;                                                                               \
    }
#define R(p) ((real *)(p).at[s])
#define W(p) ((double *)(p).at[s])

/* --- operations ------------------------------------------------------------------------------- */

static void linear(Compare *c, size_t rows, size_t in, size_t out, bool biased) {
    Pair x = given(c, rows * in, 1), w = given(c, out * in, 0.05), b = given(c, out, 1);
    Pair dy = given(c, rows * out, 1), y = made(c, rows * out), dx = made(c, rows * in);
    Pair dw = given(c, out * in, 1), db = given(c, out, 1);
    EACH(o->linear(be, rows, in, out, R(x), R(w), biased ? R(b) : NULL, R(y)));
    EACH(o->linear_back(be, rows, in, out, R(x), R(w), R(dy), R(dx), false, R(dw),
                        biased ? R(db) : NULL));
    check(c, "linear", y, product);
    check(c, "linear_back dx", dx, product);
    check(c, "linear_back dw", dw, product);
    check(c, "linear_back dbias", db, float_tolerance);
    EACH(o->linear_back(be, rows, in, out, R(x), R(w), R(dy), R(dx), true, NULL, NULL));
    check(c, "linear_back dx +=", dx, product);
}

static void elements(Compare *c, size_t n) {
    Pair x = given(c, n, 1), u = given(c, n, 1), dy = given(c, n, 1), y = made(c, n);
    Pair dx = made(c, n), du = made(c, n), sum = given(c, n, 1), low = given(c, n, 1);
    EACH(o->gelu(be, n, R(x), R(y)); o->gelu_back(be, n, R(x), R(dy), R(dx)));
    check(c, "gelu", y, float_tolerance);
    check(c, "gelu_back", dx, float_tolerance);
    EACH(o->relu(be, n, R(x), R(y)); o->relu_back(be, n, R(x), R(dy), R(dx)));
    check(c, "relu", y, float_tolerance);
    check(c, "relu_back", dx, float_tolerance);
    EACH(o->swiglu(be, n, R(x), R(u), R(y));
         o->swiglu_back(be, n, R(x), R(u), R(dy), R(dx), R(du)));
    check(c, "swiglu", y, float_tolerance);
    check(c, "swiglu_back dgate", dx, float_tolerance);
    check(c, "swiglu_back dup", du, float_tolerance);
    EACH(o->copy(be, n, R(x), R(y)); o->add(be, n, R(x), R(sum)));
    check(c, "copy", y, float_tolerance);
    check(c, "add", sum, float_tolerance);
    EACH(o->approach(be, n, 0.01, R(x), R(low)));
    check(c, "approach", low, float_tolerance);
}

static void norms(Compare *c, size_t rows, size_t width) {
    size_t n = rows * width;
    Pair x = given(c, n, 1), g = given(c, width, 1), b = given(c, width, 1), dy = given(c, n, 1);
    Pair y = made(c, n), mean = made(c, rows), rstd = made(c, rows), dx = made(c, n);
    Pair dg = given(c, width, 1), db = given(c, width, 1);
    EACH(o->layernorm(be, rows, width, 1e-6, R(x), R(g), R(b), R(y), R(mean), R(rstd));
         o->layernorm_back(be, rows, width, R(x), R(g), R(mean), R(rstd), R(dy), R(dx), false,
                           R(dg), R(db)));
    check(c, "layernorm", y, float_tolerance);
    check(c, "layernorm_back dx", dx, float_tolerance);
    check(c, "layernorm_back dgamma", dg, float_tolerance);
    check(c, "layernorm_back dbeta", db, float_tolerance);
    EACH(o->rmsnorm(be, rows, width, 1e-5, R(x), R(g), R(y), R(rstd));
         o->rmsnorm_back(be, rows, width, R(x), R(g), R(rstd), R(dy), R(dx), true, R(dg)));
    check(c, "rmsnorm", y, float_tolerance);
    check(c, "rmsnorm_back dx +=", dx, float_tolerance);
    check(c, "rmsnorm_back dgamma", dg, float_tolerance);
    EACH(o->rescale(be, rows, width, 0.14, R(x), R(y), R(rstd));
         o->rescale_back(be, rows, width, 0.14, R(x), R(rstd), R(dy), R(dx)));
    check(c, "rescale", y, float_tolerance);
    check(c, "rescale_back", dx, float_tolerance);
    EACH(o->residual(be, rows, width, R(x), R(g), R(dy), R(y));
         o->residual_back(be, rows, width, R(g), R(x), R(dy), R(dx), R(dg)));
    check(c, "residual", y, float_tolerance);
    check(c, "residual_back da", dx, float_tolerance);
    check(c, "residual_back dscale", dg, float_tolerance);
}

static void attention(Compare *c, FvAttention a) {
    size_t q_n = a.batch * a.rows * a.heads * a.width;
    size_t k_n = a.batch * a.keys * a.kv_heads * a.width;
    Pair q = given(c, q_n, 1), k = given(c, k_n, 1), v = given(c, k_n, 1), dy = given(c, q_n, 1);
    Pair probs = made(c, a.batch * a.heads * a.rows * a.keys), y = made(c, q_n), dq = made(c, q_n);
    Pair dk = given(c, k_n, 1), dv = given(c, k_n, 1);
    EACH(o->attention(be, &a, R(q), R(k), R(v), R(probs), R(y));
         o->attention_back(be, &a, R(q), R(k), R(v), R(probs), R(dy), R(dq), R(dk), R(dv)));
    check(c, "attention", y, float_tolerance);
    check(c, "attention_back dq", dq, float_tolerance);
    check(c, "attention_back dk", dk, float_tolerance);
    check(c, "attention_back dv", dv, float_tolerance);
    EACH(o->rope(be, a.batch, a.rows, a.heads, a.width, 3, NULL, 1e4, false, R(q)));
    check(c, "rope", q, float_tolerance);
}

/* The query of a frozen encoder: products per head before and after it, of `width` elements. */
static void stored_query(Compare *c, FvQuery a, size_t width) {
    size_t n = a.frames * a.heads * width, wide = a.frames * a.heads * a.width;
    Pair q = given(c, n, 1), w = given(c, a.heads * width * a.width, 0.05);
    Pair b = given(c, a.heads * width, 1), keys = given(c, a.frames * a.keys * a.width, 1);
    Pair absorbed = made(c, wide), probs = made(c, a.frames * a.heads * a.keys);
    Pair pooled = made(c, wide), y = made(c, n), dq = made(c, wide), dout = given(c, wide, 1);
    EACH(o->head_linear_back(be, a.frames, a.heads, a.width, width, R(w), R(q), R(absorbed)));
    check(c, "head_linear_back", absorbed, product);
    EACH(o->query(be, &a, R(absorbed), R(keys), R(keys), R(probs), R(pooled));
         o->head_linear(be, a.frames, a.heads, a.width, width, R(pooled), R(w), R(b), R(y));
         o->query_back(be, &a, R(absorbed), R(keys), R(keys), R(probs), R(dout), NULL, R(dq), NULL,
                       NULL));
    check(c, "stored query", pooled, product);
    check(c, "head_linear", y, product);
    check(c, "stored query_back", dq, product);
}

static void query(Compare *c, FvQuery a) {
    size_t q_n = a.frames * a.heads * a.width, k_n = q_n * a.keys,
           p_n = a.frames * a.heads * a.keys;
    Pair q = given(c, q_n, 1), k = given(c, k_n, 1), v = given(c, k_n, 1), dy = given(c, q_n, 1);
    Pair dp = given(c, p_n, 1), probs = made(c, p_n), y = made(c, q_n), dq = made(c, q_n);
    Pair dk = given(c, k_n, 1), dv = given(c, k_n, 1), h = made_wide(c, a.frames);
    EACH(o->query(be, &a, R(q), R(k), R(v), R(probs), R(y));
         o->query_back(be, &a, R(q), R(k), R(v), R(probs), R(dy), R(dp), R(dq), R(dk), R(dv)));
    check(c, "query probs", probs, float_tolerance);
    check(c, "query", y, float_tolerance);
    check(c, "query_back dq", dq, float_tolerance);
    check(c, "query_back dk", dk, float_tolerance);
    check(c, "query_back dv", dv, float_tolerance);
    EACH(o->entropy(be, a.frames, a.heads, a.keys, R(probs), W(h));
         o->entropy_back(be, a.frames, a.heads, a.keys, R(probs), W(h), R(dp)));
    check(c, "entropy", h, float_tolerance);
    check(c, "entropy_back", dp, float_tolerance);
}

static void images(Compare *c, size_t frames, size_t size, size_t patch, size_t width) {
    size_t grid = size / patch, patches = grid * grid, bytes = frames * size * size * 3;
    uint8_t *noise = host(bytes, 1);
    for (size_t i = 0; i < bytes; i++)
        noise[i] = (uint8_t)fv_random(0xf00d, i);
    Pair pixels = place(c, bytes, 1, noise);
    free(noise);
    size_t n = frames * patches;
    Pair rows = made(c, n * 3 * patch * patch), x = made(c, (n + frames) * width);
    Pair p = given(c, n * width, 1), cls = given(c, width, 1),
         pos = given(c, (patches + 1) * width, 1);
    Pair dx = given(c, (n + frames) * width, 1), dp = made(c, n * width);
    Pair dcls = given(c, width, 1), dpos = given(c, (patches + 1) * width, 1);
    EACH(o->patchify(be, frames, size, patch, (const uint8_t *)pixels.at[s], R(rows));
         o->tokens(be, frames, patches, width, R(p), R(cls), R(pos), R(x));
         o->tokens_back(be, frames, patches, width, R(dx), R(dp), R(dcls), R(dpos)));
    check(c, "patchify", rows, float_tolerance);
    check(c, "tokens", x, float_tolerance);
    check(c, "tokens_back dpatch", dp, float_tolerance);
    check(c, "tokens_back dcls", dcls, float_tolerance);
    check(c, "tokens_back dpos", dpos, float_tolerance);
}

static void conv(Compare *c, FvConv a) {
    size_t out = fv_conv_side(a.height, a.stride) * fv_conv_side(a.width, a.stride);
    size_t x_n = a.frames * a.height * a.width * a.in, y_n = a.frames * out * a.out;
    Pair x = given(c, x_n, 1), w = given(c, a.out * 9 * a.in, 0.1), b = given(c, a.out, 1);
    Pair dy = given(c, y_n, 1), y = made(c, y_n), dx = made(c, x_n);
    Pair dw = given(c, a.out * 9 * a.in, 1), db = given(c, a.out, 1);
    EACH(o->conv(be, &a, R(x), R(w), R(b), R(y));
         o->conv_back(be, &a, R(x), R(w), R(dy), R(dx), false, R(dw), R(db)));
    check(c, "conv", y, product);
    check(c, "conv_back dx", dx, product);
    check(c, "conv_back dw", dw, product);
    check(c, "conv_back dbias", db, float_tolerance);
}

static void film(Compare *c, size_t frames, size_t positions, size_t channels) {
    size_t n = frames * positions * channels, m = frames * 2 * channels;
    Pair x = given(c, n, 1), gb = given(c, m, 1), dy = given(c, n, 1), y = made(c, n);
    Pair dx = made(c, n), dgb = made(c, m);
    EACH(o->film(be, frames, positions, channels, R(x), R(gb), R(y));
         o->film_back(be, frames, positions, channels, R(x), R(gb), R(dy), R(dx), false, R(dgb)));
    check(c, "film", y, float_tolerance);
    check(c, "film_back dx", dx, float_tolerance);
    check(c, "film_back dgb", dgb, float_tolerance);
}

static void losses(Compare *c, size_t rows, size_t width) {
    size_t n = rows * width;
    Pair x = given(c, n, 1), y = given(c, n, 1), d = made(c, n), loss = made_wide(c, rows);
    Pair dx = given(c, n, 1), dy = given(c, n, 1), cosine = made_wide(c, rows);
    EACH(o->mse(be, rows, width, R(x), R(y), W(loss));
         o->mse_back(be, rows, width, 0.5, R(x), R(y), R(d)));
    check(c, "mse", loss, float_tolerance);
    check(c, "mse_back", d, float_tolerance);
    EACH(o->cosine(be, rows, width, R(x), R(y), W(cosine));
         o->cosine_back(be, rows, width, 0.5, R(x), R(y), R(dx), R(dy)));
    check(c, "cosine", cosine, float_tolerance);
    check(c, "cosine_back dx", dx, float_tolerance);
    check(c, "cosine_back dy", dy, float_tolerance);
    Pair p = made(c, n), t = made(c, n), ce = made_wide(c, rows), norm = made(c, rows);
    EACH(o->softmax(be, rows, width, 0.5, R(y), NULL, R(t));
         o->cross_entropy(be, rows, width, 0.5, R(x), R(t), R(p), W(ce));
         o->cross_entropy_back(be, rows, width, 0.5, 1, R(p), R(t), R(d)));
    check(c, "softmax", t, float_tolerance);
    check(c, "cross_entropy", ce, float_tolerance);
    check(c, "cross_entropy_back", d, float_tolerance);
    EACH(o->normalize(be, rows, width, R(x), R(y), R(norm));
         o->normalize_back(be, rows, width, R(y), R(norm), R(dx), R(d), false));
    check(c, "normalize", y, float_tolerance);
    check(c, "normalize_back", d, float_tolerance);
}

static void optimizer(Compare *c, size_t n) {
    const FvAdamW a = {0.1, 0.9, 0.999, 1e-8, 0.01, 1, 3};
    const double none[2] = {0, 0};
    double rates[FV_RATES];
    fv_adamw_rates(&a, rates);
    Pair norm = place(c, 2, sizeof *none, none), rate = place(c, FV_RATES, sizeof *rates, rates);
    Pair g = given(c, n, 1), p = given(c, n, 1), m = given(c, n, 0.1);
    Pair v = squares(c, n);
    EACH(o->norm(be, n, R(g), W(norm));
         o->adamw(be, &a, W(rate), n, W(norm), R(g), R(p), R(m), R(v)));
    check(c, "norm", norm, float_tolerance);
    check(c, "adamw p", p, float_tolerance);
    check(c, "adamw m", m, float_tolerance);
    check(c, "adamw v", v, float_tolerance);
}

/* Operand tensors are read by products alone: what an operation writes there, through a product. */
static void through_product(Compare *c, const char *name, size_t rows, size_t in, Pair x) {
    enum { OUT = 48 };
    Pair w = given(c, in * OUT, 0.05), y = made(c, rows * OUT), dy = given(c, rows * OUT, 1);
    Pair dw = given(c, in * OUT, 1);
    char line[64];
    EACH(o->linear(be, rows, in, OUT, R(x), R(w), NULL, R(y));
         o->linear_back(be, rows, in, OUT, R(x), R(w), R(dy), NULL, false, R(dw), NULL));
    snprintf(line, sizeof line, "%s, linear", name);
    check(c, line, y, product);
    snprintf(line, sizeof line, "%s, linear_back", name);
    check(c, line, dw, product);
}

static void operands(Compare *c, size_t frames, size_t keys, size_t heads, size_t width) {
    size_t rows = frames * keys, wide = heads * width, n = rows * wide;
    FvAttention a = {frames, keys, keys, heads, heads, width, 0.125, false, NULL};
    FvQuery q = {frames, keys, heads, width, 0.125, 0, false};
    Pair x = given(c, n, 1), u = given(c, n, 1), v = given(c, n, 1), g = given(c, wide, 1);
    Pair mean = made(c, rows), rstd = made(c, rows), y = operand(c, n);
    Pair probs = made(c, rows * heads * keys), some = operand(c, frames * wide);
    EACH(o->gelu(be, n, R(x), R(y)));
    through_product(c, "gelu", rows, wide, y);
    EACH(o->swiglu(be, n, R(x), R(u), R(y)));
    through_product(c, "swiglu", rows, wide, y);
    EACH(o->layernorm(be, rows, wide, 1e-6, R(x), R(g), R(g), R(y), R(mean), R(rstd)));
    through_product(c, "layernorm", rows, wide, y);
    EACH(o->rmsnorm(be, rows, wide, 1e-5, R(x), R(g), R(y), R(rstd)));
    through_product(c, "rmsnorm", rows, wide, y);
    EACH(o->attention(be, &a, R(x), R(u), R(v), R(probs), R(y)));
    through_product(c, "attention", rows, wide, y);
    EACH(o->query(be, &q, R(x), R(u), R(v), R(probs), R(some)));
    through_product(c, "query", frames, wide, some);
}

/* --- shapes ----------------------------------------------------------------------------------- */

static void seed_scale(Compare *c) {
    size_t frames = c->small ? 2 : 16, keys = c->small ? 10 : 257, wide = c->small ? 24 : 384;
    size_t lm = c->small ? 36 : 576, mlp = c->small ? 40 : 1536, rows = 10,
           side = c->small ? 5 : 28;
    size_t heads = 6, width = wide / heads, size = c->small ? 22 : 224, patch = c->small ? 7 : 14;
    linear(c, frames * keys, wide, mlp, true);
    linear(c, 2 * rows, lm, mlp, false);
    elements(c, frames * keys * wide);
    release(c);
    norms(c, frames * keys, wide);
    norms(c, 2 * rows, lm);
    release(c);
    operands(c, frames, keys, heads, width);
    release(c);
    attention(c, (FvAttention){frames, keys, keys, heads, heads, width, 0.125, false, NULL});
    attention(c, (FvAttention){2, rows, rows, 9, 3, lm / 9, 0.125, true, NULL});
    release(c);
    query(c, (FvQuery){frames, keys, heads, width, 0.125, 0, false});
    query(c, (FvQuery){frames, keys, heads, width, 1.25, keys / 8 + 2, false});
    stored_query(c, (FvQuery){frames, keys, heads, wide, 0.125, 0, true}, width);
    release(c);
    images(c, frames, size, patch, wide);
    conv(c, (FvConv){frames, side, side, 4, 64, 1});
    conv(c, (FvConv){frames, side, side, c->small ? 8 : 64, c->small ? 12 : 128, 1});
    conv(c, (FvConv){frames, side, side, c->small ? 8 : 64, c->small ? 8 : 64, 2});
    release(c);
    film(c, frames, side * side, c->small ? 16 : 256);
    losses(c, frames, 4 * side * side);
    losses(c, frames, wide);
    optimizer(c, frames * keys * wide);
    release(c);
}

int main(int argc, char **argv) {
    Compare c = {.next = 1};
    FvError err = {0};
    for (int i = 1; i < argc; i++) {
        c.bf16 = c.bf16 || strcmp(argv[i], "--bf16") == 0;
        c.small = c.small || strcmp(argv[i], "--small") == 0;
    }
    const FvCudaOptions options = {.bf16 = c.bf16};
    if (fv_cpu_backend_create(2, &c.be[CPU], &err) != FV_OK ||
        fv_cuda_backend_create(&options, &c.be[GPU], &err) != FV_OK)
        stop("backends", &err);
    seed_scale(&c);
    printf("%s against %s: %zu of %zu tensors within their tolerance\n", c.be[GPU]->description,
           c.be[CPU]->description, c.compared - c.failed, c.compared);
    for (int s = 0; s < SIDES; s++)
        fv_backend_destroy(c.be[s]);
    return c.failed > 0;
}
