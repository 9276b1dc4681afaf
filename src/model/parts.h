/* Inside the model layer: the parts that model.c puts together. Each part declares its parameters,
 * carves its activations, and runs forward and backward. Rows are frames or tokens, F = clips * T.
 * Names: x stream, n its norm, q k v query key value; d<name> the gradient of <name>. Members
 * marked so are operand tensors (backend.h). */
#ifndef FV_MODEL_PARTS_H
#define FV_MODEL_PARTS_H

#include "model/encoder.h"
#include "model/encoder_cache.h"
#include "model/model.h"

/* --- query.c -------------------------------------------------------------------------------- */

typedef struct FvQueryPass {
    real *u;                         /* [F, Q] */
    FvBlockActs *act;                /* deep: [dino_layers], rows F */
    real *q0;                        /* [F, D] */
    real *last, *norm, *mean, *rstd; /* deep: after the last block, LN_f of it (operand) */
    real *probs, *pooled; /* shallow (pooled: operand); deep: probs is the last layer's */
    real *absorbed; /* deep, stored: [dino_layers][F, heads * D] queries of the layers' inputs */
    real *z;        /* [F, D] */
} FvQueryPass;

typedef struct FvQueryPart {
    FvWeight in_w, out_w, out_b, fixed, init; /* fixed: q_static, init: q_init */
    FvQueryPass pass[FV_PASSES];
    real *dz, *du, *dprobs, *dx, *dn, *dq, *da, *df; /* scratch */
    real *pooled, *dpooled, *dabsorbed; /* scratch, deep, stored: [F, heads * D]; pooled: operand */
} FvQueryPart;

void fv_query_params(FvModel *, FvParams *);
void fv_query_carve(FvModel *, FvArena *);
void fv_query_forward(FvModel *, FvPass); /* pass[p].u -> pass[p].z */
/* dz in query.dz -> du in query.du; dprobs: gradient of the last layer's probs or NULL. */
void fv_query_backward(FvModel *, FvPass, const real *dprobs);

/* --- lm.c ----------------------------------------------------------------------------------- */

typedef struct FvLmWeights {
    FvWeight norm1, q, k, v, o, norm2, gate, up, down;
} FvLmWeights;

typedef struct FvLmActs { /* n1, att, n2, act: operands */
    real *x, *n1, *rstd1, *q, *own_k, *own_v, *k, *v, *probs, *att, *o, *mid, *n2, *rstd2, *gate,
        *up, *act, *m;
} FvLmActs;

/* A run of rows of every clip's sequence: the text that both passes share, or a pass's own rows
 * [mode | v_1 .. v_T], which see the text through its keys and values. */
typedef struct FvSegment {
    size_t first_row, rows; /* per clip */
    FvLmActs *act;          /* [lm_layers] */
    real *last, *h, *rstd;  /* a pass: x after the last block, final norm of it */
    real **dk, **dv;        /* text: [lm_layers] gradients of own_k, own_v from the passes */
} FvSegment;

typedef struct FvLm {
    FvWeight embed, norm;
    FvLmWeights *layer;
    FvSegment text, pass[FV_PASSES];
    int32_t *text_to_keys, *own_to_keys; /* rows of a segment within [clips, text + pass rows] */
    int32_t *first;                      /* [clips]: text rows that are padding */
    real *dx, *dn, *dq, *dk, *dv, *own_dk, *own_dv, *da, *df, *dg; /* scratch */
} FvLm;

void fv_lm_params(FvModel *, FvParams *);
void fv_lm_carve(FvModel *, FvArena *);
void fv_lm_upload(FvModel *);          /* the fixed index arrays */
void fv_lm_text(FvModel *);            /* text.act[0].x -> keys and values of every layer */
void fv_lm_text_clear(FvModel *);      /* the gradients of these, before fv_lm_backward adds */
void fv_lm_forward(FvModel *, FvPass); /* pass[p].act[0].x -> pass[p].h */
/* lm.dx holds dh on entry and the gradient of the pass's input rows on return. */
void fv_lm_backward(FvModel *, FvPass);
/* After the passes that read the text: lm.dx = gradient of its rows. last: nothing is added to the
 * layers' gradients after this. */
void fv_lm_text_backward(FvModel *, bool last);

/* --- head.c --------------------------------------------------------------------------------- */

typedef struct FvHeadPass { /* film_mid, g4, g5: operands */
    real *hidden;           /* [F, M]: the hidden state before each frame */
    real *film_in, *film_mid, *gb;
    real *mixed, *c4, *g4, *c5, *g5, *prediction; /* [F, positions, channels] */
} FvHeadPass;

typedef struct FvHead {
    FvWeight conv_w[6], conv_b[6], film1_w, film1_b, film2_w, film2_b, latent_init;
    real *targets, *previous;       /* [F, positions, 4] */
    real *c1, *g1, *c2, *g2, *base; /* shared by the passes; g1, g2: operands */
    FvHeadPass pass[FV_PASSES];
    real *dhidden, *dbase, *da, *db; /* scratch; dhidden [F, M] */
    int32_t *shift;                  /* [F]: frame before, -1 for the first of a clip */
} FvHead;

void fv_head_params(FvModel *, FvParams *);
void fv_head_carve(FvModel *, FvArena *);
void fv_head_prepare(FvModel *);         /* previous latents */
void fv_head_share(FvModel *);           /* the convolutions that do not depend on the pass */
void fv_head_forward(FvModel *, FvPass); /* pass[p].hidden -> prediction */
/* Gradient of scale * sum over frames of the frame's mean squared error: head.dhidden, and
 * head.dbase = or += */
void fv_head_backward(FvModel *, FvPass, double scale, bool add);
void fv_head_share_backward(FvModel *); /* from head.dbase */

/* --- the whole ------------------------------------------------------------------------------ */

/* Index arrays on the backend: which row goes where. */
typedef struct FvRows {
    int32_t *zeros;   /* [max(F, clips * max_text)]: every row reads row 0 */
    int32_t *mode;    /* [clips]: the mode token's row in [clips, 1 + T] */
    int32_t *visual;  /* [F]: row of v_t */
    int32_t *before;  /* [F]: row of the hidden state before frame t */
    int32_t *chooser; /* [clips * (T - 1)]: row of v_t, t < T: chooses the query of t + 1 */
    int32_t *chosen;  /* [clips * (T - 1)]: frame t + 1 in [clips, T] */
    int32_t *initial; /* [clips]: frame 1 in [clips, T] */
    int32_t *tokens;  /* [clips * max_text]: token id or -1, from the batch */
} FvRows;

typedef struct FvMetrics { /* doubles on the backend, in one block */
    double *block;
    size_t count;
    double *loss[FV_PASSES], *cosine, *entropy[FV_PASSES], *hinge, *loss_copy, *loss_other;
    double *norm;                        /* [2] */
    double *dentropy[FV_PASSES], *rates; /* behind the block: not measures */
} FvMetrics;

struct FvModel {
    FvModelConfig c;
    FvBackend *be;
    FvParams params;
    FvEncoderWeights encoder_weights;
    FvEncoder encoder;
    FvQueryPart query;
    FvLm lm;
    FvHead head;
    FvWeight mode[FV_PASSES], no_text, to_lm_w, to_lm_b, to_query_w, to_query_b;
    FvRows rows;
    FvMetrics metrics;
    FvEncoderCache *cache; /* of the rank, or NULL */
    uint8_t *pixels;       /* of the batch; where outputs are stored, of one clip */
    /* Where outputs are stored: the batch's, deep [dino_layers][F, N + 1, D] inputs n1 of the
     * layers, shallow [F, N + 1, D] features; else NULL. */
    real *encoded;
    real *visual_in[FV_PASSES], *visual_std[FV_PASSES], *visual[FV_PASSES]; /* [F, M] */
    real *bank;     /* [(clips + 1) * (T - 1), Q]: chosen queries; slot 0 the clip before */
    real *choosers; /* [clips * (T - 1), M] */
    real *dvisual, *dvisual_in, *dchoosers, *dchosen, *dz_coarse; /* scratch */
    void *block_weights, *block_train, *block_acts, *block_operands;
    double *host_metrics[FV_MARKS]; /* a copy of the block each, of ops->host_alloc */
    real *host_probs;               /* [F, dino_heads, N + 1] */
    int32_t *host_rows;             /* [clips * (1 + max_text)]: lm.first and rows.tokens */
    FvReady *ready;
    void *ready_context;
};

/* From the gradient g on (NULL: frozen or unused) to the end of params->g, all is final. */
static inline void fv_ready_from(void *model, const real *g) {
    const FvModel *m = model;
    if (m->ready && g)
        m->ready(m->ready_context, (size_t)(g - m->params.g));
}

/* Element i of stored outputs of the encoder, which are operand tensors when deep. */
static inline real *fv_encoded_at(const FvModel *m, const real *base, size_t i) {
    size_t bytes = m->c.deep ? m->be->operand_bytes : sizeof(real);
    return (real *)(void *)((char *)(uintptr_t)base + i * bytes);
}

static inline size_t fv_frames(const FvModel *m) {
    return m->c.clips * m->c.frames;
}
static inline size_t fv_keys(const FvModel *m) {
    return fv_patches(&m->c) + 1;
}
static inline size_t fv_positions(const FvModel *m) {
    return fv_latent_side(&m->c) * fv_latent_side(&m->c);
}

#endif
