/* Dense layers, whole or one per head: cuBLAS products, and the bias and its gradient. In bf16 mode
 * each operand that is not in bfloat16 already is rounded once for all products of the call. */
#include "cuda/kernel.cuh"

static __global__ void fill_rows(size_t n, size_t width, const float *bias, float *y) {
    size_t i = fv_thread();
    if (i < n)
        y[i] = bias[i % width];
}

/* The product of each of `heads` parts of x [rows, heads * in] with its weights [out, in], into y
 * [rows, heads * out], and the one of dy with them, into dx. */
static FvGemm to_y(size_t rows, size_t heads, size_t in, size_t out, bool add) {
    return {.trans_a = false,
            .trans_b = true,
            .m = rows,
            .n = out,
            .k = in,
            .lda = heads * in,
            .ldb = in,
            .ldc = heads * out,
            .alpha = 1,
            .beta = add ? 1.0f : 0.0f};
}

static FvGemm to_x(size_t rows, size_t heads, size_t in, size_t out, bool add) {
    return {.trans_a = false,
            .trans_b = false,
            .m = rows,
            .n = in,
            .k = out,
            .lda = heads * out,
            .ldb = in,
            .ldc = heads * in,
            .alpha = 1,
            .beta = add ? 1.0f : 0.0f};
}

void fv_cuda_linear(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                    const real *w, const real *bias, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm product = to_y(rows, 1, in, out, bias != nullptr);
    size_t n = rows * out, nx = rows * in, nw = out * in;
    char *space;
    if (!fv_are_floats(cuda, "linear", w, bias, y) ||
        !fv_take_space(
            cuda, fv_cuda_operand_bytes(cuda, nx, x) + fv_cuda_operand_bytes(cuda, nw, w), &space))
        return;
    const void *a = fv_cuda_operand(cuda, nx, x, &space), *b = fv_cuda_operand(cuda, nw, w, &space);
    if (bias)
        FV_LAUNCH(cuda, fill_rows, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, out, bias, y);
    fv_cuda_gemm(cuda, &product, a, b, y);
}

/* --- column sums ----------------------------------------------------------------------------- */

enum { COLUMNS = 32, ROWS = 8, PARTS = 64 };

/* part [gridDim.y][width]: a block adds the rows of its part for 32 columns, 8 rows at once, and
 * leaves dy rounded in `copy` unless that is NULL. */
static __global__ void sum_part(size_t rows, size_t width, size_t each, const float *dy,
                                const float *x, const float *mean, const float *rstd, float *part,
                                __nv_bfloat16 *copy) {
    __shared__ float sums[ROWS][COLUMNS];
    size_t column = (size_t)blockIdx.x * COLUMNS + threadIdx.x;
    size_t first = (size_t)blockIdx.y * each, end = first + each < rows ? first + each : rows;
    float sum = 0;
    if (column < width)
        for (size_t r = first + threadIdx.y; r < end; r += ROWS) {
            size_t i = r * width + column;
            float d = dy[i], h = x ? (x[i] - (mean ? mean[r] : 0)) * (rstd ? rstd[r] : 1) : 1;
            sum += d * h;
            if (copy)
                fv_store(copy + i, d);
        }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= width)
        return;
    for (int r = 1; r < ROWS; r++)
        sum += sums[r][threadIdx.x];
    part[blockIdx.y * width + column] = sum;
}

static __global__ void add_parts(size_t parts, size_t width, const float *part, float *sum) {
    size_t column = fv_thread();
    if (column >= width)
        return;
    float total = 0;
    for (size_t p = 0; p < parts; p++)
        total += part[p * width + column];
    sum[column] += total;
}

static size_t rows_of_part(size_t rows) {
    size_t each = (rows + PARTS - 1) / PARTS, least = 4 * ROWS;
    return each > least ? each : least;
}

static size_t part_bytes(size_t rows, size_t width) {
    size_t each = rows_of_part(rows), bytes = (rows + each - 1) / each * width * sizeof(float);
    return fv_cuda_aligned(bytes);
}

static void add_columns(FvCuda *cuda, size_t rows, size_t width, const float *dy, const float *x,
                        const float *mean, const float *rstd, float *part, __nv_bfloat16 *copy,
                        float *sum) {
    size_t each = rows_of_part(rows), parts = (rows + each - 1) / each;
    if (parts == 0)
        return;
    FV_LAUNCH(cuda, sum_part, dim3(fv_blocks(width, COLUMNS), (unsigned)parts), dim3(COLUMNS, ROWS),
              0, rows, width, each, dy, x, mean, rstd, part, copy);
    FV_LAUNCH(cuda, add_parts, fv_blocks(width, FV_BLOCK), FV_BLOCK, 0, parts, width, part, sum);
}

void fv_cuda_add_columns(FvCuda *cuda, size_t rows, size_t width, const float *dy, const float *x,
                         const float *mean, const float *rstd, float *sum) {
    char *space;
    if (fv_take_space(cuda, part_bytes(rows, width), &space))
        add_columns(cuda, rows, width, dy, x, mean, rstd, (float *)space, nullptr, sum);
}

/* --- backward ----------------------------------------------------------------------------------
 */

size_t fv_cuda_gradient_bytes(const FvCuda *cuda, size_t rows, size_t width, const float *dy,
                              bool dbias) {
    return fv_cuda_operand_bytes(cuda, rows * width, dy) + (dbias ? part_bytes(rows, width) : 0);
}

const void *fv_cuda_gradient(FvCuda *cuda, size_t rows, size_t width, const float *dy, float *dbias,
                             char **space) {
    if (!dbias)
        return fv_cuda_operand(cuda, rows * width, dy, space);
    size_t bytes = fv_cuda_operand_bytes(cuda, rows * width, dy);
    __nv_bfloat16 *copy = bytes > 0 ? (__nv_bfloat16 *)*space : nullptr;
    add_columns(cuda, rows, width, dy, nullptr, nullptr, nullptr, (float *)(*space + bytes), copy,
                dbias);
    *space += fv_cuda_gradient_bytes(cuda, rows, width, dy, true);
    return copy ? (const void *)copy : dy;
}

void fv_cuda_linear_back(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                         const real *w, const real *dy, real *dx, bool add, real *dw, real *dbias) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm for_x = to_x(rows, 1, in, out, add);
    FvGemm for_w = {.trans_a = true,
                    .trans_b = false,
                    .m = out,
                    .n = in,
                    .k = rows,
                    .lda = out,
                    .ldb = in,
                    .ldc = in,
                    .alpha = 1,
                    .beta = 1};
    x = dw ? x : nullptr; /* what is not read is not rounded */
    w = dx ? w : nullptr;
    size_t nx = rows * in, nw = out * in;
    size_t bytes = fv_cuda_operand_bytes(cuda, nx, x) + fv_cuda_operand_bytes(cuda, nw, w) +
                   fv_cuda_gradient_bytes(cuda, rows, out, dy, dbias);
    char *space;
    if (!fv_are_floats(cuda, "linear_back", w, dy, dx, dw, dbias) ||
        !fv_take_space(cuda, bytes, &space))
        return;
    const void *xs = fv_cuda_operand(cuda, nx, x, &space);
    const void *ws = fv_cuda_operand(cuda, nw, w, &space);
    const void *dys = fv_cuda_gradient(cuda, rows, out, dy, dbias, &space);
    if (dx)
        fv_cuda_gemm(cuda, &for_x, dys, ws, dx);
    if (dw && rows > 0)
        fv_cuda_gemm(cuda, &for_w, dys, xs, dw);
}

/* --- a product per head ------------------------------------------------------------------------
 */

/* y = x + bias, rows of `width`; bias NULL is 0. Products leave float; y may be an operand tensor.
 */
template <typename T>
static __global__ void add_bias(size_t n, size_t width, const float *x, const float *bias, T *y) {
    size_t i = fv_thread();
    if (i < n)
        fv_store(y + i, x[i] + (bias ? bias[i % width] : 0));
}

void fv_cuda_head_linear(FvBackend *backend, size_t rows, size_t heads, size_t in, size_t out,
                         const real *x, const real *w, const real *bias, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm product = to_y(rows, heads, in, out, false);
    size_t n = rows * heads * out, nx = rows * heads * in, nw = heads * out * in;
    bool plain = !bias && !fv_cuda_is_operand(cuda, y); /* the product is the result */
    size_t bytes = fv_cuda_operand_bytes(cuda, nx, x) + fv_cuda_operand_bytes(cuda, nw, w);
    char *space;
    if (!fv_are_floats(cuda, "head_linear", w, bias) ||
        !fv_take_space(cuda, bytes + (plain ? 0 : n * sizeof(float)), &space))
        return;
    const void *a = fv_cuda_operand(cuda, nx, x, &space), *b = fv_cuda_operand(cuda, nw, w, &space);
    float *c = plain ? y : (float *)space;
    fv_cuda_gemm_strided(cuda, &product, heads, a, in, b, out * in, c, out);
    if (!plain)
        fv_with_elements(cuda, y, [&](auto *to) {
            FV_LAUNCH(cuda, add_bias, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, heads * out, c, bias,
                      to);
        });
}

void fv_cuda_head_linear_back(FvBackend *backend, size_t rows, size_t heads, size_t in, size_t out,
                              const real *w, const real *dy, real *dx) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm product = to_x(rows, heads, in, out, false);
    size_t ndy = rows * heads * out, nw = heads * out * in;
    size_t bytes = fv_cuda_operand_bytes(cuda, ndy, dy) + fv_cuda_operand_bytes(cuda, nw, w);
    char *space;
    if (!fv_are_floats(cuda, "head_linear_back", w, dx) || !fv_take_space(cuda, bytes, &space))
        return;
    const void *a = fv_cuda_operand(cuda, ndy, dy, &space);
    const void *b = fv_cuda_operand(cuda, nw, w, &space);
    fv_cuda_gemm_strided(cuda, &product, heads, a, out, b, out * in, dx, in);
}
