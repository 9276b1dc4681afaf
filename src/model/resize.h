/* Position tables for other grids: bicubic interpolation as PyTorch's interpolate(mode="bicubic",
 * align_corners=False) does it. */
#ifndef FV_MODEL_RESIZE_H
#define FV_MODEL_RESIZE_H

#include <stddef.h>

#include "base/real.h"

/* Matrix [to * to + 1, from * from + 1] that makes a table of CLS and `to` x `to` positions of one
 * of CLS and `from` x `from`: the CLS row stays, equal grids give the identity. Output cell i reads
 * four cells about (i + 0.5) * step - 0.5 with the cubic kernel of A = -0.75, clamped at the
 * borders. step = from / (to + offset): offset 0 as Hugging Face's implementation has it, 0.1 as
 * the original DINOv2. The caller owns `matrix`. */
void fv_resize_matrix(size_t from, size_t to, double offset, real *matrix);

#endif
