/* Operand tensors, copies of weights, and products that round what they read, on the backend that
 * does (CUDA's in bf16 mode; the CPU's operand tensors are floats and it rounds nothing).
 *
 * Where bfloat16 is read, an operand is off by u = 2^-8 of itself: 8 significant bits, rounded to
 * nearest. A sum of products of two such operands is off by (1 + u)^2 - 1 of the sum of the sizes
 * of its terms, beside the roundings of a float sum. */
#include "testing.h"

static int rounding_setup(void **state) {
    Testing *t = malloc(sizeof *t);
    if (!t)
        return -1;
    *t = (Testing){.next = 1};
    if (tested_rounding_create(2, &t->be, NULL) != FV_OK) {
        free(t);
        return -1;
    }
    t->ops = t->be->ops;
    *state = t;
    return 0;
}

#define ROUNDING_TEST(f) cmocka_unit_test_setup_teardown(f, rounding_setup, testing_teardown)

static bool is_short(const Testing *t) {
    return t->be->operand_bytes == 2;
}

static double unit(const Testing *t) {
    return is_short(t) ? 0x1p-8 : 0;
}

/* Of a sum of n products of two operands, relative to the sizes of its terms. Twice the roundings
 * of such a sum, as the reference sums too. */
static double product_error(const Testing *t, size_t n) {
    double u = unit(t);
    return 2 * u + u * u + 4 * FV_EPSILON * ((double)n + 2);
}

/* --- tensors ---------------------------------------------------------------------------------- */

static uint16_t bfloat16(real x) {
    float value = (float)x;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
}

static real element(const Testing *t, const real *x, size_t i) {
    if (!is_short(t))
        return x[i];
    uint32_t bits = (uint32_t)((const uint16_t *)(const void *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (real)value;
}

static real *guarded(Testing *t, size_t length, void *p) {
    assert_true(t->count < TESTING_TENSORS);
    memset(p, 0xff, (length + 2 * TESTING_GUARD) * sizeof(real));
    t->length[t->count] = length;
    t->block[t->count++] = p;
    return (real *)p + TESTING_GUARD;
}

/* n elements between guards, all NaN. */
static real *operand_tensor(Testing *t, size_t n) {
    void *p = NULL;
    size_t each = t->be->operand_bytes, length = (n * each + sizeof(real) - 1) / sizeof(real);
    size_t count = (length + 2 * TESTING_GUARD) * sizeof(real) / each;
    assert_int_equal(t->ops->alloc_operands(t->be, count, &p, NULL), FV_OK);
    return guarded(t, length, p);
}

static real *operand_copy(Testing *t, size_t n, const real *x) {
    real *y = operand_tensor(t, n);
    for (size_t i = 0; i < n; i++)
        if (is_short(t))
            ((uint16_t *)(void *)y)[i] = bfloat16(x[i]);
        else
            y[i] = x[i];
    return y;
}

static real *weights(Testing *t, size_t n, const real *values) {
    void *p = NULL;
    assert_int_equal(t->ops->alloc_weights(t->be, n + 2 * TESTING_GUARD, &p, NULL), FV_OK);
    real *w = guarded(t, n, p);
    memcpy(w, values, n * sizeof *w);
    t->ops->weights_changed(t->be, n, w);
    return w;
}

static real *sizes_of(Testing *t, size_t n, const real *x) {
    real *y = testing_tensor(t, n);
    for (size_t i = 0; i < n; i++)
        y[i] = (real)fabs((double)x[i]);
    return y;
}

/* `size`: sums of the sizes of what was added up. */
static void check_near(const char *what, size_t n, const real *got, const real *want,
                       const real *size, double relative) {
    for (size_t i = 0; i < n; i++)
        testing_close(what, i, (double)got[i], (double)want[i], relative * (double)size[i]);
}

/* --- writing ---------------------------------------------------------------------------------- */

/* The same computation stored in both types: one is the other, rounded. */
static void check_written(const Testing *t, const char *what, size_t n, const real *operand,
                          const real *y) {
    for (size_t i = 0; i < n; i++) {
        real want = y[i];
        uint16_t bits = bfloat16(y[i]);
        if (is_short(t))
            want = element(t, (const real *)(const void *)&bits, 0);
        testing_close(what, i, (double)element(t, operand, i), (double)want, 0);
    }
}

static void operand_tensors_hold_the_rounded_result(void **state) {
    Testing *t = *state;
    enum { ROWS = 5, WIDTH = 37, N = ROWS * WIDTH };
    real *x = testing_random(t, N, 1), *a = testing_random(t, N, 1),
         *w = testing_random(t, WIDTH, 1);
    real *mean = testing_tensor(t, ROWS), *rstd = testing_tensor(t, ROWS),
         *y = testing_tensor(t, N);
    real *z = operand_tensor(t, N);
    t->ops->gelu(t->be, N, x, y);
    t->ops->gelu(t->be, N, x, z);
    check_written(t, "gelu", N, z, y);
    t->ops->swiglu(t->be, N, x, a, y);
    t->ops->swiglu(t->be, N, x, a, z);
    check_written(t, "swiglu", N, z, y);
    t->ops->layernorm(t->be, ROWS, WIDTH, 1e-6, x, w, w, y, mean, rstd);
    real *mean2 = testing_tensor(t, ROWS), *rstd2 = testing_tensor(t, ROWS);
    t->ops->layernorm(t->be, ROWS, WIDTH, 1e-6, x, w, w, z, mean2, rstd2);
    check_written(t, "layernorm", N, z, y);
    testing_same("mean", ROWS, mean2, mean);
    testing_same("rstd", ROWS, rstd2, rstd);
    t->ops->rmsnorm(t->be, ROWS, WIDTH, 1e-6, x, w, y, rstd);
    t->ops->rmsnorm(t->be, ROWS, WIDTH, 1e-6, x, w, z, rstd2);
    check_written(t, "rmsnorm", N, z, y);
    testing_same("rstd", ROWS, rstd2, rstd);

    uint8_t pixels[2 * 6 * 6 * 3];
    enum { PATCHES = 2 * 4 * 27 };
    for (size_t i = 0; i < sizeof pixels; i++)
        pixels[i] = (uint8_t)(i * 37);
    real *patches = testing_tensor(t, PATCHES), *cut = operand_tensor(t, PATCHES);
    t->ops->patchify(t->be, 2, 6, 3, pixels, patches);
    t->ops->patchify(t->be, 2, 6, 3, pixels, cut);
    check_written(t, "patchify", PATCHES, cut, patches);

    const FvQuery s = {.frames = 2, .keys = 9, .heads = 3, .width = 7, .scale = 0.4, .top_k = 4};
    enum { NQ = 2 * 21, NK = 9 * NQ, NP = 2 * 3 * 9 };
    real *q = testing_random(t, NQ, 1), *k = testing_random(t, NK, 1),
         *v = testing_random(t, NK, 1);
    real *probs = testing_tensor(t, NP), *probs2 = testing_tensor(t, NP);
    real *out = testing_tensor(t, NQ), *pooled = operand_tensor(t, NQ);
    t->ops->query(t->be, &s, q, k, v, probs, out);
    t->ops->query(t->be, &s, q, k, v, probs2, pooled);
    check_written(t, "query", NQ, pooled, out);
    testing_same("probs", NP, probs2, probs);
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
}

/* Keys that all heads share, as a frozen encoder's outputs are stored: reading operand tensors is
 * reading the floats that they hold. */
static void query_reads_stored_operands(void **state) {
    Testing *t = *state;
    enum {
        F = 2,
        KEYS = 9,
        HEADS = 3,
        D = 40,
        NQ = F * HEADS * D,
        NK = F * KEYS * D,
        NP = F * HEADS * KEYS
    };
    const FvQuery s = {
        .frames = F, .keys = KEYS, .heads = HEADS, .width = D, .shared = true, .scale = 0.4};
    real *q = testing_random(t, NQ, 1), *dout = testing_random(t, NQ, 1);
    real *stored = operand_copy(t, NK, testing_random(t, NK, 1)), *k = testing_tensor(t, NK);
    real *probs = testing_tensor(t, NP), *probs2 = testing_tensor(t, NP);
    real *out = testing_tensor(t, NQ), *out2 = testing_tensor(t, NQ);
    real *dq = testing_tensor(t, NQ), *dq2 = testing_tensor(t, NQ);
    for (size_t i = 0; i < NK; i++)
        k[i] = element(t, stored, i);
    t->ops->query(t->be, &s, q, k, k, probs, out);
    t->ops->query(t->be, &s, q, stored, stored, probs2, out2);
    testing_same("probs", NP, probs2, probs);
    testing_same("out", NQ, out2, out);
    t->ops->query_back(t->be, &s, q, k, k, probs, dout, NULL, dq, NULL, NULL);
    t->ops->query_back(t->be, &s, q, stored, stored, probs, dout, NULL, dq2, NULL, NULL);
    testing_same("dq", NQ, dq2, dq);
    real *moved = operand_tensor(t, NK);
    t->ops->copy_operands(t->be, NK, stored, moved);
    for (size_t i = 0; i < NK; i++)
        testing_close("copy", i, (double)element(t, moved, i), (double)k[i], 0);
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
}

/* A product per head, with operands and results of both types: near the one of the operands' own
 * values, written out. */
static void products_per_head_read_and_write_operands(void **state) {
    Testing *t = *state;
    enum {
        ROWS = 5,
        HEADS = 3,
        IN = 16,
        OUT = 8,
        NX = ROWS * HEADS * IN,
        NY = ROWS * HEADS * OUT,
        NW = HEADS * OUT * IN
    };
    real *x = testing_random(t, NX, 1), *w = weights(t, NW, testing_random(t, NW, 1));
    real *b = testing_random(t, HEADS * OUT, 1), *dy = testing_random(t, NY, 1);
    real *y = testing_tensor(t, NY), *z = operand_tensor(t, NY), *dx = testing_tensor(t, NX);
    t->ops->head_linear(t->be, ROWS, HEADS, IN, OUT, x, w, b, y);
    t->ops->head_linear(t->be, ROWS, HEADS, IN, OUT, x, w, b, z);
    t->ops->head_linear_back(t->be, ROWS, HEADS, IN, OUT, w, dy, dx);
    check_written(t, "y", NY, z, y);
    for (size_t i = 0; i < NY; i++) {
        size_t row = i / (HEADS * OUT), h = i / OUT % HEADS, o = i % OUT;
        double want = (double)b[h * OUT + o], size = fabs(want);
        for (size_t k = 0; k < IN; k++) {
            double term = (double)x[(row * HEADS + h) * IN + k] * (double)w[(h * OUT + o) * IN + k];
            want += term;
            size += fabs(term);
        }
        testing_close("y", i, (double)y[i], want, product_error(t, IN + 1) * size);
    }
    for (size_t i = 0; i < NX; i++) {
        size_t row = i / (HEADS * IN), h = i / IN % HEADS, k = i % IN;
        double want = 0, size = 0;
        for (size_t o = 0; o < OUT; o++) {
            double term =
                (double)dy[(row * HEADS + h) * OUT + o] * (double)w[(h * OUT + o) * IN + k];
            want += term;
            size += fabs(term);
        }
        testing_close("dx", i, (double)dx[i], want, product_error(t, OUT) * size);
    }
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
}

/* --- dense layers and convolutions --------------------------------------------------------------
 */

typedef struct Product { /* y = x w + b and its gradients, whose tensors have these lengths */
    Testing *t;
    FvBackend *cpu;
    const FvConv *conv; /* NULL: linear */
    size_t rows, in, out, nx, nw, ny;
    const real *x, *w, *b, *dy;
} Product;

static void forward(const Product *p, FvBackend *be, const real *x, const real *w, const real *b,
                    real *y) {
    if (p->conv)
        be->ops->conv(be, p->conv, x, w, b, y);
    else
        be->ops->linear(be, p->rows, p->in, p->out, x, w, b, y);
}

static void backward(const Product *p, FvBackend *be, const real *x, const real *w, const real *dy,
                     real *dx, bool add, real *dw, real *db) {
    if (p->conv)
        be->ops->conv_back(be, p->conv, x, w, dy, dx, add, dw, db);
    else
        be->ops->linear_back(be, p->rows, p->in, p->out, x, w, dy, dx, add, dw, db);
}

/* x and w as the tested backend is given them, against the CPU on floats; the CPU on the operands'
 * magnitudes gives the sizes. What dbias sums is not rounded. */
static void check_product(const Product *p, const real *x, const real *w, bool add) {
    Testing *t = p->t;
    real *y = testing_tensor(t, p->ny), *want = testing_tensor(t, p->ny);
    real *size = testing_tensor(t, p->ny);
    real *ax = sizes_of(t, p->nx, p->x), *aw = sizes_of(t, p->nw, p->w);
    real *ab = sizes_of(t, p->out, p->b), *ady = sizes_of(t, p->ny, p->dy);
    forward(p, t->be, x, w, p->b, y);
    forward(p, p->cpu, p->x, p->w, p->b, want);
    forward(p, p->cpu, ax, aw, ab, size);
    check_near("y", p->ny, y, want, size, product_error(t, p->nw / p->out));

    const size_t n[3] = {p->nx, p->nw, p->out};
    real *got[3], *right[3], *sum[3], *alone[2];
    for (int i = 0; i < 3; i++) {
        double before = i == 0 && !add ? NAN : 0.5;
        got[i] = testing_filled(t, n[i], before);
        right[i] = testing_filled(t, n[i], before);
        sum[i] = testing_filled(t, n[i], before);
        if (i < 2)
            alone[i] = testing_filled(t, n[i], before);
    }
    backward(p, t->be, x, w, p->dy, got[0], add, got[1], got[2]);
    backward(p, p->cpu, p->x, p->w, p->dy, right[0], add, right[1], right[2]);
    backward(p, p->cpu, ax, aw, ady, sum[0], add, sum[1], sum[2]);
    check_near("dx", n[0], got[0], right[0], sum[0], product_error(t, 9 * p->out));
    check_near("dw", n[1], got[1], right[1], sum[1], product_error(t, p->ny / p->out));
    check_near("dbias", n[2], got[2], right[2], sum[2],
               4 * FV_EPSILON * (double)(p->ny / p->out + 2));
    backward(p, t->be, x, w, p->dy, alone[0], add, NULL, NULL);
    backward(p, t->be, x, w, p->dy, NULL, false, alone[1], NULL);
    testing_same("dx alone", n[0], alone[0], got[0]);
    testing_same("dw alone", n[1], alone[1], got[1]);
}

static void check_every_source(Product *p) {
    Testing *t = p->t;
    p->x = testing_random(t, p->nx, 1), p->w = testing_random(t, p->nw, 1);
    p->b = testing_random(t, p->out, 1), p->dy = testing_random(t, p->ny, 1);
    const real *x[2] = {p->x, operand_copy(t, p->nx, p->x)};
    const real *w[2] = {p->w, weights(t, p->nw, p->w)};
    for (int k = 0; k < 4; k++)
        check_product(p, x[k % 2], w[k / 2], k % 2);
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
}

static void linear_reads_operands_weights_and_floats(void **state) {
    Testing *t = *state;
    static const size_t shapes[][3] = {{1, 1, 1}, {3, 7, 5}, {70, 24, 40}};
    Product p = {.t = t};
    assert_int_equal(fv_cpu_backend_create(1, &p.cpu, NULL), FV_OK);
    for (size_t k = 0; k < 3; k++) {
        p.rows = shapes[k][0], p.in = shapes[k][1], p.out = shapes[k][2];
        p.nx = p.rows * p.in, p.nw = p.in * p.out, p.ny = p.rows * p.out;
        check_every_source(&p);
    }
    fv_backend_destroy(p.cpu);
}

static void conv_reads_operands_weights_and_floats(void **state) {
    Testing *t = *state;
    static const FvConv shapes[] = {{2, 3, 4, 5, 7, 1}, {1, 6, 5, 8, 16, 2}};
    Product p = {.t = t};
    assert_int_equal(fv_cpu_backend_create(1, &p.cpu, NULL), FV_OK);
    for (size_t k = 0; k < 2; k++) {
        const FvConv *s = p.conv = &shapes[k];
        p.out = s->out;
        p.nx = s->frames * s->height * s->width * s->in, p.nw = s->out * 9 * s->in;
        p.ny = s->frames * fv_conv_side(s->height, s->stride) * fv_conv_side(s->width, s->stride) *
               s->out;
        check_every_source(&p);
    }
    fv_backend_destroy(p.cpu);
}

/* Unfolded, each frame takes more than half of the CUDA backend's 64 MB for it: both directions go
 * in two parts. */
static void conv_in_parts_reads_every_part(void **state) {
    Testing *t = *state;
    const FvConv s = {2, 48, 48, 512, 3, 1};
    Product p = {.t = t, .conv = &s, .out = s.out};
    assert_int_equal(fv_cpu_backend_create(1, &p.cpu, NULL), FV_OK);
    p.nx = 2 * 48 * 48 * s.in, p.nw = s.out * 9 * s.in, p.ny = 2 * 48 * 48 * s.out;
    p.x = testing_random(t, p.nx, 1), p.w = testing_random(t, p.nw, 1);
    p.b = testing_random(t, p.out, 1), p.dy = testing_random(t, p.ny, 1);
    check_product(&p, operand_copy(t, p.nx, p.x), weights(t, p.nw, p.w), false);
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
    fv_backend_destroy(p.cpu);
}

/* --- attention -------------------------------------------------------------------------------- */

typedef struct Value {
    double want, error; /* sums of terms, and of what each may be off by */
} Value;

typedef struct Attention {
    Testing *t;
    FvAttention a;
    size_t nq, nk, np;
    const real *q, *k, *v, *dout;
    real *probs;
    Value *dq, *dk, *dv;
} Attention;

static bool sees(const FvAttention *a, size_t b, size_t i, size_t j) {
    return !(a->first && j < (size_t)a->first[b]) && !(a->causal && j + a->rows > i + a->keys);
}

/* x . y over `width`, and what the product of rounded copies may be off by. */
static Value dot(const Testing *t, size_t width, double scale, const real *x, const real *y) {
    Value v = {0, 0};
    for (size_t d = 0; d < width; d++) {
        double term = scale * (double)x[d] * (double)y[d];
        v.want += term;
        v.error += product_error(t, width) * fabs(term);
    }
    return v;
}

enum { MOST_KEYS = 32 };

/* Scores off by at most e move each probability by a factor within exp(+-2 e). In a term p v of the
 * output, p and v are rounded, and so is the sum where it is an operand. */
static void check_row(const Attention *c, const real *out, bool operand, size_t b, size_t h,
                      size_t i) {
    const FvAttention *a = &c->a;
    const Testing *t = c->t;
    size_t w = a->width, g = h / (a->heads / a->kv_heads);
    const real *q = c->q + ((b * a->rows + i) * a->heads + h) * w;
    const real *probs = c->probs + ((b * a->heads + h) * a->rows + i) * a->keys;
    double p[MOST_KEYS] = {0}, sum = 0, e = 0;
    for (size_t j = 0; j < a->keys; j++) {
        if (!sees(a, b, i, j))
            continue;
        Value s = dot(t, w, a->scale, q, c->k + ((b * a->keys + j) * a->kv_heads + g) * w);
        p[j] = exp(s.want);
        sum += p[j];
        e = fmax(e, s.error);
    }
    double u = unit(t), few = 4 * FV_EPSILON * ((double)a->keys + 8);
    double of_p = exp(2 * e) * (1 + few) - 1, of_out = (1 + of_p) * pow(1 + u, 3) * (1 + few) - 1;
    for (size_t j = 0; j < a->keys; j++) {
        p[j] = sum > 0 ? p[j] / sum : 0;
        testing_close("probs", j, (double)probs[j], p[j], of_p * p[j]);
    }
    for (size_t d = 0; d < w; d++) {
        double want = 0, size = 0;
        for (size_t j = 0; j < a->keys; j++) {
            double v = (double)c->v[((b * a->keys + j) * a->kv_heads + g) * w + d];
            want += p[j] * v;
            size += fabs(p[j] * v);
        }
        size_t at = ((b * a->rows + i) * a->heads + h) * w + d;
        double got = (double)(operand ? element(t, out, at) : out[at]);
        testing_close("out", at, got, want, of_out * size);
    }
}

static void add_product(Value *sum, double scale, Value x, double y, double relative) {
    sum->want += scale * x.want * y;
    sum->error += fabs(scale * y) * (x.error * (1 + relative) + fabs(x.want) * relative);
}

/* Adds a row's part of the gradients, given its probabilities. With dp = dout . v, off by products
 * of rounded copies, ds = p (dp - sum p dp) carries their errors; products with ds round it. */
static void add_gradients(const Attention *c, size_t b, size_t h, size_t i) {
    const FvAttention *a = &c->a;
    const Testing *t = c->t;
    size_t w = a->width, g = h / (a->heads / a->kv_heads);
    size_t row = ((b * a->rows + i) * a->heads + h) * w;
    const real *p = c->probs + ((b * a->heads + h) * a->rows + i) * a->keys;
    double relative = product_error(t, a->keys + a->rows * a->heads), few = 16 * FV_EPSILON;
    Value dp[MOST_KEYS] = {{0, 0}}, mean = {0, 0};
    for (size_t j = 0; j < a->keys; j++) {
        if (!sees(a, b, i, j))
            continue;
        dp[j] = dot(t, w, 1, c->dout + row, c->v + ((b * a->keys + j) * a->kv_heads + g) * w);
        mean.want += (double)p[j] * dp[j].want;
        mean.error += (double)p[j] * (dp[j].error + few * fabs(dp[j].want) * (double)a->keys);
    }
    for (size_t j = 0; j < a->keys; j++) {
        size_t key = ((b * a->keys + j) * a->kv_heads + g) * w;
        Value ds = {(double)p[j] * (dp[j].want - mean.want),
                    (double)p[j] *
                        (dp[j].error + mean.error + few * (fabs(dp[j].want) + fabs(mean.want)))};
        Value prob = {(double)p[j], 0};
        for (size_t d = 0; d < w; d++) {
            add_product(&c->dq[row + d], a->scale, ds, (double)c->k[key + d], relative);
            add_product(&c->dk[key + d], a->scale, ds, (double)c->q[row + d], relative);
            add_product(&c->dv[key + d], 1, prob, (double)c->dout[row + d], relative);
        }
    }
}

static void check_values(const char *what, size_t n, const real *got, double before,
                         const Value *v) {
    for (size_t i = 0; i < n; i++)
        testing_close(what, i, (double)got[i] - before, v[i].want,
                      v[i].error + 4 * FV_EPSILON * fabs(before));
}

static void check_gradients(Attention *c) {
    Testing *t = c->t;
    real *dq = testing_tensor(t, c->nq), *dk = testing_filled(t, c->nk, 0.5);
    real *dv = testing_filled(t, c->nk, -0.5);
    t->ops->attention_back(t->be, &c->a, c->q, c->k, c->v, c->probs, c->dout, dq, dk, dv);
    c->dq = calloc(c->nq + 2 * c->nk, sizeof *c->dq);
    assert_non_null(c->dq);
    c->dk = c->dq + c->nq, c->dv = c->dk + c->nk;
    for (size_t n = 0; n < c->a.batch * c->a.heads * c->a.rows; n++)
        add_gradients(c, n / c->a.rows / c->a.heads, n / c->a.rows % c->a.heads, n % c->a.rows);
    check_values("dq", c->nq, dq, 0, c->dq);
    check_values("dk", c->nk, dk, 0.5, c->dk);
    check_values("dv", c->nk, dv, -0.5, c->dv);
    free(c->dq);
}

/* Heads of a width that products of bfloat16 take, and of widths that are left to float. */
static void attention_rounds_what_its_products_read(void **state) {
    Testing *t = *state;
    const int32_t first[2] = {3, 0};
    const FvAttention shapes[] = {
        {.batch = 2, .rows = 5, .keys = 5, .heads = 3, .kv_heads = 3, .width = 8, .scale = 0.35},
        {.batch = 1, .rows = 3, .keys = 16, .heads = 4, .kv_heads = 2, .width = 16, .scale = 0.2},
        {2, 4, 11, 4, 2, 8, 0.3, true, first},
        {2, 4, 8, 3, 1, 2, 0.7, true, first},
        {.batch = 1, .rows = 7, .keys = 7, .heads = 2, .kv_heads = 2, .width = 9, .scale = 0.3},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        FvAttention a = shapes[k];
        Attention c = {.t = t, .a = a};
        c.nq = a.batch * a.rows * a.heads * a.width, c.nk = a.batch * a.keys * a.kv_heads * a.width;
        c.np = a.batch * a.heads * a.rows * a.keys;
        assert_true(a.keys <= MOST_KEYS);
        c.q = testing_random(t, c.nq, 1), c.k = testing_random(t, c.nk, 1);
        c.v = testing_random(t, c.nk, 1), c.dout = testing_random(t, c.nq, 1);
        c.probs = testing_tensor(t, c.np);
        real *out[2] = {testing_tensor(t, c.nq), operand_tensor(t, c.nq)};
        for (int o = 0; o < 2; o++) {
            t->ops->attention(t->be, &a, c.q, c.k, c.v, c.probs, out[o]);
            for (size_t n = 0; n < a.batch * a.heads * a.rows; n++)
                check_row(&c, out[o], o, n / a.rows / a.heads, n / a.rows % a.heads, n % a.rows);
        }
        check_gradients(&c);
        assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
    }
}

static void attention_without_keys_is_zero(void **state) {
    Testing *t = *state;
    const FvAttention a = {
        .batch = 1, .rows = 2, .heads = 1, .kv_heads = 1, .width = 8, .scale = 1};
    real *q = testing_random(t, 16, 1), *none = testing_tensor(t, 0), *out = operand_tensor(t, 16);
    t->ops->attention(t->be, &a, q, none, none, none, out);
    for (size_t i = 0; i < 16; i++)
        assert_true(element(t, out, i) == 0);
}

/* --- weights ---------------------------------------------------------------------------------- */

enum { IN = 9, OUT = 7, COUNT = IN * OUT };

/* Products with the weights are those with a tensor of the same floats, which is rounded when it
 * is read, but for the order of sums: no copy is behind. */
static void check_copy(Testing *t, const real *w) {
    enum { ROWS = 4 };
    real *x = testing_random(t, ROWS * IN, 1), *y = testing_tensor(t, ROWS * OUT);
    real *want = testing_tensor(t, ROWS * OUT), *same = testing_copy(t, COUNT, w);
    t->ops->linear(t->be, ROWS, IN, OUT, x, w, NULL, y);
    t->ops->linear(t->be, ROWS, IN, OUT, x, same, NULL, want);
    for (size_t i = 0; i < ROWS * OUT; i++) {
        double size = 0;
        for (size_t k = 0; k < IN; k++)
            size += fabs((double)x[i / OUT * IN + k] * (double)w[i % OUT * IN + k]);
        testing_close("product", i, (double)y[i], (double)want[i],
                      4 * FV_EPSILON * (IN + 2) * size);
    }
}

static void products_follow_the_weights(void **state) {
    Testing *t = *state;
    const FvAdamW a = {0.1, 0.9, 0.999, 1e-8, 0.1, 1, 1};
    double rates[FV_RATES];
    fv_adamw_rates(&a, rates);
    const double *at = testing_doubles(t, FV_RATES, rates);
    const double *norm = testing_doubles(t, 2, (double[]){1, 0});
    const double *bad = testing_doubles(t, 2, (double[]){NAN, NAN});
    real *block = weights(t, 3 * COUNT, testing_random(t, 3 * COUNT, 1)), *w = block + COUNT;
    real *g = testing_random(t, COUNT, 1), *m = testing_filled(t, COUNT, 0);
    real *v = testing_filled(t, COUNT, 0), *before = testing_copy(t, 3 * COUNT, block);
    for (size_t i = 0; i < 3; i++)
        check_copy(t, block + i * COUNT);
    t->ops->adamw(t->be, &a, at, COUNT, norm, g, w, m, v);
    for (size_t i = 0; i < COUNT; i++) /* by about the rate: far more than a rounding */
        assert_true(fabs((double)w[i] - (double)before[COUNT + i]) > 0.05);
    testing_same("neighbour", COUNT, block, before);
    testing_same("neighbour", COUNT, block + 2 * COUNT, before + 2 * COUNT);
    for (size_t i = 0; i < 3; i++)
        check_copy(t, block + i * COUNT);
    t->ops->adamw(t->be, &a, at, COUNT, bad, g, w, m, v);
    check_copy(t, w);
    t->ops->upload(t->be, w, before, COUNT * sizeof *w);
    t->ops->weights_changed(t->be, COUNT, w);
    check_copy(t, w);
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
}

/* --- modes ------------------------------------------------------------------------------------ */

/* 1 + 2^-12 is a float; as bfloat16 it is 1. Each product here is of that number and 1. */
static void check_rounding(Testing *t, bool rounds) {
    enum { WIDTH = 8 };
    const double x = 1 + 0x1p-12, want = rounds ? 1 : x;
    const FvConv s = {1, 1, 1, 1, 1, 1};
    const FvAttention a = {
        .batch = 1, .rows = 1, .keys = 1, .heads = 1, .kv_heads = 1, .width = WIDTH, .scale = 1};
    real *number = testing_filled(t, WIDTH, x), *one = testing_filled(t, 9, 1);
    real *y = testing_tensor(t, WIDTH), *dw = testing_filled(t, WIDTH, 0);
    real *probs = testing_tensor(t, 1), *dv = testing_filled(t, WIDTH, 0);
    t->ops->linear(t->be, 1, 1, 1, number, one, NULL, y);
    testing_close("linear", 0, (double)y[0], want, 0);
    t->ops->linear_back(t->be, 1, 1, 1, one, one, number, y, false, dw, NULL);
    testing_close("dx", 0, (double)y[0], want, 0);
    testing_close("dw", 0, (double)dw[0], want, 0);
    t->ops->conv(t->be, &s, number, one, NULL, y);
    testing_close("conv", 0, (double)y[0], want, 0);
    t->ops->conv_back(t->be, &s, one, one, number, y, false, testing_filled(t, 9, 0), NULL);
    testing_close("conv's dx", 0, (double)y[0], want, 0);
    t->ops->attention(t->be, &a, one, one, number, probs, y);
    testing_close("attention", 0, (double)y[0], want, 0);
    t->ops->attention_back(t->be, &a, one, one, one, probs, number, y, testing_filled(t, WIDTH, 0),
                           dv);
    testing_close("dv", 0, (double)dv[0], want, 0);
    assert_int_equal(t->ops->sync(t->be, NULL), FV_OK);
}

static void products_round_where_operands_are_short(void **state) {
    Testing *t = *state;
    check_rounding(t, is_short(t));
}

/* Nor does it keep anything in another type. */
static void the_other_mode_rounds_nothing(void **state) {
    Testing *t = *state;
    assert_int_equal(t->be->operand_bytes, sizeof(real));
    check_rounding(t, false);
    real *x = operand_copy(t, COUNT, testing_random(t, COUNT, 1)), *y = testing_filled(t, COUNT, 1);
    t->ops->add(t->be, COUNT, x, y);
    for (size_t i = 0; i < COUNT; i++)
        testing_close("sum", i, (double)y[i], (double)(x[i] + 1), 0);
    check_copy(t, weights(t, COUNT, x));
}

/* --- memory ----------------------------------------------------------------------------------- */

static void memory_for_elements_is_zeroed_and_refused_alike(void **state) {
    Testing *t = *state;
    FvStatus (*const alloc[])(FvBackend *, size_t, void **, FvError *) = {t->ops->alloc_operands,
                                                                          t->ops->alloc_weights};
    const size_t each[] = {t->be->operand_bytes, sizeof(real)};
    for (size_t k = 0; k < 2; k++) {
        const size_t impossible[] = {SIZE_MAX, SIZE_MAX / each[k] - 2, SIZE_MAX / 2};
        for (size_t count = 0; count < 200; count += 67) {
            void *p = NULL;
            assert_int_equal(alloc[k](t->be, count, &p, NULL), FV_OK);
            assert_int_equal((uintptr_t)p % 64, 0);
            for (size_t i = 0; i < count * each[k]; i++)
                assert_int_equal(((char *)p)[i], 0);
            t->ops->release(t->be, p);
        }
        for (size_t i = 0; i < 3; i++) {
            FvError err = {0};
            void *p = t;
            assert_int_equal(alloc[k](t->be, impossible[i], &p, &err), FV_DEVICE);
            assert_null(p);
            assert_non_null(strstr(err.text, "no memory for"));
        }
    }
}

static void refused(Testing *t, const char *operation, const real *y, double kept) {
    FvError err = {0};
    assert_int_equal(t->ops->sync(t->be, &err), FV_DEVICE);
    assert_non_null(strstr(err.text, operation));
    assert_non_null(strstr(err.text, "takes float"));
    testing_close(operation, 0, (double)y[0], kept, 0);
    assert_int_equal(t->ops->sync(t->be, &err), FV_OK); /* told once */
}

/* Floats would be read from halves of pairs. Where operands are floats all is allowed. */
static void operations_on_floats_refuse_operand_tensors(void **state) {
    Testing *t = *state;
    enum { N = 6 };
    real *x = operand_copy(t, N, testing_filled(t, N, 3)), *y = testing_filled(t, N, 2);
    real *w = testing_filled(t, N, 1), *row = testing_tensor(t, N);
    if (!is_short(t))
        return;
    t->ops->copy(t->be, N, x, y);
    refused(t, "copy", y, 2);
    t->ops->add(t->be, N, x, y);
    refused(t, "add", y, 2);
    t->ops->copy_rows(t->be, 1, N, x, NULL, y, NULL, false);
    refused(t, "copy_rows", y, 2);
    t->ops->residual(t->be, 1, N, w, NULL, x, y);
    refused(t, "residual", y, 2);
    t->ops->gelu(t->be, N, x, y);
    refused(t, "gelu", y, 2);
    t->ops->layernorm(t->be, 1, N, 1e-6, x, w, w, y, row, row);
    refused(t, "layernorm", y, 2);
    t->ops->layernorm_back(t->be, 1, N, w, w, w, w, x, y, false, NULL, NULL);
    refused(t, "layernorm_back", y, 2);
    t->ops->linear(t->be, 1, 2, 3, w, x, NULL, y);
    refused(t, "linear", y, 2);
    t->ops->linear(t->be, 1, 1, 1, w, w, NULL, x);
    refused(t, "linear", y, 2);
    t->ops->linear_back(t->be, 1, 1, 1, w, w, x, y, false, NULL, NULL);
    refused(t, "linear_back", y, 2);
    t->ops->film(t->be, 1, 1, 1, w, x, y);
    refused(t, "film", y, 2);
    double norm = 5;
    t->ops->norm(t->be, N, x, &norm);
    refused(t, "norm", y, 2);
    assert_true(norm == 5);
    for (size_t i = 0; i < N; i++)
        assert_true(element(t, x, i) == 3);
    t->ops->add(t->be, N, w, y); /* floats go on as ever */
    assert_true(y[0] == 3);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        ROUNDING_TEST(operand_tensors_hold_the_rounded_result),
        ROUNDING_TEST(query_reads_stored_operands),
        ROUNDING_TEST(products_per_head_read_and_write_operands),
        ROUNDING_TEST(linear_reads_operands_weights_and_floats),
        ROUNDING_TEST(conv_reads_operands_weights_and_floats),
        ROUNDING_TEST(conv_in_parts_reads_every_part),
        ROUNDING_TEST(attention_rounds_what_its_products_read),
        ROUNDING_TEST(attention_without_keys_is_zero),
        ROUNDING_TEST(products_follow_the_weights),
        ROUNDING_TEST(products_round_where_operands_are_short),
        TESTING_TEST(the_other_mode_rounds_nothing),
        ROUNDING_TEST(memory_for_elements_is_zeroed_and_refused_alike),
        ROUNDING_TEST(operations_on_floats_refuse_operand_tensors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
