/* The prediction head: convolutions over the previous frame's latents, modulated by the hidden
 * state (FiLM: Perez et al. 2018), predict the frame's latents. The convolutions before the
 * modulation read the same latents in both passes: one run serves both. */
#include <stdio.h>

#include "model/parts.h"

/* channels in and out of the six convolutions, in units of head_width (0: latent channels) */
static const size_t units[6][2] = {{0, 1}, {1, 2}, {2, 4}, {4, 2}, {2, 1}, {1, 0}};

static size_t channels(const FvModel *m, size_t unit) {
    return unit ? unit * m->c.head_width : FV_LATENT_CHANNELS;
}

static FvConv conv_shape(const FvModel *m, size_t i) {
    size_t side = fv_latent_side(&m->c);
    return (FvConv){.frames = fv_frames(m),
                    .height = side,
                    .width = side,
                    .in = channels(m, units[i][0]),
                    .out = channels(m, units[i][1]),
                    .stride = 1};
}

void fv_head_params(FvModel *m, FvParams *table) {
    const FvModelConfig *c = &m->c;
    FvHead *h = &m->head;
    size_t side = fv_latent_side(c);
    char name[FV_PARAM_NAME];
    for (size_t i = 0; i < 6; i++) {
        size_t in = channels(m, units[i][0]), out = channels(m, units[i][1]);
        double bound = 1.0 / __builtin_sqrt(9.0 * (double)in);
        snprintf(name, sizeof name, "head.conv%zu.weight", i + 1);
        fv_params_add(table, &h->conv_w[i], FV_TRAINED, FV_INIT_UNIFORM, bound, name,
                      (size_t[]){out, in, 3, 3}, true);
        snprintf(name, sizeof name, "head.conv%zu.bias", i + 1);
        fv_params_add(table, &h->conv_b[i], FV_TRAINED, FV_INIT_UNIFORM, bound, name,
                      (size_t[]){out, 0}, false);
    }
    double b1 = 1.0 / __builtin_sqrt((double)c->lm_width);
    double b2 = 1.0 / __builtin_sqrt((double)c->film_width);
    size_t w = c->film_width, gb = 8 * c->head_width;
    fv_params_add(table, &h->film1_w, FV_TRAINED, FV_INIT_UNIFORM, b1, "head.film1.weight",
                  (size_t[]){w, c->lm_width, 0}, false);
    fv_params_add(table, &h->film1_b, FV_TRAINED, FV_INIT_UNIFORM, b1, "head.film1.bias",
                  (size_t[]){w, 0}, false);
    fv_params_add(table, &h->film2_w, FV_TRAINED, FV_INIT_UNIFORM, b2, "head.film2.weight",
                  (size_t[]){gb, w, 0}, false);
    fv_params_add(table, &h->film2_b, FV_TRAINED, FV_INIT_UNIFORM, b2, "head.film2.bias",
                  (size_t[]){gb, 0}, false);
    fv_params_add(table, &h->latent_init, FV_TRAINED, FV_INIT_CONSTANT, 0, "latent_init",
                  (size_t[]){FV_LATENT_CHANNELS, side, side, 0}, true);
}

void fv_head_carve(FvModel *m, FvArena *arena) {
    FvHead *h = &m->head;
    size_t frames = fv_frames(m), at = fv_mul(frames, fv_positions(m)), c = m->c.head_width;
    h->targets = fv_take(arena, fv_mul(at, FV_LATENT_CHANNELS));
    h->previous = fv_take(arena, fv_mul(at, FV_LATENT_CHANNELS));
    h->c1 = fv_take(arena, fv_mul(at, c));
    h->g1 = fv_take_operand(arena, fv_mul(at, c));
    h->c2 = fv_take(arena, fv_mul3(at, 2, c));
    h->g2 = fv_take_operand(arena, fv_mul3(at, 2, c));
    h->base = fv_take(arena, fv_mul3(at, 4, c));
    for (int p = 0; p < FV_PASSES; p++) {
        FvHeadPass *pass = &h->pass[p];
        pass->hidden = fv_take(arena, fv_mul(frames, m->c.lm_width));
        pass->film_in = fv_take(arena, fv_mul(frames, m->c.film_width));
        pass->film_mid = fv_take_operand(arena, fv_mul(frames, m->c.film_width));
        pass->gb = fv_take(arena, fv_mul3(frames, 8, c));
        pass->mixed = fv_take(arena, fv_mul3(at, 4, c));
        pass->c4 = fv_take(arena, fv_mul3(at, 2, c));
        pass->g4 = fv_take_operand(arena, fv_mul3(at, 2, c));
        pass->c5 = fv_take(arena, fv_mul(at, c));
        pass->g5 = fv_take_operand(arena, fv_mul(at, c));
        pass->prediction = fv_take(arena, fv_mul(at, FV_LATENT_CHANNELS));
    }
    h->dhidden = fv_take(arena, fv_mul(frames, m->c.lm_width));
    h->dbase = fv_take(arena, fv_mul3(at, 4, c));
    const size_t uses[] = {fv_mul(frames, m->c.film_width), fv_mul3(frames, 8, c),
                           fv_mul3(at, 4, c), fv_mul(at, FV_LATENT_CHANNELS)};
    size_t most = 0;
    for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
        most = uses[i] > most ? uses[i] : most;
    h->da = fv_take(arena, most);
    h->db = fv_take(arena, most);
    h->shift = fv_take_bytes(arena, fv_mul(frames, sizeof(int32_t)));
}

static void conv(FvModel *m, size_t i, const real *x, real *y) {
    FvConv shape = conv_shape(m, i);
    m->be->ops->conv(m->be, &shape, x, m->head.conv_w[i].w, m->head.conv_b[i].w, y);
}

static void conv_back(FvModel *m, size_t i, const real *x, const real *dy, real *dx) {
    FvConv shape = conv_shape(m, i);
    const FvHead *h = &m->head;
    m->be->ops->conv_back(m->be, &shape, x, h->conv_w[i].w, dy, dx, false, h->conv_w[i].g,
                          h->conv_b[i].g);
}

void fv_head_prepare(FvModel *m) {
    const FvOps *ops = m->be->ops;
    FvHead *h = &m->head;
    size_t frames = fv_frames(m), latent = fv_latent_count(&m->c);
    ops->copy_rows(m->be, frames, latent, h->targets, h->shift, h->previous, NULL, false);
    ops->copy_rows(m->be, m->c.clips, latent, h->latent_init.w, m->rows.zeros, h->previous,
                   m->rows.initial, false);
}

void fv_head_share(FvModel *m) {
    const FvOps *ops = m->be->ops;
    FvHead *h = &m->head;
    size_t at = fv_frames(m) * fv_positions(m), c = m->c.head_width;
    conv(m, 0, h->previous, h->c1);
    ops->gelu(m->be, at * c, h->c1, h->g1);
    conv(m, 1, h->g1, h->c2);
    ops->gelu(m->be, at * 2 * c, h->c2, h->g2);
    conv(m, 2, h->g2, h->base);
}

void fv_head_forward(FvModel *m, FvPass pass) {
    const FvOps *ops = m->be->ops;
    FvHead *h = &m->head;
    FvHeadPass *p = &h->pass[pass];
    size_t frames = fv_frames(m), positions = fv_positions(m), at = frames * positions;
    size_t c = m->c.head_width, w = m->c.film_width;
    ops->linear(m->be, frames, m->c.lm_width, w, p->hidden, h->film1_w.w, h->film1_b.w, p->film_in);
    ops->gelu(m->be, frames * w, p->film_in, p->film_mid);
    ops->linear(m->be, frames, w, 8 * c, p->film_mid, h->film2_w.w, h->film2_b.w, p->gb);
    ops->film(m->be, frames, positions, 4 * c, h->base, p->gb, p->mixed);
    conv(m, 3, p->mixed, p->c4);
    ops->gelu(m->be, at * 2 * c, p->c4, p->g4);
    conv(m, 4, p->g4, p->c5);
    ops->gelu(m->be, at * c, p->c5, p->g5);
    conv(m, 5, p->g5, p->prediction);
}

void fv_head_backward(FvModel *m, FvPass pass, double scale, bool add) {
    const FvOps *ops = m->be->ops;
    FvHead *h = &m->head;
    FvHeadPass *p = &h->pass[pass];
    size_t frames = fv_frames(m), positions = fv_positions(m), at = frames * positions;
    size_t c = m->c.head_width, w = m->c.film_width;
    ops->mse_back(m->be, frames, fv_latent_count(&m->c), scale, p->prediction, h->targets, h->da);
    conv_back(m, 5, p->g5, h->da, h->db);
    ops->gelu_back(m->be, at * c, p->c5, h->db, h->db);
    conv_back(m, 4, p->g4, h->db, h->da);
    ops->gelu_back(m->be, at * 2 * c, p->c4, h->da, h->da);
    conv_back(m, 3, p->mixed, h->da, h->db);
    ops->film_back(m->be, frames, positions, 4 * c, h->base, p->gb, h->db, h->dbase, add, h->da);
    ops->linear_back(m->be, frames, w, 8 * c, p->film_mid, h->film2_w.w, h->da, h->db, false,
                     h->film2_w.g, h->film2_b.g);
    ops->gelu_back(m->be, frames * w, p->film_in, h->db, h->db);
    ops->linear_back(m->be, frames, m->c.lm_width, w, p->hidden, h->film1_w.w, h->db, h->dhidden,
                     false, h->film1_w.g, h->film1_b.g);
}

void fv_head_share_backward(FvModel *m) {
    const FvOps *ops = m->be->ops;
    FvHead *h = &m->head;
    size_t at = fv_frames(m) * fv_positions(m), c = m->c.head_width;
    conv_back(m, 2, h->g2, h->dbase, h->da);
    ops->gelu_back(m->be, at * 2 * c, h->c2, h->da, h->da);
    conv_back(m, 1, h->g1, h->da, h->db);
    ops->gelu_back(m->be, at * c, h->c1, h->db, h->db);
    conv_back(m, 0, h->previous, h->db, h->da);
    ops->copy_rows(m->be, m->c.clips, fv_latent_count(&m->c), h->da, m->rows.initial,
                   h->latent_init.g, m->rows.zeros, true);
}
