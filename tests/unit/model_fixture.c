#include "model_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "tested_backend.h"

void fixture_require(bool good, const char *file, int line, const char *format, ...) {
    if (good)
        return;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    print_error("%s\n", text);
    _fail(file, line);
}

static void succeeds(FvStatus status, const FvError *err) {
    REQUIRE(status == FV_OK, "status %d: %s", (int)status, err->text);
}

static void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    REQUIRE(p != NULL, "out of memory");
    return p;
}

FvModelConfig fixture_config(void) {
    return (FvModelConfig){
        .clips = 2,
        .frames = 3,
        .size = 24,
        .max_text = 1,
        .patch = 7,
        .dino_width = 15,
        .dino_heads = 3,
        .dino_layers = 2,
        .dino_mlp = 13,
        .lm_width = 36,
        .lm_layers = 2,
        .lm_heads = 6,
        .lm_kv_heads = 2,
        .lm_mlp = 11,
        .lm_vocab = 17,
        .lm_rope_theta = 100,
        .lm_rms_eps = 1e-5,
        .query_width = 7,
        .head_width = 3,
        .film_width = 5,
        .deep = true,
        .vision = true,
        .temperature = 1,
        .lambda_coarse = 1,
        .skip_tail = true,
        .share_text = true,
        .share_convolutions = true,
        .cache_encoder = true,
    };
}

const char *const fixture_experiment_names[FIXTURE_EXPERIMENTS] = {
    "A_baseline",     "B_temp_0.1",    "C_contrastive",  "D_freeze_dino",
    "E_hard_attn_32", "F_entropy_reg", "G_combined_best"};

void fixture_experiment(FvModelConfig *c, size_t experiment) {
    const char letter = fixture_experiment_names[experiment][0];
    if (letter == 'B' || letter == 'G')
        c->temperature = 0.1;
    if (letter == 'C' || letter == 'G')
        c->contrastive = 0.1;
    if (letter == 'D' || letter == 'G')
        c->freeze_dino = true;
    if (letter == 'E' || letter == 'G')
        c->hard_attn_k = 4;
    if (letter == 'F')
        c->entropy_margin = 0.5;
}

FvBatch fixture_batch_create(const FvModelConfig *c) {
    size_t frames = c->clips * c->frames;
    FvBatch batch = {
        .clips = c->clips,
        .max_text = c->max_text,
        .pixels = allocate(frames * c->size * c->size * 3, 1),
        .latents = allocate(frames * fv_latent_count(c), sizeof(real)),
        .tokens = allocate(c->clips * c->max_text, sizeof(int32_t)),
        .token_count = allocate(c->clips, sizeof(int32_t)),
        .clip = allocate(c->clips, sizeof(uint32_t)),
        .number = allocate(c->clips, sizeof(uint32_t)),
    };
    for (size_t b = 0; c->captions && b < c->clips; b++)
        batch.token_count[b] = (int32_t)c->max_text;
    return batch;
}

void fixture_batch_destroy(FvBatch *batch) {
    free(batch->pixels);
    free(batch->latents);
    free(batch->tokens);
    free(batch->token_count);
    free(batch->clip);
    free(batch->number);
    *batch = (FvBatch){0};
}

static void fill_clip(const FvModelConfig *c, FvBatch *batch, size_t b, uint64_t seed,
                      size_t number) {
    size_t pixels = c->frames * c->size * c->size * 3, latents = c->frames * fv_latent_count(c);
    uint64_t key = fv_mix(fv_stream(seed, "batch") + number);
    batch->clip[b] = batch->number[b] = (uint32_t)number;
    for (size_t i = 0; i < pixels; i++)
        batch->pixels[b * pixels + i] = (uint8_t)fv_random_below(fv_mix(key ^ 1), i, 256);
    for (size_t i = 0; i < latents; i++)
        batch->latents[b * latents + i] = (real)fv_normal(fv_mix(key ^ 2), i);
    for (size_t i = 0; i < c->max_text; i++)
        batch->tokens[b * c->max_text + i] =
            (int32_t)fv_random_below(fv_mix(key ^ 3), i, c->lm_vocab);
}

/* Start deviation and mean of a parameter of the tests. */
static void healthy(const FvParam *p, double *mean, double *deviation) {
    static const char *const large[] = {"attention.key.weight", "k_proj.weight", "query_in.weight",
                                        "query_out.weight", "lm_to_query.weight"};
    size_t fan_in = p->rank > 1 ? p->count / p->shape[0] : 1;
    *mean = strstr(p->name, "norm") && strstr(p->name, "weight") ? 1 : 0;
    *deviation = p->rank > 1 ? 1 / sqrt((double)fan_in) : 0.2;
    if (strstr(p->name, "lambda1"))
        *mean = 0.7;
    if (strncmp(p->name, "q_", 2) == 0)
        *deviation = 1;
    if (strncmp(p->name, "mode_", 5) == 0 || strstr(p->name, "embed_tokens"))
        *deviation = 0.14;
    if (strcmp(p->name, "latent_init") == 0)
        *deviation = 0.5;
    if (strncmp(p->name, "dino.embeddings.", 16) == 0)
        *deviation = strstr(p->name, "projection.weight") ? 0.1 : 0.5;
    for (size_t i = 0; i < sizeof large / sizeof *large; i++)
        if (strstr(p->name, large[i]))
            *deviation *= 2;
}

void fixture_randomize(Fixture *f, uint64_t seed) {
    FvParams *table = fv_model_params(f->model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        double mean, deviation;
        healthy(p, &mean, &deviation);
        real *values = allocate(p->count, sizeof *values);
        uint64_t key = fv_stream(seed, p->name);
        for (size_t j = 0; j < p->count; j++)
            values[j] = (real)(mean + deviation * fv_normal(key, j));
        fixture_set(f, p, values);
        free(values);
    }
}

Fixture fixture_create(const FvModelConfig *c, size_t threads, uint64_t seed, size_t first_clip) {
    FvError err = {0};
    FvBackend *be;
    succeeds(tested_backend_create(threads, &be, &err), &err);
    return fixture_create_on(be, c, seed, first_clip);
}

Fixture fixture_create_on(FvBackend *be, const FvModelConfig *c, uint64_t seed, size_t first_clip) {
    FvError err = {0};
    Fixture f = {.c = *c, .be = be, .batch = fixture_batch_create(c)};
    succeeds(fv_model_create(c, f.be, &f.model, &err), &err);
    fixture_randomize(&f, seed);
    for (size_t b = 0; b < c->clips; b++)
        fill_clip(c, &f.batch, b, seed, first_clip + b);
    return f;
}

void fixture_destroy(Fixture *f) {
    fv_model_destroy(f->model);
    fv_backend_destroy(f->be);
    fixture_batch_destroy(&f->batch);
}

void fixture_forward(Fixture *f) {
    FvError err = {0};
    succeeds(fv_model_load(f->model, &f->batch, &err), &err);
    fv_model_encode(f->model);
    fv_model_coarse(f->model);
    fv_model_fine(f->model);
    succeeds(fv_model_measure(f->model, &f->measures, &err), &err);
}

void fixture_forward_and_back(Fixture *f) {
    fixture_forward(f);
    fv_model_backward(f->model);
}

FvAdamW fixture_adamw(size_t step) {
    return (FvAdamW){.lr = 1e-2,
                     .beta1 = 0.9,
                     .beta2 = 0.999,
                     .eps = 1e-8,
                     .weight_decay = 0.5,
                     .clip_norm = 1,
                     .step = step};
}

void fixture_train(Fixture *f, size_t steps) {
    for (size_t step = 1; step <= steps; step++) {
        FvAdamW adamw = fixture_adamw(step);
        fixture_forward_and_back(f);
        fv_model_norm(f->model);
        fv_model_rates(f->model, &adamw);
        fv_model_update(f->model, &adamw);
    }
}

double fixture_mean(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i];
    return sum / (double)n;
}

double fixture_largest(const real *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        double size = fabs((double)x[i]);
        most = size > most || isnan(size) ? size : most;
    }
    return most;
}

double fixture_loss(const Fixture *f) {
    const FvModelConfig *c = &f->c;
    const FvMeasures *m = &f->measures;
    size_t frames = c->clips * c->frames;
    double loss = fixture_mean(m->loss[FV_FINE], frames) +
                  c->lambda_coarse * fixture_mean(m->loss[FV_COARSE], frames);
    if (c->vision && c->contrastive != 0)
        loss += c->contrastive * fixture_mean(m->cosine, frames);
    if (c->vision && c->entropy_margin > 0)
        loss += 0.1 * fixture_mean(m->hinge, c->clips);
    return loss;
}

real *fixture_get(const Fixture *f, const FvParam *p, FvBlock block) {
    FvError err = {0};
    real *values = allocate(p->count, sizeof *values);
    succeeds(fv_params_get(fv_model_params(f->model), f->be, p, block, values, &err), &err);
    return values;
}

void fixture_set(Fixture *f, const FvParam *p, const real *values) {
    FvError err = {0};
    succeeds(fv_params_set(fv_model_params(f->model), f->be, p, FV_BLOCK_W, values, &err), &err);
}

const FvParam *fixture_param(const Fixture *f, const char *name) {
    const FvParam *p = fv_params_find(fv_model_params(f->model), name);
    REQUIRE(p != NULL, "the model has no parameter %s", name);
    return p;
}
