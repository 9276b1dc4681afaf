/* The whole model on a backend whose products round what they read (CUDA's in bf16 mode), beside
 * the same model on floats. On the CPU both are one.
 *
 * From the study's start values, where the model is nearly linear, roundings of u = 2^-8 of an
 * operand are independent of each other: through the few dozen products between pixels and a
 * gradient they add up to a few u. A copy of the weights that was not made, or an operand read in
 * the wrong type, is off by the order of the gradient itself. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model_fixture.h"
#include "tested_backend.h"

static const double unit = 0x1p-8;

static Fixture started(const FvModelConfig *c, bool rounding) {
    FvError err = {0};
    FvBackend *be;
    FvStatus made =
        rounding ? tested_rounding_create(2, &be, &err) : tested_backend_create(2, &be, &err);
    REQUIRE(made == FV_OK, "%s", err.text);
    Fixture f = fixture_create_on(be, c, 1, 0);
    FvStatus status = fv_params_init(fv_model_params(f.model), be, 1, NULL, &err);
    REQUIRE(status == FV_OK, "%s", err.text);
    return f;
}

static bool rounds(const Fixture *f) {
    return f->be->operand_bytes == 2;
}

typedef struct Difference {
    double square, size; /* sums over elements: of the difference, and of the float one */
} Difference;

static Difference between(const Fixture *f, const Fixture *g, const FvParam *p, FvBlock block) {
    Difference d = {0, 0};
    real *x = fixture_get(f, p, block), *y = fixture_get(g, p, block);
    for (size_t i = 0; i < p->count; i++) {
        d.square += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        d.size += (double)x[i] * (double)x[i];
    }
    free(x);
    free(y);
    return d;
}

/* A bias of all keys moves no probability: its gradient is a rounding error. */
static bool is_zero_but_for_rounding(const FvParam *p) {
    return strstr(p->name, "key.bias") != NULL;
}

static void check_gradients(const Fixture *exact, const Fixture *rounded) {
    const FvParams *table = fv_model_params(exact->model);
    Difference all = {0, 0};
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (p->role != FV_TRAINED)
            continue;
        Difference d = between(exact, rounded, p, FV_BLOCK_G);
        all.square += d.square;
        all.size += d.size;
        /* with top_k another key may be among the largest, and its share jumps */
        if (!is_zero_but_for_rounding(p) && exact->c.hard_attn_k == 0)
            REQUIRE(d.square <= 16 * 16 * unit * unit * d.size, "gradient of %s is off by %g",
                    p->name, sqrt(d.square / d.size));
    }
    REQUIRE(all.square <= 4 * 4 * unit * unit * all.size, "gradient is off by %g",
            sqrt(all.square / all.size));
    REQUIRE((all.square > 0) == rounds(rounded), "gradient is off by %g of itself",
            sqrt(all.square / all.size));
}

static void check_losses(const Fixture *exact, const Fixture *rounded) {
    double want = fixture_loss(exact), got = fixture_loss(rounded);
    REQUIRE(fabs(got - want) <= unit * fabs(want), "loss %.9g, not %.9g", got, want);
}

static void check_model(const FvModelConfig *c) {
    FvError err = {0};
    Fixture exact = started(c, false), rounded = started(c, true);
    fixture_forward_and_back(&exact);
    fixture_forward_and_back(&rounded);
    check_losses(&exact, &rounded);
    check_gradients(&exact, &rounded);
    REQUIRE(rounded.be->ops->sync(rounded.be, &err) == FV_OK, "%s", err.text);
    fixture_destroy(&exact);
    fixture_destroy(&rounded);
}

static void gradients_are_near_those_of_floats(void **state) {
    (void)state;
    for (size_t i = 0; i < 2 * FIXTURE_EXPERIMENTS; i++) {
        FvModelConfig c = fixture_config();
        fixture_experiment(&c, i / 2);
        c.deep = i % 2;
        c.captions = i % 3 == 0;
        check_model(&c);
        c.cache_encoder = false; /* the queries read keys and values, not what is stored */
        if (c.freeze_dino)
            check_model(&c);
    }
    FvModelConfig blind = fixture_config();
    blind.vision = false;
    check_model(&blind);
}

/* Weights move by about the rate a step, many times a rounding: a copy left behind would show. */
static void training_goes_the_same_way_and_repeats_its_bits(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture exact = started(&c, false), rounded = started(&c, true), again = started(&c, true);
    fixture_forward(&exact);
    double before = fixture_loss(&exact);
    fixture_train(&exact, 3);
    fixture_train(&rounded, 3);
    fixture_train(&again, 3);
    fixture_forward(&exact);
    fixture_forward(&rounded);
    check_losses(&exact, &rounded);
    REQUIRE(before - fixture_loss(&exact) > 8 * unit * before, "the loss hardly moved: %g to %g",
            before, fixture_loss(&exact));
    const FvParams *table = fv_model_params(rounded.model);
    for (size_t i = 0; i < table->count; i++) {
        Difference d = between(&rounded, &again, &table->list[i], FV_BLOCK_W);
        REQUIRE(d.square == 0, "%s differs between equal runs", table->list[i].name);
    }
    fixture_destroy(&exact);
    fixture_destroy(&rounded);
    fixture_destroy(&again);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_are_near_those_of_floats),
        cmocka_unit_test(training_goes_the_same_way_and_repeats_its_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
