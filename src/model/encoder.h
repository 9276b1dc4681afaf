/* The DINOv2 vision transformer over the patches (Oquab et al. 2023; weights and names as in the
 * Hugging Face checkpoint facebook/dinov2-small), forward and backward.
 *
 * Weights stand apart from their uses: the study reads one encoder at one image size, pretraining
 * runs the same weights over crops of two sizes. Names: x stream, n its norm, q k v query key
 * value; d<name> the gradient of <name>. */
#ifndef FV_MODEL_ENCODER_H
#define FV_MODEL_ENCODER_H

#include "base/memory.h"
#include "model/params.h"

#define FV_LAYER_NORM_EPS 1e-6 /* DINOv2's config.json */

typedef struct FvVit {
    size_t frames, size, patch; /* images at once, pixels per side of an image and of a patch */
    size_t width, heads, layers, mlp;
} FvVit;

static inline size_t fv_vit_patches(const FvVit *v) {
    return (v->size / v->patch) * (v->size / v->patch);
}
/* CLS and the patches */
static inline size_t fv_vit_tokens(const FvVit *v) {
    return fv_vit_patches(v) + 1;
}

typedef struct FvBlockWeights { /* one pre-norm ViT block with LayerScale */
    FvWeight norm1_w, norm1_b, q_w, q_b, k_w, k_b, v_w, v_b, o_w, o_b, scale1;
    FvWeight norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b, scale2;
} FvBlockWeights;

typedef struct FvEncoderWeights {
    FvWeight cls, mask, pos, patch_w, patch_b, norm_w, norm_b;
    FvBlockWeights *layer; /* [layers] */
} FvEncoderWeights;

/* What one block keeps of `rows` tokens for its backward pass. x is the block's input; out is the
 * next block's x. k, v and probs as the kind of attention needs them. n1, att, n2 and f2 are
 * operand tensors, as is `patches` below. */
typedef struct FvBlockActs {
    real *x, *n1, *mean1, *rstd1, *q, *probs, *att, *o, *mid, *n2, *mean2, *rstd2, *f1, *f2, *m;
} FvBlockActs;

/* One use of the weights. */
typedef struct FvEncoder {
    FvVit v;
    const FvEncoderWeights *w;
    FvWeight pos; /* [tokens, width]: the weights' position table, or one resized from it */
    bool trained;
    bool whole; /* compute the last block and `features`; else its keys and values only */
    bool tail;  /* compute the last block whole though nobody reads it */
    bool norms; /* not trained: keep n1 of every layer, which keys and values follow from, not these
                 */
    /* Patches whose embedding is replaced by the mask token (pretraining), or none: their rows in
     * [F * N], a zero for each, and a row [D] of zeros. */
    size_t masked;
    int32_t *masked_rows, *masked_zeros;
    real *blank;
    FvBlockActs *act; /* [layers]; entries share memory where nothing is differentiated */
    real **k, **v_of, **dk, **dv;        /* [layers] of [F, tokens, D]; dk, dv when trained */
    real *patches, *embedded;            /* [F * N, 3 P P], [F * N, D] */
    real *last, *features, *mean, *rstd; /* whole: x after the last block, LN_f of it */
    real *dfeatures;
    real *dx, *dn, *dq, *da, *df; /* scratch of the backward pass */
    /* NULL, or told in the backward pass that the gradients from g on are final */
    void (*ready)(void *context, const real *g);
    void *ready_context;
} FvEncoder;

/* The tables with one entry per layer; FV_DEVICE when memory is out. */
FvStatus fv_encoder_weights_create(FvEncoderWeights *, size_t layers, FvError *);
void fv_encoder_weights_free(FvEncoderWeights *);

/* Declares the parameters under prefix + Hugging Face name; without `masks` the mask token is not
 * used. */
void fv_encoder_params(FvEncoderWeights *, const FvVit *, FvRole, bool masks, const char *prefix,
                       FvParams *);

/* v, w, trained, whole, tail, norms set by the caller before; `pos` after the weights are bound. */
FvStatus fv_encoder_create(FvEncoder *, FvError *);
void fv_encoder_free(FvEncoder *);
void fv_encoder_carve(FvEncoder *, FvArena *);

/* pixels uint8 [frames, size, size, 3] in the backend's memory -> keys and values of every layer,
 * or n1 if norms, and `features` if whole. */
void fv_encoder_forward(FvEncoder *, FvBackend *, const uint8_t *pixels);
/* Starts from dk, dv (which query passes have accumulated) and, if whole, dfeatures; the forward
 * pass zeroes them. */
void fv_encoder_backward(FvEncoder *, FvBackend *);

void fv_block_carve(const FvVit *, FvArena *, FvBlockActs *, size_t rows, size_t probs);
/* The second half of a block: y = mid + scale2 * MLP(LN2 mid). */
void fv_block_mlp(FvBackend *, const FvVit *, const FvBlockWeights *, const FvBlockActs *,
                  size_t rows, real *y);
/* dx holds the gradient of y on entry and of mid on return; df [rows, mlp], dn [rows, D] scratch.
 */
void fv_block_mlp_back(FvBackend *, const FvVit *, const FvBlockWeights *, const FvBlockActs *,
                       size_t rows, real *dx, real *dn, real *df);

#endif
