/* Block targets: what is predicted when no autoencoder is there. */
#include <math.h>

#include "model/config.h"
#include "run/data.h"

enum { BLOCK = FV_LATENT_STRIDE, AREA = BLOCK * BLOCK, LUMA_SCALE = 1000 * 255 };

/* Sums of one block are integers, hence exact; luma is in units of 1/LUMA_SCALE. */
static void block(const uint8_t *corner, size_t row_bytes, real out[FV_LATENT_CHANNELS]) {
    uint32_t red = 0, blue = 0, luma = 0;
    uint64_t squares = 0;
    for (size_t y = 0; y < BLOCK; y++) {
        const uint8_t *p = corner + y * row_bytes;
        for (size_t x = 0; x < BLOCK; x++, p += 3) {
            uint32_t v = 299u * p[0] + 587u * p[1] + 114u * p[2];
            red += p[0];
            blue += p[2];
            luma += v;
            squares += (uint64_t)v * v;
        }
    }
    double r = red / (AREA * 255.0), b = blue / (AREA * 255.0);
    double y = luma / ((double)AREA * LUMA_SCALE);
    uint64_t spread = squares * AREA - (uint64_t)luma * luma; /* AREA^2 times the variance, >= 0 */
    out[0] = (real)y;
    out[1] = (real)(0.564 * (b - y));
    out[2] = (real)(0.713 * (r - y));
    out[3] = (real)(sqrt((double)spread) / ((double)AREA * LUMA_SCALE));
}

void fv_blocks(size_t frames, size_t size, const uint8_t *pixels, real *out) {
    size_t side = size / BLOCK, row_bytes = size * 3;
    for (size_t t = 0; t < frames; t++)
        for (size_t y = 0; y < side; y++)
            for (size_t x = 0; x < side; x++, out += FV_LATENT_CHANNELS)
                block(pixels + (t * size + y * BLOCK) * row_bytes + x * BLOCK * 3, row_bytes, out);
}
