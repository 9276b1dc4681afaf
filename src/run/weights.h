/* Start values from files: a run's own weights by name, DINOv2 encoders and Llama language models
 * as Hugging Face or the original repository name them. */
#ifndef FV_RUN_WEIGHTS_H
#define FV_RUN_WEIGHTS_H

#include <stdbool.h>

#include "model/config.h"
#include "model/params.h"
#include "run/config.h"
#include "run/hf_config.h"
#include "run/safetensors.h"

/* Opens everything that a configuration starts from and compares names, shapes and config.json with
 * the model's parameters, before anything is allocated for it. FV_DATA names file, tensor, what is
 * there and what is needed. */
FvStatus fv_weights_check(const FvConfig *, const FvParams *, FvError *err);

/* The same for the parameters of a whole model. */
FvStatus fv_weights_check_model(const FvConfig *, const FvModelConfig *, FvError *err);

/* Start values: drawn from the seed, except what comes from lm_from, dino_from and init_from (the
 * later over the earlier). */
FvStatus fv_weights_start(const FvConfig *, FvParams *, FvBackend *, uint64_t seed, FvError *err);

/* One tensor for one parameter: FV_DATA, one line that ends with `advice` on other shapes, unless
 * it is of floating point and has the parameter's shape (a table of positions where `resizable`:
 * any square grid). */
FvStatus fv_weights_check_tensor(const FvTensorFile *, const FvTensor *, const FvParam *,
                                 bool resizable, const char *advice, FvError *err);
/* Its values, of just the parameter's shape, into the parameter's memory. */
FvStatus fv_weights_set(const FvTensor *, const FvParam *, FvParams *, FvBackend *, FvError *err);

/* Writes the encoder found in params under `prefix` as folder/config.json and
 * folder/model.safetensors with Hugging Face's names. */
FvStatus fv_weights_write_dino(const char *folder, const FvDinoSizes *, const FvParams *,
                               const char *prefix, FvBackend *, FvError *err);

/* How the file or folder that `from` names fits each parameter [params->count], whichever key would
 * take it; `left` is called for every tensor that none would take. */
typedef enum FvFit { FV_FIT_MISSING, FV_FIT_FILLED, FV_FIT_SHAPE } FvFit;
FvStatus fv_weights_fit(const char *from, const FvParams *, FvFit *fit,
                        void (*left)(const char *name), FvError *err);

#endif
