/* Operations on rows and elements, dense layers and normalisation: values against plain sums in
 * double, gradients against central differences. */
#include "backend/cpu_math.h"
#include "testing.h"

/* Sizes that are no multiple of each other or of a register's width, and the smallest ones. */
static const size_t shapes[][3] = {{1, 1, 1}, {3, 7, 5}, {1, 19, 33}, {13, 1, 4}, {5, 37, 1}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* --- copies and sums -------------------------------------------------------------------------- */

static void copy_and_add_move_every_element(void **state) {
    Testing *t = *state;
    for (size_t n = 1; n < 40; n += 6) {
        real *x = testing_random(t, n, 1), *y = testing_tensor(t, n);
        t->ops->copy(t->be, n, x, y);
        testing_same("copy", n, y, x);
        t->ops->add(t->be, n, x, y);
        for (size_t i = 0; i < n; i++)
            testing_close("add", i, (double)y[i], 2 * (double)x[i], 0);
    }
}

static void copy_rows_gathers_scatters_and_skips(void **state) {
    Testing *t = *state;
    enum { ROWS = 4, WIDTH = 5 };
    const int32_t from[ROWS] = {2, -1, 0, 3}, to[ROWS] = {1, 0, 3, -1};
    real *x = testing_random(t, ROWS * WIDTH, 1);
    real *gathered = testing_filled(t, ROWS * WIDTH, 9);
    t->ops->copy_rows(t->be, ROWS, WIDTH, x, from, gathered, NULL, false);
    testing_same("row 0", WIDTH, gathered, x + 2 * WIDTH);
    testing_close("skipped row", 0, (double)gathered[WIDTH], 9, 0);
    testing_same("row 2", WIDTH, gathered + 2 * WIDTH, x);
    real *both = testing_filled(t, ROWS * WIDTH, 9);
    t->ops->copy_rows(t->be, ROWS, WIDTH, x, from, both, to, false);
    testing_same("row 1", WIDTH, both + WIDTH, x + 2 * WIDTH);
    testing_same("row 3", WIDTH, both + 3 * WIDTH, x);
    for (size_t i = 0; i < WIDTH; i++) {
        testing_close("row without a source", i, (double)both[i], 9, 0);
        testing_close("row without a target", i, (double)both[2 * WIDTH + i], 9, 0);
    }
}

static void copy_rows_adds_repeated_targets_in_order(void **state) {
    Testing *t = *state;
    enum { ROWS = 5, WIDTH = 67 };
    const int32_t to[ROWS] = {1, 1, 0, 1, -1};
    real *x = testing_random(t, ROWS * WIDTH, 1), *y = testing_filled(t, 2 * WIDTH, 3);
    real *want = testing_filled(t, 2 * WIDTH, 3);
    for (size_t i = 0; i < ROWS; i++)
        for (size_t c = 0; to[i] >= 0 && c < WIDTH; c++)
            want[(size_t)to[i] * WIDTH + c] += x[i * WIDTH + c];
    t->ops->copy_rows(t->be, ROWS, WIDTH, x, NULL, y, to, true);
    testing_same("sum", 2 * WIDTH, y, want);
}

/* --- residual --------------------------------------------------------------------------------- */

typedef struct Call {
    Testing *t;
    size_t rows, in, out;
    double eps;
    real *x, *w, *b, *a, *y, *weight;
    real *mean, *rstd;
} Call;

static double residual_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->residual(c->t->be, c->rows, c->in, c->x, c->w, c->a, c->y);
    return testing_weighted(c->rows * c->in, c->weight, c->y, size);
}

static void residual_and_its_gradients(void **state) {
    Testing *t = *state;
    for (size_t k = 0; k < 2 * SHAPES; k++) {
        size_t rows = shapes[k / 2][0], width = shapes[k / 2][1], n = rows * width;
        bool scaled = k % 2;
        Call c = {.t = t, .rows = rows, .in = width};
        c.x = testing_random(t, n, 1), c.a = testing_random(t, n, 1);
        c.w = scaled ? testing_random(t, width, 1) : NULL;
        c.y = testing_tensor(t, n), c.weight = testing_random(t, n, 1);
        double size;
        residual_loss(&c, &size);
        for (size_t i = 0; i < n; i++) {
            double branch = (scaled ? (double)c.w[i % width] : 1) * (double)c.a[i];
            testing_close("residual", i, (double)c.y[i], (double)c.x[i] + branch,
                          2 * FV_EPSILON * (fabs((double)c.x[i]) + fabs(branch)));
        }
        real *da = testing_tensor(t, n), *dscale = testing_filled(t, width, 0.5);
        t->ops->residual_back(t->be, rows, width, c.w, c.a, c.weight, da, scaled ? dscale : NULL);
        Gradient gradients[] = {{"da", n, c.a, da, 0}, {"dscale", width, c.w, dscale, 0.5}};
        testing_gradients(residual_loss, &c, scaled ? 2 : 1, gradients);
    }
}

static void residual_works_in_place(void **state) {
    Testing *t = *state;
    enum { N = 3 * 21 };
    real *x = testing_random(t, N, 1), *a = testing_random(t, N, 1), *y = testing_tensor(t, N);
    t->ops->residual(t->be, 3, 21, x, NULL, a, y);
    t->ops->residual(t->be, 3, 21, x, NULL, a, x);
    testing_same("in place", N, x, y);
}

/* --- dense layers ----------------------------------------------------------------------------- */

static double linear_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->linear(c->t->be, c->rows, c->in, c->out, c->x, c->w, c->b, c->y);
    return testing_weighted(c->rows * c->out, c->weight, c->y, size);
}

static Call linear_call(Testing *t, size_t rows, size_t in, size_t out, bool bias) {
    Call c = {.t = t, .rows = rows, .in = in, .out = out};
    c.x = testing_random(t, rows * in, 1), c.w = testing_random(t, out * in, 1);
    c.b = bias ? testing_random(t, out, 1) : NULL;
    c.y = testing_tensor(t, rows * out), c.weight = testing_random(t, rows * out, 1);
    return c;
}

/* Bound: every term of a sum of n is rounded at most n + 1 times. Twice, for the double build. */
static void check_linear(const Call *c) {
    for (size_t i = 0; i < c->rows * c->out; i++) {
        const real *x = c->x + i / c->out * c->in, *w = c->w + i % c->out * c->in;
        double want = c->b ? (double)c->b[i % c->out] : 0, size = fabs(want);
        for (size_t k = 0; k < c->in; k++) {
            want += (double)x[k] * (double)w[k];
            size += fabs((double)x[k] * (double)w[k]);
        }
        testing_close("linear", i, (double)c->y[i], want,
                      2 * FV_EPSILON * (double)(c->in + 2) * size);
    }
}

static void linear_is_the_matrix_product(void **state) {
    Testing *t = *state;
    static const size_t large[][3] = {{700, 65, 40}, {17, 130, 515}, {260, 33, 257}};
    for (size_t k = 0; k < 2 * (SHAPES + 3); k++) {
        const size_t *shape = k / 2 < SHAPES ? shapes[k / 2] : large[k / 2 - SHAPES];
        Call c = linear_call(t, shape[0], shape[1], shape[2], k % 2);
        double size;
        linear_loss(&c, &size);
        check_linear(&c);
    }
}

static void linear_gradients(void **state) {
    Testing *t = *state;
    for (size_t k = 0; k < 2 * SHAPES; k++) {
        size_t rows = shapes[k / 2][0], in = shapes[k / 2][1], out = shapes[k / 2][2];
        bool add = k % 2;
        Call c = linear_call(t, rows, in, out, true);
        real *dx = testing_filled(t, rows * in, add ? 0.25 : NAN);
        real *dw = testing_filled(t, out * in, 0.5), *db = testing_filled(t, out, -0.5);
        t->ops->linear_back(t->be, rows, in, out, c.x, c.w, c.weight, dx, add, dw, db);
        Gradient gradients[] = {{"dx", rows * in, c.x, dx, add ? 0.25 : 0},
                                {"dw", out * in, c.w, dw, 0.5},
                                {"dbias", out, c.b, db, -0.5}};
        testing_gradients(linear_loss, &c, 3, gradients);
    }
}

/* Many rows are summed in parts: the weight gradient against plain sums. */
static void linear_gradients_of_many_rows(void **state) {
    Testing *t = *state;
    static const size_t large[][3] = {{1041, 63, 65}, {2100, 33, 4}, {40, 300, 200}};
    for (size_t k = 0; k < 3; k++) {
        size_t rows = large[k][0], in = large[k][1], out = large[k][2];
        Call c = linear_call(t, rows, in, out, true);
        real *dx = testing_tensor(t, rows * in);
        real *dw = testing_filled(t, out * in, 1), *db = testing_filled(t, out, 1);
        t->ops->linear_back(t->be, rows, in, out, c.x, c.w, c.weight, dx, false, dw, db);
        for (size_t i = 0; i < out * (in + 1); i++) {
            size_t o = i / (in + 1), j = i % (in + 1); /* j = in: the bias */
            double want = 1, size = 1;
            for (size_t r = 0; r < rows; r++) {
                double term =
                    (double)c.weight[r * out + o] * (j < in ? (double)c.x[r * in + j] : 1);
                want += term;
                size += fabs(term);
            }
            double got = j < in ? (double)dw[o * in + j] : (double)db[o];
            testing_close("dw, dbias", i, got, want, 2 * FV_EPSILON * (double)(rows + 2) * size);
        }
        Call back = {.rows = rows, .in = out, .out = in, .x = c.weight, .y = dx};
        back.w = testing_tensor(t, in * out); /* dx = dy w is a linear layer with w^T */
        for (size_t i = 0; i < in * out; i++)
            back.w[i] = c.w[i % out * in + i / out];
        check_linear(&back);
    }
}

static void frozen_parameters_get_no_gradient(void **state) {
    Testing *t = *state;
    enum { ROWS = 300, IN = 9, OUT = 17 };
    Call c = linear_call(t, ROWS, IN, OUT, true);
    real *all[3] = {testing_tensor(t, ROWS * IN), testing_filled(t, OUT * IN, 0),
                    testing_filled(t, OUT, 0)};
    t->ops->linear_back(t->be, ROWS, IN, OUT, c.x, c.w, c.weight, all[0], false, all[1], all[2]);
    for (int only = 0; only < 3; only++) {
        real *one[3] = {NULL, NULL, NULL};
        size_t n = only == 0 ? ROWS * IN : only == 1 ? OUT * IN : OUT;
        one[only] = testing_filled(t, n, 0);
        t->ops->linear_back(t->be, ROWS, IN, OUT, c.x, c.w, c.weight, one[0], false, one[1],
                            one[2]);
        testing_same("gradient alone", n, one[only], all[only]);
    }
}

/* --- a product per head ----------------------------------------------------------------------- */

typedef struct Heads {
    Testing *t;
    size_t rows, heads, in, out;
    real *x, *w, *b, *y, *weight;
} Heads;

static Heads heads_call(Testing *t, size_t rows, size_t heads, size_t in, size_t out, bool bias) {
    Heads c = {.t = t, .rows = rows, .heads = heads, .in = in, .out = out};
    c.x = testing_random(t, rows * heads * in, 1), c.w = testing_random(t, heads * out * in, 1);
    c.b = bias ? testing_random(t, heads * out, 1) : NULL;
    c.y = testing_tensor(t, rows * heads * out);
    c.weight = testing_random(t, rows * heads * out, 1);
    return c;
}

static double heads_loss(void *context, double *size) {
    Heads *c = context;
    c->t->ops->head_linear(c->t->be, c->rows, c->heads, c->in, c->out, c->x, c->w, c->b, c->y);
    return testing_weighted(c->rows * c->heads * c->out, c->weight, c->y, size);
}

/* Each head is a dense layer of its own: the same products, in whatever order they are summed. */
static void head_linear_is_a_layer_per_head(void **state) {
    Testing *t = *state;
    static const size_t sizes[][4] = {{1, 1, 1, 1}, {3, 2, 7, 5}, {5, 3, 33, 4}, {150, 6, 17, 9}};
    for (size_t k = 0; k < 8; k++) {
        const size_t *z = sizes[k / 2];
        size_t rows = z[0], heads = z[1], in = z[2], out = z[3];
        Heads c = heads_call(t, rows, heads, in, out, k % 2);
        double size;
        heads_loss(&c, &size);
        for (size_t h = 0; h < heads; h++) {
            Call one = {.t = t, .rows = rows, .in = in, .out = out};
            one.x = testing_tensor(t, rows * in), one.y = testing_tensor(t, rows * out);
            one.w = c.w + h * out * in, one.b = c.b ? c.b + h * out : NULL;
            for (size_t r = 0; r < rows; r++) {
                memcpy(one.x + r * in, c.x + (r * heads + h) * in, in * sizeof(real));
                memcpy(one.y + r * out, c.y + (r * heads + h) * out, out * sizeof(real));
            }
            check_linear(&one);
        }
    }
}

static void head_linear_back_is_its_gradient(void **state) {
    Testing *t = *state;
    static const size_t sizes[][4] = {{1, 1, 1, 1}, {3, 2, 7, 5}, {5, 3, 19, 4}, {70, 2, 3, 9}};
    for (size_t k = 0; k < 4; k++) {
        const size_t *z = sizes[k];
        Heads c = heads_call(t, z[0], z[1], z[2], z[3], k % 2);
        size_t n = z[0] * z[1] * z[2];
        real *dx = testing_tensor(t, n);
        t->ops->head_linear_back(t->be, z[0], z[1], z[2], z[3], c.w, c.weight, dx);
        Gradient gradient = {"dx", n, c.x, dx, 0};
        testing_gradients(heads_loss, &c, 1, &gradient);
    }
}

/* Nothing is written: the tensors have no elements, the gradients gain nothing. */
static void no_rows_are_no_work(void **state) {
    Testing *t = *state;
    enum { WIDTH = 5 };
    real *none = testing_tensor(t, 0), *w = testing_random(t, WIDTH * WIDTH, 1);
    real *dw = testing_filled(t, WIDTH * WIDTH, 0.5), *kept = testing_copy(t, WIDTH * WIDTH, dw);
    t->ops->copy_rows(t->be, 0, WIDTH, none, NULL, none, NULL, false);
    t->ops->residual(t->be, 0, WIDTH, none, w, none, none);
    t->ops->residual_back(t->be, 0, WIDTH, w, none, none, none, dw);
    t->ops->linear(t->be, 0, WIDTH, WIDTH, none, w, w, none);
    t->ops->linear_back(t->be, 0, WIDTH, WIDTH, none, w, none, none, false, dw, dw);
    t->ops->head_linear(t->be, 0, 1, WIDTH, WIDTH, none, w, w, none);
    t->ops->head_linear_back(t->be, 0, 1, WIDTH, WIDTH, w, none, none);
    t->ops->gelu(t->be, 0, none, none);
    t->ops->layernorm(t->be, 0, WIDTH, 1e-6, none, w, w, none, none, none);
    t->ops->layernorm_back(t->be, 0, WIDTH, none, w, none, none, none, none, false, dw, dw);
    t->ops->rmsnorm_back(t->be, 0, WIDTH, none, w, none, none, none, false, dw);
    testing_same("gradient", WIDTH * WIDTH, dw, kept);
}

/* --- activations ------------------------------------------------------------------------------ */

static double gelu_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->gelu(c->t->be, c->in, c->x, c->y);
    return testing_weighted(c->in, c->weight, c->y, size);
}

static void gelu_gradient_also_in_place(void **state) {
    Testing *t = *state;
    for (size_t n = 1; n < 70; n += 17) {
        Call c = {.t = t, .in = n};
        c.x = testing_random(t, n, 2), c.y = testing_tensor(t, n);
        c.weight = testing_random(t, n, 1);
        real *dx = testing_tensor(t, n), *place = testing_copy(t, n, c.weight);
        t->ops->gelu_back(t->be, n, c.x, c.weight, dx);
        t->ops->gelu_back(t->be, n, c.x, place, place);
        testing_same("in place", n, place, dx);
        testing_gradients(gelu_loss, &c, 1, &(Gradient){"dx", n, c.x, dx, 0});
    }
}

static double swiglu_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->swiglu(c->t->be, c->in, c->x, c->a, c->y);
    return testing_weighted(c->in, c->weight, c->y, size);
}

static void swiglu_gradients_also_in_place(void **state) {
    Testing *t = *state;
    for (size_t n = 1; n < 70; n += 17) {
        Call c = {.t = t, .in = n};
        c.x = testing_random(t, n, 2), c.a = testing_random(t, n, 1);
        c.y = testing_tensor(t, n), c.weight = testing_random(t, n, 1);
        double size;
        swiglu_loss(&c, &size);
        for (size_t i = 0; i < n; i++) {
            double g = (double)c.x[i], want = g / (1 + exp(-g)) * (double)c.a[i];
            testing_close("swiglu", i, (double)c.y[i], want, 8 * FV_EPSILON * fabs(want));
        }
        real *dgate = testing_tensor(t, n), *dup = testing_tensor(t, n);
        real *place = testing_copy(t, n, c.weight), *dup2 = testing_tensor(t, n);
        t->ops->swiglu_back(t->be, n, c.x, c.a, c.weight, dgate, dup);
        t->ops->swiglu_back(t->be, n, c.x, c.a, place, place, dup2);
        testing_same("dgate in place", n, place, dgate);
        testing_same("dup in place", n, dup2, dup);
        Gradient gradients[] = {{"dgate", n, c.x, dgate, 0}, {"dup", n, c.a, dup, 0}};
        testing_gradients(swiglu_loss, &c, 2, gradients);
    }
}

/* Relative error in units of eps over the whole range, the far negative tail of Phi included. Below
 * the smallest normal number the spacing is absolute. */
static double relu_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->relu(c->t->be, c->in, c->x, c->y);
    return testing_weighted(c->in, c->weight, c->y, size);
}

/* Away from the kink, where the central difference sees one side; then at it. */
static void relu_and_its_gradient_also_in_place(void **state) {
    Testing *t = *state;
    for (size_t n = 1; n < 70; n += 17) {
        Call c = {.t = t, .in = n};
        c.x = testing_random(t, n, 2), c.y = testing_tensor(t, n);
        for (size_t i = 0; i < n; i++)
            c.x[i] += c.x[i] < 0 ? (real)-0.5 : (real)0.5;
        c.weight = testing_random(t, n, 1);
        real *dx = testing_tensor(t, n), *place = testing_copy(t, n, c.weight);
        t->ops->relu_back(t->be, n, c.x, c.weight, dx);
        t->ops->relu_back(t->be, n, c.x, place, place);
        testing_same("in place", n, place, dx);
        testing_gradients(relu_loss, &c, 1, &(Gradient){"dx", n, c.x, dx, 0});
        real *y = testing_copy(t, n, c.x);
        t->ops->relu(t->be, n, y, y);
        for (size_t i = 0; i < n; i++)
            assert_true(y[i] == (c.x[i] > 0 ? c.x[i] : 0));
    }
    real x[] = {0, (real)-INFINITY, (real)INFINITY, (real)NAN}, y[4], dy[] = {1, 1, 1, 1};
    t->ops->relu(t->be, 4, x, y);
    t->ops->relu_back(t->be, 4, x, dy, dy);
    assert_true(y[0] == 0 && y[1] == 0 && isinf(y[2]) && isnan(y[3]));
    assert_true(dy[0] == 0 && dy[1] == 0 && dy[2] == 1);
}

static void exp_and_gelu_are_accurate_everywhere(void **state) {
    Testing *t = *state;
    enum { N = 40000 };
    real *x = testing_tensor(t, N), *y = testing_tensor(t, N), *slope = testing_tensor(t, N);
    real *ones = testing_filled(t, N, 1);
    const double tiny = sizeof(real) == sizeof(float) ? 1.5e-45 : 5e-324;
    const double sigmas = sizeof(real) == sizeof(float) ? 14 : 38;
    for (size_t i = 0; i < N; i++)
        x[i] = (real)(sigmas * (2.0 * (double)i / (N - 1) - 1));
    t->ops->gelu(t->be, N, x, y);
    t->ops->gelu_back(t->be, N, x, ones, slope);
    for (size_t i = 0; i < N; i++) {
        double v = (double)x[i], cdf = 0.5 * erfc(-v * M_SQRT1_2);
        double density = exp(-0.5 * v * v) / sqrt(2 * M_PI);
        /* libm's erfc and exp lose up to v^2 / 2 units in the double build, as ours may */
        double units = sizeof(real) == sizeof(float) ? 6 : 6 + v * v;
        testing_close("gelu", i, (double)y[i], v * cdf,
                      units * FV_EPSILON * fabs(v * cdf) + 20 * tiny);
        testing_close("gelu'", i, (double)slope[i], cdf + v * density,
                      units * FV_EPSILON * (cdf + fabs(v * density)) + 20 * tiny);
    }
    const double low = sizeof(real) == sizeof(float) ? -110 : -750, high = -low * 0.8;
    for (size_t i = 0; i < N; i++) {
        real v = (real)(low + (high - low) * (double)i / (N - 1));
        double want = exp((double)v);
        double got = (double)fv_exp(v);
        if (want > (sizeof(real) == sizeof(float) ? 3.4028235677973366e38 : 1.7976931348623157e308))
            assert_true(isinf(got));
        else
            testing_close("exp", i, got, want, 1.5 * FV_EPSILON * want + tiny);
    }
}

static void not_finite_values_go_through(void **state) {
    Testing *t = *state;
    enum { N = 37 };
    const double bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t k = 0; k < 3; k++)
        for (size_t at = 0; at < N; at += 18) {
            real *x = testing_random(t, N, 1), *y = testing_tensor(t, N);
            real *up = testing_random(t, N, 1), *z = testing_tensor(t, N);
            x[at] = (real)bad[k];
            t->ops->gelu(t->be, N, x, y);
            t->ops->swiglu(t->be, N, x, up, z);
            for (size_t i = 0; i < N; i++) {
                assert_int_equal(isfinite(y[i]) != 0, i != at);
                assert_int_equal(isfinite(z[i]) != 0, i != at);
            }
        }
    assert_true(isnan(fv_exp((real)NAN)));
    assert_true(isinf(fv_exp((real)INFINITY)));
    assert_true(fv_exp((real)-INFINITY) == 0);
}

/* --- normalisation ---------------------------------------------------------------------------- */

static double layernorm_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->layernorm(c->t->be, c->rows, c->in, c->eps, c->x, c->w, c->b, c->y, c->mean,
                         c->rstd);
    return testing_weighted(c->rows * c->in, c->weight, c->y, size);
}

static double rmsnorm_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->rmsnorm(c->t->be, c->rows, c->in, c->eps, c->x, c->w, c->y, c->rstd);
    return testing_weighted(c->rows * c->in, c->weight, c->y, size);
}

static Call norm_call(Testing *t, size_t rows, size_t width) {
    Call c = {.t = t, .rows = rows, .in = width, .eps = 0.1};
    c.x = testing_random(t, rows * width, 1), c.w = testing_random(t, width, 1);
    c.b = testing_random(t, width, 1), c.y = testing_tensor(t, rows * width);
    c.weight = testing_random(t, rows * width, 1);
    c.mean = testing_tensor(t, rows), c.rstd = testing_tensor(t, rows);
    return c;
}

/* eps 0.1 keeps rstd below 4, so that errors of the mean are not magnified. */
static void check_norm(const Call *c, bool centred) {
    size_t n = c->in;
    for (size_t r = 0; r < c->rows; r++) {
        const real *x = c->x + r * n;
        double mean = 0, square = 0;
        for (size_t i = 0; centred && i < n; i++)
            mean += (double)x[i] / (double)n;
        for (size_t i = 0; i < n; i++)
            square += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
        double rstd = 1 / sqrt(square + c->eps);
        for (size_t i = 0; i < n; i++) {
            double want =
                ((double)x[i] - mean) * rstd * (double)c->w[i] + (centred ? (double)c->b[i] : 0);
            testing_close("norm", r * n + i, (double)c->y[r * n + i], want,
                          2 * FV_EPSILON * (double)(n + 8) * (4 * fabs((double)c->w[i]) + 4));
        }
    }
}

static void layernorm_and_its_gradients(void **state) {
    Testing *t = *state;
    for (size_t k = 0; k < 2 * SHAPES; k++) {
        size_t rows = shapes[k / 2][0], width = shapes[k / 2][1], n = rows * width;
        bool add = k % 2;
        Call c = norm_call(t, rows, width);
        double size;
        layernorm_loss(&c, &size);
        check_norm(&c, true);
        real *dx = testing_filled(t, n, add ? 0.25 : NAN);
        real *dg = testing_filled(t, width, 0.5), *db = testing_filled(t, width, 0.5);
        t->ops->layernorm_back(t->be, rows, width, c.x, c.w, c.mean, c.rstd, c.weight, dx, add,
                               add ? dg : NULL, db);
        if (!add) /* one of the two alone */
            t->ops->layernorm_back(t->be, rows, width, c.x, c.w, c.mean, c.rstd, c.weight, dx,
                                   false, dg, NULL);
        Gradient gradients[] = {{"dx", n, c.x, dx, add ? 0.25 : 0},
                                {"dgamma", width, c.w, dg, 0.5},
                                {"dbeta", width, c.b, db, 0.5}};
        testing_gradients(layernorm_loss, &c, 3, gradients);
    }
}

static void rmsnorm_and_its_gradients(void **state) {
    Testing *t = *state;
    for (size_t k = 0; k < 2 * SHAPES; k++) {
        size_t rows = shapes[k / 2][0], width = shapes[k / 2][1], n = rows * width;
        bool add = k % 2;
        Call c = norm_call(t, rows, width);
        double size;
        rmsnorm_loss(&c, &size);
        check_norm(&c, false);
        real *dx = testing_filled(t, n, add ? 0.25 : NAN), *dg = testing_filled(t, width, 0.5);
        real *dx2 = testing_copy(t, n, dx);
        t->ops->rmsnorm_back(t->be, rows, width, c.x, c.w, c.rstd, c.weight, dx, add, dg);
        t->ops->rmsnorm_back(t->be, rows, width, c.x, c.w, c.rstd, c.weight, dx2, add, NULL);
        testing_same("dx with gamma frozen", n, dx2, dx);
        Gradient gradients[] = {{"dx", n, c.x, dx, add ? 0.25 : 0},
                                {"dgamma", width, c.w, dg, 0.5}};
        testing_gradients(rmsnorm_loss, &c, 2, gradients);
    }
}

static double rescale_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->rescale(c->t->be, c->rows, c->in, 0.14, c->x, c->y, c->rstd);
    return testing_weighted(c->rows * c->in, c->weight, c->y, size);
}

static void rescale_sets_the_sample_deviation(void **state) {
    Testing *t = *state;
    for (size_t width = 2; width < 40; width += 9) {
        size_t n = 3 * width;
        Call c = norm_call(t, 3, width);
        double size;
        rescale_loss(&c, &size);
        for (size_t r = 0; r < 3; r++) {
            double mean = 0, square = 0;
            for (size_t i = 0; i < width; i++)
                mean += (double)c.y[r * width + i] / (double)width;
            for (size_t i = 0; i < width; i++)
                square += pow((double)c.y[r * width + i] - mean, 2) / (double)(width - 1);
            double std = (double)c.rstd[r];
            testing_close("deviation", r, sqrt(square), 0.14 * std / (std + 1e-6),
                          0.14 * FV_EPSILON * (double)(width + 8));
        }
        real *dx = testing_tensor(t, n);
        t->ops->rescale_back(t->be, 3, width, 0.14, c.x, c.rstd, c.weight, dx);
        testing_gradients(rescale_loss, &c, 1, &(Gradient){"dx", n, c.x, dx, 0});
    }
}

static void rescale_of_a_constant_row(void **state) {
    Testing *t = *state;
    const size_t widths[] = {1, 7, 576};
    for (size_t k = 0; k < 3; k++) {
        size_t n = widths[k];
        const double factor = 0.14 / 1e-6;
        real *x = testing_filled(t, n, 0.3), *y = testing_tensor(t, n), *std = testing_tensor(t, 1);
        real *dy = testing_random(t, n, 1), *dx = testing_tensor(t, n);
        t->ops->rescale(t->be, 1, n, 0.14, x, y, std);
        t->ops->rescale_back(t->be, 1, n, 0.14, x, std, dy, dx);
        testing_close("std", 0, (double)std[0], 0, 0);
        for (size_t i = 0; i < n; i++) {
            testing_close("y", i, (double)y[i], factor * (double)x[i], 4e4 * FV_EPSILON * 4);
            testing_close("dx", i, (double)dx[i], factor * (double)dy[i],
                          4 * FV_EPSILON * factor * fabs((double)dy[i]));
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TESTING_TEST(copy_and_add_move_every_element),
        TESTING_TEST(copy_rows_gathers_scatters_and_skips),
        TESTING_TEST(copy_rows_adds_repeated_targets_in_order),
        TESTING_TEST(residual_and_its_gradients),
        TESTING_TEST(residual_works_in_place),
        TESTING_TEST(linear_is_the_matrix_product),
        TESTING_TEST(linear_gradients),
        TESTING_TEST(linear_gradients_of_many_rows),
        TESTING_TEST(frozen_parameters_get_no_gradient),
        TESTING_TEST(head_linear_is_a_layer_per_head),
        TESTING_TEST(head_linear_back_is_its_gradient),
        TESTING_TEST(no_rows_are_no_work),
        TESTING_TEST(gelu_gradient_also_in_place),
        TESTING_TEST(relu_and_its_gradient_also_in_place),
        TESTING_TEST(swiglu_gradients_also_in_place),
        TESTING_TEST(exp_and_gelu_are_accurate_everywhere),
        TESTING_TEST(not_finite_values_go_through),
        TESTING_TEST(layernorm_and_its_gradients),
        TESTING_TEST(rmsnorm_and_its_gradients),
        TESTING_TEST(rescale_sets_the_sample_deviation),
        TESTING_TEST(rescale_of_a_constant_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
