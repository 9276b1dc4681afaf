/* Patches, tokens and FiLM: one frame at a time. */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

static const double ns_per_element = 0.5;

typedef struct Image {
    FvCpu *cpu;
    size_t frames, size, patch, patches, width; /* film: patches = positions, width = channels */
    const uint8_t *pixels;
    const real *x, *cls, *pos, *gb, *dy;
    real *y, *dgb, *dpatch, *dcls, *dpos;
    bool add;
} Image;

static void patchify_tile(void *arg, size_t frame, size_t thread) {
    const Image *t = arg;
    (void)thread;
    size_t grid = t->size / t->patch, p = t->patch;
    const uint8_t *image = t->pixels + frame * t->size * t->size * 3;
    real *out = t->y + frame * grid * grid * 3 * p * p;
    for (size_t gy = 0; gy < grid; gy++)
        for (size_t gx = 0; gx < grid; gx++)
            for (size_t c = 0; c < 3; c++)
                for (size_t y = 0; y < p; y++) {
                    const uint8_t *row = image + ((gy * p + y) * t->size + gx * p) * 3 + c;
                    for (size_t x = 0; x < p; x++)
                        *out++ = t->cpu->pixel[c][row[3 * x]];
                }
}

void fv_cpu_patchify(FvBackend *backend, size_t frames, size_t size, size_t patch,
                     const uint8_t *pixels, real *out) {
    Image t = {.cpu = fv_cpu(backend), .size = size, .patch = patch, .pixels = pixels, .y = out};
    fv_cpu_run(t.cpu, frames, ns_per_element * (double)(frames * size * size * 3), patchify_tile,
               &t);
}

FV_SIMD static void add_to(size_t n, const real *x, const real *y, real *sum) {
    for (size_t i = 0; i < n; i++)
        sum[i] = x[i] + y[i];
}

static void tokens_tile(void *arg, size_t frame, size_t thread) {
    const Image *t = arg;
    (void)thread;
    real *x = t->y + frame * (t->patches + 1) * t->width;
    add_to(t->width, t->cls, t->pos, x);
    add_to(t->patches * t->width, t->x + frame * t->patches * t->width, t->pos + t->width,
           x + t->width);
}

void fv_cpu_tokens(FvBackend *backend, size_t frames, size_t patches, size_t width,
                   const real *patch, const real *cls, const real *pos, real *x) {
    Image t = {.patches = patches, .width = width, .x = patch, .cls = cls, .pos = pos, .y = x};
    fv_cpu_run(fv_cpu(backend), frames, ns_per_element * (double)(frames * patches * width),
               tokens_tile, &t);
}

/* One tile per token: its row of the position table sums over the frames in order. */
static void tokens_back_tile(void *arg, size_t token, size_t thread) {
    const Image *t = arg;
    (void)thread;
    size_t w = t->width;
    for (size_t f = 0; f < t->frames; f++) {
        const real *dx = t->dy + (f * (t->patches + 1) + token) * w;
        if (token > 0)
            memcpy(t->dpatch + (f * t->patches + token - 1) * w, dx, w * sizeof *dx);
        if (t->dpos)
            add_to(w, t->dpos + token * w, dx, t->dpos + token * w);
        if (token == 0 && t->dcls)
            add_to(w, t->dcls, dx, t->dcls);
    }
}

void fv_cpu_tokens_back(FvBackend *backend, size_t frames, size_t patches, size_t width,
                        const real *dx, real *dpatch, real *dcls, real *dpos) {
    Image t = {.frames = frames,
               .patches = patches,
               .width = width,
               .dy = dx,
               .dpatch = dpatch,
               .dcls = dcls,
               .dpos = dpos};
    fv_cpu_run(fv_cpu(backend), patches + 1, ns_per_element * (double)(frames * patches * width),
               tokens_back_tile, &t);
}

FV_SIMD static void film_frame(size_t positions, size_t c, const real *x, const real *gb, real *y) {
    for (size_t p = 0; p < positions; p++, x += c, y += c)
        for (size_t i = 0; i < c; i++)
            y[i] = gb[i] * x[i] + gb[c + i];
}

static void film_tile(void *arg, size_t frame, size_t thread) {
    const Image *t = arg;
    (void)thread;
    size_t at = frame * t->patches * t->width;
    film_frame(t->patches, t->width, t->x + at, t->gb + frame * 2 * t->width, t->y + at);
}

void fv_cpu_film(FvBackend *backend, size_t frames, size_t positions, size_t channels,
                 const real *x, const real *gb, real *y) {
    Image t = {.patches = positions, .width = channels, .x = x, .gb = gb, .y = y};
    fv_cpu_run(fv_cpu(backend), frames, ns_per_element * (double)(frames * positions * channels),
               film_tile, &t);
}

FV_SIMD static void film_back_frame(size_t positions, size_t c, const real *x, const real *gb,
                                    const real *dy, real *dx, bool add, real *dgb) {
    memset(dgb, 0, 2 * c * sizeof *dgb);
    for (size_t p = 0; p < positions; p++, x += c, dy += c, dx += c) {
        for (size_t i = 0; i < c; i++)
            dgb[i] += dy[i] * x[i];
        for (size_t i = 0; i < c; i++)
            dgb[c + i] += dy[i];
        for (size_t i = 0; i < c; i++)
            dx[i] = add ? dx[i] + gb[i] * dy[i] : gb[i] * dy[i];
    }
}

static void film_back_tile(void *arg, size_t frame, size_t thread) {
    const Image *t = arg;
    (void)thread;
    size_t at = frame * t->patches * t->width, gb = frame * 2 * t->width;
    film_back_frame(t->patches, t->width, t->x + at, t->gb + gb, t->dy + at, t->y + at, t->add,
                    t->dgb + gb);
}

void fv_cpu_film_back(FvBackend *backend, size_t frames, size_t positions, size_t channels,
                      const real *x, const real *gb, const real *dy, real *dx, bool add,
                      real *dgb) {
    Image t = {.patches = positions,
               .width = channels,
               .x = x,
               .gb = gb,
               .dy = dy,
               .y = dx,
               .dgb = dgb,
               .add = add};
    fv_cpu_run(fv_cpu(backend), frames,
               2 * ns_per_element * (double)(frames * positions * channels), film_back_tile, &t);
}
