/* Copies, sums and residual connections: work that streams once through memory. */
#include <string.h>

#include "backend/cpu.h"
#include "backend/cpu_math.h"

static const double ns_per_element = 0.15;

typedef struct Rows {
    FvTiles split;
    size_t width;
    const real *x, *scale, *a;
    const int32_t *si, *di;
    real *y, *part;
    bool add;
} Rows;

void fv_cpu_copy(FvBackend *backend, size_t n, const real *x, real *y) {
    (void)backend;
    memcpy(y, x, n * sizeof *y);
}

FV_SIMD static void add_range(size_t n, const real *x, real *y) {
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

static void add_tile(void *arg, size_t tile, size_t thread) {
    const Rows *r = arg;
    (void)thread;
    size_t start = fv_split_start(&r->split, tile);
    add_range(fv_split_length(&r->split, tile), r->x + start, r->y + start);
}

void fv_cpu_add(FvBackend *backend, size_t n, const real *x, real *y) {
    Rows r = {.split = fv_split_rows(n, 1), .x = x, .y = y};
    fv_cpu_run(fv_cpu(backend), r.split.count, ns_per_element * (double)n, add_tile, &r);
}

/* Targets may repeat when adding: rows go in order, and it is the columns that are shared out. */
void fv_cpu_copy_rows(FvBackend *backend, size_t rows, size_t width, const real *src,
                      const int32_t *si, real *dst, const int32_t *di, bool add) {
    (void)backend;
    for (size_t i = 0; i < rows; i++) {
        ptrdiff_t from = si ? si[i] : (ptrdiff_t)i, to = di ? di[i] : (ptrdiff_t)i;
        if (from < 0 || to < 0)
            continue;
        const real *x = src + (size_t)from * width;
        real *y = dst + (size_t)to * width;
        if (add)
            add_range(width, x, y);
        else
            memcpy(y, x, width * sizeof *y);
    }
}

FV_SIMD static void residual_range(size_t rows, size_t width, const real *x, const real *scale,
                                   const real *a, real *y) {
    for (size_t r = 0; r < rows; r++, x += width, a += width, y += width)
        for (size_t i = 0; i < width; i++)
            y[i] = x[i] + (scale ? scale[i] * a[i] : a[i]);
}

static void residual_tile(void *arg, size_t tile, size_t thread) {
    const Rows *r = arg;
    (void)thread;
    size_t start = fv_split_start(&r->split, tile) * r->width;
    residual_range(fv_split_length(&r->split, tile), r->width, r->x + start, r->scale, r->a + start,
                   r->y + start);
}

void fv_cpu_residual(FvBackend *backend, size_t rows, size_t width, const real *x,
                     const real *scale, const real *a, real *y) {
    Rows r = {.split = fv_split_rows(rows, width),
              .width = width,
              .x = x,
              .scale = scale,
              .a = a,
              .y = y};
    fv_cpu_run(fv_cpu(backend), r.split.count, ns_per_element * (double)(rows * width),
               residual_tile, &r);
}

FV_SIMD static void residual_back_range(size_t rows, size_t width, const real *scale, const real *a,
                                        const real *dy, real *da, real *dscale) {
    for (size_t r = 0; r < rows; r++, a += width, dy += width, da += width) {
        for (size_t i = 0; dscale && i < width; i++)
            dscale[i] += a[i] * dy[i];
        for (size_t i = 0; i < width; i++)
            da[i] = scale ? scale[i] * dy[i] : dy[i];
    }
}

static void residual_back_tile(void *arg, size_t tile, size_t thread) {
    const Rows *r = arg;
    (void)thread;
    size_t start = fv_split_start(&r->split, tile) * r->width;
    real *part = r->part ? r->part + tile * r->width : NULL;
    if (part)
        memset(part, 0, r->width * sizeof *part);
    residual_back_range(fv_split_length(&r->split, tile), r->width, r->scale, r->a + start,
                        r->x + start, r->y + start, part);
}

void fv_cpu_residual_back(FvBackend *backend, size_t rows, size_t width, const real *scale,
                          const real *a, const real *dy, real *da, real *dscale) {
    FvCpu *cpu = fv_cpu(backend);
    Rows r = {.split = fv_split_sums(rows, width),
              .width = width,
              .x = dy,
              .scale = scale,
              .a = a,
              .y = da};
    if (dscale) {
        if (!fv_cpu_workspace(cpu, 0, fv_mul3(r.split.count, width, sizeof(real))))
            return;
        r.part = cpu->shared.data;
    }
    fv_cpu_run(cpu, r.split.count, 2 * ns_per_element * (double)(rows * width), residual_back_tile,
               &r);
    if (dscale)
        fv_cpu_add_parts(cpu, r.split.count, width, width, r.part, dscale);
}

FV_SIMD static void add_parts(size_t parts, size_t n, size_t stride, const real *part, real *sum) {
    for (size_t p = 0; p < parts; p++)
        for (size_t i = 0; i < n; i++)
            sum[i] += part[p * stride + i];
}

typedef struct Parts {
    FvTiles split;
    size_t parts, stride;
    const real *part;
    real *sum;
} Parts;

static void add_parts_tile(void *arg, size_t tile, size_t thread) {
    const Parts *p = arg;
    (void)thread;
    size_t start = fv_split_start(&p->split, tile);
    add_parts(p->parts, fv_split_length(&p->split, tile), p->stride, p->part + start,
              p->sum + start);
}

void fv_cpu_add_parts(FvCpu *cpu, size_t parts, size_t n, size_t stride, const real *part,
                      real *sum) {
    Parts p = {fv_split_rows(n, 1), parts, stride, part, sum};
    fv_cpu_run(cpu, p.split.count, ns_per_element * (double)(parts * n), add_parts_tile, &p);
}
