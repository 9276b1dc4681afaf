#include "parity.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/parts.h"
#include "run/model_folder.h"
#include "run/safetensors.h"
#include "run/weights.h"
#include "tested_backend.h"

enum { THREADS = 2 };

static FvStatus allocate(Parity *p, FvError *err) {
    p->count = 1;
    for (size_t i = 0; i < p->rank; i++)
        p->count *= p->shape[i];
    p->states = calloc(p->layers + 2, p->count * sizeof *p->states);
    p->final = p->states ? p->states + (p->layers + 1) * p->count : NULL;
    return p->states ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory");
}

void parity_free(Parity *p) {
    free(p->states);
    *p = (Parity){0};
}

/* The sizes of the folder's config.json. */
static FvConfig sizes_of(const char *folder, bool dino) {
    FvConfig c = *fv_config_defaults();
    snprintf(c.dino_from, sizeof c.dino_from, "%s", dino ? folder : "none");
    snprintf(c.lm_from, sizeof c.lm_from, "%s", dino ? "none" : folder);
    fv_folder_preset(&c);
    return c;
}

static FvStatus find_input(const FvTensorFile *file, const char *name, const FvTensor **out,
                           FvError *err) {
    *out = fv_tensors_find(file, name);
    return *out ? FV_OK : FV_FAIL(err, FV_DATA, "%s: no tensor %s", fv_tensors_path(file), name);
}

/* --- DINOv2 --------------------------------------------------------------------------------- */

static FvStatus run_encoder(FvEncoder *e, FvBackend *be, const FvTensor *pixels, Parity *p,
                            FvError *err) {
    void *device;
    size_t bytes = p->count * sizeof *p->states;
    FV_TRY(be->ops->alloc(be, pixels->count, &device, err));
    be->ops->upload(be, device, pixels->data, pixels->count);
    fv_encoder_forward(e, be, device);
    for (size_t l = 0; l < p->layers; l++)
        be->ops->download(be, p->states + l * p->count, e->act[l].x, bytes);
    be->ops->download(be, p->states + p->layers * p->count, e->last, bytes);
    be->ops->download(be, p->final, e->features, bytes);
    be->ops->release(be, device);
    return be->ops->sync(be, err);
}

static FvStatus build_encoder(const FvConfig *c, const FvTensor *pixels, FvBackend *be, Parity *p,
                              FvError *err) {
    FvEncoderWeights w = {0};
    FvParams params = {0};
    FvArena arena = {0};
    void *memory = NULL, *acts = NULL, *operands = NULL;
    FvEncoder e = {.v = {.frames = pixels->shape[0],
                         .size = pixels->shape[1],
                         .patch = c->patch,
                         .width = c->dino_width,
                         .heads = c->dino_heads,
                         .layers = c->dino_layers,
                         .mlp = c->dino_mlp},
                   .w = &w,
                   .trained = true, /* keeps every layer's input */
                   .whole = true};
    p->layers = e.v.layers;
    p->rank = 3;
    p->shape[0] = e.v.frames;
    p->shape[1] = fv_vit_tokens(&e.v);
    p->shape[2] = e.v.width;
    FvStatus status = fv_encoder_weights_create(&w, e.v.layers, err);
    if (status == FV_OK)
        status = fv_encoder_create(&e, err);
    if (status == FV_OK)
        status = allocate(p, err);
    if (status == FV_OK) {
        fv_encoder_params(&w, &e.v, FV_FROZEN, false, "dino.", &params);
        fv_encoder_carve(&e, &arena);
        status = be->ops->alloc_weights(be, params.memory, &memory, err);
    }
    if (status == FV_OK)
        status = be->ops->alloc(be, arena.used, &acts, err);
    if (status == FV_OK)
        status = be->ops->alloc_operands(be, arena.operands_used, &operands, err);
    if (status == FV_OK) {
        fv_params_bind(&params, memory, NULL, NULL, NULL);
        arena = (FvArena){.base = acts, .operands = operands, .operand_bytes = be->operand_bytes};
        fv_encoder_carve(&e, &arena);
        e.pos = w.pos;
        status = fv_weights_check(c, &params, err);
    }
    if (status == FV_OK)
        status = fv_weights_start(c, &params, be, 0, err);
    if (status == FV_OK)
        status = run_encoder(&e, be, pixels, p, err);
    if (memory)
        be->ops->release(be, memory);
    if (acts)
        be->ops->release(be, acts);
    if (operands)
        be->ops->release(be, operands);
    fv_params_free(&params);
    fv_encoder_free(&e);
    fv_encoder_weights_free(&w);
    return status;
}

FvStatus parity_dinov2(const char *folder, const char *input, Parity *p, FvError *err) {
    FvConfig c = sizes_of(folder, true);
    FvTensorFile *file;
    FvBackend *be;
    const FvTensor *pixels;
    *p = (Parity){0};
    FV_TRY(fv_tensors_open(input, &file, err));
    FV_TRY(tested_backend_create(THREADS, &be, err));
    FvStatus status = find_input(file, "pixels", &pixels, err);
    if (status == FV_OK && (pixels->type != FV_U8 || pixels->rank != 4))
        status = FV_FAIL(err, FV_DATA, "%s: pixels must be U8 [frames, S, S, 3]", input);
    if (status == FV_OK)
        status = build_encoder(&c, pixels, be, p, err);
    fv_backend_destroy(be);
    fv_tensors_close(file);
    return status;
}

/* --- Llama ---------------------------------------------------------------------------------- */

/* A model whose text is empty: its own rows start at position 0 and are all there is. */
static FvStatus run_lm(FvModel *m, const FvTensor *input, Parity *p, FvError *err) {
    FvBackend *be = m->be;
    const FvSegment *s = &m->lm.pass[FV_COARSE];
    const int32_t no_text = (int32_t)m->c.max_text;
    size_t bytes = p->count * sizeof(real);
    fv_tensor_read_real(input, 0, p->count, p->states);
    be->ops->upload(be, m->lm.first, &no_text, sizeof no_text);
    be->ops->upload(be, s->act[0].x, p->states, bytes);
    fv_lm_text(m);
    fv_lm_forward(m, FV_COARSE);
    for (size_t l = 0; l < p->layers; l++)
        be->ops->download(be, p->states + l * p->count, s->act[l].x, bytes);
    be->ops->download(be, p->states + p->layers * p->count, s->last, bytes);
    be->ops->download(be, p->final, s->h, bytes);
    return be->ops->sync(be, err);
}

static FvStatus build_lm(FvConfig *c, const FvTensor *input, FvBackend *be, Parity *p,
                         FvError *err) {
    FvModelConfig config;
    FvModel *m;
    size_t rows = input->rank >= 2 ? input->shape[input->rank - 2] : 0;
    c->frames = rows - 1; /* the mode token is the first row */
    c->batch = 1;
    c->vision = false;
    snprintf(c->text, sizeof c->text, "captions");
    p->layers = c->lm_layers;
    p->rank = 2;
    p->shape[0] = rows;
    p->shape[1] = c->lm_width;
    if (rows < 2 || input->shape[input->rank - 1] != c->lm_width ||
        input->count != rows * c->lm_width)
        return FV_FAIL(err, FV_DATA, "inputs_embeds must be [rows, %zu]", c->lm_width);
    FV_TRY(fv_config_model(c, 1, 1, &config, err));
    FV_TRY(allocate(p, err));
    FV_TRY(fv_model_create(&config, be, &m, err));
    FvStatus status = fv_weights_check(c, fv_model_params(m), err);
    if (status == FV_OK)
        status = fv_weights_start(c, fv_model_params(m), be, 0, err);
    if (status == FV_OK)
        status = run_lm(m, input, p, err);
    fv_model_destroy(m);
    return status;
}

FvStatus parity_llama(const char *folder, const char *input, Parity *p, FvError *err) {
    FvConfig c = sizes_of(folder, false);
    FvTensorFile *file;
    FvBackend *be;
    const FvTensor *embeds;
    *p = (Parity){0};
    FV_TRY(fv_tensors_open(input, &file, err));
    FV_TRY(tested_backend_create(THREADS, &be, err));
    FvStatus status = find_input(file, "inputs_embeds", &embeds, err);
    if (status == FV_OK)
        status = build_lm(&c, embeds, be, p, err);
    fv_backend_destroy(be);
    fv_tensors_close(file);
    return status;
}
