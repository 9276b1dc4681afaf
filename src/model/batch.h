/* What one training or evaluation step reads: host memory, filled by the data layer. */
#ifndef FV_MODEL_BATCH_H
#define FV_MODEL_BATCH_H

#include <stddef.h>
#include <stdint.h>

#include "base/real.h"

typedef struct FvBatch {
    size_t clips;         /* as in FvModelConfig */
    size_t max_text;      /* as in FvModelConfig: the row length of tokens */
    uint8_t *pixels;      /* [clips, T, S, S, 3] */
    real *latents;        /* [clips, T, S/8, S/8, 4]: channels last */
    int32_t *tokens;      /* [clips, max_text]: token ids, the first token_count[c] are valid */
    int32_t *token_count; /* [clips]; all 0 when the data has no captions */
    uint32_t *clip;       /* [clips]: index within the split, for messages and records */
    uint32_t *number;     /* [clips]: index over both splits, those for training first */
} FvBatch;

#endif
