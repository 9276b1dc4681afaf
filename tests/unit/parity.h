/* Hidden states of published architectures, computed by the model layer from a Hugging Face folder:
 * what the parity tests compare with transformers. */
#ifndef TESTS_UNIT_PARITY_H
#define TESTS_UNIT_PARITY_H

#include "base/real.h"
#include "base/status.h"

/* states [layers + 1][count]: what enters the first layer, what leaves each; final [count]: after
 * the last norm. One block behind all of them; parity_free. */
typedef struct Parity {
    size_t layers, count;
    size_t rank, shape[3]; /* of one state */
    real *states, *final;
} Parity;

/* The tensor `pixels` uint8 [frames, S, S, 3] of `input` through the encoder of `folder`. */
FvStatus parity_dinov2(const char *folder, const char *input, Parity *out, FvError *err);

/* The tensor `inputs_embeds` [rows, M] or [1, rows, M] of `input` through the language model. */
FvStatus parity_llama(const char *folder, const char *input, Parity *out, FvError *err);

void parity_free(Parity *);

#endif
