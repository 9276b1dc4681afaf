/* Copies, sums and residual branches: operations that stream once through memory. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Rows {
    FvSplit split; /* of the rows, or of the elements */
    size_t width;
    const real *x, *a, *scale, *dy;
    const int32_t *si, *di;
    real *y, *part;
    bool add;
    FvSplit columns; /* copy_rows with repeated targets is cut by columns instead */
} Rows;

/* --- copy, add ------------------------------------------------------------------------------- */

static void copy_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Rows *o = arg;
    size_t start = fv_split_start(&o->split, tile);
    memcpy(o->y + start, o->x + start, fv_split_length(&o->split, tile) * sizeof(real));
}

void fv_cpu_copy(FvBackend *backend, size_t n, const real *x, real *y) {
    Rows o = {.split = fv_split_rows(n, 1), .x = x, .y = y};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.1 * (double)n, copy_tile, &o);
}

FV_SIMD
static void add_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Rows *o = arg;
    size_t start = fv_split_start(&o->split, tile), n = fv_split_length(&o->split, tile);
    const real *x = o->x + start;
    real *y = o->y + start;
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

void fv_cpu_add(FvBackend *backend, size_t n, const real *x, real *y) {
    Rows o = {.split = fv_split_rows(n, 1), .x = x, .y = y};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.12 * (double)n, add_tile, &o);
}

/* --- partial sums ---------------------------------------------------------------------------- */

typedef struct Parts {
    FvSplit split;
    size_t parts, stride;
    const real *part;
    real *sum;
} Parts;

FV_SIMD
static void parts_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Parts *o = arg;
    size_t start = fv_split_start(&o->split, tile), n = fv_split_length(&o->split, tile);
    real *sum = o->sum + start;
    for (size_t p = 0; p < o->parts; p++) {
        const real *part = o->part + p * o->stride + start;
        for (size_t i = 0; i < n; i++)
            sum[i] += part[i];
    }
}

void fv_cpu_add_parts(FvCpu *cpu, size_t parts, size_t n, size_t stride, const real *part,
                      real *sum) {
    if (!sum || parts == 0)
        return;
    Parts o = {fv_split_rows(n, 2), parts, stride, part, sum};
    fv_cpu_run(cpu, o.split.count, 0.1 * (double)n * (double)parts, parts_tile, &o);
}

/* --- gather and scatter ---------------------------------------------------------------------- */

/* Source and target row of copy i; false when it is to be skipped. */
FV_INLINE bool row_pair(const Rows *o, size_t i, size_t *from, size_t *to) {
    int64_t s = o->si ? o->si[i] : (int64_t)i, d = o->di ? o->di[i] : (int64_t)i;
    *from = (size_t)s;
    *to = (size_t)d;
    return s >= 0 && d >= 0;
}

FV_SIMD
static void copy_rows_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Rows *o = arg;
    size_t row = tile / o->columns.count, column = tile % o->columns.count;
    size_t begin = fv_split_start(&o->split, row);
    size_t end = begin + fv_split_length(&o->split, row);
    size_t left = fv_split_start(&o->columns, column);
    size_t n = fv_split_length(&o->columns, column);
    for (size_t i = begin; i < end; i++) {
        size_t from, to;
        if (!row_pair(o, i, &from, &to))
            continue;
        const real *x = o->x + from * o->width + left;
        real *y = o->y + to * o->width + left;
        if (!o->add)
            memcpy(y, x, n * sizeof(real));
        else
            for (size_t c = 0; c < n; c++)
                y[c] += x[c];
    }
}

void fv_cpu_copy_rows(FvBackend *backend, size_t rows, size_t width, const real *src,
                      const int32_t *si, real *dst, const int32_t *di, bool add) {
    bool ordered = add && di; /* targets may repeat: all rows of a column stay in one tile */
    Rows o = {.split = ordered ? fv_split(rows, 1, 1, 1) : fv_split_rows(rows, width),
              .columns = ordered ? fv_split(width, 16, 16, 16) : fv_split(width, 1, 1, 1),
              .width = width,
              .x = src,
              .si = si,
              .y = dst,
              .di = di,
              .add = add};
    fv_cpu_run(fv_cpu(backend), o.split.count * o.columns.count,
               0.1 * (double)rows * (double)width, copy_rows_tile, &o);
}

/* --- residual -------------------------------------------------------------------------------- */

FV_SIMD
static void residual_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Rows *o = arg;
    size_t start = fv_split_start(&o->split, tile) * o->width;
    size_t rows = fv_split_length(&o->split, tile), width = o->width;
    const real *x = o->x + start, *a = o->a + start, *scale = o->scale;
    real *y = o->y + start;
    if (!scale) {
        for (size_t i = 0; i < rows * width; i++)
            y[i] = x[i] + a[i];
        return;
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < width; c++)
            y[r * width + c] = x[r * width + c] + scale[c] * a[r * width + c];
}

void fv_cpu_residual(FvBackend *backend, size_t rows, size_t width, const real *x,
                     const real *scale, const real *a, real *y) {
    Rows o = {.split = fv_split_rows(rows, width),
              .width = width,
              .x = x,
              .a = a,
              .scale = scale,
              .y = y};
    fv_cpu_run(fv_cpu(backend), o.split.count, 0.15 * (double)rows * (double)width, residual_tile,
               &o);
}

FV_SIMD
static void residual_back_tile(void *arg, size_t tile, size_t thread) {
    (void)thread;
    const Rows *o = arg;
    size_t start = fv_split_start(&o->split, tile) * o->width;
    size_t rows = fv_split_length(&o->split, tile), width = o->width;
    const real *a = o->a + start, *dy = o->dy + start, *scale = o->scale;
    real *da = o->y + start, *part = o->part ? o->part + tile * width : NULL;
    if (part) /* before da is written, which may take the place of dy */
        memset(part, 0, width * sizeof(real));
    for (size_t r = 0; r < rows; r++, a += width, dy += width, da += width) {
        if (part)
            for (size_t c = 0; c < width; c++)
                part[c] += a[c] * dy[c];
        for (size_t c = 0; c < width; c++)
            da[c] = scale ? scale[c] * dy[c] : dy[c];
    }
}

void fv_cpu_residual_back(FvBackend *backend, size_t rows, size_t width, const real *scale,
                          const real *a, const real *dy, real *da, real *dscale) {
    FvCpu *cpu = fv_cpu(backend);
    Rows o = {.split = fv_split_sums(rows, width),
              .width = width,
              .scale = scale,
              .a = a,
              .dy = dy,
              .y = da};
    if (dscale) {
        if (!fv_cpu_workspace(cpu, 0, fv_mul3(o.split.count, width, sizeof(real))))
            return;
        o.part = cpu->shared.data;
    }
    fv_cpu_run(cpu, o.split.count, 0.2 * (double)rows * (double)width, residual_back_tile, &o);
    fv_cpu_add_parts(cpu, o.split.count, width, width, o.part, dscale);
}
