/* Matrix products by cuBLAS: float operands in fp32 mode, without the tensor cores' short formats;
 * bfloat16 operands in bf16 mode. Sums are float in both. */
#include "cuda/internal.h"

/* cuBLAS is column-major: a row-major c = a b is its c^T = b^T a^T, operands exchanged. */
static cublasOperation_t transposed(bool trans) {
    return trans ? CUBLAS_OP_T : CUBLAS_OP_N;
}

#define FV_TYPE(is_short) ((is_short) ? CUDA_R_16BF : CUDA_R_32F)

void fv_cuda_gemm(FvCuda *cuda, const FvGemm *g, const void *a, const void *b, float *c) {
    if (g->m == 0 || g->n == 0)
        return;
    fv_cublas_ok(cuda,
                 cublasGemmEx(cuda->blas, transposed(g->trans_b), transposed(g->trans_a), (int)g->n,
                              (int)g->m, (int)g->k, &g->alpha, b, FV_TYPE(cuda->bf16), (int)g->ldb,
                              a, FV_TYPE(cuda->bf16), (int)g->lda, &g->beta, c, CUDA_R_32F,
                              (int)g->ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                 "matrix product");
}

void fv_cuda_gemm_batch(FvCuda *cuda, const FvGemm *g, bool short_operands, bool short_result,
                        size_t count, void *const *a, void *const *b, void *const *c) {
    if (g->m == 0 || g->n == 0 || count == 0)
        return;
    fv_cublas_ok(cuda,
                 cublasGemmBatchedEx(cuda->blas, transposed(g->trans_b), transposed(g->trans_a),
                                     (int)g->n, (int)g->m, (int)g->k, &g->alpha,
                                     (const void *const *)b, FV_TYPE(short_operands), (int)g->ldb,
                                     (const void *const *)a, FV_TYPE(short_operands), (int)g->lda,
                                     &g->beta, c, FV_TYPE(short_result), (int)g->ldc, (int)count,
                                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                 "batched matrix product");
}

void fv_cuda_gemm_strided(FvCuda *cuda, const FvGemm *g, size_t count, const void *a,
                          size_t a_stride, const void *b, size_t b_stride, float *c,
                          size_t c_stride) {
    if (g->m == 0 || g->n == 0 || count == 0)
        return;
    fv_cublas_ok(cuda,
                 cublasGemmStridedBatchedEx(
                     cuda->blas, transposed(g->trans_b), transposed(g->trans_a), (int)g->n,
                     (int)g->m, (int)g->k, &g->alpha, b, FV_TYPE(cuda->bf16), (int)g->ldb,
                     (long long)b_stride, a, FV_TYPE(cuda->bf16), (int)g->lda, (long long)a_stride,
                     &g->beta, c, CUDA_R_32F, (int)g->ldc, (long long)c_stride, (int)count,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                 "matrix product per head");
}
