/* What the files of the CUDA backend share. Host code is C; kernels and their launches are in .cu
 * files, which include kernel.cuh as well.
 *
 * Operations only enqueue on the backend's stream. The first error is kept and reported by sync().
 */
#ifndef FV_CUDA_INTERNAL_H
#define FV_CUDA_INTERNAL_H

#include <cublas_v2.h>
#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "cuda/cuda_backend.h"

/* A place through which an upload travels. */
typedef struct FvStage {
    void *host, *device;
    size_t bytes;
    cudaEvent_t arrived, taken; /* on the GPU; copied from there to its tensor */
} FvStage;

/* Stages: two steps' uploads; scratch blocks: doubling, more than any memory holds. */
enum { FV_STAGES = 16, FV_SCRATCH_BLOCKS = 40 };

typedef struct FvCuda {
    FvBackend base; /* first: a FvBackend * is a FvCuda * */
    int device;
    bool bf16;                   /* matrix products from bfloat16 operands; else float throughout */
    bool managed;                /* tensors that the host may touch, for the tests of operations */
    cudaStream_t stream, copies; /* operations; transfers to the GPU beside them */
    cublasHandle_t blas;
    void *blas_scratch;
    void *scratch[FV_SCRATCH_BLOCKS]; /* one operation's workspace is the last of them */
    size_t scratch_blocks, scratch_bytes;
    FvStage stage[FV_STAGES];
    size_t stages_used;
    cudaEvent_t marks[FV_MARKS];
    cudaGraphExec_t recording;
    bool capturing;    /* between record() and recorded() */
    char failure[256]; /* the first since the last sync; "" when none */
} FvCuda;

static inline FvCuda *fv_cuda(FvBackend *backend) {
    return (FvCuda *)backend;
}

/* The operation's workspace, at least `bytes`, whose content is what the last operation left. NULL
 * when there is no memory: the operation returns without effect, and sync() reports it. */
void *fv_cuda_workspace(FvCuda *, size_t bytes);

/* Keeps the first failure; _ok: true when `code` is success. */
bool fv_cuda_fail(FvCuda *, const char *what, const char *why); /* false */
bool fv_cuda_ok(FvCuda *, cudaError_t code, const char *what);
bool fv_cublas_ok(FvCuda *, cublasStatus_t code, const char *what);

/* One matrix product, row-major with row strides: c [m, n] = a b + beta c; a is stored [k, m] if
 * trans_a, b [n, k] if trans_b. */
typedef struct FvGemm {
    bool trans_a, trans_b;
    size_t m, n, k, lda, ldb, ldc;
    float alpha, beta;
} FvGemm;

/* In the backend's arithmetic: bf16 rounds a and b first, sums stay in float. */
void fv_cuda_gemm(FvCuda *, const FvGemm *, const float *a, const float *b, float *c);
/* `count` products whose operands start at the addresses in device arrays; float operands. */
void fv_cuda_gemm_batch(FvCuda *, const FvGemm *, size_t count, const float *const *a,
                        const float *const *b, float *const *c);

/* sum [width] += sums over the rows of dy (x - mean) rstd, dy and x [rows, width], mean and rstd
 * [rows]; x NULL: of dy alone; mean NULL is 0, rstd NULL is 1. Uses the workspace. */
void fv_cuda_add_columns(FvCuda *, size_t rows, size_t width, const float *dy, const float *x,
                         const float *mean, const float *rstd, float *sum);

/* Every operation that a .cu file defines as fv_cuda_<name>; gives the prototypes here and the
 * table in backend.c. */
/* clang-format off */
#define FV_CUDA_OPS(X)                                                                             \
    X(add) X(copy_rows) X(residual) X(residual_back)                                               \
    X(linear) X(linear_back) X(gelu) X(gelu_back) X(relu) X(relu_back) X(swiglu) X(swiglu_back)    \
    X(layernorm) X(layernorm_back) X(rmsnorm) X(rmsnorm_back) X(rescale) X(rescale_back)           \
    X(attention) X(attention_back) X(query) X(query_back) X(rope)                                  \
    X(patchify) X(tokens) X(tokens_back) X(conv) X(conv_back) X(film) X(film_back)                 \
    X(mse) X(mse_back) X(cosine) X(cosine_back) X(entropy) X(entropy_back) X(entropy_hinge)        \
    X(normalize) X(normalize_back) X(softmax) X(cross_entropy) X(cross_entropy_back) X(approach)   \
    X(norm) X(adamw) X(first_nonfinite)
/* clang-format on */
#define FV_CUDA_PROTOTYPE(name) extern __typeof__(*((FvOps *)0)->name) fv_cuda_##name;
FV_CUDA_OPS(FV_CUDA_PROTOTYPE)
#undef FV_CUDA_PROTOTYPE

#ifdef __cplusplus
}
#endif
#endif
