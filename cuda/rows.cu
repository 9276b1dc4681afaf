/* Copies of rows, sums and activations: work that streams once through memory, a thread per
 * element. The residual connection, whose gradient has column sums, is in norm.cu. */
#include "cuda/kernel.cuh"

/* --- rows ------------------------------------------------------------------------------------ */

enum { ROW_BLOCK = 128, ADD_BLOCK = 64, ADD_GROUPS = 32, ADD_AHEAD = 8 };

static __device__ inline ptrdiff_t row_index(const int32_t *index, size_t i) {
    return index ? index[i] : (ptrdiff_t)i;
}

/* Targets do not repeat. */
static __global__ void copy_rows(size_t width, const float *src, const int32_t *si, float *dst,
                                 const int32_t *di, bool add) {
    size_t column = (size_t)blockIdx.y * blockDim.x + threadIdx.x;
    ptrdiff_t from = row_index(si, blockIdx.x), to = row_index(di, blockIdx.x);
    if (column >= width || from < 0 || to < 0)
        return;
    float x = src[(size_t)from * width + column];
    float *y = dst + (size_t)to * width + column;
    *y = add ? *y + x : x;
}

/* A thread adds the rows of one column in order, of the targets that its group of blocks owns:
 * target % groups. The sum stays in a register while the target does, and the reads of ADD_AHEAD
 * rows do not wait for one another. */
static __global__ void add_rows(size_t rows, size_t width, const float *src, const int32_t *si,
                                float *dst, const int32_t *di) {
    size_t column = fv_thread();
    if (column >= width)
        return;
    float sum = 0;
    ptrdiff_t target = -1;
    for (size_t first = 0; first < rows; first += ADD_AHEAD) {
        ptrdiff_t to[ADD_AHEAD];
        float x[ADD_AHEAD];
        for (size_t k = 0; k < ADD_AHEAD; k++) {
            size_t i = first + k;
            ptrdiff_t from = i < rows ? row_index(si, i) : -1;
            to[k] = from < 0 ? -1 : di[i];
            if (to[k] < 0 || (size_t)to[k] % gridDim.y != blockIdx.y)
                to[k] = -1;
            x[k] = to[k] < 0 ? 0 : src[(size_t)from * width + column];
        }
        for (size_t k = 0; k < ADD_AHEAD; k++) {
            if (to[k] < 0)
                continue;
            if (to[k] != target) {
                if (target >= 0)
                    dst[(size_t)target * width + column] = sum;
                target = to[k];
                sum = dst[(size_t)target * width + column];
            }
            sum += x[k];
        }
    }
    if (target >= 0)
        dst[(size_t)target * width + column] = sum;
}

void fv_cuda_copy_rows(FvBackend *backend, size_t rows, size_t width, const real *src,
                       const int32_t *si, real *dst, const int32_t *di, bool add) {
    FvCuda *cuda = fv_cuda(backend);
    if (add && di)
        FV_LAUNCH(cuda, add_rows, dim3(fv_blocks(width, ADD_BLOCK), ADD_GROUPS), ADD_BLOCK, 0, rows,
                  width, src, si, dst, di);
    else
        FV_LAUNCH(cuda, copy_rows, dim3((unsigned)rows, fv_blocks(width, ROW_BLOCK)), ROW_BLOCK, 0,
                  width, src, si, dst, di, add);
}

/* --- sums ------------------------------------------------------------------------------------ */

static __global__ void add(size_t n, const float *x, float *y) {
    size_t i = fv_thread();
    if (i < n)
        y[i] += x[i];
}

void fv_cuda_add(FvBackend *backend, size_t n, const real *x, real *y) {
    FV_LAUNCH(fv_cuda(backend), add, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, x, y);
}

static __global__ void approach(size_t n, float share, const float *x, float *y) {
    size_t i = fv_thread();
    if (i < n)
        y[i] += share * (x[i] - y[i]);
}

void fv_cuda_approach(FvBackend *backend, size_t n, double share, const real *x, real *y) {
    FV_LAUNCH(fv_cuda(backend), approach, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, (float)share, x,
              y);
}

/* --- activations ----------------------------------------------------------------------------- */

/* Beyond +-15, Phi is 0 or 1 and its derivative 0; finite there, the corrections below are too. */
static __device__ inline float normal_range(float x) {
    return fminf(fmaxf(x, -15.0f), 15.0f);
}

/* Phi(x) = erfc(-x / sqrt(2)) / 2. In the negative tail the rounding of the argument z would cost
 * z^2 units: erfc(z + rest) = erfc(z) + rest erfc'(z). */
static __device__ inline float normal_cdf(float x) {
    const float high = 0.70710677f, low = 1.21016175e-8f; /* 1 / sqrt(2) in two parts */
    float z = -x * high, rest = fmaf(-x, high, -z) - x * low;
    return 0.5f * (erfcf(z) - rest * 1.12837917f * expf(-z * z)); /* 2 / sqrt(pi) */
}

/* exp(-x^2 / 2) / sqrt(2 pi), with the rounding of the square made good likewise. */
static __device__ inline float normal_density(float x) {
    float square = x * x, rest = fmaf(x, x, -square), e = expf(-0.5f * square);
    return 0.39894228f * (e - 0.5f * rest * e);
}

template <typename T> static __global__ void gelu(size_t n, const float *x, T *y) {
    size_t i = fv_thread();
    if (i < n)
        fv_store(y + i, x[i] * normal_cdf(normal_range(x[i]))); /* NaN stays, by the factor x */
}

void fv_cuda_gelu(FvBackend *backend, size_t n, const real *x, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_are_floats(cuda, "gelu", x))
        return;
    fv_with_elements(cuda, y, [&](auto *out) {
        FV_LAUNCH(cuda, gelu, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, x, out);
    });
}

/* gelu'(x) = Phi(x) + x phi(x) */
static __global__ void gelu_back(size_t n, const float *x, const float *dy, float *dx) {
    size_t i = fv_thread();
    if (i >= n)
        return;
    float v = normal_range(x[i]);
    dx[i] = dy[i] * (normal_cdf(v) + x[i] * normal_density(v));
}

void fv_cuda_gelu_back(FvBackend *backend, size_t n, const real *x, const real *dy, real *dx) {
    FV_LAUNCH(fv_cuda(backend), gelu_back, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, x, dy, dx);
}

static __global__ void relu(size_t n, const float *x, float *y) {
    size_t i = fv_thread();
    if (i < n)
        y[i] = x[i] < 0 ? 0 : x[i]; /* a comparison that lets NaN pass */
}

void fv_cuda_relu(FvBackend *backend, size_t n, const real *x, real *y) {
    FV_LAUNCH(fv_cuda(backend), relu, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, x, y);
}

static __global__ void relu_back(size_t n, const float *x, const float *dy, float *dx) {
    size_t i = fv_thread();
    if (i < n)
        dx[i] = x[i] > 0 ? dy[i] : 0;
}

void fv_cuda_relu_back(FvBackend *backend, size_t n, const real *x, const real *dy, real *dx) {
    FV_LAUNCH(fv_cuda(backend), relu_back, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, x, dy, dx);
}

static __device__ inline float sigmoid(float x) {
    return 1 / (1 + expf(-x));
}

template <typename T>
static __global__ void swiglu(size_t n, const float *gate, const float *up, T *y) {
    size_t i = fv_thread();
    if (i < n)
        fv_store(y + i, gate[i] * sigmoid(gate[i]) * up[i]);
}

void fv_cuda_swiglu(FvBackend *backend, size_t n, const real *gate, const real *up, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_are_floats(cuda, "swiglu", gate, up))
        return;
    fv_with_elements(cuda, y, [&](auto *out) {
        FV_LAUNCH(cuda, swiglu, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, gate, up, out);
    });
}

static __global__ void swiglu_back(size_t n, const float *gate, const float *up, const float *dy,
                                   float *dgate, float *dup) {
    size_t i = fv_thread();
    if (i >= n)
        return;
    float g = gate[i], u = up[i], d = dy[i], s = sigmoid(g);
    dgate[i] = d * u * (s + g * s * (1 - s));
    dup[i] = d * g * s;
}

void fv_cuda_swiglu_back(FvBackend *backend, size_t n, const real *gate, const real *up,
                         const real *dy, real *dgate, real *dup) {
    FV_LAUNCH(fv_cuda(backend), swiglu_back, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, gate, up, dy,
              dgate, dup);
}
