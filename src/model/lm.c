/* The Llama-style language model (weights and names as in Hugging Face's Llama checkpoints):
 * RMSNorm, rotary embedding, grouped-query causal attention, SwiGLU, no biases.
 *
 * A clip's sequence is [text | mode | v_1 .. v_T]. The text is the same in both passes and sees
 * nothing of what follows, so that one run serves both; a pass runs its own rows against the text's
 * keys and values. Texts are right-aligned in max_text rows; the rows before them (`first`) are
 * padding that no row sees, and positions count from the text's start. */
#include <stdio.h>
#include <stdlib.h>

#include "model/parts.h"

static size_t head_width(const FvModel *m) {
    return m->c.lm_width / m->c.lm_heads;
}
static size_t kv_width(const FvModel *m) {
    return m->c.lm_kv_heads * head_width(m);
}
static size_t pass_rows(const FvModel *m) {
    return 1 + m->c.frames;
}
static size_t key_rows(const FvModel *m) {
    return m->c.max_text + pass_rows(m);
}

void fv_lm_params(FvModel *m, FvParams *table) {
    const FvModelConfig *c = &m->c;
    FvRole role = c->freeze_lm ? FV_FROZEN : FV_TRAINED;
    size_t d = c->lm_width, kv = kv_width(m), f = c->lm_mlp;
    fv_params_add(table, &m->lm.embed, c->captions ? role : FV_UNUSED, FV_INIT_NORMAL, 0.02,
                  "lm.model.embed_tokens.weight", (size_t[]){c->lm_vocab, d, 0}, false);
    for (size_t l = 0; l < c->lm_layers; l++) {
        FvLmWeights *w = &m->lm.layer[l];
        const struct {
            FvWeight *weight;
            const char *name;
            size_t dims[3];
        } rows[] = {
            {&w->norm1, "input_layernorm", {d}},  {&w->q, "self_attn.q_proj", {d, d}},
            {&w->k, "self_attn.k_proj", {kv, d}}, {&w->v, "self_attn.v_proj", {kv, d}},
            {&w->o, "self_attn.o_proj", {d, d}},  {&w->norm2, "post_attention_layernorm", {d}},
            {&w->gate, "mlp.gate_proj", {f, d}},  {&w->up, "mlp.up_proj", {f, d}},
            {&w->down, "mlp.down_proj", {d, f}},
        };
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            char name[FV_PARAM_NAME];
            bool norm = rows[i].dims[1] == 0;
            snprintf(name, sizeof name, "lm.model.layers.%zu.%s.weight", l, rows[i].name);
            fv_params_add(table, rows[i].weight, role, norm ? FV_INIT_CONSTANT : FV_INIT_NORMAL,
                          norm ? 1 : 0.02, name, rows[i].dims, false);
        }
    }
    fv_params_add(table, &m->lm.norm, role, FV_INIT_CONSTANT, 1, "lm.model.norm.weight",
                  (size_t[]){d, 0}, false);
}

static void carve_acts(FvModel *m, FvArena *arena, FvLmActs *a, size_t rows, size_t keys) {
    const FvModelConfig *c = &m->c;
    size_t clips = c->clips, n = fv_mul(clips, rows), wide = fv_mul(n, c->lm_width);
    size_t mlp = fv_mul(n, c->lm_mlp), kv = fv_mul(n, kv_width(m));
    a->x = fv_take(arena, wide);
    a->n1 = fv_take_operand(arena, wide);
    a->rstd1 = fv_take(arena, n);
    a->q = fv_take(arena, wide);
    a->own_k = fv_take(arena, kv);
    a->own_v = fv_take(arena, kv);
    if (keys == rows) {
        a->k = a->own_k;
        a->v = a->own_v;
    } else {
        a->k = fv_take(arena, fv_mul3(clips, keys, kv_width(m)));
        a->v = fv_take(arena, fv_mul3(clips, keys, kv_width(m)));
    }
    a->probs = fv_take(arena, fv_mul4(clips, c->lm_heads, rows, keys));
    a->att = fv_take_operand(arena, wide);
    a->o = fv_take(arena, wide);
    a->mid = fv_take(arena, wide);
    a->n2 = fv_take_operand(arena, wide);
    a->rstd2 = fv_take(arena, n);
    a->gate = fv_take(arena, mlp);
    a->up = fv_take(arena, mlp);
    a->act = fv_take_operand(arena, mlp);
    a->m = fv_take(arena, wide);
}

void fv_lm_carve(FvModel *m, FvArena *arena) {
    const FvModelConfig *c = &m->c;
    FvLm *lm = &m->lm;
    size_t text = c->max_text, rows = pass_rows(m), keys = key_rows(m), kv = kv_width(m);
    lm->text.rows = text;
    for (size_t l = 0; l < c->lm_layers; l++) {
        carve_acts(m, arena, &lm->text.act[l], text, text);
        lm->text.dk[l] = fv_take(arena, fv_mul3(c->clips, text, kv));
        lm->text.dv[l] = fv_take(arena, fv_mul3(c->clips, text, kv));
    }
    for (int p = 0; p < FV_PASSES; p++) {
        FvSegment *s = &lm->pass[p];
        s->first_row = text;
        s->rows = rows;
        for (size_t l = 0; l < c->lm_layers; l++)
            carve_acts(m, arena, &s->act[l], rows, keys);
        s->last = fv_take(arena, fv_mul3(c->clips, rows, c->lm_width));
        s->h = fv_take(arena, fv_mul3(c->clips, rows, c->lm_width));
        s->rstd = fv_take(arena, fv_mul(c->clips, rows));
    }
    lm->text_to_keys = fv_take_bytes(arena, fv_mul3(c->clips, text, sizeof(int32_t)));
    lm->own_to_keys = fv_take_bytes(arena, fv_mul3(c->clips, rows, sizeof(int32_t)));
    lm->first = fv_take_bytes(arena, fv_mul(c->clips, sizeof(int32_t)));
    size_t most = text > rows ? text : rows, wide = fv_mul3(c->clips, most, c->lm_width);
    lm->dx = fv_take(arena, wide);
    lm->dn = fv_take(arena, wide);
    lm->dq = fv_take(arena, wide);
    lm->da = fv_take(arena, wide);
    lm->dk = fv_take(arena, fv_mul3(c->clips, keys, kv));
    lm->dv = fv_take(arena, fv_mul3(c->clips, keys, kv));
    lm->own_dk = fv_take(arena, fv_mul3(c->clips, most, kv));
    lm->own_dv = fv_take(arena, fv_mul3(c->clips, most, kv));
    lm->df = fv_take(arena, fv_mul3(c->clips, most, c->lm_mlp));
    lm->dg = fv_take(arena, fv_mul3(c->clips, most, c->lm_mlp));
}

/* Calls once: the arrays depend on sizes alone. */
void fv_lm_upload(FvModel *m) {
    size_t clips = m->c.clips, text = m->c.max_text, rows = pass_rows(m), keys = key_rows(m);
    for (size_t b = 0; b < clips; b++) {
        for (size_t r = 0; r < text; r++) {
            int32_t row = (int32_t)(b * keys + r);
            m->be->ops->upload(m->be, m->lm.text_to_keys + b * text + r, &row, sizeof row);
        }
        for (size_t r = 0; r < rows; r++) {
            int32_t row = (int32_t)(b * keys + text + r);
            m->be->ops->upload(m->be, m->lm.own_to_keys + b * rows + r, &row, sizeof row);
        }
    }
}

static FvAttention attention_shape(const FvModel *m, const FvSegment *s) {
    size_t width = head_width(m);
    return (FvAttention){.batch = m->c.clips,
                         .rows = s->rows,
                         .keys = s->first_row + s->rows,
                         .heads = m->c.lm_heads,
                         .kv_heads = m->c.lm_kv_heads,
                         .width = width,
                         .scale = 1.0 / __builtin_sqrt((double)width),
                         .causal = true,
                         .first = m->lm.first};
}

/* Norm, and this segment's rotated keys and values of layer l. */
static void keys_forward(FvModel *m, const FvSegment *s, size_t l) {
    const FvOps *ops = m->be->ops;
    const FvLmWeights *w = &m->lm.layer[l];
    const FvLmActs *a = &s->act[l];
    size_t n = m->c.clips * s->rows, d = m->c.lm_width;
    ops->rmsnorm(m->be, n, d, m->c.lm_rms_eps, a->x, w->norm1.w, a->n1, a->rstd1);
    ops->linear(m->be, n, d, kv_width(m), a->n1, w->k.w, NULL, a->own_k);
    ops->linear(m->be, n, d, kv_width(m), a->n1, w->v.w, NULL, a->own_v);
    ops->rope(m->be, m->c.clips, s->rows, m->c.lm_kv_heads, head_width(m), s->first_row,
              m->lm.first, m->c.lm_rope_theta, false, a->own_k);
}

static void block_forward(FvModel *m, const FvSegment *s, size_t l, real *y) {
    const FvOps *ops = m->be->ops;
    const FvLmWeights *w = &m->lm.layer[l];
    const FvLmActs *a = &s->act[l];
    FvAttention shape = attention_shape(m, s);
    size_t n = m->c.clips * s->rows, d = m->c.lm_width, f = m->c.lm_mlp;
    ops->linear(m->be, n, d, d, a->n1, w->q.w, NULL, a->q);
    ops->rope(m->be, m->c.clips, s->rows, m->c.lm_heads, head_width(m), s->first_row, m->lm.first,
              m->c.lm_rope_theta, false, a->q);
    ops->attention(m->be, &shape, a->q, a->k, a->v, a->probs, a->att);
    ops->linear(m->be, n, d, d, a->att, w->o.w, NULL, a->o);
    ops->residual(m->be, n, d, a->x, NULL, a->o, a->mid);
    ops->rmsnorm(m->be, n, d, m->c.lm_rms_eps, a->mid, w->norm2.w, a->n2, a->rstd2);
    ops->linear(m->be, n, d, f, a->n2, w->gate.w, NULL, a->gate);
    ops->linear(m->be, n, d, f, a->n2, w->up.w, NULL, a->up);
    ops->swiglu(m->be, n * f, a->gate, a->up, a->act);
    ops->linear(m->be, n, f, d, a->act, w->down.w, NULL, a->m);
    ops->residual(m->be, n, d, a->mid, NULL, a->m, y);
}

void fv_lm_text(FvModel *m) {
    const FvSegment *s = &m->lm.text;
    for (size_t l = 0; l < m->c.lm_layers; l++) {
        keys_forward(m, s, l);
        if (l + 1 < m->c.lm_layers) /* nothing reads the text's rows after the last keys */
            block_forward(m, s, l, s->act[l + 1].x);
    }
}

void fv_lm_text_clear(FvModel *m) {
    const FvSegment *s = &m->lm.text;
    for (size_t l = 0; l < m->c.lm_layers; l++) {
        size_t bytes = m->c.clips * s->rows * kv_width(m) * sizeof(real);
        m->be->ops->zero(m->be, s->dk[l], bytes);
        m->be->ops->zero(m->be, s->dv[l], bytes);
    }
}

void fv_lm_forward(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    FvLm *lm = &m->lm;
    const FvSegment *s = &lm->pass[pass], *text = &lm->text;
    size_t clips = m->c.clips, kv = kv_width(m);
    for (size_t l = 0; l < m->c.lm_layers; l++) {
        const FvLmActs *a = &s->act[l], *t = &text->act[l];
        keys_forward(m, s, l);
        ops->copy_rows(m->be, clips * text->rows, kv, t->own_k, NULL, a->k, lm->text_to_keys,
                       false);
        ops->copy_rows(m->be, clips * text->rows, kv, t->own_v, NULL, a->v, lm->text_to_keys,
                       false);
        ops->copy_rows(m->be, clips * s->rows, kv, a->own_k, NULL, a->k, lm->own_to_keys, false);
        ops->copy_rows(m->be, clips * s->rows, kv, a->own_v, NULL, a->v, lm->own_to_keys, false);
        block_forward(m, s, l, l + 1 < m->c.lm_layers ? s->act[l + 1].x : s->last);
    }
    ops->rmsnorm(m->be, clips * s->rows, m->c.lm_width, m->c.lm_rms_eps, s->last, lm->norm.w, s->h,
                 s->rstd);
}

/* Through a block down to its attention: lm.dx is the gradient of the block's output on entry and
 * of x by way of the residual on return; lm.dn that of n1 by way of q; dk, dv += all keys seen. */
static void block_backward(FvModel *m, const FvSegment *s, size_t l, real *dk, real *dv) {
    const FvOps *ops = m->be->ops;
    FvLm *lm = &m->lm;
    const FvLmWeights *w = &lm->layer[l];
    const FvLmActs *a = &s->act[l];
    FvAttention shape = attention_shape(m, s);
    size_t n = m->c.clips * s->rows, d = m->c.lm_width, f = m->c.lm_mlp;
    ops->linear_back(m->be, n, f, d, a->act, w->down.w, lm->dx, lm->df, false, w->down.g, NULL);
    ops->swiglu_back(m->be, n * f, a->gate, a->up, lm->df, lm->df, lm->dg);
    ops->linear_back(m->be, n, d, f, a->n2, w->gate.w, lm->df, lm->dn, false, w->gate.g, NULL);
    ops->linear_back(m->be, n, d, f, a->n2, w->up.w, lm->dg, lm->dn, true, w->up.g, NULL);
    ops->rmsnorm_back(m->be, n, d, a->mid, w->norm2.w, a->rstd2, lm->dn, lm->dx, true, w->norm2.g);
    ops->linear_back(m->be, n, d, d, a->att, w->o.w, lm->dx, lm->da, false, w->o.g, NULL);
    ops->attention_back(m->be, &shape, a->q, a->k, a->v, a->probs, lm->da, lm->dq, dk, dv);
    ops->rope(m->be, m->c.clips, s->rows, m->c.lm_heads, head_width(m), s->first_row, lm->first,
              m->c.lm_rope_theta, true, lm->dq);
    ops->linear_back(m->be, n, d, d, a->n1, w->q.w, lm->dq, lm->dn, false, w->q.g, NULL);
}

/* The segment's own keys and values: dk is rotated back in place; then through the norm to x.
 * inner: lm.dn and lm.dx already hold what came through the block. */
static void keys_backward(FvModel *m, const FvSegment *s, size_t l, real *dk, real *dv,
                          bool inner) {
    const FvOps *ops = m->be->ops;
    FvLm *lm = &m->lm;
    const FvLmWeights *w = &lm->layer[l];
    const FvLmActs *a = &s->act[l];
    size_t n = m->c.clips * s->rows, d = m->c.lm_width;
    ops->rope(m->be, m->c.clips, s->rows, m->c.lm_kv_heads, head_width(m), s->first_row, lm->first,
              m->c.lm_rope_theta, true, dk);
    ops->linear_back(m->be, n, d, kv_width(m), a->n1, w->k.w, dk, lm->dn, inner, w->k.g, NULL);
    ops->linear_back(m->be, n, d, kv_width(m), a->n1, w->v.w, dv, lm->dn, true, w->v.g, NULL);
    ops->rmsnorm_back(m->be, n, d, a->x, w->norm1.w, a->rstd1, lm->dn, lm->dx, inner, w->norm1.g);
}

void fv_lm_backward(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    FvLm *lm = &m->lm;
    const FvSegment *s = &lm->pass[pass], *text = &lm->text;
    size_t clips = m->c.clips, kv = kv_width(m), own = clips * s->rows, d = m->c.lm_width;
    /* dh arrives in dx; the norm's gradient replaces it */
    ops->copy(m->be, own * d, lm->dx, lm->dn);
    ops->rmsnorm_back(m->be, own, d, s->last, lm->norm.w, s->rstd, lm->dn, lm->dx, false,
                      lm->norm.g);
    for (size_t l = m->c.lm_layers; l-- > 0;) {
        size_t bytes = clips * key_rows(m) * kv * sizeof(real);
        ops->zero(m->be, lm->dk, bytes);
        ops->zero(m->be, lm->dv, bytes);
        block_backward(m, s, l, lm->dk, lm->dv);
        ops->copy_rows(m->be, clips * text->rows, kv, lm->dk, lm->text_to_keys, text->dk[l], NULL,
                       true);
        ops->copy_rows(m->be, clips * text->rows, kv, lm->dv, lm->text_to_keys, text->dv[l], NULL,
                       true);
        ops->copy_rows(m->be, own, kv, lm->dk, lm->own_to_keys, lm->own_dk, NULL, false);
        ops->copy_rows(m->be, own, kv, lm->dv, lm->own_to_keys, lm->own_dv, NULL, false);
        keys_backward(m, s, l, lm->own_dk, lm->own_dv, true);
    }
}

void fv_lm_text_backward(FvModel *m, bool last) {
    const FvSegment *s = &m->lm.text;
    for (size_t l = m->c.lm_layers; l-- > 0;) {
        bool inner = l + 1 < m->c.lm_layers;
        if (inner)
            block_backward(m, s, l, s->dk[l], s->dv[l]);
        keys_backward(m, s, l, s->dk[l], s->dv[l], inner);
        if (last)
            fv_ready_from(m, m->lm.layer[l].norm1.g);
    }
}
