/* The part of cuBLAS that the backend uses, mapped to the CPU's BLAS; bfloat16 arithmetic rounds
 * the operands, as the tensor cores read them. Scalars are on the host and taken at the call. */
#ifndef TESTS_CUDA_HOST_CUBLAS_V2_H
#define TESTS_CUDA_HOST_CUBLAS_V2_H

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct HostBlas *cublasHandle_t;
typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_16BF = 75 } cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT = -1 } cublasGemmAlgo_t;
typedef enum {
    CUBLAS_DEFAULT_MATH = 0,
    CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
} cublasMath_t;

const char *cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
cublasStatus_t cublasGetProperty(libraryPropertyType, int *value);
/* Of device memory; cublasSetStream goes back to cuBLAS's own. */
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t bytes);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                            int k, const void *alpha, const void *a, cudaDataType_t, int lda,
                            const void *b, cudaDataType_t, int ldb, const void *beta, void *c,
                            cudaDataType_t, int ldc, cublasComputeType_t, cublasGemmAlgo_t);
cublasStatus_t cublasGemmBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m,
                                   int n, int k, const void *alpha, const void *const a[],
                                   cudaDataType_t, int lda, const void *const b[], cudaDataType_t,
                                   int ldb, const void *beta, void *const c[], cudaDataType_t,
                                   int ldc, int count, cublasComputeType_t, cublasGemmAlgo_t);
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t,
                                          int m, int n, int k, const void *alpha, const void *a,
                                          cudaDataType_t, int lda, long long stride_a,
                                          const void *b, cudaDataType_t, int ldb,
                                          long long stride_b, const void *beta, void *c,
                                          cudaDataType_t, int ldc, long long stride_c, int count,
                                          cublasComputeType_t, cublasGemmAlgo_t);

#ifdef __cplusplus
}
#endif
#endif
