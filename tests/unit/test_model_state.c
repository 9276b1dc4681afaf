/* The state of a model: which parameters are trained, their start values and layouts, the memory
 * that was planned, the update, and the search for what is not finite. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/model.h"
#include "model_fixture.h"

static bool starts_with(const char *text, const char *start) {
    return strncmp(text, start, strlen(start)) == 0;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* --- roles ------------------------------------------------------------------------------- */

/* The rule of SPEC 3 in words of its own. */
static FvRole expected_role(const FvModelConfig *c, const char *name) {
    bool encoder = starts_with(name, "dino."), lm = starts_with(name, "lm.");
    bool embedding = strcmp(name, "lm.model.embed_tokens.weight") == 0;
    if (strcmp(name, "dino.embeddings.mask_token") == 0)
        return FV_UNUSED;
    if (embedding ? !c->captions : strcmp(name, "no_text") == 0 && c->captions)
        return FV_UNUSED;
    if (!c->vision && (encoder || starts_with(name, "q_") || starts_with(name, "query_") ||
                       starts_with(name, "dino_to_lm") || starts_with(name, "lm_to_query")))
        return FV_UNUSED;
    if (c->frames == 1 && starts_with(name, "lm_to_query"))
        return FV_UNUSED;
    return (encoder && c->freeze_dino) || (lm && c->freeze_lm) ? FV_FROZEN : FV_TRAINED;
}

static void test_roles(void **state) {
    (void)state;
    for (unsigned bits = 0; bits < 64; bits++) {
        FvModelConfig c = fixture_config();
        c.deep = bits & 1;
        c.captions = bits & 2;
        c.vision = bits & 4;
        c.freeze_dino = bits & 8;
        c.freeze_lm = bits & 16;
        c.frames = bits & 32 ? 1 : 3;
        Fixture f = fixture_create(&c, 1, 1, 0);
        const FvParams *table = fv_model_params(f.model);
        size_t total = 0, trained = 0;
        for (size_t i = 0; i < table->count; i++) {
            const FvParam *p = &table->list[i];
            REQUIRE(p->role == expected_role(&c, p->name), "%s has role %d (switches %#x)", p->name,
                    (int)p->role, bits);
            REQUIRE((p->weight->g != NULL) == (p->role == FV_TRAINED), "%s: gradient", p->name);
            total += p->count;
            trained += p->role == FV_TRAINED ? p->count : 0;
        }
        assert_int_equal(total, table->total);
        assert_int_equal(trained, table->trained);
        fixture_destroy(&f);
    }
}

/* --- start values --------------------------------------------------------------------------- */

static void same_seed_same_weights(Fixture *a, Fixture *b) {
    const FvParams *table = fv_model_params(a->model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i], *q = fixture_param(b, p->name);
        real *x = fixture_get(a, p, FV_BLOCK_W), *y = fixture_get(b, q, FV_BLOCK_W);
        assert_int_equal(p->count, q->count);
        assert_memory_equal(x, y, p->count * sizeof(real));
        free(x);
        free(y);
    }
}

static void start(Fixture *f, uint64_t seed) {
    FvError err = {0};
    assert_int_equal(fv_params_init(fv_model_params(f->model), f->be, seed, NULL, &err), FV_OK);
}

static void test_start_is_a_function_of_seed_and_name(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture a = fixture_create(&c, 1, 1, 0);
    fixture_experiment(&c, FIXTURE_EXPERIMENTS - 1);
    c.captions = true;
    c.deep = false;
    c.clips = 1;
    Fixture g = fixture_create(&c, 2, 2, 0);
    start(&a, 42);
    start(&g, 42);
    same_seed_same_weights(&a, &g);
    const FvParam *fixed = fixture_param(&a, "q_static");
    real *first = fixture_get(&a, fixed, FV_BLOCK_W);
    real *other = fixture_get(&a, fixture_param(&a, "q_init"), FV_BLOCK_W);
    assert_memory_not_equal(first, other, fixed->count * sizeof(real));
    start(&a, 43);
    real *again = fixture_get(&a, fixed, FV_BLOCK_W);
    assert_memory_not_equal(first, again, fixed->count * sizeof(real));
    free(first);
    free(other);
    free(again);
    fixture_destroy(&a);
    fixture_destroy(&g);
}

typedef struct Start {
    double constant, normal, uniform; /* the value; the deviation; the bound */
} Start;

/* The table of SPEC 3. */
static Start expected_start(const Fixture *f, const FvParam *p) {
    const char *name = p->name;
    bool weight = ends_with(name, ".weight");
    if (starts_with(name, "dino.") || starts_with(name, "lm.")) {
        if (strstr(name, "norm"))
            return (Start){.constant = weight};
        if (strstr(name, "lambda1"))
            return (Start){.constant = 1};
        if (strstr(name, "position") || strstr(name, "cls_token") || weight)
            return (Start){.normal = 0.02};
        return (Start){0};
    }
    if (starts_with(name, "q_"))
        return (Start){.normal = 1};
    if (starts_with(name, "mode_") || strcmp(name, "no_text") == 0)
        return (Start){.normal = 0.14};
    if (strcmp(name, "latent_init") == 0)
        return (Start){0};
    char of[FV_PARAM_NAME]; /* a bias has the bound of its weight */
    snprintf(of, sizeof of, "%.*s.weight", (int)(strrchr(name, '.') - name), name);
    const FvParam *w = fixture_param(f, of);
    return (Start){.uniform = 1 / sqrt((double)(w->count / w->shape[0]))};
}

static void test_start_values(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 1, 0);
    start(&f, 3);
    const FvParams *table = fv_model_params(f.model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        Start want = expected_start(&f, p);
        real *x = fixture_get(&f, p, FV_BLOCK_W);
        double n = (double)p->count, sum = 0, squares = 0, most = fixture_largest(x, p->count);
        for (size_t j = 0; j < p->count; j++) {
            sum += x[j];
            squares += (double)x[j] * (double)x[j];
        }
        double deviation = want.normal + want.uniform / sqrt(3.0);
        if (deviation == 0)
            for (size_t j = 0; j < p->count; j++)
                REQUIRE(x[j] == (real)want.constant, "%s[%zu] = %g", p->name, j, (double)x[j]);
        /* five standard errors of the mean and of the mean square (normal: kurtosis 3) */
        REQUIRE(deviation == 0 || fabs(sum / n) <= 5 * deviation / sqrt(n), "%s: mean %g", p->name,
                sum / n);
        REQUIRE(deviation == 0 ||
                    fabs(squares / n / (deviation * deviation) - 1) <= 5 * sqrt(2 / n),
                "%s: root mean square %g, not %g", p->name, sqrt(squares / n), deviation);
        REQUIRE(want.uniform == 0 || most <= want.uniform * (1 + FV_EPSILON), "%s: %g beyond %g",
                p->name, most, want.uniform);
        free(x);
    }
    fixture_destroy(&f);
}

/* --- memory --------------------------------------------------------------------------------- */

/* The backend with an alloc that counts: `ops` first, so that be->ops leads back here. */
typedef struct Counting {
    FvOps ops;
    const FvOps *real_ops;
    size_t bytes, calls;
} Counting;

static FvStatus counting_alloc(FvBackend *be, size_t bytes, void **out, FvError *err) {
    Counting *counting = (Counting *)be->ops;
    counting->bytes += bytes;
    counting->calls++;
    return counting->real_ops->alloc(be, bytes, out, err);
}

/* On the CPU the elements of operand tensors and weights are `real`. */
static FvStatus counting_alloc_elements(FvBackend *be, size_t count, void **out, FvError *err) {
    return counting_alloc(be, count * sizeof(real), out, err);
}

static void check_memory(const FvModelConfig *c) {
    FvError err = {0};
    FvModelMemory memory;
    size_t parameters, trained;
    FvBackend *be;
    FvModel *model;
    assert_int_equal(fv_model_plan(c, &memory, &parameters, &trained, &err), FV_OK);
    assert_int_equal(fv_cpu_backend_create(1, &be, &err), FV_OK);
    Counting counting = {.ops = *be->ops, .real_ops = be->ops};
    counting.ops.alloc = counting_alloc;
    counting.ops.alloc_operands = counting.ops.alloc_weights = counting_alloc_elements;
    be->ops = &counting.ops;
    assert_int_equal(fv_model_create(c, be, &model, &err), FV_OK);
    assert_int_equal(counting.bytes, memory.weights + memory.gradients + memory.moments +
                                         memory.activations + memory.operands);
    const FvParams *table = fv_model_params(model);
    assert_int_equal(parameters, table->total);
    assert_int_equal(trained, table->trained);
    Fixture f = {.c = *c, .be = be, .model = model, .batch = fixture_batch_create(c)};
    fixture_randomize(&f, 1);
    size_t calls = counting.calls;
    fixture_train(&f, 1);
    size_t workspace = fv_cpu_workspace_bytes(be);
    fixture_train(&f, 2);
    assert_int_equal(counting.calls, calls);
    assert_int_equal(fv_cpu_workspace_bytes(be), workspace);
    be->ops = counting.real_ops;
    fixture_destroy(&f);
}

static void test_plan_is_what_is_allocated(void **state) {
    (void)state;
    for (size_t i = 0; i < 2 * FIXTURE_EXPERIMENTS; i++) {
        FvModelConfig c = fixture_config();
        fixture_experiment(&c, i / 2);
        c.deep = i % 2;
        check_memory(&c);
    }
    FvModelConfig c = fixture_config();
    c.captions = true;
    c.clips = 3;
    c.max_text = 3;
    check_memory(&c);
    c.vision = false;
    check_memory(&c);
    c.frames = 1;
    check_memory(&c);
}

/* --- update --------------------------------------------------------------------------------- */

typedef struct Snapshot { /* every parameter in the file's layout, by its number in the table */
    real **w;
    size_t count;
} Snapshot;

static Snapshot snapshot(const Fixture *f, FvBlock block) {
    const FvParams *table = fv_model_params(f->model);
    Snapshot s = {calloc(table->count, sizeof *s.w), table->count};
    assert_non_null(s.w);
    for (size_t i = 0; i < table->count; i++)
        if (block == FV_BLOCK_W || table->list[i].role == FV_TRAINED)
            s.w[i] = fixture_get(f, &table->list[i], block);
    return s;
}

static void free_snapshot(Snapshot *s) {
    for (size_t i = 0; i < s->count; i++)
        free(s->w[i]);
    free(s->w);
}

/* One element through AdamW as its paper (Loshchilov and Hutter 2019) and PyTorch write it. */
static double adamw_element(const FvAdamW *a, double clip, double w, double g, double *m,
                            double *v) {
    g *= clip;
    *m = a->beta1 * *m + (1 - a->beta1) * g;
    *v = a->beta2 * *v + (1 - a->beta2) * g * g;
    double mean = *m / (1 - pow(a->beta1, (double)a->step));
    double square = *v / (1 - pow(a->beta2, (double)a->step));
    return w * (1 - a->lr * a->weight_decay) - a->lr * mean / (sqrt(square) + a->eps);
}

/* One update compared with adamw_element for everything trained, bit for bit unchanged for the
 * rest. */
static void check_update(Fixture *f, const FvAdamW *adamw) {
    FvError err = {0};
    const FvParams *table = fv_model_params(f->model);
    fixture_forward_and_back(f);
    fv_model_norm(f->model);
    assert_int_equal(fv_model_measure(f->model, &f->measures, &err), FV_OK);
    Snapshot w = snapshot(f, FV_BLOCK_W), g = snapshot(f, FV_BLOCK_G), m = snapshot(f, FV_BLOCK_M),
             v = snapshot(f, FV_BLOCK_V);
    double squares = 0;
    for (size_t i = 0; i < table->count; i++)
        for (size_t j = 0; g.w[i] && j < table->list[i].count; j++)
            squares += (double)g.w[i][j] * (double)g.w[i][j];
    CLOSE(f->measures.norm, sqrt(squares), 0, "norm at step", adamw->step);
    double clip = fmin(1, adamw->clip_norm / (sqrt(squares) + 1e-6));
    fv_model_rates(f->model, adamw);
    fv_model_update(f->model, adamw);
    Snapshot now = snapshot(f, FV_BLOCK_W);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (p->role != FV_TRAINED)
            assert_memory_equal(now.w[i], w.w[i], p->count * sizeof(real));
        for (size_t j = 0; p->role == FV_TRAINED && j < p->count; j++) {
            double mean = (double)m.w[i][j], square = (double)v.w[i][j];
            double want =
                adamw_element(adamw, clip, (double)w.w[i][j], (double)g.w[i][j], &mean, &square);
            /* roundings of a step of at most 3 lr, and of the weight itself */
            double limit = 16 * FV_EPSILON * (3 * adamw->lr + fabs(want));
            REQUIRE(fabs((double)now.w[i][j] - want) <= limit, "%s[%zu]: %.9g, expected %.9g",
                    p->name, j, (double)now.w[i][j], want);
        }
    }
    Snapshot *all[] = {&w, &g, &m, &v, &now};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free_snapshot(all[i]);
}

static void test_update(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        FvModelConfig c = fixture_config();
        c.freeze_dino = i & 1;
        c.freeze_lm = i & 2;
        Fixture f = fixture_create(&c, 1, 14, 0);
        for (size_t step = 1; step <= 3; step++) {
            FvAdamW adamw = fixture_adamw(step);
            adamw.clip_norm = i == 0 ? 1e-2 : i == 1 ? 1e6 : 1;
            check_update(&f, &adamw);
        }
        fixture_destroy(&f);
    }
}

static void test_bad_norm_changes_nothing(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 14, 0);
    fixture_train(&f, 1);
    f.batch.latents[3] = (real)NAN;
    Snapshot w = snapshot(&f, FV_BLOCK_W), m = snapshot(&f, FV_BLOCK_M);
    fixture_train(&f, 1);
    FvError err = {0};
    assert_int_equal(fv_model_measure(f.model, &f.measures, &err), FV_OK);
    assert_true(isnan(f.measures.norm));
    Snapshot w2 = snapshot(&f, FV_BLOCK_W), m2 = snapshot(&f, FV_BLOCK_M);
    const FvParams *table = fv_model_params(f.model);
    for (size_t i = 0; i < table->count; i++) {
        assert_memory_equal(w.w[i], w2.w[i], table->list[i].count * sizeof(real));
        if (m.w[i])
            assert_memory_equal(m.w[i], m2.w[i], table->list[i].count * sizeof(real));
    }
    free_snapshot(&w);
    free_snapshot(&m);
    free_snapshot(&w2);
    free_snapshot(&m2);
    fixture_destroy(&f);
}

/* --- trouble -------------------------------------------------------------------------------- */

static void expect_bad(Fixture *f, const char *want) {
    char name[128] = "";
    fv_model_first_bad(f->model, name, sizeof name);
    assert_string_equal(name, want);
}

static void poison(Fixture *f, const char *name, size_t at, double value, real *before) {
    const FvParam *p = fixture_param(f, name);
    real *x = fixture_get(f, p, FV_BLOCK_W);
    *before = x[at];
    x[at] = (real)value;
    fixture_set(f, p, x);
    free(x);
}

static void test_first_bad_names_parameters(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 15, 0);
    fixture_forward_and_back(&f);
    expect_bad(&f, "");
    const FvParams *table = fv_model_params(f.model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        char want[128];
        real before;
        size_t at = p->count - 1;
        poison(&f, p->name, at, i % 2 ? NAN : -INFINITY, &before);
        snprintf(want, sizeof want, "parameter %s", p->name);
        expect_bad(&f, p->role == FV_UNUSED ? "" : want);
        poison(&f, p->name, at, before, &before);
    }
    expect_bad(&f, "");
    fixture_destroy(&f);
}

static void test_first_bad_names_data_and_tensors(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"dino.encoder.layer.1.attention.attention.key.weight", "encoder: keys of layer 1"},
        {"query_out.weight", "coarse pass: features z"},
        {"dino_to_lm.weight", "coarse pass: visual tokens"},
        {"head.conv6.weight", "coarse pass: prediction"},
        {"lm_to_query.weight", "fine pass: features z"},
    };
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 15, 0);
    f.batch.latents[5] = (real)INFINITY;
    fixture_forward_and_back(&f);
    expect_bad(&f, "data: latents");
    f.batch.latents[5] = 0;
    /* finite weights so large that products overflow, in every row */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const FvParam *p = fixture_param(&f, cases[i][0]);
        real *x = fixture_get(&f, p, FV_BLOCK_W), *huge = fixture_get(&f, p, FV_BLOCK_W);
        for (size_t j = 0; j < p->count; j++)
            huge[j] = (real)(sizeof(real) == sizeof(float) ? 3e38 : 1e308);
        fixture_set(&f, p, huge);
        fixture_forward_and_back(&f);
        expect_bad(&f, cases[i][1]);
        fixture_set(&f, p, x);
        free(x);
        free(huge);
    }
    fixture_forward_and_back(&f);
    const FvParam *p = fixture_param(&f, "head.film1.bias");
    FvError err = {0};
    real *g = fixture_get(&f, p, FV_BLOCK_G);
    g[0] = (real)NAN;
    FvParams *table = fv_model_params(f.model);
    assert_int_equal(fv_params_set(table, f.be, p, FV_BLOCK_G, g, &err), FV_OK);
    expect_bad(&f, "gradient of head.film1.bias");
    free(g);
    fixture_destroy(&f);
}

static void test_layouts(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 16, 0);
    const FvParams *table = fv_model_params(f.model);
    const FvParam *p = fixture_param(&f, "head.conv2.weight");
    assert_true(p->channels_last);
    size_t out = p->shape[0], in = p->shape[1];
    real *file = fixture_get(&f, p, FV_BLOCK_W);
    for (size_t o = 0; o < out; o++)
        for (size_t i = 0; i < in; i++)
            for (size_t k = 0; k < 9; k++)
                assert_true(file[(o * in + i) * 9 + k] ==
                            table->w[p->offset + (o * 9 + k) * in + i]);
    free(file);
    assert_null(fv_params_find(table, "head.conv7.weight"));
    fixture_destroy(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_roles),
        cmocka_unit_test(test_start_is_a_function_of_seed_and_name),
        cmocka_unit_test(test_start_values),
        cmocka_unit_test(test_plan_is_what_is_allocated),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_bad_norm_changes_nothing),
        cmocka_unit_test(test_first_bad_names_parameters),
        cmocka_unit_test(test_first_bad_names_data_and_tensors),
        cmocka_unit_test(test_layouts),
    };
    return cmocka_run_group_tests_name("model state", tests, NULL, NULL);
}
