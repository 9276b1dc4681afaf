#include "run/crops.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "base/rng.h"

enum { MAX_SIDE = 4096 };

/* Numbers of the stream, by what they decide. */
enum { AREA, SHAPE, X, Y, MIRROR, RECOLOUR, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR };

static double between(uint64_t key, uint64_t index, double low, double high) {
    return low + (high - low) * fv_uniform(key, index);
}

typedef struct Window { /* of the frame, in pixels */
    double x, y, width, height;
} Window;

/* Sides with a ratio from 3/4 to 4/3, cut to the frame. */
static Window choose_window(const FvCropRecipe *r, uint64_t key, size_t size) {
    double side = (double)size, area = between(key, AREA, r->area_low, r->area_high) * side * side;
    double ratio = exp(between(key, SHAPE, log(0.75), log(4.0 / 3.0)));
    double width = fmin(side, sqrt(area * ratio)), height = fmin(side, sqrt(area / ratio));
    return (Window){between(key, X, 0, side - width), between(key, Y, 0, side - height), width,
                    height};
}

/* Colour as an affine map of RGB: out = m rgb + shift. */
typedef struct Colouring {
    float m[3][3], shift;
    float contrast; /* about the mean of the crop, which is known only after sampling */
} Colouring;

static const float luma[3] = {0.299f, 0.587f, 0.114f};

/* Brightness, saturation (towards grey) and a turn of the hue about the grey axis, whose matrix is
 * Rodrigues' formula for the axis (1, 1, 1) / sqrt 3. */
static Colouring choose_colouring(const FvCropRecipe *r, uint64_t key) {
    Colouring c = {.m = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}, .contrast = 1};
    float saturation = 1, bright = 1;
    double turn = 0;
    if (fv_uniform(key, RECOLOUR) < 0.8) {
        bright = (float)between(key, BRIGHTNESS, 1 - r->jitter, 1 + r->jitter);
        c.contrast = (float)between(key, CONTRAST, 1 - r->jitter, 1 + r->jitter);
        saturation = (float)between(key, SATURATION, 1 - r->jitter, 1 + r->jitter);
        turn = 2 * 3.141592653589793 * between(key, HUE, -r->jitter / 4, r->jitter / 4);
    }
    if (fv_uniform(key, GREY) < r->grey)
        saturation = 0;
    float cosine = (float)cos(turn), third = (1 - cosine) / 3, cross = (float)(sin(turn) / sqrt(3));
    float hue[3][3];
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            hue[i][j] = third + (i == j ? cosine : (j == (i + 1) % 3 ? -cross : cross));
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            c.m[i][j] = bright * (saturation * hue[i][j] + (1 - saturation) * luma[j]);
    return c;
}

/* The two neighbours of a sampling position and the share of the second. */
typedef struct Tap {
    size_t low, high;
    float share;
} Tap;

static void choose_taps(double start, double length, size_t size, size_t out_size, bool mirror,
                        Tap *taps) {
    for (size_t i = 0; i < out_size; i++) {
        size_t place = mirror ? out_size - 1 - i : i;
        double at = start + ((double)place + 0.5) * length / (double)out_size - 0.5;
        at = fmin(fmax(at, 0), (double)(size - 1));
        size_t low = (size_t)at;
        taps[i] = (Tap){low, low + 1 < size ? low + 1 : low, (float)(at - (double)low)};
    }
}

static uint8_t to_byte(float v) {
    return (uint8_t)(v <= 0 ? 0 : v >= 255 ? 255 : v + 0.5f);
}

/* Bilinear sampling and the colour matrix. Returns the mean luma. */
static float sample(const uint8_t *frame, size_t size, const Tap *tx, const Tap *ty,
                    const Colouring *c, size_t out_size, uint8_t *out) {
    double sum = 0;
    for (size_t y = 0; y < out_size; y++) {
        const uint8_t *a = frame + ty[y].low * size * 3, *b = frame + ty[y].high * size * 3;
        float v = ty[y].share;
        for (size_t x = 0; x < out_size; x++, out += 3) {
            size_t l = tx[x].low * 3, h = tx[x].high * 3;
            float u = tx[x].share, p[3];
            for (size_t k = 0; k < 3; k++) {
                float above = (float)a[l + k] + u * (float)(a[h + k] - a[l + k]);
                float below = (float)b[l + k] + u * (float)(b[h + k] - b[l + k]);
                p[k] = above + v * (below - above);
            }
            for (int k = 0; k < 3; k++) {
                out[k] = to_byte(c->m[k][0] * p[0] + c->m[k][1] * p[1] + c->m[k][2] * p[2]);
                sum += (double)(luma[k] * (float)out[k]);
            }
        }
    }
    return (float)(sum / (double)(out_size * out_size));
}

static void change_contrast(size_t n, float contrast, float mean, uint8_t *pixels) {
    uint8_t table[256];
    for (int i = 0; i < 256; i++)
        table[i] = to_byte(mean + contrast * ((float)i - mean));
    for (size_t i = 0; i < n; i++)
        pixels[i] = table[pixels[i]];
}

/* One pass of 1/4, 1/2, 1/4 along a line of `n` pixels that lie `stride` bytes apart. */
static void blur_line(uint8_t *line, size_t n, size_t stride) {
    for (size_t k = 0; k < 3; k++) {
        unsigned before = line[k];
        for (size_t i = 0; i < n; i++) {
            uint8_t *p = line + i * stride + k;
            unsigned here = *p, after = i + 1 < n ? p[stride] : here;
            *p = (uint8_t)((before + 2 * here + after + 2) / 4);
            before = here;
        }
    }
}

void fv_crop(const uint8_t *frame, size_t size, const FvCropRecipe *recipe, uint64_t key,
             size_t out_size, uint8_t *out) {
    Tap tx[MAX_SIDE], ty[MAX_SIDE];
    Window w = choose_window(recipe, key, size);
    Colouring c = choose_colouring(recipe, key);
    choose_taps(w.x, w.width, size, out_size, fv_uniform(key, MIRROR) < 0.5, tx);
    choose_taps(w.y, w.height, size, out_size, false, ty);
    float mean = sample(frame, size, tx, ty, &c, out_size, out);
    if (c.contrast != 1)
        change_contrast(out_size * out_size * 3, c.contrast, mean, out);
    if (fv_uniform(key, BLUR) >= recipe->blur)
        return;
    for (size_t i = 0; i < out_size; i++)
        blur_line(out + i * out_size * 3, out_size, 3);
    for (size_t i = 0; i < out_size; i++)
        blur_line(out + i * 3, out_size, out_size * 3);
}
