/* A step: the batch, the coarse and the fine pass with their losses, the controls, the gradients
 * through both passes, the update. model.h says what each is; here is their order and what goes
 * from one part to the next. */
#include "model/parts.h"

static const double visual_scale = 0.14; /* deviation of a visual token's values */
static const double hinge_weight = 0.1;

/* --- forward -------------------------------------------------------------------------------- */

/* Which rows of the texts are padding, and their tokens, right-aligned; without captions the one
 * learned vector stands in all rows of every clip. */
static void load_text(FvModel *m, const FvBatch *batch) {
    const FvOps *ops = m->be->ops;
    size_t clips = m->c.clips, text = m->c.max_text;
    int32_t *first = m->host_rows, *tokens = first + clips;
    if (!m->c.captions)
        return;
    for (size_t b = 0; b < clips; b++) {
        size_t count = (size_t)batch->token_count[b], padding = text - count;
        first[b] = (int32_t)padding;
        for (size_t r = 0; r < text; r++)
            tokens[b * text + r] = r < padding ? -1 : batch->tokens[b * text + r - padding];
    }
    ops->upload(m->be, m->lm.first, first, clips * sizeof *first);
    ops->upload(m->be, m->rows.tokens, tokens, clips * text * sizeof *tokens);
}

/* Outputs of block i (a layer, or the features) of the clip that was encoded last. */
static const real *encoded_block(const FvModel *m, size_t i) {
    return m->c.deep ? m->encoder.act[i].n1 : m->encoder.features;
}

static void copy_encoded(FvModel *m, size_t n, const real *from, real *to) {
    const FvOps *ops = m->be->ops;
    (m->c.deep ? ops->copy_operands : ops->copy)(m->be, n, from, to);
}

/* Clip b's outputs, stored or made now. A clip is encoded alone, at one place in memory: its bits
 * do not depend on the batch, nor on who stored them. */
static FvStatus load_encoded(FvModel *m, const FvBatch *batch, size_t b, FvError *err) {
    const FvOps *ops = m->be->ops;
    size_t pixels = m->c.frames * m->c.size * m->c.size * 3,
           blocks = m->c.deep ? m->c.dino_layers : 1;
    size_t n = fv_encoder_cache_clip_values(&m->c) / blocks;
    const real *stored = m->cache ? fv_encoder_cache_find(m->cache, batch->number[b]) : NULL;
    if (!stored) {
        ops->upload(m->be, m->pixels, batch->pixels + b * pixels, pixels);
        fv_encoder_forward(&m->encoder, m->be, m->pixels);
    }
    for (size_t i = 0; i < blocks; i++)
        copy_encoded(m, n, stored ? fv_encoded_at(m, stored, i * n) : encoded_block(m, i),
                     fv_encoded_at(m, m->encoded, (i * m->c.clips + b) * n));
    real *room = m->cache && !stored ? fv_encoder_cache_reserve(m->cache, batch->number[b]) : NULL;
    if (!room)
        return FV_OK;
    for (size_t i = 0; i < blocks; i++)
        copy_encoded(m, n, encoded_block(m, i), fv_encoded_at(m, room, i * n));
    FV_TRY(ops->sync(m->be, err));
    fv_encoder_cache_publish(m->cache, batch->number[b]);
    return FV_OK;
}

FvStatus fv_model_load(FvModel *m, const FvBatch *batch, FvError *err) {
    const FvOps *ops = m->be->ops;
    size_t frames = fv_frames(m);
    ops->upload(m->be, m->head.targets, batch->latents,
                frames * fv_latent_count(&m->c) * sizeof(real));
    load_text(m, batch);
    if (!fv_encoder_stored(&m->c))
        ops->upload(m->be, m->pixels, batch->pixels, frames * m->c.size * m->c.size * 3);
    for (size_t b = 0; fv_encoder_stored(&m->c) && b < m->c.clips; b++)
        FV_TRY(load_encoded(m, batch, b, err));
    return FV_OK;
}

void fv_model_use_cache(FvModel *m, FvEncoderCache *cache) {
    m->cache = cache;
}

static void run_text(FvModel *m) {
    const FvOps *ops = m->be->ops;
    size_t rows = m->c.clips * m->c.max_text, w = m->c.lm_width;
    real *x = m->lm.text.act[0].x;
    if (m->c.captions) {
        ops->zero(m->be, x, rows * w * sizeof(real)); /* padding rows stay zero */
        ops->copy_rows(m->be, rows, w, m->lm.embed.w, m->rows.tokens, x, NULL, false);
    } else {
        ops->copy_rows(m->be, rows, w, m->no_text.w, m->rows.zeros, x, NULL, false);
    }
    fv_lm_text(m);
}

void fv_model_encode(FvModel *m) {
    if (m->c.vision && !fv_encoder_stored(&m->c))
        fv_encoder_forward(&m->encoder, m->be, m->pixels);
    fv_head_prepare(m);
    if (m->c.share_text)
        run_text(m);
    if (m->c.share_convolutions)
        fv_head_share(m);
}

/* From the pass's queries to its visual tokens v. */
static void look(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    size_t frames = fv_frames(m), w = m->c.lm_width;
    if (!m->c.vision) {
        ops->zero(m->be, m->visual[pass], frames * w * sizeof(real));
        return;
    }
    const FvQueryPass *q = &m->query.pass[pass];
    fv_query_forward(m, pass);
    ops->linear(m->be, frames, m->c.dino_width, w, q->z, m->to_lm_w.w, m->to_lm_b.w,
                m->visual_in[pass]);
    ops->rescale(m->be, frames, w, visual_scale, m->visual_in[pass], m->visual[pass],
                 m->visual_std[pass]);
}

static void measure_entropy(FvModel *m, FvPass pass) {
    m->be->ops->entropy(m->be, fv_frames(m), m->c.deep ? m->c.dino_heads : 1, fv_keys(m),
                        m->query.pass[pass].probs, m->metrics.entropy[pass]);
}

/* From the visual tokens to the predictions and their losses [F]. */
static void predict(FvModel *m, FvPass pass, double *loss) {
    const FvOps *ops = m->be->ops;
    size_t frames = fv_frames(m), w = m->c.lm_width;
    real *x = m->lm.pass[pass].act[0].x;
    if (!m->c.share_text)
        run_text(m);
    if (!m->c.share_convolutions)
        fv_head_share(m);
    ops->copy_rows(m->be, m->c.clips, w, m->mode[pass].w, m->rows.zeros, x, m->rows.mode, false);
    ops->copy_rows(m->be, frames, w, m->visual[pass], NULL, x, m->rows.visual, false);
    fv_lm_forward(m, pass);
    ops->copy_rows(m->be, frames, w, m->lm.pass[pass].h, m->rows.before, m->head.pass[pass].hidden,
                   NULL, false);
    fv_head_forward(m, pass);
    ops->mse(m->be, frames, fv_latent_count(&m->c), m->head.pass[pass].prediction, m->head.targets,
             loss);
}

static size_t choices(const FvModel *m) {
    return m->c.clips * (m->c.frames - 1);
}

/* The queries chosen for the clips of this batch: behind slot 0 of the bank. */
static real *chosen_queries(const FvModel *m) {
    return m->bank + (m->c.frames - 1) * m->c.query_width;
}

void fv_model_coarse(FvModel *m) {
    const FvOps *ops = m->be->ops;
    size_t frames = fv_frames(m), w = m->c.lm_width;
    if (m->c.vision)
        ops->copy_rows(m->be, frames, m->c.query_width, m->query.fixed.w, m->rows.zeros,
                       m->query.pass[FV_COARSE].u, NULL, false);
    look(m, FV_COARSE);
    predict(m, FV_COARSE, m->metrics.loss[FV_COARSE]);
    if (m->c.vision)
        measure_entropy(m, FV_COARSE);
    if (!m->c.vision || m->c.frames == 1)
        return;
    ops->copy_rows(m->be, choices(m), w, m->lm.pass[FV_COARSE].h, m->rows.chooser, m->choosers,
                   NULL, false);
    ops->linear(m->be, choices(m), w, m->c.query_width, m->choosers, m->to_query_w.w,
                m->to_query_b.w, chosen_queries(m));
}

static void fine_with(FvModel *m, const real *queries, double *loss) {
    const FvOps *ops = m->be->ops;
    if (m->c.vision) {
        real *u = m->query.pass[FV_FINE].u;
        ops->copy_rows(m->be, m->c.clips, m->c.query_width, m->query.init.w, m->rows.zeros, u,
                       m->rows.initial, false);
        ops->copy_rows(m->be, choices(m), m->c.query_width, queries, NULL, u, m->rows.chosen,
                       false);
    }
    look(m, FV_FINE);
    predict(m, FV_FINE, loss);
}

void fv_model_fine(FvModel *m) {
    const FvOps *ops = m->be->ops;
    const FvMetrics *t = &m->metrics;
    fine_with(m, chosen_queries(m), t->loss[FV_FINE]);
    if (!m->c.vision)
        return;
    measure_entropy(m, FV_FINE);
    ops->cosine(m->be, fv_frames(m), m->c.dino_width, m->query.pass[FV_COARSE].z,
                m->query.pass[FV_FINE].z, t->cosine);
    ops->entropy_hinge(m->be, m->c.clips, m->c.frames, t->entropy[FV_FINE], t->entropy[FV_COARSE],
                       m->c.entropy_margin, hinge_weight, t->hinge, t->dentropy[FV_FINE],
                       t->dentropy[FV_COARSE]);
}

/* --- controls ------------------------------------------------------------------------------- */

void fv_model_fine_other(FvModel *m) {
    const FvOps *ops = m->be->ops;
    const FvMetrics *t = &m->metrics;
    size_t frames = fv_frames(m), latent = fv_latent_count(&m->c);
    real *copy = m->head.da; /* free outside the backward pass */
    fine_with(m, m->bank, t->loss_other);
    ops->zero(m->be, copy, frames * latent * sizeof(real));
    ops->copy_rows(m->be, frames, latent, m->head.targets, m->head.shift, copy, NULL, false);
    ops->mse(m->be, frames, latent, copy, m->head.targets, t->loss_copy);
}

void fv_model_keep_last(FvModel *m) {
    size_t one = (m->c.frames - 1) * m->c.query_width;
    if (one)
        m->be->ops->copy(m->be, one, m->bank + m->c.clips * one, m->bank);
}

/* --- backward ------------------------------------------------------------------------------- */

/* Gradient of the visual tokens in lm.dx -> queries' gradient in query.du. */
static void look_back(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    FvQueryPart *q = &m->query;
    size_t frames = fv_frames(m), d = m->c.dino_width, w = m->c.lm_width;
    ops->copy_rows(m->be, frames, w, m->lm.dx, m->rows.visual, m->dvisual, NULL, false);
    ops->rescale_back(m->be, frames, w, visual_scale, m->visual_in[pass], m->visual_std[pass],
                      m->dvisual, m->dvisual_in);
    ops->linear_back(m->be, frames, d, w, q->pass[pass].z, m->to_lm_w.w, m->dvisual_in, q->dz,
                     false, m->to_lm_w.g, m->to_lm_b.g);
    if (m->c.contrastive != 0 && pass == FV_FINE) {
        ops->zero(m->be, m->dz_coarse, frames * d * sizeof(real));
        ops->cosine_back(m->be, frames, d, m->c.contrastive / (double)frames, q->pass[FV_COARSE].z,
                         q->pass[FV_FINE].z, m->dz_coarse, q->dz);
    } else if (m->c.contrastive != 0) {
        ops->add(m->be, frames * d, m->dz_coarse, q->dz);
    }
    if (m->c.entropy_margin > 0)
        ops->entropy_back(m->be, frames, m->c.deep ? m->c.dino_heads : 1, fv_keys(m),
                          q->pass[pass].probs, m->metrics.dentropy[pass], q->dprobs);
    fv_query_backward(m, pass, m->c.entropy_margin > 0 ? q->dprobs : NULL);
}

/* The fine pass's queries were chosen by the coarse pass: leaves dchoosers for it. */
static void choose_back(FvModel *m) {
    const FvOps *ops = m->be->ops;
    size_t w = m->c.lm_width, q = m->c.query_width;
    ops->copy_rows(m->be, m->c.clips, q, m->query.du, m->rows.initial, m->query.init.g,
                   m->rows.zeros, true);
    if (m->c.frames == 1)
        return;
    ops->copy_rows(m->be, choices(m), q, m->query.du, m->rows.chosen, m->dchosen, NULL, false);
    ops->linear_back(m->be, choices(m), w, q, m->choosers, m->to_query_w.w, m->dchosen,
                     m->dchoosers, false, m->to_query_w.g, m->to_query_b.g);
}

static void pass_back(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    size_t frames = fv_frames(m), w = m->c.lm_width, rows = m->c.clips * (1 + m->c.frames);
    double weight = pass == FV_FINE ? 1.0 : m->c.lambda_coarse;
    fv_head_backward(m, pass, weight / (double)frames,
                     m->c.share_convolutions && pass == FV_COARSE);
    ops->zero(m->be, m->lm.dx, rows * w * sizeof(real));
    ops->copy_rows(m->be, frames, w, m->head.dhidden, NULL, m->lm.dx, m->rows.before, false);
    if (pass == FV_COARSE && m->c.vision && m->c.frames > 1)
        ops->copy_rows(m->be, choices(m), w, m->dchoosers, NULL, m->lm.dx, m->rows.chooser, true);
    fv_lm_backward(m, pass);
    ops->copy_rows(m->be, m->c.clips, w, m->lm.dx, m->rows.mode, m->mode[pass].g, m->rows.zeros,
                   true);
    if (!m->c.vision)
        return;
    look_back(m, pass);
    if (pass == FV_FINE)
        choose_back(m);
    else
        ops->copy_rows(m->be, frames, m->c.query_width, m->query.du, NULL, m->query.fixed.g,
                       m->rows.zeros, true);
}

/* last: no gradient is added to what the text trains after this. */
static void text_back(FvModel *m, bool last) {
    const FvOps *ops = m->be->ops;
    size_t text = m->c.clips * m->c.max_text, w = m->c.lm_width;
    fv_lm_text_backward(m, last);
    if (!m->c.captions)
        ops->copy_rows(m->be, text, w, m->lm.dx, NULL, m->no_text.g, m->rows.zeros, true);
    else if (m->lm.embed.g)
        ops->copy_rows(m->be, text, w, m->lm.dx, NULL, m->lm.embed.g, m->rows.tokens, true);
    if (last)
        fv_ready_from(m, m->c.captions ? m->lm.embed.g : m->no_text.g);
}

/* What the passes share is differentiated once, from the sum of their gradients, or after each. */
void fv_model_backward(FvModel *m) {
    static const FvPass order[FV_PASSES] = {FV_FINE, FV_COARSE};
    m->be->ops->zero(m->be, m->params.g, m->params.trained_memory * sizeof(real));
    for (size_t i = 0; i < FV_PASSES; i++) {
        bool first = i == 0, last = i + 1 == FV_PASSES;
        if (first || !m->c.share_text)
            fv_lm_text_clear(m);
        pass_back(m, order[i]);
        if (last || !m->c.share_convolutions)
            fv_head_share_backward(m);
        if (last)
            fv_ready_from(m, m->lm.norm.g);
        if (last || !m->c.share_text)
            text_back(m, last);
    }
    if (m->encoder.trained)
        fv_encoder_backward(&m->encoder, m->be);
}

void fv_model_norm(FvModel *m) {
    m->be->ops->norm(m->be, m->params.trained_memory, m->params.g, m->metrics.norm);
}

void fv_model_rates(FvModel *m, const FvAdamW *adamw) {
    double rates[FV_RATES];
    fv_adamw_rates(adamw, rates);
    m->be->ops->upload(m->be, m->metrics.rates, rates, sizeof rates);
}

void fv_model_update(FvModel *m, const FvAdamW *adamw) {
    fv_params_update(&m->params, m->be, adamw, m->metrics.rates, m->metrics.norm);
}
