/* Attention, the foveated query and the rotary embedding: values against plain loops in double,
 * masks and ties exactly, gradients against central differences. */
#include "testing.h"

/* --- attention -------------------------------------------------------------------------------- */

typedef struct Call {
    Testing *t;
    FvAttention a;
    size_t nq, nk, np; /* elements of q and out, of k and v, of probs */
    real *q, *k, *v, *probs, *out, *weight;
} Call;

static Call attention_call(Testing *t, FvAttention a) {
    Call c = {.t = t, .a = a};
    c.nq = a.batch * a.rows * a.heads * a.width;
    c.nk = a.batch * a.keys * a.kv_heads * a.width;
    c.np = a.batch * a.heads * a.rows * a.keys;
    c.q = testing_random(t, c.nq, 1), c.k = testing_random(t, c.nk, 1);
    c.v = testing_random(t, c.nk, 1), c.weight = testing_random(t, c.nq, 1);
    c.probs = testing_tensor(t, c.np), c.out = testing_tensor(t, c.nq);
    return c;
}

static void attention_forward(Call *c) {
    c->t->ops->attention(c->t->be, &c->a, c->q, c->k, c->v, c->probs, c->out);
}

static double attention_loss(void *context, double *size) {
    Call *c = context;
    attention_forward(c);
    return testing_weighted(c->nq, c->weight, c->out, size);
}

/* Whether row i of batch entry b sees key j. */
static bool sees(const FvAttention *a, size_t b, size_t i, size_t j) {
    return !(a->first && j < (size_t)a->first[b]) && !(a->causal && j + a->rows > i + a->keys);
}

/* One row of one head. A score of `width` products is rounded to within (width + 2) eps of the sum
 * of their sizes; a difference of scores moves a probability by that much of itself; the sums over
 * the keys add keys + 8 roundings. Twice, for the double build. */
static void check_row(const Call *c, size_t b, size_t h, size_t i) {
    const FvAttention *a = &c->a;
    size_t w = a->width, g = h / (a->heads / a->kv_heads);
    const real *q = c->q + ((b * a->rows + i) * a->heads + h) * w;
    const real *probs = c->probs + ((b * a->heads + h) * a->rows + i) * a->keys;
    double p[64], sum = 0, largest = 0;
    assert_true(a->keys <= 64);
    for (size_t j = 0; j < a->keys; j++) {
        const real *k = c->k + ((b * a->keys + j) * a->kv_heads + g) * w;
        double score = 0, size = 0;
        for (size_t d = 0; d < w; d++) {
            score += a->scale * (double)q[d] * (double)k[d];
            size += fabs(a->scale * (double)q[d] * (double)k[d]);
        }
        p[j] = sees(a, b, i, j) ? exp(score) : 0;
        sum += p[j];
        largest = sees(a, b, i, j) ? fmax(largest, size) : largest;
    }
    double relative = 2 * FV_EPSILON * (2 * ((double)w + 2) * largest + (double)a->keys + 8);
    for (size_t j = 0; j < a->keys; j++) {
        p[j] = sum > 0 ? p[j] / sum : 0;
        testing_close("probs", j, (double)probs[j], p[j], relative * p[j]);
    }
    for (size_t d = 0; d < w; d++) {
        double want = 0, size = 0;
        for (size_t j = 0; j < a->keys; j++) {
            const real *v = c->v + ((b * a->keys + j) * a->kv_heads + g) * w;
            if (!sees(a, b, i, j))
                continue;
            want += p[j] * (double)v[d];
            size += fabs(p[j] * (double)v[d]);
        }
        testing_close("out", d, (double)c->out[((b * a->rows + i) * a->heads + h) * w + d], want,
                      2 * relative * size);
    }
}

static void check_attention(Call *c) {
    attention_forward(c);
    for (size_t b = 0; b < c->a.batch; b++)
        for (size_t h = 0; h < c->a.heads; h++)
            for (size_t i = 0; i < c->a.rows; i++)
                check_row(c, b, h, i);
}

static void check_attention_gradients(Call *c) {
    Testing *t = c->t;
    attention_forward(c);
    real *dq = testing_tensor(t, c->nq), *dk = testing_filled(t, c->nk, 0.5);
    real *dv = testing_filled(t, c->nk, -0.5);
    t->ops->attention_back(t->be, &c->a, c->q, c->k, c->v, c->probs, c->weight, dq, dk, dv);
    Gradient gradients[] = {
        {"dq", c->nq, c->q, dq, 0}, {"dk", c->nk, c->k, dk, 0.5}, {"dv", c->nk, c->v, dv, -0.5}};
    testing_gradients(attention_loss, c, 3, gradients);
}

static void attention_and_its_gradients(void **state) {
    Testing *t = *state;
    const FvAttention shapes[] = {
        {.batch = 1, .rows = 1, .keys = 1, .heads = 1, .kv_heads = 1, .width = 1, .scale = 1},
        {.batch = 2, .rows = 5, .keys = 5, .heads = 3, .kv_heads = 3, .width = 7, .scale = 0.4},
        {.batch = 1, .rows = 3, .keys = 37, .heads = 1, .kv_heads = 1, .width = 17, .scale = 0.2},
        {.batch = 2, .rows = 1, .keys = 6, .heads = 6, .kv_heads = 2, .width = 3, .scale = 0.6},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        Call c = attention_call(t, shapes[k]);
        check_attention(&c);
        check_attention_gradients(&c);
    }
}

/* Also rows that come after keys of their own (cached ones), before any key, and padding that
 * leaves a row nothing to see. */
static void attention_sees_only_what_masks_allow(void **state) {
    Testing *t = *state;
    static const int32_t first[3] = {0, 2, 5};
    const size_t rows[] = {5, 3, 7};
    for (size_t k = 0; k < 3; k++) {
        Call c = attention_call(t, (FvAttention){.batch = 3,
                                                 .rows = rows[k],
                                                 .keys = 5,
                                                 .heads = 4,
                                                 .kv_heads = 2,
                                                 .width = 3,
                                                 .scale = 0.5,
                                                 .causal = true,
                                                 .first = first});
        check_attention(&c);
        check_attention_gradients(&c);
        for (size_t i = 0; i < rows[k] * 4 * 3; i++) /* the last entry is all padding */
            testing_close("out that sees nothing", i, (double)c.out[c.nq - 1 - i], 0, 0);
    }
}

static void attention_never_reads_padding(void **state) {
    Testing *t = *state;
    static const int32_t first[2] = {3, 1};
    Call c = attention_call(t, (FvAttention){.batch = 2,
                                             .rows = 6,
                                             .keys = 6,
                                             .heads = 2,
                                             .kv_heads = 1,
                                             .width = 5,
                                             .scale = 0.5,
                                             .causal = true,
                                             .first = first});
    for (size_t b = 0; b < 2; b++)
        for (size_t i = 0; i < (size_t)first[b] * 5; i++)
            c.k[b * 30 + i] = c.v[b * 30 + i] = (real)NAN;
    check_attention(&c);
    real *dq = testing_tensor(t, c.nq), *dk = testing_filled(t, c.nk, 0.5);
    real *dv = testing_filled(t, c.nk, 0.5);
    t->ops->attention_back(t->be, &c.a, c.q, c.k, c.v, c.probs, c.weight, dq, dk, dv);
    for (size_t i = 0; i < c.nq; i++)
        assert_true(isfinite(dq[i]));
    for (size_t i = 0; i < c.nk; i++) {
        bool padding = i % 30 < (size_t)first[i / 30] * 5;
        assert_true(isfinite(dk[i]) && isfinite(dv[i]));
        assert_true(!padding || (dk[i] == (real)0.5 && dv[i] == (real)0.5));
    }
}

static void attention_passes_nan_on(void **state) {
    Testing *t = *state;
    Call c = attention_call(
        t,
        (FvAttention){
            .batch = 1, .rows = 3, .keys = 20, .heads = 1, .kv_heads = 1, .width = 4, .scale = 1});
    c.q[4] = (real)NAN; /* row 1 */
    attention_forward(&c);
    for (size_t i = 0; i < 12; i++)
        assert_int_equal(isnan(c.out[i]) != 0, i / 4 == 1);
}

/* --- query ------------------------------------------------------------------------------------ */

typedef struct Fovea {
    Testing *t;
    FvQuery s;
    size_t nq, nk, np;
    real *q, *k, *v, *probs, *out, *weight, *weight_probs;
} Fovea;

static Fovea query_of(Testing *t, FvQuery s) {
    Fovea c = {.t = t, .s = s};
    c.nq = s.frames * s.heads * s.width, c.np = s.frames * s.heads * s.keys;
    c.nk = s.frames * s.keys * (s.shared ? 1 : s.heads) * s.width;
    c.q = testing_random(t, c.nq, 1), c.k = testing_random(t, c.nk, 1);
    c.v = testing_random(t, c.nk, 1), c.weight = testing_random(t, c.nq, 1);
    c.weight_probs = testing_random(t, c.np, 1);
    c.probs = testing_tensor(t, c.np), c.out = testing_tensor(t, c.nq);
    return c;
}

static Fovea query_call(Testing *t, size_t frames, size_t keys, size_t heads, size_t width,
                        size_t top_k) {
    return query_of(t, (FvQuery){frames, keys, heads, width, 0.7, top_k, false});
}

static void query_forward(Fovea *c) {
    c->t->ops->query(c->t->be, &c->s, c->q, c->k, c->v, c->probs, c->out);
}

static double query_loss(void *context, double *size) {
    Fovea *c = context;
    double more = 0, loss = 0;
    query_forward(c);
    if (c->weight_probs)
        loss = testing_weighted(c->np, c->weight_probs, c->probs, &more);
    loss += testing_weighted(c->nq, c->weight, c->out, size);
    *size += more;
    return loss;
}

/* Kept: fewer than top_k keys have a larger score, or an equal one at a lower index. Keys whose
 * scores are within rounding of each other may be ranked either way: the test's are not. */
static bool kept(const double *score, size_t keys, size_t j, size_t top_k) {
    size_t before = 0;
    for (size_t i = 0; i < keys; i++)
        before += score[i] > score[j] || (i < j && !(score[i] < score[j]));
    return top_k == 0 || before < top_k;
}

static void check_query(const Fovea *c, size_t f, size_t h) {
    const FvQuery *s = &c->s;
    size_t w = s->width, row = (f * s->heads + h) * w, stride = s->shared ? w : s->heads * w;
    const real *q = c->q + row, *probs = c->probs + (f * s->heads + h) * s->keys;
    const real *k = c->k + f * s->keys * stride + (s->shared ? 0 : h * w), *v = c->v + (k - c->k);
    double score[64], p[64], sum = 0, largest = 0;
    assert_true(s->keys <= 64);
    for (size_t j = 0; j < s->keys; j++) {
        double size = 0;
        score[j] = 0;
        for (size_t d = 0; d < w; d++) {
            score[j] += s->scale * (double)q[d] * (double)k[j * stride + d];
            size += fabs(s->scale * (double)q[d] * (double)k[j * stride + d]);
        }
        largest = fmax(largest, size);
    }
    for (size_t j = 0; j < s->keys; j++) {
        p[j] = kept(score, s->keys, j, s->top_k) ? exp(score[j]) : 0;
        sum += p[j];
    }
    double relative = 2 * FV_EPSILON * (2 * ((double)w + 2) * largest + (double)s->keys + 8);
    for (size_t j = 0; j < s->keys; j++)
        testing_close("probs", j, (double)probs[j], p[j] / sum, relative * p[j] / sum);
    for (size_t d = 0; d < w; d++) {
        double want = 0, size = 0;
        for (size_t j = 0; j < s->keys; j++) {
            want += p[j] / sum * (double)v[j * stride + d];
            size += fabs(p[j] / sum * (double)v[j * stride + d]);
        }
        testing_close("out", d, (double)c->out[row + d], want, 2 * relative * size);
    }
}

static void query_and_its_gradients(void **state) {
    Testing *t = *state;
    const size_t shapes[][5] = {/* frames, keys, heads, width, top_k */
                                {1, 1, 1, 1, 0},   {1, 37, 1, 3, 0},  {3, 10, 2, 5, 4},
                                {2, 10, 3, 17, 9}, {2, 10, 1, 3, 10}, {2, 5, 2, 3, 90},
                                {2, 7, 2, 3, 1}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        const size_t *z = shapes[k];
        Fovea c = query_call(t, z[0], z[1], z[2], z[3], z[4]);
        query_forward(&c);
        for (size_t f = 0; f < z[0]; f++)
            for (size_t h = 0; h < z[2]; h++)
                check_query(&c, f, h);
        real *dq = testing_tensor(t, c.nq), *dk = testing_filled(t, c.nk, 0.5);
        real *dv = testing_filled(t, c.nk, -0.5);
        t->ops->query_back(t->be, &c.s, c.q, c.k, c.v, c.probs, c.weight, c.weight_probs, dq, dk,
                           dv);
        Gradient gradients[] = {
            {"dq", c.nq, c.q, dq, 0}, {"dk", c.nk, c.k, dk, 0.5}, {"dv", c.nk, c.v, dv, -0.5}};
        testing_gradients(query_loss, &c, 3, gradients);
        c.weight_probs = NULL; /* and without the entropy's gradient, keys frozen */
        t->ops->query_back(t->be, &c.s, c.q, c.k, c.v, c.probs, c.weight, NULL, dq, NULL, NULL);
        testing_gradients(query_loss, &c, 1, gradients);
    }
}

static void query_with_shared_keys_and_values(void **state) {
    Testing *t = *state;
    const size_t shapes[][5] = {/* frames, keys, heads, width, top_k */
                                {1, 1, 1, 1, 0},  {1, 37, 1, 3, 0},  {3, 10, 2, 5, 4},
                                {2, 5, 2, 3, 90}, {2, 10, 3, 17, 9}, {1, 3, 1, 260, 0}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        const size_t *z = shapes[k];
        double scale = 0.7 / sqrt((double)z[3]); /* scores of order 1 */
        Fovea c = query_of(t, (FvQuery){z[0], z[1], z[2], z[3], scale, z[4], true});
        query_forward(&c);
        for (size_t f = 0; f < z[0]; f++)
            for (size_t h = 0; h < z[2]; h++)
                check_query(&c, f, h);
        real *dq = testing_tensor(t, c.nq);
        t->ops->query_back(t->be, &c.s, c.q, c.k, c.v, c.probs, c.weight, c.weight_probs, dq, NULL,
                           NULL);
        Gradient gradient = {"dq", c.nq, c.q, dq, 0};
        testing_gradients(query_loss, &c, 1, &gradient);
        if (k % 2) /* and without the entropy's gradient */
            continue;
        query_forward(&c); /* of the query itself again */
        c.weight_probs = NULL;
        t->ops->query_back(t->be, &c.s, c.q, c.k, c.v, c.probs, c.weight, NULL, dq, NULL, NULL);
        testing_gradients(query_loss, &c, 1, &gradient);
    }
}

static void query_over_one_tensor_of_keys_and_values(void **state) {
    Testing *t = *state;
    Fovea c = query_call(t, 2, 9, 1, 19, 0);
    c.v = c.k;
    query_forward(&c);
    real *dq = testing_tensor(t, c.nq), *dk = testing_filled(t, c.nk, 0.5);
    t->ops->query_back(t->be, &c.s, c.q, c.k, c.v, c.probs, c.weight, c.weight_probs, dq, dk, dk);
    Gradient gradients[] = {{"dq", c.nq, c.q, dq, 0}, {"dk = dv", c.nk, c.k, dk, 0.5}};
    testing_gradients(query_loss, &c, 2, gradients);
}

static void query_breaks_ties_by_the_lower_index(void **state) {
    Testing *t = *state;
    /* width 1, query 1: the scores are the keys; 0 and -0 are equal */
    const double scores[][6] = {{1, 2, 2, 2, 1, 0}, {0, 0, 0, 0, 0, 0}, {-0.0, 0, -1, 0, -0.0, 0}};
    const bool keep[][6] = {{0, 1, 1, 1, 0, 0}, {1, 1, 1, 0, 0, 0}, {1, 1, 0, 1, 0, 0}};
    for (size_t k = 0; k < 3; k++) {
        Fovea c = query_call(t, 1, 6, 1, 1, 3);
        c.q[0] = 1;
        for (size_t j = 0; j < 6; j++)
            c.k[j] = (real)scores[k][j];
        query_forward(&c);
        for (size_t j = 0; j < 6; j++)
            testing_close("probability", j, (double)c.probs[j], keep[k][j] ? 1.0 / 3 : 0,
                          keep[k][j] ? 4 * FV_EPSILON : 0);
    }
}

static void query_passes_nan_on(void **state) {
    Testing *t = *state;
    for (size_t at = 0; at < 20; at += 6)
        for (size_t top_k = 0; top_k < 20; top_k += 7) {
            Fovea c = query_call(t, 2, 20, 1, 1, top_k);
            c.k[at] = (real)NAN;
            query_forward(&c);
            assert_true(isnan(c.out[0]) && isfinite(c.out[1]));
        }
}

/* --- rotary embedding ------------------------------------------------------------------------- */

static void rope_turns_pairs_by_their_position(void **state) {
    Testing *t = *state;
    enum { BATCH = 2, ROWS = 5, HEADS = 3, WIDTH = 6, HALF = WIDTH / 2, ROW0 = 4 };
    static const int32_t first[BATCH] = {0, 3};
    real *x = testing_random(t, BATCH * ROWS * HEADS * WIDTH, 1);
    real *y = testing_copy(t, BATCH * ROWS * HEADS * WIDTH, x);
    t->ops->rope(t->be, BATCH, ROWS, HEADS, WIDTH, ROW0, first, 10000, false, y);
    for (size_t i = 0; i < BATCH * ROWS * HEADS * HALF; i++) {
        size_t d = i % HALF, head = i / HALF, row = head / HEADS % ROWS, b = head / HEADS / ROWS;
        double position = (double)(ROW0 + row) - first[b];
        double angle = position * pow(10000, -2.0 * (double)d / WIDTH);
        double u = (double)x[head * WIDTH + d], v = (double)x[head * WIDTH + HALF + d];
        double tolerance = 4 * FV_EPSILON * (fabs(u) + fabs(v));
        testing_close("first half", i, (double)y[head * WIDTH + d], u * cos(angle) - v * sin(angle),
                      tolerance);
        testing_close("second half", i, (double)y[head * WIDTH + HALF + d],
                      v * cos(angle) + u * sin(angle), tolerance);
    }
}

/* Tables of other widths, rates and lengths in between, and back again. */
static void rope_inverse_is_its_transpose(void **state) {
    Testing *t = *state;
    const size_t widths[] = {6, 2, 6, 64}, rows[] = {5, 40, 90, 3};
    const double theta[] = {10000, 10000, 100, 100};
    for (size_t k = 0; k < 4; k++) {
        size_t n = rows[k] * widths[k];
        real *x = testing_random(t, n, 1), *w = testing_random(t, n, 1);
        real *y = testing_copy(t, n, x), *back = testing_copy(t, n, w);
        t->ops->rope(t->be, 1, rows[k], 1, widths[k], 0, NULL, theta[k], false, y);
        t->ops->rope(t->be, 1, rows[k], 1, widths[k], 0, NULL, theta[k], true, back);
        double size, forward = testing_weighted(n, w, y, &size);
        double ignored, backward = testing_weighted(n, back, x, &ignored);
        testing_close("w . R x - R' w . x", 0, backward, forward,
                      8 * FV_EPSILON * (size + ignored));
        t->ops->rope(t->be, 1, rows[k], 1, widths[k], 0, NULL, theta[k], true, y);
        for (size_t i = 0; i < n; i++)
            testing_close("R' R x", i, (double)y[i], (double)x[i], 32 * FV_EPSILON);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TESTING_TEST(attention_and_its_gradients),
        TESTING_TEST(attention_sees_only_what_masks_allow),
        TESTING_TEST(attention_never_reads_padding),
        TESTING_TEST(attention_passes_nan_on),
        TESTING_TEST(query_and_its_gradients),
        TESTING_TEST(query_with_shared_keys_and_values),
        TESTING_TEST(query_over_one_tensor_of_keys_and_values),
        TESTING_TEST(query_breaks_ties_by_the_lower_index),
        TESTING_TEST(query_passes_nan_on),
        TESTING_TEST(rope_turns_pairs_by_their_position),
        TESTING_TEST(rope_inverse_is_its_transpose),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
