/* The rank's caches of frozen encoders' outputs: who shares one, how much is kept, what is planned.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/memory.h"
#include "model/parts.h"
#include "model_fixture.h"
#include "run/encoder_caches.h"
#include "run/plan.h"

static const FvDevice processor = {.threads = 1, .ranks = 1, .text = "cpu, 1 thread"};
static const FvDataInfo clips = {.count = {4, 2}, .sha256 = "0123"};

static Fixture open_frozen(uint64_t seed, void (*change)(FvModelConfig *)) {
    FvModelConfig c = fixture_config();
    c.freeze_dino = true;
    if (change)
        change(&c);
    return fixture_create(&c, 1, seed, 0);
}

/* The cache that the fixture's model is given; told: whether it was made just now. */
static FvEncoderCache *attach(FvEncoderCaches *caches, Fixture *f, const FvDataInfo *data,
                              bool *told) {
    FvError err = {0};
    char note[128];
    REQUIRE(fv_encoder_caches_attach(caches, f->model, &f->c, f->be, data, note, sizeof note,
                                     &err) == FV_OK,
            "%s", err.text);
    *told = note[0] != '\0';
    REQUIRE(!*told || strstr(note, "kept for 6 of 6 clips"), "%s", note);
    return f->model->cache;
}

static void further_terms(FvModelConfig *c) {
    c->temperature = 0.1;
    c->contrastive = 0.1;
    c->clips = 1;
    c->lm_layers = 1;
}
static void shallow(FvModelConfig *c) {
    c->deep = false;
}

static void jobs_share_what_has_the_same_encoder_data_and_sizes(void **state) {
    (void)state;
    FvError err = {0};
    FvEncoderCaches *caches;
    bool told;
    assert_int_equal(fv_encoder_caches_create(&processor, &caches, &err), FV_OK);
    Fixture first = open_frozen(1, NULL), other = open_frozen(1, further_terms);
    Fixture features = open_frozen(1, shallow), drawn = open_frozen(2, NULL);
    FvDataInfo elsewhere = clips;
    snprintf(elsewhere.sha256, sizeof elsewhere.sha256, "4567");
    FvEncoderCache *cache = attach(caches, &first, &clips, &told);
    assert_true(cache && told);
    assert_ptr_equal(attach(caches, &other, &clips, &told), cache);
    assert_false(told);
    FvEncoderCache *others[] = {attach(caches, &features, &clips, &told),
                                attach(caches, &drawn, &clips, &told),
                                attach(caches, &first, &elsewhere, &told)};
    for (size_t i = 0; i < 3; i++) {
        assert_true(others[i] && others[i] != cache);
        for (size_t j = 0; j < i; j++)
            assert_true(others[i] != others[j]);
    }
    fixture_destroy(&first);
    fixture_destroy(&other);
    fixture_destroy(&features);
    fixture_destroy(&drawn);
    fv_encoder_caches_destroy(caches);
}

/* One weight of one layer, by its last bit. */
static void another_weight_is_another_encoder(void **state) {
    (void)state;
    FvError err = {0};
    FvEncoderCaches *caches;
    bool told;
    assert_int_equal(fv_encoder_caches_create(&processor, &caches, &err), FV_OK);
    Fixture f = open_frozen(1, NULL);
    FvEncoderCache *before = attach(caches, &f, &clips, &told);
    const FvParam *p = fixture_param(&f, "dino.encoder.layer.1.norm1.bias");
    real *w = fixture_get(&f, p, FV_BLOCK_W);
    w[p->count - 1] *= 1 + FV_EPSILON;
    fixture_set(&f, p, w);
    free(w);
    assert_true(attach(caches, &f, &clips, &told) != before);
    assert_true(told);
    fixture_destroy(&f);
    fv_encoder_caches_destroy(caches);
}

static void a_cache_takes_half_of_what_is_left(void **state) {
    (void)state;
    assert_int_equal(fv_encoder_cache_fitting(10, 100, 1 << 20), 10);
    assert_int_equal(fv_encoder_cache_fitting(10, 100, 1000), 5);
    assert_int_equal(fv_encoder_cache_fitting(10, 100, 199), 0);
    assert_int_equal(fv_encoder_cache_fitting(10, SIZE_MAX, SIZE_MAX), 0);
}

static void memory_left_is_some_of_the_machines(void **state) {
    (void)state;
    FvError err = {0};
    FvDevice two = processor;
    size_t all = 0, half = 0;
    two.ranks = 2;
    assert_int_equal(fv_device_memory_left(&processor, &all, &err), FV_OK);
    assert_int_equal(fv_device_memory_left(&two, &half, &err), FV_OK);
    size_t machine = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    assert_true(all > 0 && all <= machine);
    assert_true(half > 0 && half <= machine / 2);
}

/* --- the plan --------------------------------------------------------------------------------- */

static size_t planned(FvConfig *configs, size_t count, size_t seeds, size_t left) {
    FvError err = {0};
    FvExperiment *list = calloc(count, sizeof *list);
    size_t bytes;
    assert_non_null(list);
    for (size_t i = 0; i < count; i++)
        list[i].config = configs[i];
    FvStudy study = {.experiments = list, .experiment_count = count, .seed_count = seeds};
    assert_int_equal(fv_plan_caches(&study, NULL, left, &bytes, &err), FV_OK);
    free(list);
    return bytes;
}

static void the_plan_counts_every_cache_once(void **state) {
    (void)state;
    FvConfig *c = calloc(3, sizeof *c);
    assert_non_null(c);
    for (size_t i = 0; i < 3; i++)
        c[i] = *fv_config_defaults();
    const size_t plenty = (size_t)1 << 50;
    /* small scale: 4 layers of 8 frames of 65 tokens of width 64 */
    const size_t all = (813 + 64) * (4 * 8 * 65 * 64) * sizeof(real);
    assert_int_equal(planned(c, 3, 1, plenty), 0); /* nothing is frozen */
    c[1].freeze_dino = c[2].freeze_dino = true;
    snprintf(c[1].dino_from, FV_TEXT, "a");
    snprintf(c[2].dino_from, FV_TEXT, "a");
    assert_int_equal(planned(c, 3, 5, plenty), all);
    snprintf(c[2].dino_from, FV_TEXT, "b");
    assert_int_equal(planned(c, 3, 5, plenty), 2 * all);
    c[2].cache_encoder = false;
    assert_int_equal(planned(c, 3, 5, plenty), all);
    snprintf(c[1].dino_from, FV_TEXT, "none"); /* each seed draws its own */
    assert_int_equal(planned(c, 3, 5, plenty), 5 * all);
    size_t some = planned(c, 3, 1, all);
    assert_true(some > 0 && some <= all / 2);
    free(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jobs_share_what_has_the_same_encoder_data_and_sizes),
        cmocka_unit_test(another_weight_is_another_encoder),
        cmocka_unit_test(a_cache_takes_half_of_what_is_left),
        cmocka_unit_test(memory_left_is_some_of_the_machines),
        cmocka_unit_test(the_plan_counts_every_cache_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
