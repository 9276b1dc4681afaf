/* Random views of a frame for self-distillation: a part of it at another size, mirrored,
 * recoloured, blurred. */
#ifndef FV_RUN_CROPS_H
#define FV_RUN_CROPS_H

#include <stddef.h>
#include <stdint.h>

typedef struct FvCropRecipe {
    double area_low, area_high; /* share of the frame's area that the crop covers */
    double jitter;              /* brightness, contrast and saturation change by up to this share;
                                   hue by up to a quarter of it, in turns */
    double grey, blur;          /* probabilities */
} FvCropRecipe;

/* frame uint8 [size, size, 3] -> out uint8 [out_size, out_size, 3]. What is drawn is a function of
 * `key` alone. */
void fv_crop(const uint8_t *frame, size_t size, const FvCropRecipe *, uint64_t key, size_t out_size,
             uint8_t *out);

#endif
