/* Dense layers, whole or one per head: tiles of the output, one gemm each.
 *
 * Weight gradients sum over rows. Where the weight is too small to give every thread a tile, the
 * rows are cut into parts as well: the first part adds to dw itself, the others to partial sums
 * that are added afterwards, in order. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

/* y [rows, columns] cut into tiles that gemm handles well (128 rows and more) and that are enough
 * for many threads. Sizes depend on the shape alone. */
typedef struct Grid {
    FvTiles rows, columns;
} Grid;

enum { ENOUGH_TILES = 8 };

static Grid output_grid(size_t rows, size_t columns) {
    Grid g;
    g.rows = fv_split(rows, fv_max_size(ENOUGH_TILES, rows / 256), 128, 16);
    size_t parts = fv_ceil_div(ENOUGH_TILES, g.rows.count);
    g.columns = fv_split(columns, fv_max_size(parts, columns / 512), 64, 16);
    return g;
}

static size_t grid_tiles(const Grid *g) {
    return g->rows.count * g->columns.count;
}

static double gemm_ns(size_t m, size_t n, size_t k) {
    return 300 + 0.02 * (double)m * (double)n * (double)k; /* 100 GFLOP/s a core */
}

/* --- forward --------------------------------------------------------------------------------- */

typedef struct Linear {
    size_t rows, in, out;
    const real *x, *w, *bias;
    real *y;
    Grid grid;
} Linear;

static void linear_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Linear *o = arg;
    size_t r = tile / o->grid.columns.count, c = tile % o->grid.columns.count;
    size_t row = fv_split_start(&o->grid.rows, r), rows = fv_split_length(&o->grid.rows, r);
    size_t col = fv_split_start(&o->grid.columns, c), cols = fv_split_length(&o->grid.columns, c);
    real *y = o->y + row * o->out + col;
    if (o->bias)
        for (size_t i = 0; i < rows; i++)
            memcpy(y + i * o->out, o->bias + col, cols * sizeof(real));
    fv_gemm(false, true, rows, cols, o->in, 1, o->x + row * o->in, o->in, o->w + col * o->in, o->in,
            o->bias ? 1 : 0, y, o->out);
}

void fv_cpu_linear(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                   const real *w, const real *bias, real *y) {
    if (rows == 0)
        return;
    Linear o = {rows, in, out, x, w, bias, y, output_grid(rows, out)};
    fv_cpu_run(fv_cpu(backend), grid_tiles(&o.grid), gemm_ns(rows, out, in), linear_tile, &o);
}

/* --- backward -------------------------------------------------------------------------------- */

typedef struct LinearBack {
    size_t rows, in, out;
    const real *x, *w, *dy;
    real *dx, *dw, *dbias;
    bool add;
    Grid x_grid;            /* tiles of dx [rows, in] */
    size_t x_tiles;         /* 0 when dx is not needed */
    Grid w_grid;            /* tiles of dw [out, in] ... */
    FvTiles chunks;         /* ... times parts of the rows */
    real *part, *part_bias; /* [chunks - 1][out * in], [chunks - 1][out] */
} LinearBack;

static void dx_tile(const LinearBack *o, size_t tile) {
    size_t r = tile / o->x_grid.columns.count, c = tile % o->x_grid.columns.count;
    size_t row = fv_split_start(&o->x_grid.rows, r), rows = fv_split_length(&o->x_grid.rows, r);
    size_t col = fv_split_start(&o->x_grid.columns, c);
    size_t cols = fv_split_length(&o->x_grid.columns, c);
    fv_gemm(false, false, rows, cols, o->out, 1, o->dy + row * o->out, o->out, o->w + col, o->in,
            o->add ? 1 : 0, o->dx + row * o->in + col, o->in);
}

/* sum[c] (+)= the column sums of a block of dy */
FV_SIMD
static void column_sums(size_t rows, size_t columns, size_t stride, const real *dy, bool add,
                        real *sum) {
    if (!add)
        memset(sum, 0, columns * sizeof(real));
    for (size_t r = 0; r < rows; r++, dy += stride)
        for (size_t c = 0; c < columns; c++)
            sum[c] += dy[c];
}

static void dw_tile(const LinearBack *o, size_t tile) {
    size_t blocks = grid_tiles(&o->w_grid), chunk = tile / blocks, block = tile % blocks;
    size_t b = block / o->w_grid.columns.count, c = block % o->w_grid.columns.count;
    size_t row = fv_split_start(&o->chunks, chunk), rows = fv_split_length(&o->chunks, chunk);
    size_t first = fv_split_start(&o->w_grid.rows, b);
    size_t outs = fv_split_length(&o->w_grid.rows, b);
    size_t col = fv_split_start(&o->w_grid.columns, c);
    size_t cols = fv_split_length(&o->w_grid.columns, c);
    const real *dy = o->dy + row * o->out + first;
    if (o->dw) {
        real *dw = chunk == 0 ? o->dw : o->part + (chunk - 1) * o->out * o->in;
        fv_gemm(true, false, outs, cols, rows, 1, dy, o->out, o->x + row * o->in + col, o->in,
                chunk == 0 ? 1 : 0, dw + first * o->in + col, o->in);
    }
    if (o->dbias && c == 0) {
        real *sum = chunk == 0 ? o->dbias : o->part_bias + (chunk - 1) * o->out;
        column_sums(rows, outs, o->out, dy, chunk == 0, sum + first);
    }
}

static void linear_back_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const LinearBack *o = arg;
    if (tile < o->x_tiles)
        dx_tile(o, tile);
    else
        dw_tile(o, tile - o->x_tiles);
}

/* Blocks of at most about 128 x 512 of dw, and parts of the rows while blocks are few. */
static void split_weight(LinearBack *o) {
    o->w_grid.rows = fv_split(o->out, fv_ceil_div(o->out, 128), 64, 16);
    o->w_grid.columns = fv_split(o->in, fv_ceil_div(o->in, 512), 64, 16);
    size_t parts = fv_max_size(1, ENOUGH_TILES / grid_tiles(&o->w_grid));
    o->chunks = fv_split(o->rows, parts, 128, 16);
}

void fv_cpu_linear_back(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                        const real *w, const real *dy, real *dx, bool add, real *dw, real *dbias) {
    FvCpu *cpu = fv_cpu(backend);
    if (rows == 0)
        return;
    LinearBack o = {.rows = rows,
                    .in = in,
                    .out = out,
                    .x = x,
                    .w = w,
                    .dy = dy,
                    .dx = dx,
                    .add = add,
                    .dw = dw,
                    .dbias = dbias};
    size_t tiles = 0;
    double cost = 0;
    if (dx) {
        o.x_grid = output_grid(rows, in);
        tiles = o.x_tiles = grid_tiles(&o.x_grid);
        cost = gemm_ns(rows, in, out);
    }
    if (dw || dbias) {
        split_weight(&o);
        size_t parts = o.chunks.count - 1;
        size_t weights = dw ? fv_mul3(parts, out, in) : 0;
        if (!fv_cpu_workspace(cpu, 0, fv_mul(fv_add(weights, fv_mul(parts, out)), sizeof(real))))
            return;
        o.part = cpu->shared.data;
        o.part_bias = parts ? o.part + weights : NULL;
        tiles += o.chunks.count * grid_tiles(&o.w_grid);
        cost += dw ? gemm_ns(out, in, rows) : 0.1 * (double)rows * (double)out;
    }
    fv_cpu_run(cpu, tiles, cost, linear_back_tile, &o);
    if (dw || dbias) {
        if (dw)
            fv_cpu_add_parts(cpu, o.chunks.count - 1, out * in, out * in, o.part, dw);
        if (dbias)
            fv_cpu_add_parts(cpu, o.chunks.count - 1, out, out, o.part_bias, dbias);
    }
}

/* --- a product per head ---------------------------------------------------------------------- */

typedef struct HeadLinear {
    size_t heads, in, out;
    const real *x, *w, *bias; /* backward: x is dy and y is dx */
    real *y;
    FvTiles rows;
} HeadLinear;

static void head_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const HeadLinear *o = arg;
    size_t part = tile / o->heads, h = tile % o->heads;
    size_t row = fv_split_start(&o->rows, part), rows = fv_split_length(&o->rows, part);
    size_t x_stride = o->heads * o->in, y_stride = o->heads * o->out;
    real *y = o->y + row * y_stride + h * o->out;
    for (size_t i = 0; o->bias && i < rows; i++)
        memcpy(y + i * y_stride, o->bias + h * o->out, o->out * sizeof(real));
    fv_gemm(false, true, rows, o->out, o->in, 1, o->x + row * x_stride + h * o->in, x_stride,
            o->w + h * o->out * o->in, o->in, o->bias ? 1 : 0, y, y_stride);
}

static void head_back_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const HeadLinear *o = arg;
    size_t part = tile / o->heads, h = tile % o->heads;
    size_t row = fv_split_start(&o->rows, part), rows = fv_split_length(&o->rows, part);
    size_t dy_stride = o->heads * o->out, dx_stride = o->heads * o->in;
    fv_gemm(false, false, rows, o->in, o->out, 1, o->x + row * dy_stride + h * o->out, dy_stride,
            o->w + h * o->out * o->in, o->in, 0, o->y + row * dx_stride + h * o->in, dx_stride);
}

static void run_heads(FvBackend *backend, size_t rows, HeadLinear *o, FvTile *run) {
    if (rows == 0)
        return;
    o->rows = fv_split(rows, fv_ceil_div(ENOUGH_TILES, o->heads), 64, 16);
    fv_cpu_run(fv_cpu(backend), o->rows.count * o->heads, gemm_ns(rows, o->heads * o->out, o->in),
               run, o);
}

void fv_cpu_head_linear(FvBackend *backend, size_t rows, size_t heads, size_t in, size_t out,
                        const real *x, const real *w, const real *bias, real *y) {
    HeadLinear o = {.heads = heads, .in = in, .out = out, .x = x, .w = w, .bias = bias, .y = y};
    run_heads(backend, rows, &o, head_tile);
}

void fv_cpu_head_linear_back(FvBackend *backend, size_t rows, size_t heads, size_t in, size_t out,
                             const real *w, const real *dy, real *dx) {
    HeadLinear o = {.heads = heads, .in = in, .out = out, .x = dy, .w = w, .y = dx};
    run_heads(backend, rows, &o, head_back_tile);
}
