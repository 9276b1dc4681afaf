/* Sizes in the config.json of a Hugging Face folder: DINOv2 encoders and Llama language models. */
#ifndef FV_RUN_HF_CONFIG_H
#define FV_RUN_HF_CONFIG_H

#include <stddef.h>

#include "base/status.h"

typedef struct FvDinoSizes {
    size_t image_size, patch; /* image_size: pixels of the position table's grid */
    size_t width, heads, layers, mlp;
} FvDinoSizes;

typedef struct FvLlamaSizes {
    size_t width, layers, heads, kv_heads, mlp, vocab;
    double rope_theta, rms_eps;
} FvLlamaSizes;

/* FV_DATA with path, key and reason: not JSON, a size missing or absurd, another model, or a
 * variant (register tokens, SwiGLU, biases, scaled rotary embedding ...) that fovea does not
 * compute. */
FvStatus fv_hf_read_dino(const char *path, FvDinoSizes *, FvError *err);
FvStatus fv_hf_read_llama(const char *path, FvLlamaSizes *, FvError *err);

/* Such a file for transformers.Dinov2Model; mlp must be a multiple of width. */
FvStatus fv_hf_write_dino(const char *path, const FvDinoSizes *, FvError *err);

#endif
