/* 3 x 3 convolutions, channels last: a block of output rows is unfolded into [positions, 9 * in],
 * small enough for the cache, and multiplied. Rows are counted through all frames. */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

enum { BLOCK_BYTES = 600 * 1024, PARTS = 8 };
static const double flops_per_ns = 80;

typedef struct Conv {
    const FvConv *s;
    FvCpu *cpu;
    size_t block;   /* rows unfolded at once, at most */
    FvTiles rows;   /* forward: of all frames; a tile each */
    FvTiles chunks; /* backward: frames */
    const real *x, *w, *bias, *dy;
    real *y, *dx, *part;
    size_t part_size;
    bool add, dw;
} Conv;

static size_t unfolded(const FvConv *s) {
    return fv_mul(9, s->in);
}

static size_t out_height(const FvConv *s) {
    return fv_conv_side(s->height, s->stride);
}

static size_t out_width(const FvConv *s) {
    return fv_conv_side(s->width, s->stride);
}

static size_t block_rows(const FvConv *s) {
    size_t row = fv_mul3(out_width(s), unfolded(s), sizeof(real));
    size_t fit = fv_max_size(1, BLOCK_BYTES / fv_max_size(1, row));
    return fv_min(fit, fv_max_size(1, fv_ceil_div(s->frames * out_height(s), PARTS)));
}

static double flops_of(const FvConv *s) {
    return 2.0 * (double)(s->frames * out_height(s) * out_width(s)) *
           (double)(unfolded(s) * s->out);
}

/* col[row - first][x][ky][kx][c] = images[frame][stride * y + ky - 1][stride * x + kx - 1][c], 0
 * outside the frame */
static void unfold(const FvConv *s, size_t first, size_t rows, const real *images, real *col) {
    size_t in = s->in, height = out_height(s), width = out_width(s);
    for (size_t row = first; row < first + rows; row++) {
        size_t y = row % height * s->stride;
        const real *image = images + row / height * s->height * s->width * in;
        for (size_t column = 0; column < width; column++)
            for (size_t ky = 0; ky < 3; ky++) {
                size_t x = column * s->stride, sy = y + ky; /* sy is one too large */
                bool inside = sy >= 1 && sy <= s->height;
                const real *from = image + (inside ? sy - 1 : 0) * s->width * in;
                /* the three neighbours stand side by side: one copy where all are inside */
                if (inside && x >= 1 && x + 2 <= s->width) {
                    memcpy(col, from + (x - 1) * in, 3 * in * sizeof *col);
                    col += 3 * in;
                    continue;
                }
                for (size_t kx = 0; kx < 3; kx++, col += in) {
                    size_t sx = x + kx;
                    if (inside && sx >= 1 && sx <= s->width)
                        memcpy(col, from + (sx - 1) * in, in * sizeof *col);
                    else
                        memset(col, 0, in * sizeof *col);
                }
            }
    }
}

FV_SIMD static void add_to(size_t n, const real *x, real *y) {
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

/* The transpose of unfold: every unfolded value is added to where it came from. */
FV_SIMD static void fold(const FvConv *s, size_t first, size_t rows, const real *col,
                         real *images) {
    size_t in = s->in, height = out_height(s), width = out_width(s);
    for (size_t row = first; row < first + rows; row++) {
        size_t y = row % height * s->stride;
        real *image = images + row / height * s->height * s->width * in;
        for (size_t x = 0; x < width; x++)
            for (size_t ky = 0; ky < 3; ky++)
                for (size_t kx = 0; kx < 3; kx++, col += in) {
                    size_t sy = y + ky, sx = x * s->stride + kx;
                    if (sy < 1 || sy > s->height || sx < 1 || sx > s->width)
                        continue;
                    real *to = image + ((sy - 1) * s->width + sx - 1) * in;
                    for (size_t c = 0; c < in; c++)
                        to[c] += col[c];
                }
    }
}

static void forward_tile(void *arg, size_t tile, size_t thread) {
    const Conv *t = arg;
    const FvConv *s = t->s;
    size_t first = fv_split_start(&t->rows, tile), rows = fv_split_length(&t->rows, tile);
    size_t pixels = rows * out_width(s), k = unfolded(s);
    real *col = t->cpu->own[thread].data;
    real *y = t->y + first * out_width(s) * s->out;
    unfold(s, first, rows, t->x, col);
    for (size_t p = 0; t->bias && p < pixels; p++)
        memcpy(y + p * s->out, t->bias, s->out * sizeof *y);
    fv_gemm(false, true, pixels, s->out, k, 1, col, k, t->w, k, t->bias ? 1 : 0, y, s->out);
}

void fv_cpu_conv(FvBackend *backend, const FvConv *s, const real *x, const real *w,
                 const real *bias, real *y) {
    size_t rows = s->frames * out_height(s), block = block_rows(s);
    Conv t = {.s = s,
              .cpu = fv_cpu(backend),
              .rows = {rows, block, fv_ceil_div(rows, block)},
              .x = x,
              .w = w,
              .bias = bias,
              .y = y};
    size_t col = fv_mul4(block, out_width(s), unfolded(s), sizeof(real));
    if (!fv_cpu_workspace(t.cpu, col, 0))
        return;
    fv_cpu_run(t.cpu, t.rows.count, flops_of(s) / flops_per_ns, forward_tile, &t);
}

/* Rows first .. first + rows: their share of dw and dbias into `part`, which the first block of a
 * chunk starts; their gradient folded into dx. */
static void backward_block(const Conv *t, size_t first, size_t rows, bool start, real *col,
                           real *part) {
    const FvConv *s = t->s;
    size_t pixels = rows * out_width(s), k = unfolded(s);
    const real *dy = t->dy + first * out_width(s) * s->out;
    if (t->dw) {
        unfold(s, first, rows, t->x, col);
        fv_gemm(true, false, s->out, k, pixels, 1, dy, s->out, col, k, start ? 0 : 1, part, k);
    }
    for (size_t p = 0; p < pixels; p++)
        add_to(s->out, dy + p * s->out, part + s->out * k);
    if (t->dx) {
        fv_gemm(false, false, pixels, k, s->out, 1, dy, s->out, t->w, k, 0, col, k);
        fold(s, first, rows, col, t->dx);
    }
}

static void backward_tile(void *arg, size_t tile, size_t thread) {
    const Conv *t = arg;
    const FvConv *s = t->s;
    size_t frame = fv_split_start(&t->chunks, tile), frames = fv_split_length(&t->chunks, tile);
    size_t first = frame * out_height(s), end = first + frames * out_height(s);
    size_t image = s->height * s->width * s->in;
    real *part = t->part + tile * t->part_size;
    memset(part + s->out * unfolded(s), 0, s->out * sizeof *part);
    if (t->dx && !t->add)
        memset(t->dx + frame * image, 0, frames * image * sizeof *t->dx);
    for (size_t at = first; at < end; at += t->block)
        backward_block(t, at, fv_min(t->block, end - at), at == first, t->cpu->own[thread].data,
                       part);
}

void fv_cpu_conv_back(FvBackend *backend, const FvConv *s, const real *x, const real *w,
                      const real *dy, real *dx, bool add, real *dw, real *dbias) {
    size_t weights = fv_mul(s->out, unfolded(s));
    Conv t = {.s = s,
              .cpu = fv_cpu(backend),
              .block = block_rows(s),
              .chunks = fv_split(s->frames, PARTS, 1, 1),
              .x = x,
              .w = w,
              .dy = dy,
              .dx = dx,
              .add = add,
              .dw = dw != NULL};
    t.part_size = fv_add(weights, s->out);
    size_t col = fv_mul4(t.block, out_width(s), unfolded(s), sizeof(real));
    if (!fv_cpu_workspace(t.cpu, col, fv_mul3(t.chunks.count, t.part_size, sizeof(real))))
        return;
    t.part = t.cpu->shared.data;
    fv_cpu_run(t.cpu, t.chunks.count, 2 * flops_of(s) / flops_per_ns, backward_tile, &t);
    if (dw)
        fv_cpu_add_parts(t.cpu, t.chunks.count, weights, t.part_size, t.part, dw);
    if (dbias)
        fv_cpu_add_parts(t.cpu, t.chunks.count, s->out, t.part_size, t.part + weights, dbias);
}
