/* The gradient of the whole loss, for every parameter tensor, against finite differences of the
 * loss as the measures report it: every experiment of the study, deep and shallow, and the corners
 * of the configuration. The differences need the double build; the float build (and with it the
 * sanitizers) runs the same cases and asks for a finite gradient of every trained tensor. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "model/parts.h"
#include "model_fixture.h"

typedef struct Case {
    char name[64];
    FvModelConfig c;
    uint64_t seed;
    size_t elements; /* of each tensor that are varied one by one */
} Case;

/* Clips of different text lengths, the empty one included; ids behind a text's end must not be
 * read, so they are no ids at all. */
static void set_texts(Fixture *f) {
    static const size_t shorter[] = {0, SIZE_MAX, 1};
    size_t text = f->c.max_text;
    for (size_t b = 0; f->c.captions && b < f->c.clips; b++) {
        size_t less = shorter[b % 3], count = less > text ? 0 : text - less;
        f->batch.token_count[b] = (int32_t)count;
        for (size_t i = count; i < text; i++)
            f->batch.tokens[b * text + i] = INT32_MAX;
    }
}

static Fixture open_case(const Case *test) {
    Fixture f = fixture_create(&test->c, 1, test->seed, 0);
    set_texts(&f);
    fixture_forward(&f);
    fv_model_backward(f.model);
    return f;
}

static bool is_key_bias(const FvParam *p) {
    return strstr(p->name, "attention.key.bias") != NULL;
}

static bool starts_with(const char *text, const char *start) {
    return strncmp(text, start, strlen(start)) == 0;
}

/* Tensors whose gradient is zero in exact arithmetic: a key bias moves all scores of a softmax
 * alike; a softmax over one score does not move at all (what makes the scores is used for nothing
 * else: in the last layer, or in shallow mode by the query); the last frame's visual token is read
 * by no prediction. */
static bool has_no_effect(const FvModelConfig *c, const FvParam *p) {
    char last[64];
    snprintf(last, sizeof last, "dino.encoder.layer.%zu.attention.attention.", c->dino_layers - 1);
    bool makes_scores = c->deep ? starts_with(p->name, last) && !strstr(p->name, "value")
                                : starts_with(p->name, "q_") || starts_with(p->name, "query_in") ||
                                      starts_with(p->name, "lm_to_query");
    return is_key_bias(p) || (c->hard_attn_k == 1 && makes_scores) ||
           (c->frames == 1 && starts_with(p->name, "dino_to_lm"));
}

static double norm_of(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* Root mean square over all trained elements. */
static double gradient_scale(const Fixture *f) {
    const FvParams *table = fv_model_params(f->model);
    double sum = 0;
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (p->role != FV_TRAINED)
            continue;
        real *g = fixture_get(f, p, FV_BLOCK_G);
        double norm = norm_of(g, p->count);
        sum += norm * norm;
        free(g);
    }
    return sqrt(sum / (double)table->trained);
}

static void test_every_trained_tensor(void **state) {
    Fixture f = open_case(*state);
    const FvParams *table = fv_model_params(f.model);
    double scale = gradient_scale(&f);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        REQUIRE((p->weight->g != NULL) == (p->role == FV_TRAINED), "%s: role and gradient",
                p->name);
        if (p->role != FV_TRAINED)
            continue;
        real *g = fixture_get(&f, p, FV_BLOCK_G);
        double norm = norm_of(g, p->count);
        free(g);
        REQUIRE(isfinite(norm), "%s: gradient is not finite", p->name);
        /* 1e3 eps: what is left of sums of a few hundred terms that cancel */
        if (has_no_effect(&f.c, p))
            REQUIRE(norm <= 1e3 * FV_EPSILON * scale * sqrt((double)p->count),
                    "%s: gradient %g should vanish beside %g", p->name, norm, scale);
        else
            REQUIRE(norm > 0, "%s: no gradient", p->name);
    }
    fixture_destroy(&f);
}

#ifdef FV_DOUBLE

/* Where the loss has a kink, a number that changes across it: which keys the hard attention of
 * every layer keeps, and which clips' hinge is open. */
static uint64_t branches(const Fixture *f) {
    const FvModel *m = f->model;
    size_t heads = m->c.deep ? m->c.dino_heads : 1, layers = m->c.deep ? m->c.dino_layers : 1;
    size_t n = fv_frames(m) * heads * fv_keys(m);
    uint64_t hash = 0;
    if (!m->c.vision)
        return hash;
    for (size_t b = 0; m->c.entropy_margin > 0 && b < m->c.clips; b++)
        hash = fv_mix(hash + (f->measures.hinge[b] > 0));
    if (m->c.hard_attn_k == 0)
        return hash;
    real *probs = calloc(n, sizeof *probs);
    REQUIRE(probs != NULL, "out of memory");
    for (int pass = 0; pass < FV_PASSES; pass++)
        for (size_t l = 0; l < layers; l++) {
            const FvQueryPass *q = &m->query.pass[pass];
            f->be->ops->download(f->be, probs, m->c.deep ? q->act[l].probs : q->probs,
                                 n * sizeof *probs);
            for (size_t i = 0; i < n; i++)
                hash = fv_mix(hash + (probs[i] > 0));
        }
    free(probs);
    return hash;
}

/* A tensor being varied along a direction. */
typedef struct Line {
    Fixture *f;
    const FvParam *p;
    const real *w; /* its weights */
    double *d;     /* the direction, length 1 */
    double loss;   /* at w */
    uint64_t branches;
} Line;

/* The loss at w + step * d; false when that lies beyond a kink. */
static bool loss_at(const Line *line, double step, real *scratch, double *loss) {
    for (size_t i = 0; i < line->p->count; i++)
        scratch[i] = line->w[i] + step * line->d[i];
    fixture_set(line->f, line->p, scratch);
    fixture_forward(line->f);
    *loss = fixture_loss(line->f);
    return branches(line->f) == line->branches;
}

typedef struct Slope {
    double value, error; /* error: a bound from the differences themselves */
} Slope;

/* Five points: the slope of the fourth order, its truncation bounded by the distance to the slope
 * of the second order (which is larger by a factor of 1/step^2), and its rounding by the fourth
 * difference (where the loss itself leaves 1e-16 at these steps) or, should that vanish by chance,
 * by 16 roundings of the loss. */
static Slope slope_along(const Line *line) {
    real *scratch = calloc(line->p->count, sizeof *scratch);
    REQUIRE(scratch != NULL, "out of memory");
    Slope slope = {NAN, NAN};
    for (double h = 1e-4; h > 1e-8; h /= 10) {
        double low2, low, high, high2;
        if (!loss_at(line, -2 * h, scratch, &low2) || !loss_at(line, -h, scratch, &low) ||
            !loss_at(line, h, scratch, &high) || !loss_at(line, 2 * h, scratch, &high2))
            continue;
        double second = (high - low) / (2 * h);
        double fourth = (8 * (high - low) - (high2 - low2)) / (12 * h);
        double noise = fabs(low2 - 4 * low + 6 * line->loss - 4 * high + high2);
        noise = fmax(noise, 16 * FV_EPSILON * fabs(line->loss));
        slope = (Slope){fourth, fabs(fourth - second) + noise / h};
        break;
    }
    fixture_set(line->f, line->p, line->w);
    free(scratch);
    return slope;
}

static void compare_slope(const Line *line, const real *g, double scale, const char *what) {
    double want = 0, tensor = norm_of(g, line->p->count) / sqrt((double)line->p->count);
    for (size_t i = 0; i < line->p->count; i++)
        want += g[i] * line->d[i];
    Slope slope = slope_along(line);
    REQUIRE(fabs(slope.value - want) <= slope.error,
            "%s, %s: the gradient says %.12g, the loss %.12g (within %.2g)", line->p->name, what,
            want, slope.value, slope.error);
    /* a bound that admits anything would prove nothing */
    double limit = 1e-4 * fmax(fmax(fabs(want), tensor), 1e-2 * scale);
    REQUIRE(slope.error <= limit, "%s, %s: the difference %.12g is uncertain by %.2g, more than %g",
            line->p->name, what, slope.value, slope.error, limit);
}

/* A random direction, which moves every element, and single elements: all of a small tensor, some
 * of a large one. */
static void check_tensor(Fixture *f, const FvParam *p, size_t elements, double loss, double scale) {
    real *w = fixture_get(f, p, FV_BLOCK_W), *g = fixture_get(f, p, FV_BLOCK_G);
    double *d = calloc(p->count, sizeof *d);
    REQUIRE(d != NULL, "out of memory");
    Line line = {f, p, w, d, loss, branches(f)};
    uint64_t key = fv_stream(99, p->name);
    double sum = 0;
    for (size_t j = 0; j < p->count; j++) {
        d[j] = fv_normal(key, j);
        sum += d[j] * d[j];
    }
    for (size_t j = 0; j < p->count; j++)
        d[j] /= sqrt(sum);
    compare_slope(&line, g, scale, "random direction");
    memset(d, 0, p->count * sizeof *d);
    bool all = p->count <= elements + 2;
    for (size_t i = 0; i < (all ? p->count : elements); i++) {
        size_t at = all ? i : (size_t)fv_random_below(key ^ 1, i, p->count);
        char what[32];
        snprintf(what, sizeof what, "element %zu", at);
        d[at] = 1;
        compare_slope(&line, g, scale, what);
        d[at] = 0;
    }
    free(w);
    free(g);
    free(d);
}

static void test_finite_differences(void **state) {
    const Case *test = *state;
    Fixture f = open_case(test);
    const FvParams *table = fv_model_params(f.model);
    double loss = fixture_loss(&f), scale = gradient_scale(&f);
    for (size_t i = 0; i < table->count; i++)
        if (table->list[i].role == FV_TRAINED) {
            fixture_forward(&f); /* the branches at the starting point */
            check_tensor(&f, &table->list[i], test->elements, loss, scale);
        }
    fixture_destroy(&f);
}

/* A margin at which the hinge is open for one clip and shut for the other; 0 when this seed has
 * none that is far enough from both. */
static double half_open_margin(const Case *test) {
    Case open = *test;
    open.c.entropy_margin = 10; /* open for all: hinge - margin is the rise of the entropy */
    Fixture f = open_case(&open);
    double first = f.measures.hinge[0] - 10, second = f.measures.hinge[1] - 10;
    fixture_destroy(&f);
    return fabs(first - second) > 1e-2 && first + second < -1e-2 ? -(first + second) / 2 : 0;
}

static void test_half_open_hinge(void **state) {
    (void)state;
    Case test = {.c = fixture_config(), .elements = 1};
    while (test.c.entropy_margin == 0 && test.seed < 50) {
        test.seed++;
        test.c.entropy_margin = half_open_margin(&test);
    }
    Fixture f = open_case(&test);
    REQUIRE((f.measures.hinge[0] > 0) != (f.measures.hinge[1] > 0), "hinges %g and %g",
            f.measures.hinge[0], f.measures.hinge[1]);
    fixture_destroy(&f);
    void *half = &test;
    test_finite_differences(&half);
}

#endif

/* --- cases ---------------------------------------------------------------------------------- */

/* One frame is predicted before anything is seen; with few frames the visual path is in the loss by
 * its further terms alone. */
static void further_terms(FvModelConfig *c) {
    c->contrastive = -0.3;
    c->entropy_margin = 0.9;
}
static void one_frame(FvModelConfig *c) {
    c->frames = 1;
    further_terms(c);
}
static void two_frames(FvModelConfig *c) {
    c->frames = 2;
    further_terms(c);
}
static void one_clip(FvModelConfig *c) {
    c->clips = 1;
}
static void keep_one(FvModelConfig *c) {
    c->hard_attn_k = 1;
}
static void keep_all_patches(FvModelConfig *c) {
    c->hard_attn_k = fv_patches(c);
}
static void keep_all_keys(FvModelConfig *c) {
    c->hard_attn_k = fv_patches(c) + 1;
}
static void texts(FvModelConfig *c) {
    c->captions = true;
    c->clips = 3;
    c->max_text = 4;
}
static void frozen_lm(FvModelConfig *c) {
    c->freeze_lm = true;
}
static void frozen_lm_and_texts(FvModelConfig *c) {
    texts(c);
    c->freeze_lm = true;
    c->freeze_dino = true;
}
static void no_vision(FvModelConfig *c) {
    c->vision = false;
}
static void one_latent(FvModelConfig *c) {
    c->size = 8;
    c->patch = 3;
}
static void one_layer(FvModelConfig *c) {
    c->dino_layers = c->lm_layers = 1;
    texts(c);
}
static void everything(FvModelConfig *c) {
    texts(c);
    further_terms(c);
    c->temperature = 0.7;
    c->lambda_coarse = 0.3;
    c->hard_attn_k = 5;
}

static const struct {
    const char *name;
    void (*change)(FvModelConfig *);
} corners[] = {
    {"one frame", one_frame},
    {"two frames", two_frames},
    {"one clip", one_clip},
    {"k = 1", keep_one},
    {"k = N", keep_all_patches},
    {"k = N + 1", keep_all_keys},
    {"captions", texts},
    {"freeze_lm", frozen_lm},
    {"freeze_lm, freeze_dino, captions", frozen_lm_and_texts},
    {"vision off", no_vision},
    {"latents 1 x 1", one_latent},
    {"one layer", one_layer},
    {"all terms", everything},
};

enum { CORNERS = sizeof corners / sizeof *corners, CASES = 2 * (FIXTURE_EXPERIMENTS + CORNERS) };

static void fill_cases(Case *cases) {
    for (size_t i = 0; i < CASES; i++) {
        size_t which = i / 2;
        Case *test = &cases[i];
        *test = (Case){.c = fixture_config(), .seed = 1, .elements = 1};
        test->c.deep = i % 2 == 0;
        const char *name;
        if (which < FIXTURE_EXPERIMENTS) {
            fixture_experiment(&test->c, which);
            test->elements = 4;
            name = fixture_experiment_names[which];
        } else {
            corners[which - FIXTURE_EXPERIMENTS].change(&test->c);
            name = corners[which - FIXTURE_EXPERIMENTS].name;
        }
        snprintf(test->name, sizeof test->name, "%s, %s", name, test->c.deep ? "deep" : "shallow");
    }
}

int main(void) {
    Case cases[CASES];
    struct CMUnitTest tests[2 * CASES + 1];
    size_t count = 0;
    fill_cases(cases);
    for (size_t i = 0; i < CASES; i++) {
        tests[count++] =
            (struct CMUnitTest){cases[i].name, test_every_trained_tensor, NULL, NULL, &cases[i]};
#ifdef FV_DOUBLE
        tests[count++] =
            (struct CMUnitTest){cases[i].name, test_finite_differences, NULL, NULL, &cases[i]};
#endif
    }
#ifdef FV_DOUBLE
    tests[count++] = (struct CMUnitTest)cmocka_unit_test(test_half_open_hinge);
#endif
    return _cmocka_run_group_tests("model gradients", tests, count, NULL, NULL);
}
