/* The foveated query: one token per frame that reads the patches through the encoder's own blocks
 * (deep), or the final features once (shallow). Patches never see it.
 *
 * Where the encoder's outputs are stored, a deep query reads a layer's normalised input n instead
 * of its keys K = n Wk^T + bk and values V = n Wv^T + bv, half as much. Head h's scores are q_h .
 * K_h = (Wk_h^T q_h) . n + q_h . bk_h: Wk is absorbed into the query, and the last term, the same
 * for all keys, drops out of the softmax. Its probabilities sum to 1: sum p V_h = Wv_h (sum p n) +
 * bv_h. */
#include "model/parts.h"

void fv_query_params(FvModel *m, FvParams *table) {
    const FvModelConfig *c = &m->c;
    FvQueryPart *q = &m->query;
    FvRole role = c->vision ? FV_TRAINED : FV_UNUSED;
    size_t d = c->dino_width, w = c->query_width;
    double in = 1.0 / __builtin_sqrt((double)w), out = 1.0 / __builtin_sqrt((double)d);
    fv_params_add(table, &q->fixed, role, FV_INIT_NORMAL, 1, "q_static", (size_t[]){w, 0}, false);
    fv_params_add(table, &q->init, role, FV_INIT_NORMAL, 1, "q_init", (size_t[]){w, 0}, false);
    fv_params_add(table, &q->in_w, role, FV_INIT_UNIFORM, in, "query_in.weight",
                  (size_t[]){d, w, 0}, false);
    fv_params_add(table, &q->out_w, role, FV_INIT_UNIFORM, out, "query_out.weight",
                  (size_t[]){d, d, 0}, false);
    fv_params_add(table, &q->out_b, role, FV_INIT_UNIFORM, out, "query_out.bias", (size_t[]){d, 0},
                  false);
}

static void carve_pass(FvModel *m, FvArena *arena, FvQueryPass *p) {
    const FvModelConfig *c = &m->c;
    size_t frames = fv_frames(m), wide = fv_mul(frames, c->dino_width);
    p->u = fv_take(arena, fv_mul(frames, c->query_width));
    p->z = fv_take(arena, wide);
    if (!c->deep) {
        p->q0 = fv_take(arena, wide);
        p->probs = fv_take(arena, fv_mul(frames, fv_keys(m)));
        p->pooled = fv_take_operand(arena, wide);
        return;
    }
    for (size_t l = 0; l < c->dino_layers; l++)
        fv_block_carve(&m->encoder.v, arena, &p->act[l], frames,
                       fv_mul3(frames, c->dino_heads, fv_keys(m)));
    p->q0 = p->act[0].x;
    p->probs = p->act[c->dino_layers - 1].probs;
    p->last = fv_take(arena, wide);
    p->norm = fv_take_operand(arena, wide);
    p->mean = fv_take(arena, frames);
    p->rstd = fv_take(arena, frames);
    if (fv_encoder_stored(c))
        p->absorbed = fv_take(arena, fv_mul3(c->dino_layers, c->dino_heads, wide));
}

void fv_query_carve(FvModel *m, FvArena *arena) {
    const FvModelConfig *c = &m->c;
    FvQueryPart *q = &m->query;
    size_t frames = fv_frames(m), wide = fv_mul(frames, c->dino_width);
    if (!c->vision)
        return;
    carve_pass(m, arena, &q->pass[FV_COARSE]);
    carve_pass(m, arena, &q->pass[FV_FINE]);
    q->dz = fv_take(arena, wide);
    q->du = fv_take(arena, fv_mul(frames, c->query_width));
    q->dprobs = fv_take(arena, fv_mul3(frames, c->deep ? c->dino_heads : 1, fv_keys(m)));
    q->dx = fv_take(arena, wide);
    q->dn = fv_take(arena, wide);
    q->dq = fv_take(arena, wide);
    q->da = fv_take(arena, wide);
    q->df = fv_take(arena, fv_mul(frames, c->dino_mlp));
    if (c->deep && fv_encoder_stored(c)) {
        q->pooled = fv_take_operand(arena, fv_mul(c->dino_heads, wide));
        q->dpooled = fv_take(arena, fv_mul(c->dino_heads, wide));
        q->dabsorbed = fv_take(arena, fv_mul(c->dino_heads, wide));
    }
}

static FvQuery query_shape(const FvModel *m) {
    const FvModelConfig *c = &m->c;
    size_t heads = c->deep ? c->dino_heads : 1, width = c->dino_width / heads;
    bool absorbed = c->deep && m->encoded;
    return (FvQuery){.frames = fv_frames(m),
                     .keys = fv_keys(m),
                     .heads = heads,
                     .width = absorbed ? c->dino_width : width,
                     .shared = absorbed,
                     .scale = 1.0 / (__builtin_sqrt((double)width) * c->temperature),
                     .top_k = c->hard_attn_k};
}

/* a->q -> a->att, layer l */
static void attend(FvModel *m, const FvQueryPass *p, size_t l) {
    const FvOps *ops = m->be->ops;
    const FvEncoder *e = &m->encoder;
    const FvBlockActs *a = &p->act[l];
    FvQuery shape = query_shape(m);
    size_t frames = fv_frames(m), d = m->c.dino_width, heads = m->c.dino_heads;
    if (!m->encoded) {
        ops->query(m->be, &shape, a->q, e->k[l], e->v_of[l], a->probs, a->att);
        return;
    }
    const FvBlockWeights *w = &e->w->layer[l];
    const real *n = fv_encoded_at(m, m->encoded, l * frames * fv_keys(m) * d);
    real *absorbed = p->absorbed + l * frames * heads * d, *pooled = m->query.pooled;
    ops->head_linear_back(m->be, frames, heads, d, d / heads, w->k_w.w, a->q, absorbed);
    ops->query(m->be, &shape, absorbed, n, n, a->probs, pooled);
    ops->head_linear(m->be, frames, heads, d, d / heads, pooled, w->v_w.w, w->v_b.w, a->att);
}

static void deep_forward(FvModel *m, FvQueryPass *p) {
    const FvOps *ops = m->be->ops;
    const FvEncoder *e = &m->encoder;
    size_t frames = fv_frames(m), d = m->c.dino_width, layers = m->c.dino_layers;
    for (size_t l = 0; l < layers; l++) {
        const FvBlockWeights *w = &e->w->layer[l];
        const FvBlockActs *a = &p->act[l];
        ops->layernorm(m->be, frames, d, FV_LAYER_NORM_EPS, a->x, w->norm1_w.w, w->norm1_b.w, a->n1,
                       a->mean1, a->rstd1);
        ops->linear(m->be, frames, d, d, a->n1, w->q_w.w, w->q_b.w, a->q);
        attend(m, p, l);
        ops->linear(m->be, frames, d, d, a->att, w->o_w.w, w->o_b.w, a->o);
        ops->residual(m->be, frames, d, a->x, w->scale1.w, a->o, a->mid);
        fv_block_mlp(m->be, &e->v, w, a, frames, l + 1 < layers ? p->act[l + 1].x : p->last);
    }
    ops->layernorm(m->be, frames, d, FV_LAYER_NORM_EPS, p->last, e->w->norm_w.w, e->w->norm_b.w,
                   p->norm, p->mean, p->rstd);
}

static const real *features_of(const FvModel *m) {
    return m->encoded ? m->encoded : m->encoder.features;
}

void fv_query_forward(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    FvQueryPart *q = &m->query;
    FvQueryPass *p = &q->pass[pass];
    size_t frames = fv_frames(m), d = m->c.dino_width;
    ops->linear(m->be, frames, m->c.query_width, d, p->u, q->in_w.w, NULL, p->q0);
    if (m->c.deep) {
        deep_forward(m, p);
    } else {
        FvQuery shape = query_shape(m);
        const real *features = features_of(m);
        ops->query(m->be, &shape, p->q0, features, features, p->probs, p->pooled);
    }
    ops->linear(m->be, frames, d, d, m->c.deep ? p->norm : p->pooled, q->out_w.w, q->out_b.w, p->z);
}

/* Gradient of a->att in q->dn -> of a->q in q->dq, layer l. */
static void attend_back(FvModel *m, const FvQueryPass *p, size_t l, const real *dprobs) {
    const FvOps *ops = m->be->ops;
    const FvEncoder *e = &m->encoder;
    const FvBlockActs *a = &p->act[l];
    FvQueryPart *q = &m->query;
    FvQuery shape = query_shape(m);
    size_t frames = fv_frames(m), d = m->c.dino_width, heads = m->c.dino_heads;
    if (!m->encoded) {
        ops->query_back(m->be, &shape, a->q, e->k[l], e->v_of[l], a->probs, q->dn, dprobs, q->dq,
                        e->dk[l], e->dv[l]);
        return;
    }
    const FvBlockWeights *w = &e->w->layer[l];
    const real *n = fv_encoded_at(m, m->encoded, l * frames * fv_keys(m) * d);
    const real *absorbed = p->absorbed + l * frames * heads * d;
    ops->head_linear_back(m->be, frames, heads, d, d / heads, w->v_w.w, q->dn, q->dpooled);
    ops->query_back(m->be, &shape, absorbed, n, n, a->probs, q->dpooled, dprobs, q->dabsorbed, NULL,
                    NULL);
    ops->head_linear(m->be, frames, heads, d, d / heads, q->dabsorbed, w->k_w.w, NULL, q->dq);
}

/* q->dx: gradient of the token after the last block on entry, of q0 on return. */
static void deep_backward(FvModel *m, FvQueryPass *p, const real *dprobs) {
    const FvOps *ops = m->be->ops;
    const FvEncoder *e = &m->encoder;
    FvQueryPart *q = &m->query;
    size_t frames = fv_frames(m), d = m->c.dino_width, layers = m->c.dino_layers;
    for (size_t l = layers; l-- > 0;) {
        const FvBlockWeights *w = &e->w->layer[l];
        const FvBlockActs *a = &p->act[l];
        fv_block_mlp_back(m->be, &e->v, w, a, frames, q->dx, q->dn, q->df);
        ops->residual_back(m->be, frames, d, w->scale1.w, a->o, q->dx, q->da, w->scale1.g);
        ops->linear_back(m->be, frames, d, d, a->att, w->o_w.w, q->da, q->dn, false, w->o_w.g,
                         w->o_b.g);
        attend_back(m, p, l, l + 1 == layers ? dprobs : NULL);
        ops->linear_back(m->be, frames, d, d, a->n1, w->q_w.w, q->dq, q->dn, false, w->q_w.g,
                         w->q_b.g);
        ops->layernorm_back(m->be, frames, d, a->x, w->norm1_w.w, a->mean1, a->rstd1, q->dn, q->dx,
                            true, w->norm1_w.g, w->norm1_b.g);
    }
}

void fv_query_backward(FvModel *m, FvPass pass, const real *dprobs) {
    const FvOps *ops = m->be->ops;
    const FvEncoder *e = &m->encoder;
    FvQueryPart *q = &m->query;
    FvQueryPass *p = &q->pass[pass];
    size_t frames = fv_frames(m), d = m->c.dino_width;
    if (m->c.deep) {
        ops->linear_back(m->be, frames, d, d, p->norm, q->out_w.w, q->dz, q->dn, false, q->out_w.g,
                         q->out_b.g);
        ops->layernorm_back(m->be, frames, d, p->last, e->w->norm_w.w, p->mean, p->rstd, q->dn,
                            q->dx, false, e->w->norm_w.g, e->w->norm_b.g);
        deep_backward(m, p, dprobs);
    } else {
        FvQuery shape = query_shape(m);
        ops->linear_back(m->be, frames, d, d, p->pooled, q->out_w.w, q->dz, q->dn, false,
                         q->out_w.g, q->out_b.g);
        const real *features = features_of(m);
        ops->query_back(m->be, &shape, p->q0, features, features, p->probs, q->dn, dprobs, q->dx,
                        e->dfeatures, e->dfeatures);
    }
    ops->linear_back(m->be, frames, m->c.query_width, d, p->u, q->in_w.w, q->dx, q->du, false,
                     q->in_w.g, NULL);
}
