/* cuBLAS of the stand-in for CUDA: see cublas_v2.h. Matrices are column-major. */
#include "cublas_v2.h"
#include "stream.h"

#include <algorithm>
#include <cblas.h>
#include <cstdint>

#include "cuda_bf16.h"

struct HostBlas {
    int device;
    cudaStream_t stream;
};

namespace {

struct Matrix {
    cublasOperation_t op;
    cudaDataType_t type;
    int rows, columns, stride; /* as stored */
};

struct Product {
    Matrix a, b, c;
    int m, n, k;
    float alpha, beta;
    bool rounds; /* operands to bfloat16 */
};

size_t bytes_of(cudaDataType_t type) {
    return type == CUDA_R_16BF ? sizeof(__nv_bfloat16) : sizeof(float);
}

size_t place(const Matrix &m, int row, int column) {
    return (size_t)column * (size_t)m.stride + (size_t)row;
}

/* In float, packed, and rounded where told. */
std::vector<float> unpacked(const Matrix &m, const void *from, bool rounds) {
    std::vector<float> to;
    to.reserve((size_t)m.rows * (size_t)m.columns + 1);
    for (int j = 0; j < m.columns; j++)
        for (int i = 0; i < m.rows; i++) {
            float x = m.type == CUDA_R_16BF
                          ? __bfloat162float(((const __nv_bfloat16 *)from)[place(m, i, j)])
                          : ((const float *)from)[place(m, i, j)];
            to.push_back(rounds ? __bfloat162float(__float2bfloat16(x)) : x);
        }
    return to;
}

/* Where BLAS finds the operand: itself where it can be read as it is. */
const float *operand(Matrix &m, const void *x, bool rounds, std::vector<float> &space) {
    if (m.type == CUDA_R_32F && !rounds)
        return (const float *)x;
    space = unpacked(m, x, rounds);
    m.stride = m.rows > 0 ? m.rows : 1;
    return space.data();
}

CBLAS_TRANSPOSE transposed(cublasOperation_t op) {
    return op == CUBLAS_OP_T ? CblasTrans : CblasNoTrans;
}

void multiply(Product p, const void *a, const void *b, void *c) {
    std::vector<float> space_a, space_b, sum;
    const float *x = operand(p.a, a, p.rounds, space_a), *y = operand(p.b, b, p.rounds, space_b);
    float *z = (float *)c;
    int stride = p.c.stride;
    if (p.c.type == CUDA_R_16BF) {
        sum = p.beta != 0 ? unpacked(p.c, c, false) : std::vector<float>((size_t)p.m * (size_t)p.n);
        z = sum.data();
        stride = p.m;
    }
    cblas_sgemm(CblasColMajor, transposed(p.a.op), transposed(p.b.op), p.m, p.n, p.k, p.alpha, x,
                p.a.stride, y, p.b.stride, p.beta, z, stride);
    for (int j = 0; p.c.type == CUDA_R_16BF && j < p.n; j++)
        for (int i = 0; i < p.m; i++)
            ((__nv_bfloat16 *)c)[place(p.c, i, j)] =
                __float2bfloat16(z[(size_t)j * (size_t)p.m + (size_t)i]);
}

bool is_type(cudaDataType_t type) {
    return type == CUDA_R_32F || type == CUDA_R_16BF;
}

/* What cuBLAS takes: operands of one type, and a result in it or in float. */
cublasStatus_t check(cublasHandle_t blas, const Product &p, const float *alpha, const float *beta,
                     cublasComputeType_t compute) {
    if (!blas)
        return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!alpha || !beta || p.m < 0 || p.n < 0 || p.k < 0 || p.a.stride < std::max(1, p.a.rows) ||
        p.b.stride < std::max(1, p.b.rows) || p.c.stride < std::max(1, p.m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!is_type(p.a.type) || p.b.type != p.a.type ||
        (p.c.type != p.a.type && p.c.type != CUDA_R_32F) ||
        (p.a.type == CUDA_R_16BF && compute != CUBLAS_COMPUTE_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return blas->device == host_device() ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

Product product(cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *alpha,
                cudaDataType_t type_a, int lda, cudaDataType_t type_b, int ldb, const void *beta,
                cudaDataType_t type_c, int ldc, cublasComputeType_t compute) {
    Matrix a = {ta, type_a, ta == CUBLAS_OP_T ? k : m, ta == CUBLAS_OP_T ? m : k, lda};
    Matrix b = {tb, type_b, tb == CUBLAS_OP_T ? n : k, tb == CUBLAS_OP_T ? k : n, ldb};
    return {a,
            b,
            {CUBLAS_OP_N, type_c, m, n, ldc},
            m,
            n,
            k,
            alpha ? *(const float *)alpha : 0,
            beta ? *(const float *)beta : 0,
            compute == CUBLAS_COMPUTE_32F_FAST_16BF};
}

cublasStatus_t enqueue(cublasHandle_t blas, std::function<void()> work) {
    return host_enqueue(blas->stream, std::move(work)) == cudaSuccess
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_EXECUTION_FAILED;
}

} // namespace

extern "C" {

const char *cublasGetStatusString(cublasStatus_t code) {
    return code == CUBLAS_STATUS_SUCCESS            ? "success"
           : code == CUBLAS_STATUS_NOT_INITIALIZED  ? "not initialized"
           : code == CUBLAS_STATUS_EXECUTION_FAILED ? "execution failed"
           : code == CUBLAS_STATUS_NOT_SUPPORTED    ? "not supported"
                                                    : "invalid value";
}

cublasStatus_t cublasCreate(cublasHandle_t *out) {
    if (host_device() < 0)
        return CUBLAS_STATUS_NOT_INITIALIZED;
    openblas_set_num_threads(1); /* the same bits on any number of cores */
    *out = new HostBlas{host_device(), nullptr};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy(cublasHandle_t blas) {
    delete blas;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t blas, cudaStream_t stream) {
    if (!blas)
        return CUBLAS_STATUS_NOT_INITIALIZED;
    blas->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetProperty(libraryPropertyType, int *value) {
    *value = 0;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace(cublasHandle_t blas, void *p, size_t bytes) {
    if (!blas)
        return CUBLAS_STATUS_NOT_INITIALIZED;
    return (uintptr_t)p % 256 == 0 && (p || bytes == 0) ? CUBLAS_STATUS_SUCCESS
                                                        : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t blas, cublasMath_t mode) {
    return blas && (mode == CUBLAS_DEFAULT_MATH ||
                    mode == CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasGemmEx(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb, int m,
                            int n, int k, const void *alpha, const void *a, cudaDataType_t type_a,
                            int lda, const void *b, cudaDataType_t type_b, int ldb,
                            const void *beta, void *c, cudaDataType_t type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(blas, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b,
                                      ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algorithm);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t blas, cublasOperation_t ta,
                                          cublasOperation_t tb, int m, int n, int k,
                                          const void *alpha, const void *a, cudaDataType_t type_a,
                                          int lda, long long stride_a, const void *b,
                                          cudaDataType_t type_b, int ldb, long long stride_b,
                                          const void *beta, void *c, cudaDataType_t type_c, int ldc,
                                          long long stride_c, int count,
                                          cublasComputeType_t compute, cublasGemmAlgo_t) {
    Product p =
        product(ta, tb, m, n, k, alpha, type_a, lda, type_b, ldb, beta, type_c, ldc, compute);
    cublasStatus_t code = check(blas, p, (const float *)alpha, (const float *)beta, compute);
    if (code != CUBLAS_STATUS_SUCCESS)
        return code;
    return enqueue(blas, [=] {
        for (long long i = 0; i < count; i++)
            multiply(p, (const char *)a + i * stride_a * (long long)bytes_of(type_a),
                     (const char *)b + i * stride_b * (long long)bytes_of(type_b),
                     (char *)c + i * stride_c * (long long)bytes_of(type_c));
    });
}

cublasStatus_t cublasGemmBatchedEx(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb,
                                   int m, int n, int k, const void *alpha, const void *const a[],
                                   cudaDataType_t type_a, int lda, const void *const b[],
                                   cudaDataType_t type_b, int ldb, const void *beta,
                                   void *const c[], cudaDataType_t type_c, int ldc, int count,
                                   cublasComputeType_t compute, cublasGemmAlgo_t) {
    Product p =
        product(ta, tb, m, n, k, alpha, type_a, lda, type_b, ldb, beta, type_c, ldc, compute);
    cublasStatus_t code = check(blas, p, (const float *)alpha, (const float *)beta, compute);
    if (code != CUBLAS_STATUS_SUCCESS)
        return code;
    return enqueue(blas, [=] {
        for (int i = 0; i < count; i++)
            multiply(p, a[i], b[i], c[i]);
    });
}

} /* extern "C" */
