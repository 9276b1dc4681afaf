/* Memory, copies and matrix products of the stand-in for CUDA: see cuda_runtime.h. */
#include <cblas.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublas_v2.h"

const char *cudaGetErrorString(cudaError_t code) {
    return code == cudaSuccess                 ? "no error"
           : code == cudaErrorMemoryAllocation ? "out of memory"
           : code == cudaErrorInvalidDevice    ? "invalid device ordinal"
                                               : "invalid argument";
}

cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device != 0)
        return cudaErrorInvalidDevice;
    *p = (struct cudaDeviceProp){.name = "kernels on the CPU", .totalGlobalMem = (size_t)1 << 32};
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) {
    snprintf(out, (size_t)size, "0000:00:00.0");
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

/* New device memory holds whatever was there: here NaN. */
cudaError_t cudaMalloc(void **out, size_t bytes) {
    *out = bytes <= PTRDIFF_MAX - 256 ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
    if (!*out)
        return cudaErrorMemoryAllocation;
    memset(*out, 0xff, bytes);
    return cudaSuccess;
}

cudaError_t cudaMallocManaged(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    return cudaMalloc(out, bytes);
}

cudaError_t cudaFree(void *p) {
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    (void)kind, (void)stream;
    memmove(dst, src, bytes);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    (void)flags;
    *out = malloc(1);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    (void)stream;
    return cudaSuccess;
}

const char *cublasGetStatusString(cublasStatus_t code) {
    return code == CUBLAS_STATUS_SUCCESS ? "success" : "invalid value";
}

cublasStatus_t cublasCreate(cublasHandle_t *out) {
    *out = malloc(1);
    return *out ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasDestroy(cublasHandle_t blas) {
    free(blas);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t blas, cudaStream_t stream) {
    return blas && stream ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t blas, cublasMath_t mode) {
    return blas && mode == CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_INVALID_VALUE;
}

/* A column-major matrix of either type, packed, in float; NULL when memory is out. */
static float *widened(const void *x, cudaDataType_t type, int rows, int columns, int stride) {
    float *y = malloc(((size_t)rows * (size_t)columns + 1) * sizeof *y);
    for (int j = 0; y && j < columns; j++)
        for (int i = 0; i < rows; i++) {
            size_t from = (size_t)j * (size_t)stride + (size_t)i;
            size_t to = (size_t)j * (size_t)rows + (size_t)i;
            if (type == CUDA_R_32F) {
                y[to] = ((const float *)x)[from];
                continue;
            }
            uint32_t bits = (uint32_t)((const uint16_t *)x)[from] << 16;
            memcpy(y + to, &bits, sizeof bits);
        }
    return y;
}

/* To the nearest bfloat16, ties to even; infinities stay and NaN becomes CUDA's. */
static uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fff : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static enum CBLAS_TRANSPOSE transposed(cublasOperation_t op) {
    return op == CUBLAS_OP_T ? CblasTrans : CblasNoTrans;
}

cublasStatus_t cublasGemmEx(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb, int m,
                            int n, int k, const void *alpha, const void *a, cudaDataType_t type_a,
                            int lda, const void *b, cudaDataType_t type_b, int ldb,
                            const void *beta, void *c, cudaDataType_t type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    int rows_a = ta == CUBLAS_OP_T ? k : m, rows_b = tb == CUBLAS_OP_T ? n : k;
    (void)algorithm;
    if (!blas || compute != CUBLAS_COMPUTE_32F || type_a != type_b ||
        (type_a == CUDA_R_32F && type_c != CUDA_R_32F) || m < 1 || n < 1 || k < 0 || lda < rows_a ||
        ldb < rows_b || ldc < m)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (type_a == CUDA_R_32F) {
        cblas_sgemm(CblasColMajor, transposed(ta), transposed(tb), m, n, k, *(const float *)alpha,
                    a, lda, b, ldb, *(const float *)beta, c, ldc);
        return CUBLAS_STATUS_SUCCESS;
    }
    float *wide_a = widened(a, type_a, rows_a, ta == CUBLAS_OP_T ? m : k, lda);
    float *wide_b = widened(b, type_b, rows_b, tb == CUBLAS_OP_T ? k : n, ldb);
    float *wide_c = type_c == CUDA_R_16BF ? widened(c, type_c, m, n, ldc) : c;
    bool there = wide_a && wide_b && wide_c;
    if (there)
        cblas_sgemm(CblasColMajor, transposed(ta), transposed(tb), m, n, k, *(const float *)alpha,
                    wide_a, rows_a > 0 ? rows_a : 1, wide_b, rows_b > 0 ? rows_b : 1,
                    *(const float *)beta, wide_c, type_c == CUDA_R_16BF ? m : ldc);
    for (int j = 0; there && type_c == CUDA_R_16BF && j < n; j++)
        for (int i = 0; i < m; i++)
            ((uint16_t *)c)[(size_t)j * (size_t)ldc + (size_t)i] =
                rounded(wide_c[(size_t)j * (size_t)m + (size_t)i]);
    free(wide_a);
    free(wide_b);
    if (wide_c != c)
        free(wide_c);
    return there ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasGemmBatchedEx(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb,
                                   int m, int n, int k, const void *alpha, const void *const a[],
                                   cudaDataType_t type_a, int lda, const void *const b[],
                                   cudaDataType_t type_b, int ldb, const void *beta,
                                   void *const c[], cudaDataType_t type_c, int ldc, int count,
                                   cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (int i = 0; i < count && status == CUBLAS_STATUS_SUCCESS; i++)
        status = cublasGemmEx(blas, ta, tb, m, n, k, alpha, a[i], type_a, lda, b[i], type_b, ldb,
                              beta, c[i], type_c, ldc, compute, algorithm);
    return status;
}
