#include "model/config.h"

#include <math.h>

static FvStatus check_counts(const FvModelConfig *c, FvError *err) {
    const struct {
        const char *name;
        size_t value;
    } counts[] = {{"clips per rank", c->clips},
                  {"frames", c->frames},
                  {"image_size", c->size},
                  {"text rows", c->max_text},
                  {"patch", c->patch},
                  {"dino_width", c->dino_width},
                  {"dino_heads", c->dino_heads},
                  {"dino_layers", c->dino_layers},
                  {"dino_mlp", c->dino_mlp},
                  {"lm_width", c->lm_width},
                  {"lm_layers", c->lm_layers},
                  {"lm_heads", c->lm_heads},
                  {"lm_kv_heads", c->lm_kv_heads},
                  {"lm_mlp", c->lm_mlp},
                  {"lm_vocab", c->lm_vocab},
                  {"query_width", c->query_width},
                  {"head_width", c->head_width},
                  {"film_width", c->film_width}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value == 0)
            return FV_FAIL(err, FV_USAGE, "%s 0: must be at least 1", counts[i].name);
    return FV_OK;
}

static FvStatus check_shapes(const FvModelConfig *c, FvError *err) {
    if (c->size % FV_LATENT_STRIDE != 0)
        return FV_FAIL(err, FV_USAGE, "image_size %zu: must be a multiple of %d", c->size,
                       FV_LATENT_STRIDE);
    if (c->patch > c->size)
        return FV_FAIL(err, FV_USAGE, "patch %zu: does not fit into image_size %zu", c->patch,
                       c->size);
    if (c->dino_width % c->dino_heads != 0)
        return FV_FAIL(err, FV_USAGE, "dino_width %zu: must be a multiple of dino_heads %zu",
                       c->dino_width, c->dino_heads);
    if (c->lm_width % c->lm_heads != 0)
        return FV_FAIL(err, FV_USAGE, "lm_width %zu: must be a multiple of lm_heads %zu",
                       c->lm_width, c->lm_heads);
    size_t head = c->lm_width / c->lm_heads;
    if (head % 2 != 0) /* rotary positions turn pairs of values */
        return FV_FAIL(err, FV_USAGE,
                       "lm_width %zu / lm_heads %zu gives heads of width %zu: must be even",
                       c->lm_width, c->lm_heads, head);
    if (c->lm_heads % c->lm_kv_heads != 0)
        return FV_FAIL(err, FV_USAGE, "lm_heads %zu: must be a multiple of lm_kv_heads %zu",
                       c->lm_heads, c->lm_kv_heads);
    return FV_OK;
}

/* The comparisons are written so that NaN fails them. */
static FvStatus check_numbers(const FvModelConfig *c, FvError *err) {
    if (!(c->temperature > 0 && isfinite(c->temperature)))
        return FV_FAIL(err, FV_USAGE, "temperature %g: must be above 0", c->temperature);
    if (!isfinite(c->contrastive))
        return FV_FAIL(err, FV_USAGE, "contrastive %g: must be finite", c->contrastive);
    if (!(c->entropy_margin >= 0 && isfinite(c->entropy_margin)))
        return FV_FAIL(err, FV_USAGE, "entropy_margin %g: must not be negative", c->entropy_margin);
    if (!(c->lambda_coarse >= 0 && isfinite(c->lambda_coarse)))
        return FV_FAIL(err, FV_USAGE, "lambda_coarse %g: must not be negative", c->lambda_coarse);
    if (!(c->lm_rope_theta > 0 && isfinite(c->lm_rope_theta)))
        return FV_FAIL(err, FV_USAGE, "lm_rope_theta %g: must be above 0", c->lm_rope_theta);
    if (!(c->lm_rms_eps >= 0 && isfinite(c->lm_rms_eps)))
        return FV_FAIL(err, FV_USAGE, "lm_rms_eps %g: must not be negative", c->lm_rms_eps);
    return FV_OK;
}

/* Without visual tokens there are no features to compare and no attention to sharpen. */
static FvStatus check_vision(const FvModelConfig *c, FvError *err) {
    if (!c->vision && c->contrastive != 0)
        return FV_FAIL(err, FV_USAGE, "vision off with contrastive %g: set contrastive to 0",
                       c->contrastive);
    if (!c->vision && c->entropy_margin > 0)
        return FV_FAIL(err, FV_USAGE, "vision off with entropy_margin %g: set entropy_margin to 0",
                       c->entropy_margin);
    return FV_OK;
}

FvStatus fv_model_config_check(const FvModelConfig *c, FvError *err) {
    FV_TRY(check_counts(c, err));
    FV_TRY(check_shapes(c, err));
    FV_TRY(check_numbers(c, err));
    return check_vision(c, err);
}
