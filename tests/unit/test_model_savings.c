/* Work that can be saved: with a saving switched off the work is done again and the numbers stay,
 * and stored outputs of a frozen encoder are the same bits as those made now. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/parts.h"
#include "model_fixture.h"
#include "tested_backend.h"

/* --- comparisons ----------------------------------------------------------------------------- */

/* Largest difference, as a share of the largest magnitude of the tensor or, where that is smaller,
 * of `scale`. */
static double difference(const real *x, const real *y, size_t n, double scale) {
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)x[i] - (double)y[i]);
        most = d > most || isnan(d) ? d : most;
    }
    return most / fmax(fixture_largest(x, n), scale);
}

/* Root mean square of all gradients. */
static double gradient_scale(const Fixture *f) {
    const FvParams *table = fv_model_params(f->model);
    double sum = 0;
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (p->role != FV_TRAINED)
            continue;
        real *g = fixture_get(f, p, FV_BLOCK_G);
        for (size_t j = 0; j < p->count; j++)
            sum += (double)g[j] * (double)g[j];
        free(g);
    }
    return sqrt(sum / (double)table->trained);
}

static void compare_gradients(const Fixture *a, const Fixture *b, double tolerance,
                              const char *what) {
    const FvParams *table = fv_model_params(a->model);
    double scale = gradient_scale(a);
    assert_true(scale > 0);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (p->role != FV_TRAINED)
            continue;
        real *x = fixture_get(a, p, FV_BLOCK_G);
        real *y = fixture_get(b, fixture_param(b, p->name), FV_BLOCK_G);
        double d = difference(x, y, p->count, scale);
        REQUIRE(d <= tolerance, "%s: gradient of %s differs by %.3g, more than %.3g", what, p->name,
                d, tolerance);
        free(x);
        free(y);
    }
}

/* Per clip and frame, relative; tolerance 0: the same bits. */
static void compare_losses(const Fixture *a, const Fixture *b, double tolerance, const char *what) {
    size_t n = a->c.clips * a->c.frames;
    for (size_t i = 0; i < n; i++)
        for (int p = 0; p < FV_PASSES; p++) {
            double x = a->measures.loss[p][i], y = b->measures.loss[p][i];
            REQUIRE(fabs(x - y) <= tolerance * fabs(x),
                    "%s: loss %d of frame %zu: %.17g, not %.17g", what, p, i, y, x);
            if (!a->c.vision)
                continue;
            double u = a->measures.entropy[p][i], v = b->measures.entropy[p][i];
            REQUIRE(fabs(u - v) <= tolerance * fmax(fabs(u), 1),
                    "%s: entropy %d of frame %zu: %.17g, not %.17g", what, p, i, v, u);
        }
}

static Fixture open_fixture(const FvModelConfig *c) {
    Fixture f = fixture_create(c, 1, 7, 0);
    for (size_t b = 1; c->captions && b < c->clips; b++)
        f.batch.token_count[b]--; /* one row of padding */
    return f;
}

/* --- switches -------------------------------------------------------------------------------- */

static void plain(FvModelConfig *c) {
    (void)c;
}
static void shallow(FvModelConfig *c) {
    c->deep = false;
}
static void frozen(FvModelConfig *c) {
    c->freeze_dino = true;
}
static void frozen_shallow(FvModelConfig *c) {
    c->freeze_dino = true;
    c->deep = false;
}
static void frozen_lm(FvModelConfig *c) {
    c->freeze_lm = true;
}
static void captions(FvModelConfig *c) {
    c->captions = true;
    c->max_text = 4;
}
static void frozen_captions(FvModelConfig *c) {
    captions(c);
    c->freeze_dino = true;
    c->contrastive = 0.1;
    c->entropy_margin = 0.5;
}
static void hard_attention(FvModelConfig *c) {
    c->freeze_dino = true;
    c->hard_attn_k = 4;
}
static void one_layer(FvModelConfig *c) {
    c->freeze_dino = true;
    c->dino_layers = 1;
}
static void one_frame(FvModelConfig *c) {
    c->freeze_dino = true;
    c->frames = 1;
}
static void no_vision(FvModelConfig *c) {
    c->freeze_dino = true;
    c->vision = false;
}

static void (*const variants[])(FvModelConfig *) = {
    plain,           shallow,        frozen,    frozen_shallow, frozen_lm, captions,
    frozen_captions, hard_attention, one_layer, one_frame,      no_vision};
enum { VARIANTS = sizeof variants / sizeof *variants };

static void compare_with(const FvModelConfig *on, const FvModelConfig *off, double losses,
                         double gradients, const char *what) {
    Fixture a = open_fixture(on), b = open_fixture(off);
    fixture_forward_and_back(&a);
    fixture_forward_and_back(&b);
    compare_losses(&a, &b, losses, what);
    compare_gradients(&a, &b, gradients, what);
    fixture_destroy(&a);
    fixture_destroy(&b);
}

/* What nobody reads changes no bit. */
static void the_tail_changes_nothing(void **state) {
    (void)state;
    for (size_t i = 0; i < VARIANTS; i++) {
        FvModelConfig on = fixture_config();
        variants[i](&on);
        FvModelConfig off = on;
        off.skip_tail = false;
        compare_with(&on, &off, 0, 0, "skip_tail");
    }
}

/* The same rows computed again are the same bits; their gradients are added in another order. */
static void passes_that_share_nothing_have_the_same_losses(void **state) {
    (void)state;
    for (size_t i = 0; i < 3 * VARIANTS; i++) {
        FvModelConfig on = fixture_config();
        variants[i / 3](&on);
        FvModelConfig off = on;
        off.share_text = i % 3 == 1;
        off.share_convolutions = i % 3 == 0;
        compare_with(&on, &off, 0, FIXTURE_REORDERED, "shared by the passes");
    }
}

/* Absorbing Wk and Wv orders the sums of a layer anew, encoding clip by clip those of the encoder.
 */
static void stored_outputs_give_the_same_losses_and_gradients(void **state) {
    (void)state;
    for (size_t i = 0; i < VARIANTS; i++) {
        FvModelConfig on = fixture_config();
        variants[i](&on);
        FvModelConfig off = on;
        off.cache_encoder = false;
        compare_with(&on, &off, FIXTURE_REORDERED, FIXTURE_REORDERED, "cache_encoder");
    }
}

/* --- the cache ------------------------------------------------------------------------------- */

static FvEncoderCache *open_cache(FvBackend *be, const FvModelConfig *c, size_t clips,
                                  size_t capacity) {
    FvError err = {0};
    FvEncoderCache *cache;
    assert_int_equal(fv_encoder_cache_create(be, clips, capacity,
                                             fv_encoder_cache_clip_bytes(c, be->operand_bytes),
                                             &cache, &err),
                     FV_OK);
    return cache;
}

static FvModelConfig stored_config(bool deep) {
    FvModelConfig c = fixture_config();
    c.freeze_dino = true;
    c.deep = deep;
    return c;
}

static void same_weights(const Fixture *a, const Fixture *b) {
    const FvParams *table = fv_model_params(a->model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        real *x = fixture_get(a, p, FV_BLOCK_W);
        real *y = fixture_get(b, fixture_param(b, p->name), FV_BLOCK_W);
        assert_memory_equal(x, y, p->count * sizeof *x);
        free(x);
        free(y);
    }
}

/* With room for both clips, for one, for none: the same bits as without a cache. */
static void training_is_the_same_however_much_is_stored(void **state) {
    (void)state;
    for (size_t i = 0; i < 6; i++) {
        FvModelConfig c = stored_config(i % 2);
        Fixture f = fixture_create(&c, 2, 1, 3), want = fixture_create(&c, 1, 1, 3);
        FvEncoderCache *cache = open_cache(f.be, &c, 5, i / 2);
        fv_model_use_cache(f.model, cache);
        fixture_train(&f, 3);
        fixture_train(&want, 3);
        same_weights(&want, &f);
        assert_int_equal(fv_encoder_cache_to_come(cache), 0);
        for (size_t n = 3; n < 5; n++) /* those that came first are there */
            assert_int_equal(fv_encoder_cache_find(cache, n) != NULL, n - 3 < i / 2);
        fixture_destroy(&want);
        fv_model_use_cache(f.model, NULL);
        fv_encoder_cache_destroy(cache);
        fixture_destroy(&f);
    }
}

/* A stored clip's pixels are not looked at again; another clip's are. */
static void stored_clips_are_not_encoded_again(void **state) {
    (void)state;
    for (int deep = 0; deep < 2; deep++) {
        FvModelConfig c = stored_config(deep);
        Fixture f = fixture_create(&c, 1, 1, 0);
        FvEncoderCache *cache = open_cache(f.be, &c, 2, 1);
        fv_model_use_cache(f.model, cache);
        fixture_forward(&f);
        double stored = f.measures.loss[FV_FINE][1], other = f.measures.loss[FV_FINE][c.frames + 1];
        memset(f.batch.pixels, 255, c.clips * c.frames * c.size * c.size * 3);
        fixture_forward(&f);
        assert_true(f.measures.loss[FV_FINE][1] == stored);
        assert_true(isfinite(f.measures.loss[FV_FINE][c.frames + 1]) &&
                    f.measures.loss[FV_FINE][c.frames + 1] != other);
        fv_encoder_cache_destroy(cache);
        fixture_destroy(&f);
    }
}

/* One clip's part of a batch's outputs, of the first layer to the last. */
static void copy_encoded(const Fixture *f, size_t b, real *out) {
    size_t blocks = f->c.deep ? f->c.dino_layers : 1;
    size_t n = fv_encoder_cache_clip_values(&f->c) / blocks;
    for (size_t i = 0; i < blocks; i++)
        f->be->ops->download(f->be, out + i * n, f->model->encoded + (i * f->c.clips + b) * n,
                             n * sizeof *out);
}

/* Clip 1 at the end of a batch of two, at the start of another, alone, and out of a cache. */
static void a_clip_has_the_same_bits_in_every_batch(void **state) {
    (void)state;
    for (int deep = 0; deep < 2; deep++) {
        FvModelConfig two = stored_config(deep), one = two;
        one.clips = 1;
        Fixture end = fixture_create(&two, 1, 1, 0), start = fixture_create(&two, 2, 1, 1);
        Fixture alone = fixture_create(&one, 1, 1, 1);
        FvEncoderCache *cache = open_cache(end.be, &two, 3, 3);
        Fixture *all[] = {&end, &start, &alone, &alone};
        size_t at[] = {1, 0, 0, 0}, n = fv_encoder_cache_clip_values(&two);
        real *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got);
        assert_true(want && got);
        fv_model_use_cache(end.model, cache);
        for (size_t i = 0; i < 4; i++) {
            if (i == 3)
                fv_model_use_cache(alone.model, cache);
            fixture_forward(all[i]);
            copy_encoded(all[i], at[i], i ? got : want);
            assert_true(i > 0 || fixture_largest(want, n) > 0);
            assert_true(i == 0 || memcmp(got, want, n * sizeof *want) == 0);
        }
        free(want);
        free(got);
        fixture_destroy(&start);
        fixture_destroy(&alone);
        fv_encoder_cache_destroy(cache);
        fixture_destroy(&end);
    }
}

static void one_job_fills_a_clip(void **state) {
    (void)state;
    FvError err = {0};
    FvModelConfig c = stored_config(true);
    FvBackend *be;
    assert_int_equal(tested_backend_create(1, &be, &err), FV_OK);
    FvEncoderCache *cache = open_cache(be, &c, 3, 2);
    size_t clip = fv_encoder_cache_clip_values(&c) * sizeof(real);
    assert_int_equal(fv_encoder_cache_to_come(cache), 2 * clip);
    real *room = fv_encoder_cache_reserve(cache, 1);
    assert_non_null(room);
    assert_null(fv_encoder_cache_find(cache, 1)); /* not before it is filled */
    assert_null(fv_encoder_cache_reserve(cache, 1));
    fv_encoder_cache_publish(cache, 1);
    assert_ptr_equal(fv_encoder_cache_find(cache, 1), room);
    assert_null(fv_encoder_cache_reserve(cache, 1));
    assert_non_null(fv_encoder_cache_reserve(cache, 0));
    assert_null(fv_encoder_cache_reserve(cache, 2)); /* full */
    assert_int_equal(fv_encoder_cache_to_come(cache), 0);
    fv_encoder_cache_destroy(cache);
    fv_backend_destroy(be);
}

static FvStatus no_memory(FvBackend *be, size_t bytes, void **out, FvError *err) {
    (void)be, (void)out;
    return FV_FAIL(err, FV_DEVICE, "no memory for %zu bytes", bytes);
}

static void a_cache_without_memory_stores_no_more(void **state) {
    (void)state;
    FvError err = {0};
    FvModelConfig c = stored_config(true);
    Fixture f = fixture_create(&c, 1, 1, 0);
    FvBackend *be;
    assert_int_equal(tested_backend_create(1, &be, &err), FV_OK);
    const FvOps *ops = be->ops;
    FvOps refusing = *ops;
    refusing.alloc = no_memory;
    FvEncoderCache *cache = open_cache(be, &c, 2, 2);
    be->ops = &refusing;
    fv_model_use_cache(f.model, cache);
    fixture_forward(&f);
    assert_true(isfinite(f.measures.loss[FV_FINE][0]));
    assert_int_equal(fv_encoder_cache_to_come(cache), 0);
    be->ops = ops;
    fv_encoder_cache_destroy(cache);
    fv_backend_destroy(be);
    fixture_destroy(&f);
}

/* --- jobs side by side -------------------------------------------------------------------------
 */

enum { JOBS = 3, CLIPS = 6, ROUNDS = 4 };

typedef struct Job {
    Fixture f[CLIPS / 2]; /* clips 2 i and 2 i + 1 */
    size_t index;
    double loss[CLIPS / 2];
} Job;

/* All clips, each job in an order of its own. */
static void *run_job(void *argument) {
    Job *job = argument;
    for (size_t i = 0; i < ROUNDS * CLIPS / 2; i++) {
        size_t pair = (i * (1 + job->index % 2) + job->index) % (CLIPS / 2);
        fixture_forward(&job->f[pair]);
        job->loss[pair] = fixture_loss(&job->f[pair]);
    }
    return NULL;
}

static void jobs_that_share_a_cache_do_not_see_each_other(void **state) {
    (void)state;
    FvModelConfig c = stored_config(true);
    FvError err = {0};
    FvBackend *be;
    Job *jobs = calloc(JOBS, sizeof *jobs);
    pthread_t threads[JOBS];
    assert_non_null(jobs);
    assert_int_equal(tested_backend_create(1, &be, &err), FV_OK);
    FvEncoderCache *cache = open_cache(be, &c, CLIPS, CLIPS - 2); /* two find no room */
    double want[CLIPS / 2];
    for (size_t j = 0; j < JOBS; j++) {
        jobs[j].index = j;
        for (size_t p = 0; p < CLIPS / 2; p++) {
            jobs[j].f[p] = fixture_create(&c, 1, 1, 2 * p);
            if (j == 0) {
                fixture_forward(&jobs[j].f[p]);
                want[p] = fixture_loss(&jobs[j].f[p]);
            }
            fv_model_use_cache(jobs[j].f[p].model, cache);
        }
    }
    for (size_t j = 0; j < JOBS; j++)
        assert_int_equal(pthread_create(&threads[j], NULL, run_job, &jobs[j]), 0);
    for (size_t j = 0; j < JOBS; j++)
        assert_int_equal(pthread_join(threads[j], NULL), 0);
    size_t stored = 0;
    for (size_t i = 0; i < CLIPS; i++)
        stored += fv_encoder_cache_find(cache, i) != NULL;
    assert_int_equal(stored, CLIPS - 2);
    for (size_t j = 0; j < JOBS; j++)
        for (size_t p = 0; p < CLIPS / 2; p++) {
            assert_true(jobs[j].loss[p] == want[p]);
            fixture_destroy(&jobs[j].f[p]);
        }
    fv_encoder_cache_destroy(cache);
    fv_backend_destroy(be);
    free(jobs);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_tail_changes_nothing),
        cmocka_unit_test(passes_that_share_nothing_have_the_same_losses),
        cmocka_unit_test(stored_outputs_give_the_same_losses_and_gradients),
        cmocka_unit_test(training_is_the_same_however_much_is_stored),
        cmocka_unit_test(stored_clips_are_not_encoded_again),
        cmocka_unit_test(a_clip_has_the_same_bits_in_every_batch),
        cmocka_unit_test(one_job_fills_a_clip),
        cmocka_unit_test(a_cache_without_memory_stores_no_more),
        cmocka_unit_test(jobs_that_share_a_cache_do_not_see_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
