/* The encoder of TAESD (github.com/madebyollin/taesd), a small autoencoder whose latents are those
 * of Stable Diffusion 1: what the study may predict. Forward only. */
#ifndef FV_MODEL_TAESD_H
#define FV_MODEL_TAESD_H

#include <stdint.h>

#include "backend/backend.h"
#include "model/params.h"

typedef struct FvTaesd FvTaesd;

/* For square frames of `size` pixels, a multiple of 8. Weights and activations are allocated here,
 * nothing later but the backend's workspace; the weights are zeros until fv_params_set. FV_DEVICE
 * when memory is out, FV_DATA for another size. */
FvStatus fv_taesd_create(FvBackend *, size_t size, FvTaesd **out, FvError *);
void fv_taesd_destroy(FvTaesd *); /* NULL is fine */

/* Named as the published files name them: "0.weight", "0.bias", "1.conv.0.weight", ... */
FvParams *fv_taesd_params(FvTaesd *);

/* How many frames are in memory at a time: fewer at once leave threads idle. */
size_t fv_taesd_frames(const FvTaesd *);

/* pixels [frames, size, size, 3] -> latents [frames, 4, size/8, size/8], both in host memory; the
 * network reads pixels as RGB in [0, 1], and its output is used as it comes. FV_DEVICE when the
 * backend failed. */
FvStatus fv_taesd_encode(FvTaesd *, size_t frames, const uint8_t *pixels, real *latents, FvError *);

#endif
