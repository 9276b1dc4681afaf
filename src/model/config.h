/* Sizes and switches of one model: what SPEC-level configuration becomes once scale, data and
 * rank sharding are resolved. */
#ifndef FV_MODEL_CONFIG_H
#define FV_MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

enum { FV_LATENT_CHANNELS = 4, FV_LATENT_STRIDE = 8 }; /* latents: [4, S/8, S/8] */

typedef struct FvModelConfig {
    /* one step of this rank */
    size_t clips;    /* the rank's share of the batch */
    size_t frames;   /* T */
    size_t size;     /* S, pixels; a multiple of 8 */
    size_t max_text; /* text rows of the LM sequence: longest caption, or 1 (no_text) */
    /* encoder */
    size_t patch, dino_width, dino_heads, dino_layers, dino_mlp;
    /* LM */
    size_t lm_width, lm_layers, lm_heads, lm_kv_heads, lm_mlp, lm_vocab;
    double lm_rope_theta, lm_rms_eps;
    /* query and head */
    size_t query_width, head_width, film_width;
    /* interventions */
    bool deep;     /* query_mode: deep, else shallow */
    bool captions; /* text: captions, else the learned no_text vector */
    bool vision;   /* false: visual tokens are zero */
    bool freeze_dino, freeze_lm;
    double temperature, contrastive, entropy_margin, lambda_coarse;
    size_t hard_attn_k; /* of this model's N + 1 keys; 0 is off */
    /* savings: the same numbers, but for rounding, from less work */
    bool skip_tail;          /* deep: of the last encoder layer nothing but what the queries read */
    bool share_text;         /* the text before the passes runs once for both */
    bool share_convolutions; /* those before the modulation likewise */
    bool cache_encoder;      /* freeze_dino: every clip is encoded by itself, and once where the
                                outputs can be kept */
} FvModelConfig;

static inline size_t fv_grid(const FvModelConfig *c) {
    return c->size / c->patch;
}
static inline size_t fv_patches(const FvModelConfig *c) {
    return fv_grid(c) * fv_grid(c);
}
static inline size_t fv_latent_side(const FvModelConfig *c) {
    return c->size / FV_LATENT_STRIDE;
}
/* values of one frame's latents */
static inline size_t fv_latent_count(const FvModelConfig *c) {
    return FV_LATENT_CHANNELS * fv_latent_side(c) * fv_latent_side(c);
}

/* The queries read stored outputs of the encoder. */
static inline bool fv_encoder_stored(const FvModelConfig *c) {
    return c->vision && c->freeze_dino && c->cache_encoder;
}

/* Refuses sizes that no model can have (heads that do not divide widths, zero layers, ...). */
FvStatus fv_model_config_check(const FvModelConfig *, FvError *);

#endif
