/* Dense layers on BLAS. The matrix product is cut into tiles by shape alone; each tile is one BLAS
 * call of one thread. */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

static const double flops_per_ns = 100; /* of one core, for the decision to share a tile's work */
static const size_t tile_flops = 2000000;

/* Into as many parts as the work is worth. */
static FvSplit split_work(size_t n, size_t flops, size_t least) {
    return fv_split(n, 1 + flops / tile_flops, least, 16);
}

typedef struct Linear {
    FvSplit rows, cols;
    size_t in, out;
    const real *x, *w, *bias, *dy;
    real *y, *dx, *dw, *dbias;
    size_t dx_tiles;
    bool add;
} Linear;

static void forward_tile(void *arg, size_t tile, size_t thread) {
    const Linear *l = arg;
    (void)thread;
    size_t r = fv_split_start(&l->rows, tile / l->cols.count);
    size_t c = fv_split_start(&l->cols, tile % l->cols.count);
    size_t rows = fv_split_length(&l->rows, tile / l->cols.count);
    size_t cols = fv_split_length(&l->cols, tile % l->cols.count);
    real *y = l->y + r * l->out + c;
    for (size_t i = 0; l->bias && i < rows; i++)
        memcpy(y + i * l->out, l->bias + c, cols * sizeof *y);
    fv_gemm(false, true, rows, cols, l->in, 1, l->x + r * l->in, l->in, l->w + c * l->in, l->in,
            l->bias ? 1 : 0, y, l->out);
}

void fv_cpu_linear(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                   const real *w, const real *bias, real *y) {
    size_t flops = fv_mul4(2, rows, in, out);
    bool tall = rows >= out;
    Linear l = {.rows = tall ? split_work(rows, flops, 32) : (FvSplit){rows, rows, 1},
                .cols = tall ? (FvSplit){out, out, 1} : split_work(out, flops, 32),
                .in = in,
                .out = out,
                .x = x,
                .w = w,
                .bias = bias,
                .y = y};
    fv_cpu_run(fv_cpu(backend), l.rows.count * l.cols.count, (double)flops / flops_per_ns,
               forward_tile, &l);
}

FV_SIMD static void column_sums(size_t rows, size_t stride, size_t cols, const real *x, real *sum) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            sum[c] += x[r * stride + c];
}

static void backward_tile(void *arg, size_t tile, size_t thread) {
    const Linear *l = arg;
    (void)thread;
    if (tile < l->dx_tiles) {
        size_t r = fv_split_start(&l->rows, tile), rows = fv_split_length(&l->rows, tile);
        fv_gemm(false, false, rows, l->in, l->out, 1, l->dy + r * l->out, l->out, l->w, l->in,
                l->add ? 1 : 0, l->dx + r * l->in, l->in);
        return;
    }
    size_t part = tile - l->dx_tiles;
    size_t c = fv_split_start(&l->cols, part), cols = fv_split_length(&l->cols, part);
    if (l->dw)
        fv_gemm(true, false, cols, l->in, l->rows.n, 1, l->dy + c, l->out, l->x, l->in, 1,
                l->dw + c * l->in, l->in);
    if (l->dbias)
        column_sums(l->rows.n, l->out, cols, l->dy + c, l->dbias + c);
}

void fv_cpu_linear_back(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                        const real *w, const real *dy, real *dx, bool add, real *dw, real *dbias) {
    size_t flops = fv_mul4(2, rows, in, out);
    Linear l = {.rows = split_work(rows, flops, 32),
                .cols = split_work(out, flops, 32),
                .in = in,
                .out = out,
                .x = x,
                .w = w,
                .dy = dy,
                .dx = dx,
                .dw = dw,
                .dbias = dbias,
                .add = add};
    l.dx_tiles = dx ? l.rows.count : 0;
    size_t tiles = l.dx_tiles + (dw || dbias ? l.cols.count : 0);
    fv_cpu_run(fv_cpu(backend), tiles, 2 * (double)flops / flops_per_ns, backward_tile, &l);
}
