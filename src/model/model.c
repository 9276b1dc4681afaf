#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/parts.h"

/* --- building ------------------------------------------------------------------------------- */

/* Registers every parameter in the order in which the blocks hold them, that of the forward pass:
 * what can be frozen or unused stands together, so that the trained ones form few runs, and the
 * backward pass is done with their gradients from the end on. */
static void declare_params(FvModel *m, FvParams *table) {
    const FvModelConfig *c = &m->c;
    size_t d = c->dino_width, w = c->lm_width, q = c->query_width;
    FvRole visual = c->vision ? FV_TRAINED : FV_UNUSED;
    FvRole chosen = c->vision && c->frames > 1 ? FV_TRAINED : FV_UNUSED;
    FvRole encoder = c->vision && c->freeze_dino ? FV_FROZEN : visual;
    double in = 1.0 / sqrt((double)d), out = 1.0 / sqrt((double)w);
    fv_encoder_params(&m->encoder_weights, &m->encoder.v, encoder, false, "dino.", table);
    fv_params_add(table, &m->no_text, c->captions ? FV_UNUSED : FV_TRAINED, FV_INIT_NORMAL, 0.14,
                  "no_text", (size_t[]){w, 0}, false);
    fv_lm_params(m, table);
    fv_query_params(m, table);
    fv_params_add(table, &m->to_lm_w, visual, FV_INIT_UNIFORM, in, "dino_to_lm.weight",
                  (size_t[]){w, d, 0}, false);
    fv_params_add(table, &m->to_lm_b, visual, FV_INIT_UNIFORM, in, "dino_to_lm.bias",
                  (size_t[]){w, 0}, false);
    fv_params_add(table, &m->to_query_w, chosen, FV_INIT_UNIFORM, out, "lm_to_query.weight",
                  (size_t[]){q, w, 0}, false);
    fv_params_add(table, &m->to_query_b, chosen, FV_INIT_UNIFORM, out, "lm_to_query.bias",
                  (size_t[]){q, 0}, false);
    fv_params_add(table, &m->mode[FV_COARSE], FV_TRAINED, FV_INIT_NORMAL, 0.14, "mode_coarse",
                  (size_t[]){w, 0}, false);
    fv_params_add(table, &m->mode[FV_FINE], FV_TRAINED, FV_INIT_NORMAL, 0.14, "mode_fine",
                  (size_t[]){w, 0}, false);
    fv_head_params(m, table);
}

static void carve_metrics(FvModel *m, FvArena *arena) {
    FvMetrics *t = &m->metrics;
    size_t frames = fv_frames(m), clips = m->c.clips;
    t->count = 7 * frames + clips + 2;
    t->block =
        fv_take_bytes(arena, fv_mul(fv_add(t->count, 2 * frames + FV_RATES), sizeof(double)));
    if (!t->block)
        return;
    double *next = t->block;
    double **per_frame[] = {&t->loss[FV_COARSE],    &t->loss[FV_FINE],    &t->cosine,
                            &t->entropy[FV_COARSE], &t->entropy[FV_FINE], &t->loss_copy,
                            &t->loss_other};
    for (size_t i = 0; i < 7; i++, next += frames)
        *per_frame[i] = next;
    t->hinge = next;
    t->norm = next + clips;
    t->dentropy[FV_COARSE] = t->norm + 2;
    t->dentropy[FV_FINE] = t->dentropy[FV_COARSE] + frames;
    t->rates = t->dentropy[FV_FINE] + frames;
}

static int32_t *take_rows(FvArena *arena, size_t count) {
    return fv_take_bytes(arena, fv_mul(count, sizeof(int32_t)));
}

static void carve(FvModel *m, FvArena *arena) {
    const FvModelConfig *c = &m->c;
    size_t frames = fv_frames(m), wide = fv_mul(frames, c->lm_width);
    size_t choices = fv_mul(c->clips, c->frames - 1), text = fv_mul(c->clips, c->max_text);
    m->pixels = fv_take_bytes(arena, fv_mul4(m->encoder.v.frames, c->size, c->size, 3));
    carve_metrics(m, arena);
    m->rows = (FvRows){
        .zeros = take_rows(arena, frames > text ? frames : text),
        .mode = take_rows(arena, c->clips),
        .visual = take_rows(arena, frames),
        .before = take_rows(arena, frames),
        .chooser = take_rows(arena, choices),
        .chosen = take_rows(arena, choices),
        .initial = take_rows(arena, c->clips),
        .tokens = take_rows(arena, text),
    };
    if (c->vision)
        fv_encoder_carve(&m->encoder, arena);
    if (fv_encoder_stored(c))
        m->encoded = (c->deep ? fv_take_operand
                              : fv_take)(arena, fv_mul(c->clips, fv_encoder_cache_clip_values(c)));
    fv_query_carve(m, arena);
    fv_lm_carve(m, arena);
    fv_head_carve(m, arena);
    for (int p = 0; p < FV_PASSES; p++) {
        m->visual_in[p] = fv_take(arena, wide);
        m->visual_std[p] = fv_take(arena, frames);
        m->visual[p] = fv_take(arena, wide);
    }
    m->bank = fv_take(arena, fv_mul3(c->clips + 1, c->frames - 1, c->query_width));
    m->choosers = fv_take(arena, fv_mul(choices, c->lm_width));
    m->dvisual = fv_take(arena, wide);
    m->dvisual_in = fv_take(arena, wide);
    m->dchoosers = fv_take(arena, fv_mul(choices, c->lm_width));
    m->dchosen = fv_take(arena, fv_mul(choices, c->query_width));
    m->dz_coarse = fv_take(arena, fv_mul(frames, c->dino_width));
}

/* The arrays with one entry per layer; pointers into the arena are filled by carve(). */
static FvStatus create_layers(FvModel *m, FvError *err) {
    size_t dino = m->c.dino_layers, lm = m->c.lm_layers;
    FV_TRY(fv_encoder_weights_create(&m->encoder_weights, dino, err));
    FV_TRY(fv_encoder_create(&m->encoder, err));
    bool ok = (m->lm.layer = calloc(lm, sizeof *m->lm.layer)) != NULL;
    ok = ok && (m->lm.text.act = calloc(lm, sizeof *m->lm.text.act));
    ok = ok && (m->lm.text.dk = calloc(lm, sizeof(real *)));
    ok = ok && (m->lm.text.dv = calloc(lm, sizeof(real *)));
    for (int p = 0; p < FV_PASSES; p++) {
        ok = ok && (m->query.pass[p].act = calloc(dino, sizeof(FvBlockActs)));
        ok = ok && (m->lm.pass[p].act = calloc(lm, sizeof(FvLmActs)));
    }
    return ok ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for the model's tables");
}

static void free_layers(FvModel *m) {
    fv_encoder_weights_free(&m->encoder_weights);
    fv_encoder_free(&m->encoder);
    free(m->lm.layer);
    free(m->lm.text.act);
    free(m->lm.text.dk);
    free(m->lm.text.dv);
    for (int p = 0; p < FV_PASSES; p++) {
        free(m->query.pass[p].act);
        free(m->lm.pass[p].act);
    }
}

static FvVit vit_of(const FvModelConfig *c) {
    return (FvVit){.frames = fv_encoder_stored(c) ? c->frames : fv_mul(c->clips, c->frames),
                   .size = c->size,
                   .patch = c->patch,
                   .width = c->dino_width,
                   .heads = c->dino_heads,
                   .layers = c->dino_layers,
                   .mlp = c->dino_mlp};
}

/* Tables and sizes, no tensor memory yet. */
static FvStatus prepare(const FvModelConfig *config, FvModel **out, FvModelMemory *memory,
                        FvError *err) {
    FV_TRY(fv_model_config_check(config, err));
    FvModel *m = calloc(1, sizeof *m);
    if (!m)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a model");
    m->c = *config;
    m->encoder = (FvEncoder){.v = vit_of(config),
                             .w = &m->encoder_weights,
                             .trained = config->vision && !config->freeze_dino,
                             .whole = !config->deep,
                             .tail = config->deep && !config->skip_tail,
                             .norms = config->deep && fv_encoder_stored(config)};
    FvStatus status = create_layers(m, err);
    if (status != FV_OK) {
        fv_model_destroy(m);
        return status;
    }
    declare_params(m, &m->params);
    if (m->params.out_of_memory) {
        fv_model_destroy(m);
        return FV_FAIL(err, FV_DEVICE, "out of memory for the parameter table");
    }
    FvArena measure = {0};
    carve(m, &measure);
    *memory = (FvModelMemory){
        .weights = fv_mul(m->params.memory, sizeof(real)),
        .gradients = fv_mul(m->params.trained_memory, sizeof(real)),
        .moments = fv_mul3(m->params.trained_memory, 2, sizeof(real)),
        .activations = measure.used,
        .operands = fv_mul(measure.operands_used, sizeof(real)),
    };
    *out = m;
    return FV_OK;
}

FvStatus fv_model_plan(const FvModelConfig *config, FvModelMemory *memory, size_t *parameters,
                       size_t *trained, FvError *err) {
    FvModel *m;
    FV_TRY(prepare(config, &m, memory, err));
    *parameters = m->params.total;
    *trained = m->params.trained;
    fv_model_destroy(m);
    return FV_OK;
}

FvStatus fv_model_declare(const FvModelConfig *config, FvParams *out, FvError *err) {
    FvModel *m;
    FvModelMemory memory;
    FV_TRY(prepare(config, &m, &memory, err));
    *out = m->params;
    m->params = (FvParams){0};
    fv_model_destroy(m);
    return FV_OK;
}

static void upload_rows(FvModel *m, int32_t *to, size_t i, size_t row) {
    int32_t value = (int32_t)row;
    m->be->ops->upload(m->be, to + i, &value, sizeof value);
}

/* Row numbers that depend on sizes alone. A pass's rows of clip b: [b * (1 + T)] is the mode
 * token, the next T are v_1 .. v_T. */
static void upload_indices(FvModel *m) {
    size_t clips = m->c.clips, frames = m->c.frames;
    for (size_t b = 0; b < clips; b++) {
        size_t first = b * (1 + frames);
        upload_rows(m, m->rows.mode, b, first);
        upload_rows(m, m->rows.initial, b, b * frames);
        for (size_t t = 0; t < frames; t++) {
            size_t f = b * frames + t;
            upload_rows(m, m->rows.visual, f, first + 1 + t);
            upload_rows(m, m->rows.before, f, first + t);
            upload_rows(m, m->head.shift, f, t ? f - 1 : SIZE_MAX /* -1: none */);
            if (t + 1 == frames)
                continue;
            upload_rows(m, m->rows.chooser, b * (frames - 1) + t, first + 1 + t);
            upload_rows(m, m->rows.chosen, b * (frames - 1) + t, f + 1);
        }
    }
    fv_lm_upload(m);
}

FvStatus fv_model_create(const FvModelConfig *config, FvBackend *be, FvModel **out, FvError *err) {
    FvModel *m;
    FvModelMemory memory;
    FV_TRY(prepare(config, &m, &memory, err));
    m->be = be;
    FvStatus status = be->ops->alloc_weights(be, m->params.memory, &m->block_weights, err);
    if (status == FV_OK)
        status = be->ops->alloc(be, fv_add(memory.gradients, memory.moments), &m->block_train, err);
    if (status == FV_OK)
        status = be->ops->alloc(be, memory.activations, &m->block_acts, err);
    if (status == FV_OK)
        status =
            be->ops->alloc_operands(be, memory.operands / sizeof(real), &m->block_operands, err);
    for (int i = 0; status == FV_OK && i < FV_MARKS; i++)
        status = be->ops->host_alloc(be, fv_mul(m->metrics.count, sizeof(double)),
                                     (void **)&m->host_metrics[i], err);
    m->host_probs = calloc(fv_mul3(fv_frames(m), m->c.dino_heads, fv_keys(m)), sizeof(real));
    m->host_rows = calloc(fv_mul(m->c.clips, 1 + m->c.max_text), sizeof(int32_t));
    if (status == FV_OK && (!m->host_rows || !m->host_probs))
        status = FV_FAIL(err, FV_DEVICE, "out of memory for measures");
    if (status != FV_OK) {
        fv_model_destroy(m);
        return status;
    }
    real *g = m->block_train;
    size_t n = m->params.trained_memory;
    fv_params_bind(&m->params, m->block_weights, g, g + n, g + 2 * n);
    m->encoder.pos = m->encoder_weights.pos;
    FvArena arena = {
        .base = m->block_acts, .operands = m->block_operands, .operand_bytes = be->operand_bytes};
    carve(m, &arena);
    upload_indices(m);
    *out = m;
    return FV_OK;
}

void fv_model_destroy(FvModel *m) {
    if (!m)
        return;
    void *blocks[] = {m->block_weights, m->block_train, m->block_acts, m->block_operands};
    for (size_t i = 0; i < 4; i++)
        if (blocks[i])
            m->be->ops->release(m->be, blocks[i]);
    for (int i = 0; i < FV_MARKS; i++)
        if (m->host_metrics[i])
            m->be->ops->host_release(m->be, m->host_metrics[i]);
    free(m->host_probs);
    free(m->host_rows);
    fv_params_free(&m->params);
    free_layers(m);
    free(m);
}

FvParams *fv_model_params(FvModel *m) {
    return &m->params;
}

/* --- measures -------------------------------------------------------------------------------- */

void fv_model_measure_later(FvModel *m, size_t mark) {
    const FvMetrics *t = &m->metrics;
    m->be->ops->download_later(m->be, m->host_metrics[mark], t->block, t->count * sizeof *t->block);
    m->be->ops->mark(m->be, mark);
}

FvStatus fv_model_measured(FvModel *m, size_t mark, FvMeasures *out, FvError *err) {
    const FvMetrics *t = &m->metrics;
    double *host = m->host_metrics[mark];
    FV_TRY(m->be->ops->wait(m->be, mark, err));
    *out = (FvMeasures){
        .loss = {host + (t->loss[FV_COARSE] - t->block), host + (t->loss[FV_FINE] - t->block)},
        .cosine = host + (t->cosine - t->block),
        .entropy = {host + (t->entropy[FV_COARSE] - t->block),
                    host + (t->entropy[FV_FINE] - t->block)},
        .loss_copy = host + (t->loss_copy - t->block),
        .loss_other = host + (t->loss_other - t->block),
        .hinge = host + (t->hinge - t->block),
        .norm = host[t->norm - t->block],
    };
    if (!m->c.vision)
        for (size_t f = 0; f < fv_frames(m); f++)
            for (int p = 0; p < FV_PASSES; p++) {
                host[(t->entropy[p] - t->block) + (ptrdiff_t)f] = NAN;
                host[(t->cosine - t->block) + (ptrdiff_t)f] = NAN;
            }
    return FV_OK;
}

FvStatus fv_model_measure(FvModel *m, FvMeasures *out, FvError *err) {
    fv_model_measure_later(m, 0);
    return fv_model_measured(m, 0, out, err);
}

void fv_model_attention(FvModel *m, FvPass pass, double *out) {
    size_t frames = fv_frames(m), keys = fv_keys(m), heads = m->c.deep ? m->c.dino_heads : 1;
    const real *probs = m->host_probs;
    m->be->ops->download(m->be, m->host_probs, m->query.pass[pass].probs,
                         frames * heads * keys * sizeof(real));
    for (size_t f = 0; f < frames; f++)
        for (size_t k = 0; k < keys; k++) {
            double sum = 0;
            for (size_t h = 0; h < heads; h++)
                sum += (double)probs[(f * heads + h) * keys + k];
            out[f * keys + k] = sum / (double)heads;
        }
}

/* --- gradients that are final -------------------------------------------------------------- */

void fv_model_on_ready(FvModel *m, FvReady *ready, void *context) {
    m->ready = ready;
    m->ready_context = context;
    m->encoder.ready = fv_ready_from;
    m->encoder.ready_context = m;
}

/* --- trouble -------------------------------------------------------------------------------- */

static bool bad(FvModel *m, const real *x, size_t n, const char *what, const char *of, char *name,
                size_t size) {
    if (!x || m->be->ops->first_nonfinite(m->be, n, x) == n)
        return false;
    snprintf(name, size, "%s%s", what, of);
    return true;
}

static bool first_bad_of_encoder(FvModel *m, char *name, size_t size) {
    size_t n = fv_frames(m) * fv_keys(m) * m->c.dino_width;
    char layer[48];
    if (m->encoded && !m->c.deep)
        return bad(m, m->encoded, n, "encoder: ", "features", name, size);
    for (size_t l = 0; m->c.vision && l < m->c.dino_layers; l++) {
        snprintf(layer, sizeof layer, "%s of layer %zu", m->encoded ? "input" : "keys", l);
        if (bad(m, m->encoded ? fv_encoded_at(m, m->encoded, l * n) : m->encoder.k[l], n,
                "encoder: ", layer, name, size))
            return true;
    }
    return false;
}

void fv_model_first_bad(FvModel *m, char *name, size_t size) {
    size_t frames = fv_frames(m), w = m->c.lm_width, rows = m->c.clips * (1 + m->c.frames);
    static const char *const passes[FV_PASSES] = {"coarse pass: ", "fine pass: "};
    for (size_t i = 0; i < m->params.count; i++) {
        const FvParam *p = &m->params.list[i];
        if (p->role != FV_UNUSED &&
            bad(m, p->weight->w, p->count, "parameter ", p->name, name, size))
            return;
    }
    if (bad(m, m->head.targets, frames * fv_latent_count(&m->c), "data: ", "latents", name, size))
        return;
    if (first_bad_of_encoder(m, name, size))
        return;
    for (int p = 0; p < FV_PASSES; p++) {
        if ((m->c.vision && bad(m, m->query.pass[p].z, frames * m->c.dino_width, passes[p],
                                "features z", name, size)) ||
            bad(m, m->visual[p], frames * w, passes[p], "visual tokens", name, size) ||
            bad(m, m->lm.pass[p].h, rows * w, passes[p], "hidden states", name, size) ||
            bad(m, m->head.pass[p].prediction, frames * fv_latent_count(&m->c), passes[p],
                "prediction", name, size))
            return;
    }
    for (size_t i = 0; i < m->params.count; i++) {
        const FvParam *p = &m->params.list[i];
        if (bad(m, p->weight->g, p->count, "gradient of ", p->name, name, size))
            return;
    }
    snprintf(name, size, "%s", "");
}
