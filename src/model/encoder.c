/* The DINOv2 vision transformer over the patches (Oquab et al. 2023; weights and names as in the
 * Hugging Face checkpoint facebook/dinov2-small), forward and backward. */
#include <stdio.h>
#include <stdlib.h>

#include "model/parts.h"

static size_t rows_of(const FvModel *m) {
    return fv_frames(m) * fv_keys(m);
}

/* In deep mode the last layer is read through its keys and values only: its attention output and
 * MLP on the patches would be dead work. */
static size_t whole_layers(const FvModel *m) {
    return m->c.deep ? m->c.dino_layers - 1 : m->c.dino_layers;
}

static void add_block(FvParams *table, FvBlockWeights *w, FvRole role, const FvModelConfig *c,
                      size_t layer) {
    size_t d = c->dino_width, f = c->dino_mlp;
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
        snprintf(name, sizeof name, "dino.encoder.layer.%zu.%s", layer, rows[i].name);
        fv_params_add(table, rows[i].weight, role, rows[i].init, rows[i].value, name, rows[i].dims,
                      false);
    }
}

void fv_encoder_params(FvModel *m, FvParams *table) {
    const FvModelConfig *c = &m->c;
    FvEncoder *e = &m->encoder;
    FvRole role = !c->vision ? FV_UNUSED : c->freeze_dino ? FV_FROZEN : FV_TRAINED;
    e->trained = role == FV_TRAINED;
    size_t d = c->dino_width, p = c->patch;
    fv_params_add(table, &e->cls, role, FV_INIT_NORMAL, 0.02, "dino.embeddings.cls_token",
                  (size_t[]){1, 1, d, 0}, false);
    fv_params_add(table, &e->mask, FV_UNUSED, FV_INIT_CONSTANT, 0, "dino.embeddings.mask_token",
                  (size_t[]){1, d, 0}, false);
    fv_params_add(table, &e->pos, role, FV_INIT_NORMAL, 0.02, "dino.embeddings.position_embeddings",
                  (size_t[]){1, fv_keys(m), d, 0}, false);
    fv_params_add(table, &e->patch_w, role, FV_INIT_NORMAL, 0.02,
                  "dino.embeddings.patch_embeddings.projection.weight", (size_t[]){d, 3, p, p},
                  false);
    fv_params_add(table, &e->patch_b, role, FV_INIT_CONSTANT, 0,
                  "dino.embeddings.patch_embeddings.projection.bias", (size_t[]){d, 0}, false);
    for (size_t l = 0; l < c->dino_layers; l++)
        add_block(table, &e->layer[l], role, c, l);
    fv_params_add(table, &e->norm_w, role, FV_INIT_CONSTANT, 1, "dino.layernorm.weight",
                  (size_t[]){d, 0}, false);
    fv_params_add(table, &e->norm_b, role, FV_INIT_CONSTANT, 0, "dino.layernorm.bias",
                  (size_t[]){d, 0}, false);
}

void fv_block_carve(const FvModelConfig *c, FvArena *arena, FvBlockActs *a, size_t rows,
                    size_t probs) {
    size_t wide = fv_mul(rows, c->dino_width), mlp = fv_mul(rows, c->dino_mlp);
    a->x = fv_take(arena, wide);
    a->n1 = fv_take(arena, wide);
    a->mean1 = fv_take(arena, rows);
    a->rstd1 = fv_take(arena, rows);
    a->q = fv_take(arena, wide);
    a->probs = fv_take(arena, probs);
    a->att = fv_take(arena, wide);
    a->o = fv_take(arena, wide);
    a->mid = fv_take(arena, wide);
    a->n2 = fv_take(arena, wide);
    a->mean2 = fv_take(arena, rows);
    a->rstd2 = fv_take(arena, rows);
    a->f1 = fv_take(arena, mlp);
    a->f2 = fv_take(arena, mlp);
    a->m = fv_take(arena, wide);
}

void fv_encoder_carve(FvModel *m, FvArena *arena) {
    const FvModelConfig *c = &m->c;
    FvEncoder *e = &m->encoder;
    if (!c->vision)
        return;
    size_t rows = fv_mul(fv_frames(m), fv_keys(m)), wide = fv_mul(rows, c->dino_width);
    size_t probs = fv_mul4(fv_frames(m), c->dino_heads, fv_keys(m), fv_keys(m));
    size_t patches = fv_mul(fv_frames(m), fv_patches(c));
    e->patches = fv_take(arena, fv_mul(patches, 3 * c->patch * c->patch));
    e->embedded = fv_take(arena, fv_mul(patches, c->dino_width));
    for (size_t l = 0; l < c->dino_layers; l++) {
        /* a frozen encoder keeps nothing but its keys and values: the layers share one set */
        if (e->trained || l == 0)
            fv_block_carve(c, arena, &e->act[l], rows, probs);
        else
            e->act[l] = e->act[0];
        e->k[l] = fv_take(arena, wide);
        e->v[l] = fv_take(arena, wide);
        if (e->trained) {
            e->dk[l] = fv_take(arena, wide);
            e->dv[l] = fv_take(arena, wide);
        }
    }
    if (!c->deep) {
        e->last = fv_take(arena, wide);
        e->features = fv_take(arena, wide);
        e->mean = fv_take(arena, rows);
        e->rstd = fv_take(arena, rows);
    }
    if (e->trained) {
        if (!c->deep)
            e->dfeatures = fv_take(arena, wide);
        e->dx = fv_take(arena, wide);
        e->dn = fv_take(arena, wide);
        e->dq = fv_take(arena, wide);
        e->da = fv_take(arena, wide);
        e->df = fv_take(arena, fv_mul(rows, c->dino_mlp));
    }
}

void fv_block_mlp(FvModel *m, const FvBlockWeights *w, const FvBlockActs *a, size_t rows, real *y) {
    const FvOps *ops = m->be->ops;
    size_t d = m->c.dino_width, f = m->c.dino_mlp;
    ops->layernorm(m->be, rows, d, FV_LAYER_NORM_EPS, a->mid, w->norm2_w.w, w->norm2_b.w, a->n2,
                   a->mean2, a->rstd2);
    ops->linear(m->be, rows, d, f, a->n2, w->fc1_w.w, w->fc1_b.w, a->f1);
    ops->gelu(m->be, rows * f, a->f1, a->f2);
    ops->linear(m->be, rows, f, d, a->f2, w->fc2_w.w, w->fc2_b.w, a->m);
    ops->residual(m->be, rows, d, a->mid, w->scale2.w, a->m, y);
}

void fv_block_mlp_back(FvModel *m, const FvBlockWeights *w, const FvBlockActs *a, size_t rows,
                       real *dx, real *dn, real *df) {
    const FvOps *ops = m->be->ops;
    size_t d = m->c.dino_width, f = m->c.dino_mlp;
    ops->residual_back(m->be, rows, d, w->scale2.w, a->m, dx, dn, w->scale2.g);
    ops->linear_back(m->be, rows, f, d, a->f2, w->fc2_w.w, dn, df, false, w->fc2_w.g, w->fc2_b.g);
    ops->gelu_back(m->be, rows * f, a->f1, df, df);
    ops->linear_back(m->be, rows, d, f, a->n2, w->fc1_w.w, df, dn, false, w->fc1_w.g, w->fc1_b.g);
    ops->layernorm_back(m->be, rows, d, a->mid, w->norm2_w.w, a->mean2, a->rstd2, dn, dx, true,
                        w->norm2_w.g, w->norm2_b.g);
}

static FvAttention patch_attention(const FvModel *m) {
    size_t width = m->c.dino_width / m->c.dino_heads;
    return (FvAttention){.batch = fv_frames(m),
                         .rows = fv_keys(m),
                         .keys = fv_keys(m),
                         .heads = m->c.dino_heads,
                         .kv_heads = m->c.dino_heads,
                         .width = width,
                         .scale = 1.0 / __builtin_sqrt((double)width)};
}

void fv_encoder_forward(FvModel *m, const uint8_t *pixels) {
    const FvModelConfig *c = &m->c;
    const FvOps *ops = m->be->ops;
    FvEncoder *e = &m->encoder;
    FvAttention shape = patch_attention(m);
    size_t frames = fv_frames(m), patches = fv_patches(c), rows = rows_of(m), d = c->dino_width;
    ops->patchify(m->be, frames, c->size, c->patch, pixels, e->patches);
    ops->linear(m->be, frames * patches, 3 * c->patch * c->patch, d, e->patches, e->patch_w.w,
                e->patch_b.w, e->embedded);
    ops->tokens(m->be, frames, patches, d, e->embedded, e->cls.w, e->pos.w, e->act[0].x);
    for (size_t l = 0; l < c->dino_layers; l++) {
        const FvBlockWeights *w = &e->layer[l];
        const FvBlockActs *a = &e->act[l];
        ops->layernorm(m->be, rows, d, FV_LAYER_NORM_EPS, a->x, w->norm1_w.w, w->norm1_b.w, a->n1,
                       a->mean1, a->rstd1);
        ops->linear(m->be, rows, d, d, a->n1, w->k_w.w, w->k_b.w, e->k[l]);
        ops->linear(m->be, rows, d, d, a->n1, w->v_w.w, w->v_b.w, e->v[l]);
        if (l >= whole_layers(m))
            break;
        ops->linear(m->be, rows, d, d, a->n1, w->q_w.w, w->q_b.w, a->q);
        ops->attention(m->be, &shape, a->q, e->k[l], e->v[l], a->probs, a->att);
        ops->linear(m->be, rows, d, d, a->att, w->o_w.w, w->o_b.w, a->o);
        ops->residual(m->be, rows, d, a->x, w->scale1.w, a->o, a->mid);
        fv_block_mlp(m, w, a, rows, l + 1 < c->dino_layers ? e->act[l + 1].x : e->last);
    }
    if (!c->deep)
        ops->layernorm(m->be, rows, d, FV_LAYER_NORM_EPS, e->last, e->norm_w.w, e->norm_b.w,
                       e->features, e->mean, e->rstd);
    if (e->trained) {
        for (size_t l = 0; l < c->dino_layers; l++) {
            ops->zero(m->be, e->dk[l], rows * d * sizeof(real));
            ops->zero(m->be, e->dv[l], rows * d * sizeof(real));
        }
        if (!c->deep)
            ops->zero(m->be, e->dfeatures, rows * d * sizeof(real));
    }
}

/* Through one block's attention: dx is the gradient of `mid` on entry and of x on return. */
static void attention_back(FvModel *m, size_t l) {
    const FvOps *ops = m->be->ops;
    FvEncoder *e = &m->encoder;
    const FvBlockWeights *w = &e->layer[l];
    const FvBlockActs *a = &e->act[l];
    FvAttention shape = patch_attention(m);
    size_t rows = rows_of(m), d = m->c.dino_width;
    ops->residual_back(m->be, rows, d, w->scale1.w, a->o, e->dx, e->da, w->scale1.g);
    ops->linear_back(m->be, rows, d, d, a->att, w->o_w.w, e->da, e->dn, false, w->o_w.g, w->o_b.g);
    ops->attention_back(m->be, &shape, a->q, e->k[l], e->v[l], a->probs, e->dn, e->dq, e->dk[l],
                        e->dv[l]);
    ops->linear_back(m->be, rows, d, d, a->n1, w->q_w.w, e->dq, e->dn, false, w->q_w.g, w->q_b.g);
}

void fv_encoder_backward(FvModel *m) {
    const FvModelConfig *c = &m->c;
    const FvOps *ops = m->be->ops;
    FvEncoder *e = &m->encoder;
    size_t frames = fv_frames(m), patches = fv_patches(c), rows = rows_of(m), d = c->dino_width;
    if (!c->deep)
        ops->layernorm_back(m->be, rows, d, e->last, e->norm_w.w, e->mean, e->rstd, e->dfeatures,
                            e->dx, false, e->norm_w.g, e->norm_b.g);
    for (size_t l = c->dino_layers; l-- > 0;) {
        const FvBlockWeights *w = &e->layer[l];
        const FvBlockActs *a = &e->act[l];
        bool whole = l < whole_layers(m);
        if (whole) {
            fv_block_mlp_back(m, w, a, rows, e->dx, e->dn, e->df);
            attention_back(m, l);
        }
        ops->linear_back(m->be, rows, d, d, a->n1, w->k_w.w, e->dk[l], e->dn, whole, w->k_w.g,
                         w->k_b.g);
        ops->linear_back(m->be, rows, d, d, a->n1, w->v_w.w, e->dv[l], e->dn, true, w->v_w.g,
                         w->v_b.g);
        ops->layernorm_back(m->be, rows, d, a->x, w->norm1_w.w, a->mean1, a->rstd1, e->dn, e->dx,
                            whole, w->norm1_w.g, w->norm1_b.g);
    }
    ops->tokens_back(m->be, frames, patches, d, e->dx, e->dn, e->cls.g, e->pos.g);
    ops->linear_back(m->be, frames * patches, 3 * c->patch * c->patch, d, e->patches, e->patch_w.w,
                     e->dn, NULL, false, e->patch_w.g, e->patch_b.g);
}
