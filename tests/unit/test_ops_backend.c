/* The backend as a whole: the same bits with any number of threads, memory, workspace, and the
 * pool of threads. */
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#include "backend/pool.h"
#include "testing.h"

/* --- the same bits ---------------------------------------------------------------------------- */

/* All outputs of every operation at shapes that are cut into several tiles, one after the other in
 * one list of tensors. Everything that is not an input starts as NaN or at a given value, so two
 * lists can be compared whole. */
static void run_dense(Testing *t) {
    enum { ROWS = 1041, IN = 65, OUT = 71, N = ROWS * IN };
    real *x = testing_random(t, N, 1), *a = testing_random(t, N, 1), *w = testing_random(t, IN, 1);
    real *y = testing_tensor(t, N), *z = testing_tensor(t, N);
    real *dw = testing_filled(t, IN, 1), *db = testing_filled(t, IN, 1);
    real *mean = testing_tensor(t, ROWS), *rstd = testing_tensor(t, ROWS);
    t->ops->copy(t->be, N, x, testing_tensor(t, N));
    t->ops->add(t->be, N, x, a);
    t->ops->residual(t->be, ROWS, IN, x, w, a, testing_tensor(t, N));
    t->ops->residual_back(t->be, ROWS, IN, w, x, a, testing_tensor(t, N), dw);
    t->ops->gelu(t->be, N, x, testing_tensor(t, N));
    t->ops->gelu_back(t->be, N, x, a, testing_tensor(t, N));
    t->ops->relu(t->be, N, x, testing_tensor(t, N));
    t->ops->relu_back(t->be, N, x, a, testing_tensor(t, N));
    t->ops->swiglu(t->be, N, x, a, testing_tensor(t, N));
    t->ops->swiglu_back(t->be, N, x, a, x, testing_tensor(t, N), testing_tensor(t, N));
    t->ops->layernorm(t->be, ROWS, IN, 1e-6, x, w, w, y, mean, rstd);
    t->ops->layernorm_back(t->be, ROWS, IN, x, w, mean, rstd, a, z, false, dw, db);
    t->ops->rmsnorm(t->be, ROWS, IN, 1e-5, x, w, testing_tensor(t, N), rstd);
    t->ops->rmsnorm_back(t->be, ROWS, IN, x, w, rstd, a, z, true, dw);
    t->ops->rescale(t->be, ROWS, IN, 0.14, x, testing_tensor(t, N), rstd);
    t->ops->rescale_back(t->be, ROWS, IN, 0.14, x, rstd, a, testing_tensor(t, N));
    real *weight = testing_random(t, OUT * IN, 1), *dweight = testing_filled(t, OUT * IN, 1);
    real *dy = testing_random(t, ROWS * OUT, 1), *dbias = testing_filled(t, OUT, 1);
    t->ops->linear(t->be, ROWS, IN, OUT, x, weight, dbias, testing_tensor(t, ROWS * OUT));
    t->ops->linear_back(t->be, ROWS, IN, OUT, x, weight, dy, z, true, dweight, dbias);
    t->ops->head_linear(t->be, ROWS, 2, IN / 2, OUT, x, weight, NULL,
                        testing_tensor(t, ROWS * 2 * OUT));
    t->ops->head_linear_back(t->be, ROWS, 1, IN, OUT, weight, dy, z);
    t->ops->linear(t->be, 20, 260, 530, x, testing_random(t, 530 * 260, 1), NULL,
                   testing_tensor(t, 20 * 530));
    int32_t to[ROWS];
    for (int32_t i = 0; i < ROWS; i++)
        to[i] = i % 7 - 1;
    t->ops->copy_rows(t->be, ROWS, IN, x, NULL, testing_filled(t, 7 * IN, 1), to, true);
}

static void run_attention(Testing *t) {
    const int32_t first[3] = {0, 7, 70};
    const FvAttention a = {3, 70, 70, 6, 2, 9, 0.3, true, first};
    enum { NQ = 3 * 70 * 54, NK = 3 * 70 * 18, NP = 3 * 6 * 70 * 70 };
    real *q = testing_random(t, NQ, 1), *k = testing_random(t, NK, 1);
    real *v = testing_random(t, NK, 1), *probs = testing_tensor(t, NP);
    real *out = testing_tensor(t, NQ), *dk = testing_filled(t, NK, 1);
    t->ops->attention(t->be, &a, q, k, v, probs, out);
    t->ops->attention_back(t->be, &a, q, k, v, probs, q, testing_tensor(t, NQ), dk,
                           testing_filled(t, NK, 1));
    t->ops->rope(t->be, 3, 70, 6, 8, 2, first, 10000, false, q);
    const FvQuery s = {16, 67, 4, 18, 0.2, 9, false}, one = {16, 67, 4, 18, 0.2, 9, true};
    enum { MQ = 16 * 72, MK = MQ * 67, MP = 16 * 4 * 67 };
    real *u = testing_random(t, MQ, 1), *keys = testing_random(t, MK, 1);
    real *p = testing_tensor(t, MP), *dkeys = testing_filled(t, MK, 1);
    t->ops->query(t->be, &s, u, keys, keys, p, testing_tensor(t, MQ));
    t->ops->query_back(t->be, &s, u, keys, keys, p, u, p, testing_tensor(t, MQ), dkeys, dkeys);
    t->ops->query(t->be, &one, u, keys, keys, p, testing_tensor(t, MQ));
    t->ops->query_back(t->be, &one, u, keys, keys, p, u, p, testing_tensor(t, MQ), NULL, NULL);
}

static void run_image(Testing *t) {
    const FvConv s = {9, 11, 13, 24, 19, 1};
    enum { IMAGE = 11 * 13, NX = 9 * IMAGE * 24, NY = 9 * IMAGE * 19, NW = 19 * 9 * 24 };
    real *x = testing_random(t, NX, 1), *w = testing_random(t, NW, 1);
    real *dy = testing_random(t, NY, 1), *bias = testing_random(t, 24, 1);
    t->ops->conv(t->be, &s, x, w, bias, testing_tensor(t, NY));
    t->ops->conv_back(t->be, &s, x, w, dy, testing_tensor(t, NX), false, testing_filled(t, NW, 1),
                      testing_filled(t, 19, 1));
    const FvConv half = {9, 11, 13, 24, 19, 2};
    enum { NHALF = 9 * 6 * 7 * 19 };
    t->ops->conv(t->be, &half, x, w, NULL, testing_tensor(t, NHALF));
    t->ops->conv_back(t->be, &half, x, w, dy, testing_tensor(t, NX), false,
                      testing_filled(t, NW, 1), NULL);
    real *gb = testing_random(t, 9 * 48, 1);
    t->ops->film(t->be, 9, IMAGE, 24, x, gb, testing_tensor(t, NX));
    t->ops->film_back(t->be, 9, IMAGE, 24, x, gb, x, testing_tensor(t, NX), false,
                      testing_tensor(t, 9 * 48));
    t->ops->tokens(t->be, 9, IMAGE - 1, 24, x, bias, x, testing_tensor(t, NX));
    t->ops->tokens_back(t->be, 9, IMAGE - 1, 24, x, testing_tensor(t, NX - 9 * 24),
                        testing_filled(t, 24, 1), testing_filled(t, IMAGE * 24, 1));
    uint8_t pixels[3 * 40 * 40 * 3];
    for (size_t i = 0; i < sizeof pixels; i++)
        pixels[i] = (uint8_t)fv_random(5, i);
    t->ops->patchify(t->be, 3, 40, 8, pixels, testing_tensor(t, sizeof pixels));
}

/* Sums in double are kept as the four quarters of their bits. */
static void keep_doubles(Testing *t, size_t n, const double *value) {
    real *kept = testing_tensor(t, 4 * n);
    for (size_t i = 0; i < 4 * n; i++) {
        uint64_t bits;
        memcpy(&bits, value + i / 4, sizeof bits);
        kept[i] = (real)(bits >> i % 4 * 16 & 0xffff);
    }
}

static void run_loss(Testing *t) {
    enum { FRAMES = 16, N = 4001, ALL = FRAMES * N };
    real *x = testing_random(t, ALL, 1), *y = testing_random(t, ALL, 1);
    real *p = testing_random(t, ALL, 1), *m = testing_filled(t, ALL, 0);
    double value[FRAMES], norm[2] = {0}, rates[FV_RATES];
    t->ops->mse(t->be, FRAMES, N, x, y, value);
    keep_doubles(t, FRAMES, value);
    t->ops->mse_back(t->be, FRAMES, N, 0.5, x, y, testing_tensor(t, ALL));
    t->ops->cosine(t->be, FRAMES, N, x, y, value);
    keep_doubles(t, FRAMES, value);
    t->ops->cosine_back(t->be, FRAMES, N, 0.5, x, y, testing_filled(t, ALL, 1),
                        testing_filled(t, ALL, 1));
    real *probs = testing_tensor(t, ALL);
    for (size_t i = 0; i < ALL; i++)
        probs[i] = (real)fv_uniform(3, i);
    t->ops->entropy(t->be, FRAMES, 1, N, probs, value);
    keep_doubles(t, FRAMES, value);
    t->ops->entropy_back(t->be, FRAMES, 1, N, probs, value, testing_tensor(t, ALL));
    t->ops->norm(t->be, ALL, x, norm);
    keep_doubles(t, 2, norm);
    FvAdamW a = {0.01, 0.9, 0.999, 1e-8, 0.1, 1, 3};
    fv_adamw_rates(&a, rates);
    t->ops->adamw(t->be, &a, rates, ALL, norm, x, p, m, testing_filled(t, ALL, 1));
}

static void any_number_of_threads_gives_the_same_bits(void **state) {
    (void)state;
    void (*const runs[])(Testing *) = {run_dense, run_attention, run_image, run_loss};
    const size_t threads[] = {1, 2, 3, 7};
    for (size_t k = 0; k < 4; k++) {
        Testing one;
        assert_true(testing_start(&one, 1));
        runs[k](&one);
        for (size_t i = 1; i < 4; i++) {
            Testing more;
            assert_true(testing_start(&more, threads[i]));
            runs[k](&more);
            assert_int_equal(more.count, one.count);
            for (size_t j = 0; j < one.count; j++) {
                assert_int_equal(more.length[j], one.length[j]);
                testing_same("tensor", one.length[j], more.block[j] + TESTING_GUARD,
                             one.block[j] + TESTING_GUARD);
            }
            assert_true(testing_stop(&more));
        }
        assert_true(testing_stop(&one));
    }
}

/* --- memory ----------------------------------------------------------------------------------- */

static void alloc_gives_aligned_zeros_and_refuses_the_impossible(void **state) {
    Testing *t = *state;
    const size_t sizes[] = {0, 1, 63, 64, 100000};
    for (size_t k = 0; k < 5; k++) {
        void *p = NULL;
        assert_int_equal(t->ops->alloc(t->be, sizes[k], &p, NULL), FV_OK);
        assert_int_equal((uintptr_t)p % 64, 0);
        for (size_t i = 0; i < sizes[k]; i++)
            assert_int_equal(((char *)p)[i], 0);
        t->ops->release(t->be, p);
    }
    const size_t impossible[] = {SIZE_MAX, SIZE_MAX - 70, (size_t)1 << 62};
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const size_t count = 2; /* their allocators stop the program where libc's returns NULL */
#else
    const size_t count = 3;
#endif
    for (size_t k = 0; k < count; k++) {
        FvError err = {0};
        void *p = t;
        char bytes[32];
        snprintf(bytes, sizeof bytes, "%zu", impossible[k]);
        assert_int_equal(t->ops->alloc(t->be, impossible[k], &p, &err), FV_DEVICE);
        assert_null(p);
        assert_non_null(strstr(err.text, bytes));
    }
}

static void upload_download_and_zero_move_bytes(void **state) {
    Testing *t = *state;
    const char text[] = "seventeen bytes.";
    char back[sizeof text];
    void *p = NULL;
    assert_int_equal(t->ops->alloc(t->be, sizeof text, &p, NULL), FV_OK);
    t->ops->upload(t->be, p, text, sizeof text);
    t->ops->download(t->be, back, p, sizeof text);
    assert_string_equal(back, text);
    t->ops->zero(t->be, p, 9);
    t->ops->download(t->be, back, p, sizeof text);
    for (size_t i = 0; i < sizeof text; i++)
        assert_int_equal(back[i], i < 9 ? 0 : text[i]);
    t->ops->release(t->be, p);
}

static void workspace_stops_growing_after_the_first_step(void **state) {
    (void)state;
    Testing t;
    assert_true(testing_start(&t, 3));
    run_image(&t);
    run_attention(&t);
    run_dense(&t);
    size_t bytes = fv_cpu_workspace_bytes(t.be);
    assert_true(bytes > 0);
    run_image(&t);
    run_attention(&t);
    run_dense(&t);
    assert_int_equal(fv_cpu_workspace_bytes(t.be), bytes);
    assert_int_equal(t.ops->sync(t.be, NULL), FV_OK);
    assert_true(testing_stop(&t));
}

/* The sizes are refused before any tensor is touched. */
static void sync_reports_a_workspace_that_cannot_be_had(void **state) {
    Testing *t = *state;
    const size_t huge[] = {(size_t)1 << 58, SIZE_MAX / 9};
    real x = 1;
    for (size_t k = 0; k < 2; k++) {
        FvConv s = {1, 1, 1, huge[k], 1, 1};
        t->ops->conv(t->be, &s, &x, &x, &x, &x);
        FvError err = {0};
        assert_int_equal(t->ops->sync(t->be, &err), FV_DEVICE);
        assert_non_null(strstr(err.text, "bytes of workspace"));
        assert_true(x == 1);
        assert_int_equal(t->ops->sync(t->be, &err), FV_OK); /* reported once */
    }
}

static void description_names_processor_and_threads(void **state) {
    Testing *t = *state;
    assert_string_equal(t->be->name, "cpu");
    assert_non_null(strstr(t->be->description, ", 2 threads"));
    assert_true(strlen(t->be->description) > strlen(", 2 threads"));
}

/* --- pool ------------------------------------------------------------------------------------- */

typedef struct Counts {
    _Atomic uint32_t tile[1000];
    _Atomic uint32_t outside;
    size_t threads;
} Counts;

static void count_tile(void *arg, size_t tile, size_t thread) {
    Counts *c = arg;
    if (tile >= 1000 || thread >= c->threads)
        atomic_fetch_add(&c->outside, 1);
    else
        atomic_fetch_add(&c->tile[tile], 1);
}

/* Thousands of operations back to back, some after a pause that lets the workers sleep. */
static void pool_runs_every_tile_once(void **state) {
    (void)state;
    for (size_t threads = 1; threads <= 5; threads += 2) {
        FvPool *pool;
        assert_int_equal(fv_pool_create(threads, &pool, NULL), FV_OK);
        assert_int_equal(fv_pool_threads(pool), threads);
        static const size_t tiles[] = {0, 1, 2, 3, 17, 1000};
        for (size_t round = 0; round < 600; round++) {
            Counts c = {.threads = threads};
            size_t n = tiles[round % 6];
            fv_pool_run(pool, n, count_tile, &c);
            for (size_t i = 0; i < 1000; i++)
                assert_int_equal(atomic_load(&c.tile[i]), i < n);
            assert_int_equal(atomic_load(&c.outside), 0);
            if (round % 100 == 0) {
                struct timespec pause = {.tv_nsec = 2000000};
                nanosleep(&pause, NULL);
            }
        }
        fv_pool_destroy(pool);
    }
}

static void pool_of_no_threads_is_refused(void **state) {
    (void)state;
    FvPool *pool;
    FvBackend *be;
    FvError err;
    assert_int_equal(fv_pool_create(0, &pool, &err), FV_USAGE);
    assert_null(pool);
    assert_int_equal(fv_cpu_backend_create(0, &be, &err), FV_USAGE);
    assert_null(be);
    fv_pool_destroy(NULL);
    fv_backend_destroy(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_number_of_threads_gives_the_same_bits),
        TESTING_TEST(alloc_gives_aligned_zeros_and_refuses_the_impossible),
        TESTING_TEST(upload_download_and_zero_move_bytes),
        cmocka_unit_test(workspace_stops_growing_after_the_first_step),
        TESTING_TEST(sync_reports_a_workspace_that_cannot_be_had),
        TESTING_TEST(description_names_processor_and_threads),
        cmocka_unit_test(pool_runs_every_tile_once),
        cmocka_unit_test(pool_of_no_threads_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
