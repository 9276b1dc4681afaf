/* Losses, measures and the optimizer: values against their definitions in double, gradients
 * against central differences. */
#include "testing.h"

typedef struct Call {
    Testing *t;
    size_t rows, n;
    double eps;
    real *x, *y;
    double *value;
    const double *weight;
} Call;

static double weighted(size_t n, const double *weight, const double *value, double *size) {
    double sum = 0;
    *size = 0;
    for (size_t i = 0; i < n; i++) {
        sum += weight[i] * value[i];
        *size += fabs(weight[i] * value[i]);
    }
    return sum;
}

/* --- mean squared error ----------------------------------------------------------------------- */

static double mse_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->mse(c->t->be, c->rows, c->n, c->x, c->y, c->value);
    return weighted(c->rows, c->weight, c->value, size);
}

static void mse_and_its_gradient(void **state) {
    Testing *t = *state;
    const double weight[3] = {0.7, 0.7, 0.7};
    for (size_t n = 1; n < 50; n += 11) {
        double *value = testing_doubles(t, 3, NULL), size;
        Call c = {.t = t, .rows = 3, .n = n, .value = value, .weight = weight};
        c.x = testing_random(t, 3 * n, 1), c.y = testing_random(t, 3 * n, 1);
        mse_loss(&c, &size);
        for (size_t f = 0; f < 3; f++) {
            double want = 0;
            for (size_t i = f * n; i < (f + 1) * n; i++)
                want += pow((double)c.x[i] - (double)c.y[i], 2) / (double)n;
            testing_close("mse", f, value[f], want, 1e-15 * (double)(n + 4) * want);
        }
        real *dx = testing_tensor(t, 3 * n);
        t->ops->mse_back(t->be, 3, n, weight[0], c.x, c.y, dx);
        testing_gradients(mse_loss, &c, 1, &(Gradient){"dx", 3 * n, c.x, dx, 0});
    }
}

/* --- cosine ----------------------------------------------------------------------------------- */

static double cosine_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->cosine(c->t->be, c->rows, c->n, c->x, c->y, c->value);
    return weighted(c->rows, c->weight, c->value, size);
}

static void cosine_and_its_gradients(void **state) {
    Testing *t = *state;
    const double weight[2] = {-0.6, -0.6};
    for (size_t n = 1; n < 50; n += 11) {
        double *value = testing_doubles(t, 2, NULL), size;
        Call c = {.t = t, .rows = 2, .n = n, .value = value, .weight = weight};
        c.x = testing_random(t, 2 * n, 1), c.y = testing_random(t, 2 * n, 1);
        cosine_loss(&c, &size);
        for (size_t r = 0; r < 2; r++) {
            double xx = 0, yy = 0, xy = 0;
            for (size_t i = r * n; i < (r + 1) * n; i++) {
                xx += (double)c.x[i] * (double)c.x[i];
                yy += (double)c.y[i] * (double)c.y[i];
                xy += (double)c.x[i] * (double)c.y[i];
            }
            testing_close("cosine", r, value[r], xy / sqrt(xx * yy), 1e-15 * (double)(n + 8));
        }
        real *dx = testing_filled(t, 2 * n, 0.5), *dy = testing_filled(t, 2 * n, -0.5);
        t->ops->cosine_back(t->be, 2, n, weight[0], c.x, c.y, dx, dy);
        Gradient gradients[] = {{"dx", 2 * n, c.x, dx, 0.5}, {"dy", 2 * n, c.y, dy, -0.5}};
        testing_gradients(cosine_loss, &c, 2, gradients);
    }
}

/* Below |x||y| = 1e-8 the divisor is a constant: the cosine is x.y / 1e-8. */
static void cosine_of_vanishing_vectors(void **state) {
    Testing *t = *state;
    enum { N = 5 };
    real *x = testing_random(t, N, 1e-6), *y = testing_random(t, N, 1e-6);
    real *dx = testing_filled(t, N, 0), *dy = testing_filled(t, N, 0);
    double value, want = 0;
    for (size_t i = 0; i < N; i++)
        want += (double)x[i] * (double)y[i] / 1e-8;
    t->ops->cosine(t->be, 1, N, x, y, &value);
    t->ops->cosine_back(t->be, 1, N, 2, x, y, dx, dy);
    testing_close("cosine", 0, value, want, 1e-12);
    for (size_t i = 0; i < N; i++) {
        testing_close("dx", i, (double)dx[i], 2e8 * (double)y[i], 400 * FV_EPSILON * 4);
        testing_close("dy", i, (double)dy[i], 2e8 * (double)x[i], 400 * FV_EPSILON * 4);
    }
    real *zero = testing_filled(t, N, 0);
    t->ops->cosine(t->be, 1, N, zero, y, &value);
    testing_close("cosine of 0", 0, value, 0, 0);
    x[2] = (real)NAN;
    t->ops->cosine(t->be, 1, N, x, y, &value);
    assert_true(isnan(value));
}

/* --- entropy ---------------------------------------------------------------------------------- */

enum { FRAMES = 4, HEADS = 3, KEYS = 7 };

static double entropy_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->entropy(c->t->be, FRAMES, HEADS, KEYS, c->x, c->value);
    return weighted(FRAMES, c->weight, c->value, size);
}

static void entropy_and_its_gradient(void **state) {
    Testing *t = *state;
    const double weight[FRAMES] = {1, -0.5, 0.25, 2};
    double *value = testing_doubles(t, FRAMES, NULL), size;
    Call c = {.t = t, .value = value, .weight = weight};
    c.x = testing_tensor(t, FRAMES * HEADS * KEYS);
    for (size_t i = 0; i < FRAMES * HEADS * KEYS; i++) /* away from 0, where log is steep */
        c.x[i] = (real)(0.2 + 0.8 * fv_uniform(1, i));
    entropy_loss(&c, &size);
    for (size_t f = 0; f < FRAMES; f++) {
        double want = 0;
        for (size_t i = f * HEADS * KEYS; i < (f + 1) * HEADS * KEYS; i++)
            want -= (double)c.x[i] * log((double)c.x[i]) / HEADS;
        testing_close("entropy", f, value[f], want, 1e-14);
    }
    real *dx = testing_tensor(t, FRAMES * HEADS * KEYS);
    t->ops->entropy_back(t->be, FRAMES, HEADS, KEYS, c.x, testing_doubles(t, FRAMES, weight), dx);
    testing_gradients(entropy_loss, &c, 1,
                      &(Gradient){"dprobs", FRAMES * HEADS * KEYS, c.x, dx, 0});
}

static void entropy_of_certainty_is_zero(void **state) {
    Testing *t = *state;
    real *p = testing_filled(t, KEYS, 0), *dp = testing_tensor(t, KEYS);
    double *value = testing_doubles(t, 1, NULL), *one = testing_doubles(t, 1, (double[]){1});
    p[3] = 1;
    t->ops->entropy(t->be, 1, 1, KEYS, p, value);
    t->ops->entropy_back(t->be, 1, 1, KEYS, p, one, dp);
    testing_close("entropy", 0, *value, 0, 0);
    for (size_t i = 0; i < KEYS; i++)
        testing_close("dprobs", i, (double)dp[i], i == 3 ? -1 : 0, 0);
    p[1] = (real)NAN;
    t->ops->entropy(t->be, 1, 1, KEYS, p, value);
    assert_true(isnan(*value));
}

static void entropy_hinge_is_active_above_zero_only(void **state) {
    Testing *t = *state;
    enum { CLIPS = 3, T = 2 };
    double *fine = testing_doubles(t, CLIPS * T, (double[]){1, 2, 0.5, 0.5, 3, 3});
    double *coarse = testing_doubles(t, CLIPS * T, (double[]){1, 1, 2, 2, 3, NAN});
    double *hinge = testing_doubles(t, CLIPS, NULL), *dfine = testing_doubles(t, CLIPS * T, NULL);
    double *dcoarse = testing_doubles(t, CLIPS * T, NULL);
    t->ops->entropy_hinge(t->be, CLIPS, T, fine, coarse, 0.25, 0.1, hinge, dfine, dcoarse);
    testing_close("hinge", 0, hinge[0], 0.75, 1e-15);
    testing_close("hinge", 1, hinge[1], 0, 0);
    assert_true(isnan(hinge[2]));
    for (size_t i = 0; i < 2 * T; i++) {
        double want = i < T ? 0.1 / (CLIPS * T) : 0;
        testing_close("dfine", i, dfine[i], want, 1e-17);
        testing_close("dcoarse", i, dcoarse[i], -want, 1e-17);
    }
}

/* --- optimizer -------------------------------------------------------------------------------- */

static void norm_is_the_root_of_the_sum_of_squares(void **state) {
    Testing *t = *state;
    const size_t sizes[] = {1, 7, 1000, 100003};
    for (size_t k = 0; k < 4; k++) {
        real *x = testing_random(t, sizes[k], 3);
        double *norm = testing_doubles(t, 2, (double[]){NAN, 0}), want = 0;
        for (size_t i = 0; i < sizes[k]; i++)
            want += (double)x[i] * (double)x[i];
        t->ops->norm(t->be, sizes[k], x, norm);
        testing_close("norm", k, norm[0], sqrt(want), 2.3e-16 * (double)sizes[k] * sqrt(want));
        testing_close("no bad norm so far", k, norm[1], 0, 0);
        x[sizes[k] - 1] = k % 2 ? (real)NAN : (real)INFINITY;
        t->ops->norm(t->be, sizes[k], x, norm);
        assert_false(isfinite(norm[0]));
        x[sizes[k] - 1] = 0;
        t->ops->norm(t->be, sizes[k], x, norm);
        assert_true(isfinite(norm[0]));
        assert_true(isnan(norm[1])); /* and stays */
    }
}

static const double *rates_of(Testing *t, const FvAdamW *a) {
    double rates[FV_RATES];
    fv_adamw_rates(a, rates);
    return testing_doubles(t, FV_RATES, rates);
}

/* Five steps of PyTorch's AdamW written out in double, the gradient clipped in some. */
static void adamw_follows_its_definition(void **state) {
    Testing *t = *state;
    enum { N = 37 };
    real *p = testing_random(t, N, 1), *m = testing_filled(t, N, 0), *v = testing_filled(t, N, 0);
    double wp[N], wm[N] = {0}, wv[N] = {0};
    for (size_t i = 0; i < N; i++)
        wp[i] = (double)p[i];
    for (size_t step = 1; step <= 5; step++) {
        real *g = testing_random(t, N, step % 2 ? 1e-3 : 10);
        FvAdamW a = {.lr = 0.01,
                     .beta1 = 0.9,
                     .beta2 = 0.999,
                     .eps = 1e-8,
                     .weight_decay = 0.1,
                     .clip_norm = 1,
                     .step = step};
        double *norm = testing_doubles(t, 2, (double[]){NAN, 0});
        t->ops->norm(t->be, N, g, norm);
        t->ops->adamw(t->be, &a, rates_of(t, &a), N, norm, g, p, m, v);
        for (size_t i = 0; i < N; i++) {
            double d = (double)g[i] * fmin(1, 1 / (norm[0] + 1e-6));
            wp[i] -= 0.01 * 0.1 * wp[i];
            wm[i] = 0.9 * wm[i] + (1 - 0.9) * d;
            wv[i] = 0.999 * wv[i] + (1 - 0.999) * d * d;
            double root = sqrt(wv[i]) / sqrt(1 - pow(0.999, (double)step)) + 1e-8;
            wp[i] -= 0.01 / (1 - pow(0.9, (double)step)) * wm[i] / root;
            /* a few roundings a step, of weights below 4 and moments below 1 */
            testing_close("p", i, (double)p[i], wp[i], 16 * FV_EPSILON * (double)step);
            testing_close("m", i, (double)m[i], wm[i], 4 * FV_EPSILON * (double)step);
            testing_close("v", i, (double)v[i], wv[i], 8 * FV_EPSILON * (double)step * wv[i]);
        }
    }
}

static void adamw_leaves_everything_alone_after_a_bad_norm(void **state) {
    Testing *t = *state;
    enum { N = 20 };
    const double bad[][2] = {{NAN, 0}, {INFINITY, 0}, {-INFINITY, 0}, {1, NAN}};
    real *g = testing_random(t, N, 1), *p = testing_random(t, N, 1), *m = testing_random(t, N, 1);
    real *v = testing_filled(t, N, 2);
    real *p0 = testing_copy(t, N, p), *m0 = testing_copy(t, N, m), *v0 = testing_copy(t, N, v);
    FvAdamW a = {0.01, 0.9, 0.999, 1e-8, 0.1, 1, 1};
    for (size_t k = 0; k < 4; k++) {
        t->ops->adamw(t->be, &a, rates_of(t, &a), N, testing_doubles(t, 2, bad[k]), g, p, m, v);
        testing_same("p", N, p, p0);
        testing_same("m", N, m, m0);
        testing_same("v", N, v, v0);
    }
}

static void first_nonfinite_finds_the_first(void **state) {
    Testing *t = *state;
    enum { N = 70000 };
    const double bad[] = {NAN, INFINITY, -INFINITY};
    const size_t at[] = {0, 1, 15, 16, 40001, N - 1};
    real *x = testing_random(t, N, 1);
    x[5] = sizeof(real) == sizeof(float) ? (real)3.4028234e38 : (real)1.7976931348623157e308;
    x[6] = -x[5];
    assert_int_equal(t->ops->first_nonfinite(t->be, N, x), N);
    assert_int_equal(t->ops->first_nonfinite(t->be, 0, x), 0);
    for (size_t k = 0; k < 18; k++) {
        real kept = x[at[k % 6]];
        x[at[k % 6]] = (real)bad[k / 6];
        assert_int_equal(t->ops->first_nonfinite(t->be, N, x), at[k % 6]);
        x[at[k % 6]] = kept;
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TESTING_TEST(mse_and_its_gradient),
        TESTING_TEST(cosine_and_its_gradients),
        TESTING_TEST(cosine_of_vanishing_vectors),
        TESTING_TEST(entropy_and_its_gradient),
        TESTING_TEST(entropy_of_certainty_is_zero),
        TESTING_TEST(entropy_hinge_is_active_above_zero_only),
        TESTING_TEST(norm_is_the_root_of_the_sum_of_squares),
        TESTING_TEST(adamw_follows_its_definition),
        TESTING_TEST(adamw_leaves_everything_alone_after_a_bad_norm),
        TESTING_TEST(first_nonfinite_finds_the_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
