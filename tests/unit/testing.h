/* What the tests of the backend's operations share: a backend, tensors between guards, random
 * values, comparisons that fail on NaN, and gradients by central differences.
 *
 * Tensors start as NaN and so do the guards on both sides: an operation that reads what it should
 * not spoils its result, one that writes outside is found by testing_teardown. */
#ifndef TESTS_UNIT_TESTING_H
#define TESTS_UNIT_TESTING_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/backend.h"
#include "base/rng.h"
#include "tested_backend.h"

enum { TESTING_GUARD = 32, TESTING_TENSORS = 256 };

typedef struct Testing {
    FvBackend *be;
    const FvOps *ops;
    size_t count;
    real *block[TESTING_TENSORS];
    size_t length[TESTING_TENSORS];
    uint64_t next; /* random number */
} Testing;

static inline bool testing_start(Testing *t, size_t threads) {
    *t = (Testing){.next = 1};
    if (tested_backend_create(threads, &t->be, NULL) != FV_OK)
        return false;
    t->ops = t->be->ops;
    return true;
}

/* True when no guard was touched. */
static inline bool testing_stop(Testing *t) {
    bool intact = true;
    real guard[TESTING_GUARD];
    memset(guard, 0xff, sizeof guard);
    for (size_t i = 0; i < t->count; i++) {
        intact = intact && memcmp(t->block[i], guard, sizeof guard) == 0 &&
                 memcmp(t->block[i] + TESTING_GUARD + t->length[i], guard, sizeof guard) == 0;
        t->ops->release(t->be, t->block[i]);
    }
    fv_backend_destroy(t->be);
    return intact;
}

static inline int testing_setup(void **state) {
    Testing *t = malloc(sizeof *t);
    if (!t || !testing_start(t, 2)) {
        free(t);
        return -1;
    }
    *state = t;
    return 0;
}

static inline int testing_teardown(void **state) {
    bool intact = testing_stop(*state);
    free(*state);
    if (!intact)
        print_error("an operation wrote outside its tensors\n");
    return intact ? 0 : -1;
}

#define TESTING_TEST(f) cmocka_unit_test_setup_teardown(f, testing_setup, testing_teardown)

/* --- tensors: freed by the teardown ---------------------------------------------------------- */

static inline real *testing_tensor(Testing *t, size_t n) {
    void *p = NULL;
    assert_true(t->count < TESTING_TENSORS);
    size_t bytes = (n + 2 * TESTING_GUARD) * sizeof(real);
    assert_int_equal(t->ops->alloc(t->be, bytes, &p, NULL), FV_OK);
    memset(p, 0xff, bytes);
    t->length[t->count] = n;
    t->block[t->count++] = p;
    return (real *)p + TESTING_GUARD;
}

static inline real *testing_filled(Testing *t, size_t n, double value) {
    real *x = testing_tensor(t, n);
    for (size_t i = 0; i < n; i++)
        x[i] = (real)value;
    return x;
}

/* Normal with the given deviation. */
static inline real *testing_random(Testing *t, size_t n, double deviation) {
    real *x = testing_tensor(t, n);
    for (size_t i = 0; i < n; i++)
        x[i] = (real)(deviation * fv_normal(0x7e57, t->next++));
    return x;
}

static inline real *testing_copy(Testing *t, size_t n, const real *x) {
    real *y = testing_tensor(t, n);
    memcpy(y, x, n * sizeof *y);
    return y;
}

/* Doubles in the backend's memory, NaN without values. */
static inline double *testing_doubles(Testing *t, size_t n, const double *values) {
    double *x = (double *)(void *)testing_tensor(t, n * sizeof(double) / sizeof(real));
    if (values)
        memcpy(x, values, n * sizeof *x);
    return x;
}

/* --- comparisons ------------------------------------------------------------------------------ */

static inline void testing_close(const char *what, size_t at, double got, double want,
                                 double tolerance) {
    if (!(fabs(got - want) <= tolerance))
        fail_msg("%s[%zu] is %.17g, not %.17g within %.3g", what, at, got, want, tolerance);
}

static inline void testing_same(const char *what, size_t n, const real *got, const real *want) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(got + i, want + i, sizeof *got) != 0)
            fail_msg("%s[%zu] is %.17g, not exactly %.17g", what, i, (double)got[i],
                     (double)want[i]);
}

/* --- gradients -------------------------------------------------------------------------------- */

/* A gradient to check: of the n values x, found in `gradient`, whose elements were `before` ahead
 * of the call when it accumulates, 0 when it overwrites. */
typedef struct Gradient {
    const char *name;
    size_t n;
    real *x;
    const real *gradient;
    double before;
} Gradient;

/* The function differentiated; *size receives the sum of the magnitudes that it adds up. */
typedef double TestingLoss(void *context, double *size);

/* sum of weight * y, and of |weight * y| */
static inline double testing_weighted(size_t n, const real *weight, const real *y, double *size) {
    double sum = 0;
    *size = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)weight[i] * (double)y[i];
        *size += fabs((double)weight[i] * (double)y[i]);
    }
    return sum;
}

/* Compares every element with (L(x + h) - L(x - h)) / 2 h. The truncation error is h^2 L''' / 6,
 * the rounding error of L, eps times the terms it adds and their own rounding, is divided by h:
 * equal orders at h = eps^(1/3), eps^(2/3) of the size of L. 30 covers third derivatives and sums
 * inside the operation; a wrong gradient is off by the order of L itself. */
static inline void testing_gradients(TestingLoss *loss, void *context, size_t count,
                                     const Gradient *gradients) {
    double eps = FV_EPSILON, size;
    loss(context, &size);
    for (size_t g = 0; g < count; g++)
        for (size_t i = 0; i < gradients[g].n; i++) {
            real *x = gradients[g].x + i, kept = *x;
            double step = cbrt(eps) * fmax(1, fabs((double)kept)), ignored;
            real above = (real)((double)kept + step), below = (real)((double)kept - step);
            *x = above;
            double high = loss(context, &ignored);
            *x = below;
            double low = loss(context, &ignored);
            *x = kept;
            testing_close(gradients[g].name, i,
                          (double)gradients[g].gradient[i] - gradients[g].before,
                          (high - low) / ((double)above - (double)below),
                          30 * cbrt(eps) * cbrt(eps) * (1 + size));
        }
}

#endif
