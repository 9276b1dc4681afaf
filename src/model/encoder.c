#include "model/encoder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* --- weights -------------------------------------------------------------------------------- */

FvStatus fv_encoder_weights_create(FvEncoderWeights *w, size_t layers, FvError *err) {
    w->layer = calloc(layers, sizeof *w->layer);
    return w->layer ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for the encoder's layers");
}

void fv_encoder_weights_free(FvEncoderWeights *w) {
    free(w->layer);
    *w = (FvEncoderWeights){0};
}

static void add_block(FvParams *table, FvBlockWeights *w, FvRole role, const FvVit *v,
                      const char *prefix, size_t layer) {
    size_t d = v->width, f = v->mlp;
    const struct {
        FvWeight *weight;
        const char *name;
        FvInit init;
        double value;
        size_t dims[3];
    } rows[] = {
        {&w->norm1_w, "norm1.weight", FV_INIT_CONSTANT, 1, {d}},
        {&w->norm1_b, "norm1.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->q_w, "attention.attention.query.weight", FV_INIT_NORMAL, 0.02, {d, d}},
        {&w->q_b, "attention.attention.query.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->k_w, "attention.attention.key.weight", FV_INIT_NORMAL, 0.02, {d, d}},
        {&w->k_b, "attention.attention.key.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->v_w, "attention.attention.value.weight", FV_INIT_NORMAL, 0.02, {d, d}},
        {&w->v_b, "attention.attention.value.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->o_w, "attention.output.dense.weight", FV_INIT_NORMAL, 0.02, {d, d}},
        {&w->o_b, "attention.output.dense.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->scale1, "layer_scale1.lambda1", FV_INIT_CONSTANT, 1, {d}},
        {&w->norm2_w, "norm2.weight", FV_INIT_CONSTANT, 1, {d}},
        {&w->norm2_b, "norm2.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->fc1_w, "mlp.fc1.weight", FV_INIT_NORMAL, 0.02, {f, d}},
        {&w->fc1_b, "mlp.fc1.bias", FV_INIT_CONSTANT, 0, {f}},
        {&w->fc2_w, "mlp.fc2.weight", FV_INIT_NORMAL, 0.02, {d, f}},
        {&w->fc2_b, "mlp.fc2.bias", FV_INIT_CONSTANT, 0, {d}},
        {&w->scale2, "layer_scale2.lambda1", FV_INIT_CONSTANT, 1, {d}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[FV_PARAM_NAME];
        snprintf(name, sizeof name, "%sencoder.layer.%zu.%s", prefix, layer, rows[i].name);
        fv_params_add(table, rows[i].weight, role, rows[i].init, rows[i].value, name, rows[i].dims,
                      false);
    }
}

static void add(FvParams *table, FvWeight *weight, FvRole role, FvInit init, double value,
                const char *prefix, const char *name, const size_t *dims) {
    char whole[FV_PARAM_NAME];
    snprintf(whole, sizeof whole, "%s%s", prefix, name);
    fv_params_add(table, weight, role, init, value, whole, dims, false);
}

void fv_encoder_params(FvEncoderWeights *w, const FvVit *v, FvRole role, bool masks,
                       const char *prefix, FvParams *table) {
    size_t d = v->width, p = v->patch;
    add(table, &w->cls, role, FV_INIT_NORMAL, 0.02, prefix, "embeddings.cls_token",
        (size_t[]){1, 1, d, 0});
    add(table, &w->mask, masks ? role : FV_UNUSED, FV_INIT_CONSTANT, 0, prefix,
        "embeddings.mask_token", (size_t[]){1, d, 0});
    add(table, &w->pos, role, FV_INIT_NORMAL, 0.02, prefix, "embeddings.position_embeddings",
        (size_t[]){1, fv_vit_tokens(v), d, 0});
    add(table, &w->patch_w, role, FV_INIT_NORMAL, 0.02, prefix,
        "embeddings.patch_embeddings.projection.weight", (size_t[]){d, 3, p, p});
    add(table, &w->patch_b, role, FV_INIT_CONSTANT, 0, prefix,
        "embeddings.patch_embeddings.projection.bias", (size_t[]){d, 0});
    for (size_t l = 0; l < v->layers; l++)
        add_block(table, &w->layer[l], role, v, prefix, l);
    add(table, &w->norm_w, role, FV_INIT_CONSTANT, 1, prefix, "layernorm.weight", (size_t[]){d, 0});
    add(table, &w->norm_b, role, FV_INIT_CONSTANT, 0, prefix, "layernorm.bias", (size_t[]){d, 0});
}

/* --- one use -------------------------------------------------------------------------------- */

static size_t rows_of(const FvEncoder *e) {
    return fv_mul(e->v.frames, fv_vit_tokens(&e->v));
}

/* A last layer that is read through its keys and values only: its attention output and MLP on the
 * patches would be dead work. */
static size_t read_layers(const FvEncoder *e) {
    return e->whole ? e->v.layers : e->v.layers - 1;
}

/* Those that run forward: with `tail` the dead work is done; its gradient is zero, and left out. */
static size_t whole_layers(const FvEncoder *e) {
    return e->tail ? e->v.layers : read_layers(e);
}

FvStatus fv_encoder_create(FvEncoder *e, FvError *err) {
    bool ok = (e->act = calloc(e->v.layers, sizeof *e->act)) != NULL;
    real ***tables[] = {&e->k, &e->v_of, &e->dk, &e->dv};
    for (size_t i = 0; i < 4; i++)
        ok = ok && (*tables[i] = calloc(e->v.layers, sizeof(real *)));
    return ok ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for the encoder's tables");
}

void fv_encoder_free(FvEncoder *e) {
    free(e->act);
    free(e->k);
    free(e->v_of);
    free(e->dk);
    free(e->dv);
}

void fv_block_carve(const FvVit *v, FvArena *arena, FvBlockActs *a, size_t rows, size_t probs) {
    size_t wide = fv_mul(rows, v->width), mlp = fv_mul(rows, v->mlp);
    a->x = fv_take(arena, wide);
    a->n1 = fv_take_operand(arena, wide);
    a->mean1 = fv_take(arena, rows);
    a->rstd1 = fv_take(arena, rows);
    a->q = fv_take(arena, wide);
    a->probs = fv_take(arena, probs);
    a->att = fv_take_operand(arena, wide);
    a->o = fv_take(arena, wide);
    a->mid = fv_take(arena, wide);
    a->n2 = fv_take_operand(arena, wide);
    a->mean2 = fv_take(arena, rows);
    a->rstd2 = fv_take(arena, rows);
    a->f1 = fv_take(arena, mlp);
    a->f2 = fv_take_operand(arena, mlp);
    a->m = fv_take(arena, wide);
}

void fv_encoder_carve(FvEncoder *e, FvArena *arena) {
    const FvVit *v = &e->v;
    size_t tokens = fv_vit_tokens(v), rows = rows_of(e), wide = fv_mul(rows, v->width);
    size_t probs = fv_mul4(v->frames, v->heads, tokens, tokens);
    size_t patches = fv_mul(v->frames, fv_vit_patches(v));
    e->patches = fv_take_operand(arena, fv_mul4(patches, 3, v->patch, v->patch));
    e->embedded = fv_take(arena, fv_mul(patches, v->width));
    for (size_t l = 0; l < v->layers; l++) {
        /* a frozen encoder keeps nothing but what is read of it: the layers share the rest */
        if (e->trained || l == 0)
            fv_block_carve(v, arena, &e->act[l], rows, probs);
        else
            e->act[l] = e->act[0];
        if (e->norms && l > 0) {
            e->act[l].n1 = fv_take_operand(arena, wide);
            e->k[l] = e->k[0];
            e->v_of[l] = e->v_of[0];
        } else {
            e->k[l] = fv_take(arena, wide);
            e->v_of[l] = fv_take(arena, wide);
        }
        if (e->trained) {
            e->dk[l] = fv_take(arena, wide);
            e->dv[l] = fv_take(arena, wide);
        }
    }
    if (e->whole || e->tail)
        e->last = fv_take(arena, wide);
    if (e->whole) {
        e->features = fv_take(arena, wide);
        e->mean = fv_take(arena, rows);
        e->rstd = fv_take(arena, rows);
    }
    if (e->trained) {
        if (e->whole)
            e->dfeatures = fv_take(arena, wide);
        e->dx = fv_take(arena, wide);
        e->dn = fv_take(arena, wide);
        e->dq = fv_take(arena, wide);
        e->da = fv_take(arena, wide);
        e->df = fv_take(arena, fv_mul(rows, v->mlp));
    }
}

void fv_block_mlp(FvBackend *be, const FvVit *v, const FvBlockWeights *w, const FvBlockActs *a,
                  size_t rows, real *y) {
    const FvOps *ops = be->ops;
    size_t d = v->width, f = v->mlp;
    ops->layernorm(be, rows, d, FV_LAYER_NORM_EPS, a->mid, w->norm2_w.w, w->norm2_b.w, a->n2,
                   a->mean2, a->rstd2);
    ops->linear(be, rows, d, f, a->n2, w->fc1_w.w, w->fc1_b.w, a->f1);
    ops->gelu(be, rows * f, a->f1, a->f2);
    ops->linear(be, rows, f, d, a->f2, w->fc2_w.w, w->fc2_b.w, a->m);
    ops->residual(be, rows, d, a->mid, w->scale2.w, a->m, y);
}

void fv_block_mlp_back(FvBackend *be, const FvVit *v, const FvBlockWeights *w, const FvBlockActs *a,
                       size_t rows, real *dx, real *dn, real *df) {
    const FvOps *ops = be->ops;
    size_t d = v->width, f = v->mlp;
    ops->residual_back(be, rows, d, w->scale2.w, a->m, dx, dn, w->scale2.g);
    ops->linear_back(be, rows, f, d, a->f2, w->fc2_w.w, dn, df, false, w->fc2_w.g, w->fc2_b.g);
    ops->gelu_back(be, rows * f, a->f1, df, df);
    ops->linear_back(be, rows, d, f, a->n2, w->fc1_w.w, df, dn, false, w->fc1_w.g, w->fc1_b.g);
    ops->layernorm_back(be, rows, d, a->mid, w->norm2_w.w, a->mean2, a->rstd2, dn, dx, true,
                        w->norm2_w.g, w->norm2_b.g);
}

static FvAttention patch_attention(const FvVit *v) {
    size_t width = v->width / v->heads;
    return (FvAttention){.batch = v->frames,
                         .rows = fv_vit_tokens(v),
                         .keys = fv_vit_tokens(v),
                         .heads = v->heads,
                         .kv_heads = v->heads,
                         .width = width,
                         .scale = 1.0 / sqrt((double)width)};
}

void fv_encoder_forward(FvEncoder *e, FvBackend *be, const uint8_t *pixels) {
    const FvVit *v = &e->v;
    const FvOps *ops = be->ops;
    FvAttention shape = patch_attention(v);
    size_t patches = fv_vit_patches(v), rows = rows_of(e), d = v->width;
    ops->patchify(be, v->frames, v->size, v->patch, pixels, e->patches);
    ops->linear(be, v->frames * patches, 3 * v->patch * v->patch, d, e->patches, e->w->patch_w.w,
                e->w->patch_b.w, e->embedded);
    if (e->masked)
        ops->copy_rows(be, e->masked, d, e->w->mask.w, e->masked_zeros, e->embedded, e->masked_rows,
                       false);
    ops->tokens(be, v->frames, patches, d, e->embedded, e->w->cls.w, e->pos.w, e->act[0].x);
    for (size_t l = 0; l < v->layers; l++) {
        const FvBlockWeights *w = &e->w->layer[l];
        const FvBlockActs *a = &e->act[l];
        ops->layernorm(be, rows, d, FV_LAYER_NORM_EPS, a->x, w->norm1_w.w, w->norm1_b.w, a->n1,
                       a->mean1, a->rstd1);
        bool rest = l < whole_layers(e);
        if (rest || !e->norms) {
            ops->linear(be, rows, d, d, a->n1, w->k_w.w, w->k_b.w, e->k[l]);
            ops->linear(be, rows, d, d, a->n1, w->v_w.w, w->v_b.w, e->v_of[l]);
        }
        if (!rest)
            break;
        ops->linear(be, rows, d, d, a->n1, w->q_w.w, w->q_b.w, a->q);
        ops->attention(be, &shape, a->q, e->k[l], e->v_of[l], a->probs, a->att);
        ops->linear(be, rows, d, d, a->att, w->o_w.w, w->o_b.w, a->o);
        ops->residual(be, rows, d, a->x, w->scale1.w, a->o, a->mid);
        fv_block_mlp(be, v, w, a, rows, l + 1 < v->layers ? e->act[l + 1].x : e->last);
    }
    if (e->whole)
        ops->layernorm(be, rows, d, FV_LAYER_NORM_EPS, e->last, e->w->norm_w.w, e->w->norm_b.w,
                       e->features, e->mean, e->rstd);
    if (e->trained) {
        for (size_t l = 0; l < v->layers; l++) {
            ops->zero(be, e->dk[l], rows * d * sizeof(real));
            ops->zero(be, e->dv[l], rows * d * sizeof(real));
        }
        if (e->whole)
            ops->zero(be, e->dfeatures, rows * d * sizeof(real));
    }
}

/* Through one block's attention: dx is the gradient of `mid` on entry and of x on return. */
static void attention_back(FvEncoder *e, FvBackend *be, size_t l) {
    const FvOps *ops = be->ops;
    const FvBlockWeights *w = &e->w->layer[l];
    const FvBlockActs *a = &e->act[l];
    FvAttention shape = patch_attention(&e->v);
    size_t rows = rows_of(e), d = e->v.width;
    ops->residual_back(be, rows, d, w->scale1.w, a->o, e->dx, e->da, w->scale1.g);
    ops->linear_back(be, rows, d, d, a->att, w->o_w.w, e->da, e->dn, false, w->o_w.g, w->o_b.g);
    ops->attention_back(be, &shape, a->q, e->k[l], e->v_of[l], a->probs, e->dn, e->dq, e->dk[l],
                        e->dv[l]);
    ops->linear_back(be, rows, d, d, a->n1, w->q_w.w, e->dq, e->dn, false, w->q_w.g, w->q_b.g);
}

void fv_encoder_backward(FvEncoder *e, FvBackend *be) {
    const FvVit *v = &e->v;
    const FvOps *ops = be->ops;
    size_t patches = fv_vit_patches(v), rows = rows_of(e), d = v->width;
    if (e->whole)
        ops->layernorm_back(be, rows, d, e->last, e->w->norm_w.w, e->mean, e->rstd, e->dfeatures,
                            e->dx, false, e->w->norm_w.g, e->w->norm_b.g);
    for (size_t l = v->layers; l-- > 0;) {
        const FvBlockWeights *w = &e->w->layer[l];
        const FvBlockActs *a = &e->act[l];
        bool whole = l < read_layers(e);
        if (whole) {
            fv_block_mlp_back(be, v, w, a, rows, e->dx, e->dn, e->df);
            attention_back(e, be, l);
        }
        ops->linear_back(be, rows, d, d, a->n1, w->k_w.w, e->dk[l], e->dn, whole, w->k_w.g,
                         w->k_b.g);
        ops->linear_back(be, rows, d, d, a->n1, w->v_w.w, e->dv[l], e->dn, true, w->v_w.g,
                         w->v_b.g);
        ops->layernorm_back(be, rows, d, a->x, w->norm1_w.w, a->mean1, a->rstd1, e->dn, e->dx,
                            whole, w->norm1_w.g, w->norm1_b.g);
        if (e->ready)
            e->ready(e->ready_context, w->norm1_w.g);
    }
    ops->tokens_back(be, v->frames, patches, d, e->dx, e->dn, e->w->cls.g, e->pos.g);
    if (e->masked) {
        ops->copy_rows(be, e->masked, d, e->dn, e->masked_rows, e->w->mask.g, e->masked_zeros,
                       true);
        ops->copy_rows(be, e->masked, d, e->blank, e->masked_zeros, e->dn, e->masked_rows, false);
    }
    ops->linear_back(be, v->frames * patches, 3 * v->patch * v->patch, d, e->patches,
                     e->w->patch_w.w, e->dn, NULL, false, e->w->patch_w.g, e->w->patch_b.g);
}
