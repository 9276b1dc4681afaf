/* A small model on the CPU backend with a batch of random data: what the tests of the whole model
 * share. Failures of set-up stop the test through cmocka. */
#ifndef TESTS_UNIT_MODEL_FIXTURE_H
#define TESTS_UNIT_MODEL_FIXTURE_H

#include "model/model.h"

typedef struct Fixture {
    FvModelConfig c;
    FvBackend *be;
    FvModel *model;
    FvBatch batch;       /* owned */
    FvMeasures measures; /* of the last fixture_forward */
} Fixture;

/* Sizes of which none is a multiple of another where the model allows it: 3 x 3 patches of 7 with
 * 3 pixels left over, 3 x 3 latents. Baseline, deep, two clips of three frames. */
FvModelConfig fixture_config(void);

/* The study's experiments on top of a configuration; k = 4 of 10 keys stands for 32 of 257. */
enum { FIXTURE_EXPERIMENTS = 7 };
extern const char *const fixture_experiment_names[FIXTURE_EXPERIMENTS];
void fixture_experiment(FvModelConfig *, size_t experiment);

/* The model with random weights of healthy size (no bias 0, no gain 1, attention far from
 * uniform), each a function of `seed` and its name alone, and a batch that is a function of seed,
 * clip number and frame alone: clip number i of the batch is first_clip + i. */
Fixture fixture_create(const FvModelConfig *, size_t threads, uint64_t seed, size_t first_clip);
/* The same on a backend that becomes the fixture's. */
Fixture fixture_create_on(FvBackend *, const FvModelConfig *, uint64_t seed, size_t first_clip);
void fixture_destroy(Fixture *);

void fixture_randomize(Fixture *, uint64_t seed);

/* Host memory for a batch of the configuration, zeroed; every clip's text is max_text long. */
FvBatch fixture_batch_create(const FvModelConfig *);
void fixture_batch_destroy(FvBatch *);

/* Loads the batch and runs both passes; fills measures. */
void fixture_forward(Fixture *);
/* The loss that fv_model_backward differentiates, from the measures alone. */
double fixture_loss(const Fixture *);

void fixture_forward_and_back(Fixture *);

/* A learning rate and decay at which every term of the update shows, clipping at 1. */
FvAdamW fixture_adamw(size_t step);
/* Steps 1 .. steps on the one batch. */
void fixture_train(Fixture *, size_t steps);

/* A parameter's weights, gradient or moments in the file's layout; the caller frees. */
real *fixture_get(const Fixture *, const FvParam *, FvBlock);
void fixture_set(Fixture *, const FvParam *, const real *values);
const FvParam *fixture_param(const Fixture *, const char *name);

/* Mean of n values, summed in order. */
double fixture_mean(const double *x, size_t n);

/* Largest magnitude; NaN when any element is. */
double fixture_largest(const real *x, size_t n);

/* cmocka's assertion with a message: stops the test unless `good` holds. A comparison with NaN
 * must be written so that it is false. */
void fixture_require(bool good, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
#define REQUIRE(good, ...) fixture_require((good), __FILE__, __LINE__, __VA_ARGS__)

/* Two orders of the same sums, each of a few hundred terms, through a few dozen operations: 1e-13
 * in double. */
#define FIXTURE_REORDERED (512 * FV_EPSILON)

/* got and want are equal but for the order of sums, relative to max(|want|, scale). */
#define CLOSE(got, want, scale, what, at)                                                          \
    do {                                                                                           \
        double got_ = (got), want_ = (want);                                                       \
        REQUIRE(fabs(got_ - want_) <= FIXTURE_REORDERED * fmax(fabs(want_), (scale)),              \
                "%s %zu: %.17g, expected %.17g", (what), (size_t)(at), got_, want_);               \
    } while (0)

#endif
