/* Dense layers, whole or one per head: cuBLAS products, and the bias and its gradient. */
#include "cuda/kernel.cuh"

static __global__ void fill_rows(size_t n, size_t width, const float *bias, float *y) {
    size_t i = fv_thread();
    if (i < n)
        y[i] = bias[i % width];
}

void fv_cuda_linear(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                    const real *w, const real *bias, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm product = {.trans_a = false,
                      .trans_b = true,
                      .m = rows,
                      .n = out,
                      .k = in,
                      .lda = in,
                      .ldb = in,
                      .ldc = out,
                      .alpha = 1,
                      .beta = bias ? 1.0f : 0.0f};
    size_t n = rows * out;
    if (bias)
        FV_LAUNCH(cuda, fill_rows, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, out, bias, y);
    fv_cuda_gemm(cuda, &product, x, w, y);
}

/* --- column sums ----------------------------------------------------------------------------- */

enum { COLUMNS = 32, ROWS = 8, PARTS = 64 };

/* part [gridDim.y][width]: a block adds the rows of its part for 32 columns, 8 rows at once. */
static __global__ void sum_part(size_t rows, size_t width, size_t each, const float *dy,
                                const float *x, const float *mean, const float *rstd, float *part) {
    __shared__ float sums[ROWS][COLUMNS];
    size_t column = (size_t)blockIdx.x * COLUMNS + threadIdx.x;
    size_t first = (size_t)blockIdx.y * each, end = first + each < rows ? first + each : rows;
    float sum = 0;
    if (column < width)
        for (size_t r = first + threadIdx.y; r < end; r += ROWS) {
            size_t i = r * width + column;
            float h = x ? (x[i] - (mean ? mean[r] : 0)) * (rstd ? rstd[r] : 1) : 1;
            sum += dy[i] * h;
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

void fv_cuda_add_columns(FvCuda *cuda, size_t rows, size_t width, const float *dy, const float *x,
                         const float *mean, const float *rstd, float *sum) {
    size_t each = (rows + PARTS - 1) / PARTS, least = 4 * ROWS;
    each = each > least ? each : least;
    size_t parts = (rows + each - 1) / each;
    float *part = (float *)fv_cuda_workspace(cuda, parts * width * sizeof(float));
    if (!part || parts == 0)
        return;
    FV_LAUNCH(cuda, sum_part, dim3(fv_blocks(width, COLUMNS), (unsigned)parts), dim3(COLUMNS, ROWS),
              0, rows, width, each, dy, x, mean, rstd, part);
    FV_LAUNCH(cuda, add_parts, fv_blocks(width, FV_BLOCK), FV_BLOCK, 0, parts, width, part, sum);
}

void fv_cuda_linear_back(FvBackend *backend, size_t rows, size_t in, size_t out, const real *x,
                         const real *w, const real *dy, real *dx, bool add, real *dw, real *dbias) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm to_x = {.trans_a = false,
                   .trans_b = false,
                   .m = rows,
                   .n = in,
                   .k = out,
                   .lda = out,
                   .ldb = in,
                   .ldc = in,
                   .alpha = 1,
                   .beta = add ? 1.0f : 0.0f};
    FvGemm to_w = {.trans_a = true,
                   .trans_b = false,
                   .m = out,
                   .n = in,
                   .k = rows,
                   .lda = out,
                   .ldb = in,
                   .ldc = in,
                   .alpha = 1,
                   .beta = 1};
    if (dx)
        fv_cuda_gemm(cuda, &to_x, dy, w, dx);
    if (dw && rows > 0)
        fv_cuda_gemm(cuda, &to_w, dy, x, dw);
    if (dbias)
        fv_cuda_add_columns(cuda, rows, out, dy, nullptr, nullptr, nullptr, dbias);
}

/* --- a product per head ---------------------------------------------------------------------- */

void fv_cuda_head_linear(FvBackend *backend, size_t rows, size_t heads, size_t in, size_t out,
                         const real *x, const real *w, const real *bias, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    FvGemm product = {.trans_a = false,
                      .trans_b = true,
                      .m = rows,
                      .n = out,
                      .k = in,
                      .lda = heads * in,
                      .ldb = in,
                      .ldc = heads * out,
                      .alpha = 1,
                      .beta = bias ? 1.0f : 0.0f};
    size_t n = rows * heads * out;
    if (bias)
        FV_LAUNCH(cuda, fill_rows, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, heads * out, bias, y);
    fv_cuda_gemm_strided(cuda, &product, heads, x, in, w, out * in, y, out);
}

void fv_cuda_head_linear_back(FvBackend *backend, size_t rows, size_t heads, size_t in, size_t out,
                              const real *w, const real *dy, real *dx) {
    FvGemm product = {.trans_a = false,
                      .trans_b = false,
                      .m = rows,
                      .n = in,
                      .k = out,
                      .lda = heads * out,
                      .ldb = in,
                      .ldc = heads * in,
                      .alpha = 1,
                      .beta = 0};
    fv_cuda_gemm_strided(fv_cuda(backend), &product, heads, dy, out, w, out * in, dx, in);
}
