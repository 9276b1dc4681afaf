/* Operations of self-distillation: values against their definitions in double, gradients against
 * central differences. */
#include "testing.h"

typedef struct Call {
    Testing *t;
    size_t rows, n;
    double temperature;
    real *x, *y, *norm;
    const real *weight, *target;
    double *loss;
} Call;

static double dot(size_t n, const real *x, const real *y) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)y[i];
    return sum;
}

static void all_nan(const char *what, size_t n, const real *x) {
    for (size_t i = 0; i < n; i++)
        if (!isnan(x[i]))
            fail_msg("%s[%zu] is %g, not NaN", what, i, (double)x[i]);
}

/* --- unit rows -------------------------------------------------------------------------------- */

enum { ROWS = 3 };

static double normalize_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->normalize(c->t->be, c->rows, c->n, c->x, c->y, c->norm);
    return testing_weighted(c->rows * c->n, c->weight, c->y, size);
}

static Call random_rows(Testing *t, size_t n) {
    return (Call){.t = t,
                  .rows = ROWS,
                  .n = n,
                  .x = testing_random(t, ROWS * n, 1),
                  .y = testing_tensor(t, ROWS * n),
                  .norm = testing_tensor(t, ROWS),
                  .weight = testing_random(t, ROWS * n, 1)};
}

static void normalize_makes_unit_rows(void **state) {
    Testing *t = *state;
    for (size_t n = 1; n < 50; n += 11) {
        Call c = random_rows(t, n);
        double size;
        normalize_loss(&c, &size);
        for (size_t i = 0; i < ROWS * n; i++) {
            const real *row = c.x + i / n * n;
            double length = sqrt(dot(n, row, row)), want = (double)c.x[i] / length;
            /* the length, its inverse and the product are rounded */
            double tolerance = (double)(n + 4) * FV_EPSILON;
            testing_close("norm", i / n, (double)c.norm[i / n], length, tolerance * length);
            testing_close("y", i, (double)c.y[i], want, tolerance * fabs(want));
        }
        real *dx = testing_tensor(t, ROWS * n), *added = testing_filled(t, ROWS * n, 0.5);
        t->ops->normalize_back(t->be, ROWS, n, c.y, c.norm, c.weight, dx, false);
        t->ops->normalize_back(t->be, ROWS, n, c.y, c.norm, c.weight, added, true);
        Gradient gradients[] = {{"dx", ROWS * n, c.x, dx, 0}, {"dx +=", ROWS * n, c.x, added, 0.5}};
        testing_gradients(normalize_loss, &c, 2, gradients);
    }
}

/* Below |x| = 1e-12 the divisor is that constant. */
static void normalize_of_vanishing_rows(void **state) {
    Testing *t = *state;
    enum { N = 5 };
    const double scales[ROWS] = {0, 1e-20, 3e-13};
    Call c = random_rows(t, N);
    double size;
    for (size_t i = 0; i < ROWS * N; i++) /* of length scale */
        c.x[i] = (real)(scales[i / N] / sqrt(N) * (i % 2 ? -1 : 1));
    normalize_loss(&c, &size);
    real *dx = testing_tensor(t, ROWS * N);
    t->ops->normalize_back(t->be, ROWS, N, c.y, c.norm, c.weight, dx, false);
    for (size_t i = 0; i < ROWS * N; i++) {
        double want = (double)c.x[i] * 1e12, slope = (double)c.weight[i] * 1e12;
        testing_close("y", i, (double)c.y[i], want, 4 * FV_EPSILON * fabs(want));
        testing_close("dx", i, (double)dx[i], slope, 4 * FV_EPSILON * fabs(slope));
    }
    testing_close("norm of 0", 0, (double)c.norm[0], 0, 0);
}

static void normalize_lets_nan_through(void **state) {
    Testing *t = *state;
    enum { N = 19 };
    Call c = random_rows(t, N);
    double size;
    real *dx = testing_tensor(t, ROWS * N);
    c.x[N + 7] = (real)NAN;
    normalize_loss(&c, &size);
    t->ops->normalize_back(t->be, ROWS, N, c.y, c.norm, c.weight, dx, false);
    all_nan("y", N, c.y + N);
    all_nan("norm", 1, c.norm + 1);
    all_nan("dx", N, dx + N);
    for (size_t r = 0; r < ROWS; r += 2) /* the rows beside it */
        testing_close("|y|", r, dot(N, c.y + r * N, c.y + r * N), 1, 16 * FV_EPSILON);
}

/* --- softmax and cross-entropy ---------------------------------------------------------------- */

/* log sum exp((x - centre) / temperature) of a row */
static double log_sum(size_t n, const real *x, const real *centre, double temperature) {
    double largest = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++)
        largest = fmax(largest, ((double)x[i] - (centre ? (double)centre[i] : 0)) / temperature);
    for (size_t i = 0; i < n; i++)
        sum += exp(((double)x[i] - (centre ? (double)centre[i] : 0)) / temperature - largest);
    return largest + log(sum);
}

/* Exponents up to 6 deviations of rows of deviation 1, each rounded a few times. */
static double exponent_error(double temperature) {
    return 8 * FV_EPSILON * (1 + 12 / temperature);
}

static void softmax_follows_its_definition(void **state) {
    Testing *t = *state;
    const double temperatures[] = {0.04, 1, 3};
    for (size_t n = 1; n < 50; n += 11)
        for (size_t k = 0; k < 6; k++) {
            double temperature = temperatures[k / 2];
            real *x = testing_random(t, ROWS * n, 1), *p = testing_tensor(t, ROWS * n);
            real *centre = k % 2 ? testing_random(t, n, 1) : NULL;
            t->ops->softmax(t->be, ROWS, n, temperature, x, centre, p);
            for (size_t i = 0; i < ROWS * n; i++) {
                double at = ((double)x[i] - (centre ? (double)centre[i % n] : 0)) / temperature;
                double want = exp(at - log_sum(n, x + i / n * n, centre, temperature));
                testing_close("p", i, (double)p[i], want,
                              (exponent_error(temperature) + (double)n * FV_EPSILON) * want +
                                  1e-37);
            }
        }
}

static double cross_entropy_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->cross_entropy(c->t->be, c->rows, c->n, c->temperature, c->x, c->target, c->y,
                             c->loss);
    double sum = 0;
    *size = 0;
    for (size_t r = 0; r < c->rows; r++) {
        sum += c->loss[r];
        *size += fabs(c->loss[r]);
    }
    return sum;
}

/* Rows of any sum: of a distribution, of two, of nothing. */
static real *some_targets(Testing *t, size_t n) {
    const double sums[ROWS] = {1, 2, 0};
    real *target = testing_tensor(t, ROWS * n);
    for (size_t r = 0; r < ROWS; r++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++)
            sum += fv_uniform(3, r * n + i);
        for (size_t i = 0; i < n; i++)
            target[r * n + i] = (real)(sums[r] * fv_uniform(3, r * n + i) / sum);
    }
    return target;
}

static void cross_entropy_and_its_gradient(void **state) {
    Testing *t = *state;
    const double scale = 0.75;
    for (size_t n = 1; n < 50; n += 11) {
        double *loss = testing_doubles(t, ROWS, NULL), size;
        Call c = random_rows(t, n);
        c.temperature = 0.5, c.loss = loss, c.target = some_targets(t, n);
        cross_entropy_loss(&c, &size);
        for (size_t r = 0; r < ROWS; r++) {
            const real *x = c.x + r * n, *target = c.target + r * n;
            double all = log_sum(n, x, NULL, c.temperature), want = 0, weight = 0;
            for (size_t i = 0; i < n; i++) {
                want += (double)target[i] * (all - (double)x[i] / c.temperature);
                weight += (double)target[i];
            }
            double error = exponent_error(c.temperature) + (double)n * FV_EPSILON;
            testing_close("loss", r, loss[r], want, 4 * error * weight);
            for (size_t i = 0; i < n; i++) {
                double p = exp((double)x[i] / c.temperature - all);
                testing_close("p", r * n + i, (double)c.y[r * n + i], p, error * p);
            }
        }
        real *dx = testing_tensor(t, ROWS * n);
        t->ops->cross_entropy_back(t->be, ROWS, n, c.temperature, 1, c.y, c.target, dx);
        testing_gradients(cross_entropy_loss, &c, 1, &(Gradient){"dx", ROWS * n, c.x, dx, 0});
        cross_entropy_loss(&c, &size);
        real *scaled = testing_tensor(t, ROWS * n);
        t->ops->cross_entropy_back(t->be, ROWS, n, c.temperature, scale, c.y, c.target, scaled);
        for (size_t i = 0; i < ROWS * n; i++)
            testing_close("scaled dx", i, (double)scaled[i], scale * (double)dx[i],
                          16 * FV_EPSILON);
        for (size_t i = 2 * n; i < 3 * n; i++) /* nothing to predict, nothing to learn */
            testing_close("dx without target", i, (double)dx[i], 0, 0);
        testing_close("loss without target", 2, loss[2], 0, 0);
    }
}

/* Exponents of 2000 and more overflow nowhere. */
static void cross_entropy_of_extreme_logits(void **state) {
    Testing *t = *state;
    enum { N = 4 };
    real *x = testing_filled(t, N, -80), *target = testing_filled(t, N, 0);
    real *p = testing_tensor(t, N);
    double *loss = testing_doubles(t, 1, NULL);
    x[1] = 80, target[2] = 1;
    t->ops->cross_entropy(t->be, 1, N, 0.04, x, target, p, loss);
    testing_close("loss", 0, *loss, 160 / 0.04, 4000 * 4 * FV_EPSILON);
    for (size_t i = 0; i < N; i++)
        testing_close("p", i, (double)p[i], i == 1, 0);
}

static void cross_entropy_lets_nan_through(void **state) {
    Testing *t = *state;
    enum { N = 21 };
    double *loss = testing_doubles(t, ROWS, NULL), size;
    Call c = random_rows(t, N);
    real *p = testing_tensor(t, ROWS * N), *dx = testing_tensor(t, ROWS * N);
    c.temperature = 0.5, c.loss = loss, c.target = some_targets(t, N);
    c.x[N + 20] = (real)NAN;
    cross_entropy_loss(&c, &size);
    t->ops->softmax(t->be, ROWS, N, 0.5, c.x, NULL, p);
    t->ops->cross_entropy_back(t->be, ROWS, N, 0.5, 1, c.y, c.target, dx);
    assert_true(isfinite(loss[0]) && isnan(loss[1]) && isfinite(loss[2]));
    all_nan("p", N, p + N);
    all_nan("kept p", N, c.y + N);
    all_nan("dx", N, dx + N);
    for (size_t i = 0; i < N; i++)
        assert_true(isfinite(p[i]) && isfinite(dx[i]) && isfinite(p[2 * N + i]));
}

/* --- the slow copy ---------------------------------------------------------------------------- */

static void approach_goes_a_share_of_the_way(void **state) {
    Testing *t = *state;
    const size_t sizes[] = {1, 7, 1000, 70003};
    const double shares[] = {0, 0.004, 0.5, 1};
    for (size_t k = 0; k < 16; k++) {
        size_t n = sizes[k / 4];
        double share = shares[k % 4];
        real *x = testing_random(t, n, 1), *y = testing_random(t, n, 1),
             *y0 = testing_copy(t, n, y);
        t->ops->approach(t->be, n, share, x, y);
        for (size_t i = 0; i < n; i++)
            testing_close("y", i, (double)y[i],
                          (double)y0[i] + share * ((double)x[i] - (double)y0[i]),
                          2 * FV_EPSILON * (fabs((double)x[i]) + fabs((double)y0[i])));
        if (share == 0)
            testing_same("y", n, y, y0);
        y[n - 1] = (real)NAN;
        t->ops->approach(t->be, n, share, x, y);
        assert_true(isnan(y[n - 1]));
    }
}

/* --- threads ---------------------------------------------------------------------------------- */

enum { MANY = 301, WIDE = 517 };

/* Every operation once, over enough rows for several tiles; what they write, in one tensor. */
static real *run_all(Testing *t) {
    const size_t n = (size_t)MANY * WIDE;
    real *out = testing_tensor(t, 7 * n + 3 * MANY);
    real *x = testing_random(t, n, 1), *target = testing_random(t, n, 1), *norm = out + 7 * n;
    double loss[MANY];
    t->ops->normalize(t->be, MANY, WIDE, x, out, norm);
    t->ops->normalize_back(t->be, MANY, WIDE, out, norm, target, out + n, false);
    memcpy(out + 2 * n, x, n * sizeof *x);
    t->ops->normalize_back(t->be, MANY, WIDE, out, norm, target, out + 2 * n, true);
    t->ops->softmax(t->be, MANY, WIDE, 0.1, x, x + n - WIDE, out + 3 * n);
    t->ops->cross_entropy(t->be, MANY, WIDE, 0.1, x, target, out + 4 * n, loss);
    t->ops->cross_entropy_back(t->be, MANY, WIDE, 0.1, 0.3, out + 4 * n, target, out + 5 * n);
    memcpy(out + 6 * n, target, n * sizeof *x);
    t->ops->approach(t->be, n, 0.3, x, out + 6 * n);
    for (size_t r = 0; r < MANY; r++) { /* a float and what it leaves of a double */
        norm[MANY + r] = (real)loss[r];
        norm[2 * MANY + r] = (real)(loss[r] - (double)norm[MANY + r]);
    }
    return out;
}

static void two_threads_give_the_bits_of_one(void **state) {
    Testing one;
    assert_true(testing_start(&one, 1));
    testing_same("result", 7 * (size_t)MANY * WIDE + 3 * (size_t)MANY, run_all(*state),
                 run_all(&one));
    assert_true(testing_stop(&one));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TESTING_TEST(normalize_makes_unit_rows),
        TESTING_TEST(normalize_of_vanishing_rows),
        TESTING_TEST(normalize_lets_nan_through),
        TESTING_TEST(softmax_follows_its_definition),
        TESTING_TEST(cross_entropy_and_its_gradient),
        TESTING_TEST(cross_entropy_of_extreme_logits),
        TESTING_TEST(cross_entropy_lets_nan_through),
        TESTING_TEST(approach_goes_a_share_of_the_way),
        TESTING_TEST(two_threads_give_the_bits_of_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
