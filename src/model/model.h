/* The foveated video model: encoder, one query token per frame, language model, prediction head;
 * a coarse and a fine pass, their losses, and exact gradients through both (SPEC of the study).
 *
 * A training step, see run/train.c:
 *     fv_model_load, fv_model_rates, fv_model_encode, fv_model_coarse, fv_model_fine,
 *     fv_model_backward, average params->g over the ranks, fv_model_norm, fv_model_update,
 *     fv_model_measure */
#ifndef FV_MODEL_MODEL_H
#define FV_MODEL_MODEL_H

#include <stdint.h>

#include "backend/backend.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/encoder_cache.h"
#include "model/params.h"

typedef struct FvModel FvModel;

typedef enum FvPass { FV_COARSE, FV_FINE, FV_PASSES } FvPass;

typedef struct FvModelMemory { /* bytes, all in `real` */
    size_t weights, gradients, moments, activations;
    size_t operands; /* activations that products alone read: see alloc_operands */
} FvModelMemory;

/* What fv_model_create will allocate, and the counts; allocates nothing that lasts. */
FvStatus fv_model_plan(const FvModelConfig *, FvModelMemory *, size_t *parameters, size_t *trained,
                       FvError *);

/* The parameter table alone, for listing; fv_params_free it. */
FvStatus fv_model_declare(const FvModelConfig *, FvParams *out, FvError *);

/* Four allocations: weights; gradients and moments; activations; operand tensors. Nothing is
 * allocated later. */
FvStatus fv_model_create(const FvModelConfig *, FvBackend *, FvModel **out, FvError *);
void fv_model_destroy(FvModel *);

FvParams *fv_model_params(FvModel *);

/* Where the encoder's outputs are stored (fv_encoder_stored): the cache that fv_model_load looks
 * into and adds to. It holds clips of the same encoder, data and sizes, knows them by
 * FvBatch.number, and outlives the model. Without one every clip is encoded in every step. */
void fv_model_use_cache(FvModel *, FvEncoderCache *);

/* Copies a batch (shapes of the model's config) to the backend, and where the encoder's outputs are
 * stored, gathers them: clips that are not there are encoded, which may wait for the backend. What
 * follows of a step depends on addresses that never change. FV_DEVICE. */
FvStatus fv_model_load(FvModel *, const FvBatch *, FvError *);

/* What both passes read: the encoder's outputs where they are not stored, text, convolutions. */
void fv_model_encode(FvModel *);
/* The pass with q_static; leaves the queries it chooses for the next frames. */
void fv_model_coarse(FvModel *);
/* The pass with q_init and the chosen queries. */
void fv_model_fine(FvModel *);

/* Controls: a fine pass in which every clip uses the queries chosen for the clip before it (the
 * first clip of a batch: those kept by fv_model_keep_last), and the previous latent as the
 * prediction. Overwrites the fine pass's activations, not its measures. */
void fv_model_fine_other(FvModel *);
/* Call after a batch is done: its last clip's chosen queries become "the clip before". */
void fv_model_keep_last(FvModel *);

/* Gradients of
 *   L_fine + lambda_coarse L_coarse + contrastive mean cos + 0.1 mean hinge (means over this
 * rank's clips) for every trained parameter, into params->g. */
void fv_model_backward(FvModel *);

/* Called during the backward pass: the gradients from params->g + from to the end are final once
 * the operations called so far have run. `from` falls; what is left at the end is not told. */
typedef void FvReady(void *context, size_t from);
void fv_model_on_ready(FvModel *, FvReady *, void *context);

/* Measures of this rank's clips, per clip and frame [clips * frames], on the host. Valid until
 * the next call of fv_model_measure. */
typedef struct FvMeasures {
    const double *loss[FV_PASSES];             /* mean over channels and positions */
    const double *cosine, *entropy[FV_PASSES]; /* NaN when vision is off */
    const double *loss_copy, *loss_other;      /* after fv_model_fine_other only */
    const double *hinge;                       /* [clips] */
    double norm;                               /* after fv_model_norm */
} FvMeasures;

FvStatus fv_model_measure(FvModel *, FvMeasures *, FvError *);
/* The same in two calls, so that the next step may be under way when this one's measures are
 * read: both calls name the same mark of the backend. fv_model_measure uses mark 0. */
void fv_model_measure_later(FvModel *, size_t mark);
FvStatus fv_model_measured(FvModel *, size_t mark, FvMeasures *, FvError *);

/* Norm of params->g, to be read by fv_model_measure and fv_model_update. After one that is not
 * finite no update changes anything. */
void fv_model_norm(FvModel *);
/* Learning rate and step of the updates called after it. */
void fv_model_rates(FvModel *, const FvAdamW *);
void fv_model_update(FvModel *, const FvAdamW *);

/* Attention of a pass at the last layer, mean over heads: out [clips * frames, 1 + N], CLS first,
 * host memory of the caller. Only with vision. */
void fv_model_attention(FvModel *, FvPass, double *out);

/* Names the first tensor, in the order of computation, that holds a value that is not finite
 * ("" when there is none). */
void fv_model_first_bad(FvModel *, char *name, size_t size);

#endif
