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
struct FvCudaBlock; /* operands.cu */

typedef struct FvCuda {
    FvBackend base; /* first: a FvBackend * is a FvCuda * */
    int device;
    bool bf16;                  /* matrix products from bfloat16 operands; else float throughout */
    bool managed;               /* tensors that the host may touch, for the tests of operations */
    struct FvCudaBlock *blocks; /* bf16: what is kept in bfloat16 */
    FvOps checked;              /* bf16: the table `plain`, operations on floats behind a check */
    const FvOps *plain;
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
/* Of a part of the workspace, so that the next one starts where products read fast. */
static inline size_t fv_cuda_aligned(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

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

/* gemm.c. Sums and c are float; a and b hold what fv_cuda_operand() gives: bfloat16 in bf16 mode,
 * else float. */
void fv_cuda_gemm(FvCuda *, const FvGemm *, const void *a, const void *b, float *c);
/* `count` products whose operands start at the addresses in device arrays; a and b hold bfloat16 if
 * short_operands, c if short_result, else float. In bfloat16 cuBLAS needs addresses that are
 * multiples of 16 bytes where k is one of 8, and of 4 where it is even. */
void fv_cuda_gemm_batch(FvCuda *, const FvGemm *, bool short_operands, bool short_result,
                        size_t count, void *const *a, void *const *b, void *const *c);

/* `count` products as fv_cuda_gemm's whose operands lie at equal distances. */
void fv_cuda_gemm_strided(FvCuda *, const FvGemm *, size_t count, const void *a, size_t a_stride,
                          const void *b, size_t b_stride, float *c, size_t c_stride);

/* --- operands.cu: in fp32 mode all is float, and these do nothing ------------------------------
 */

FvStatus fv_cuda_alloc_operands(FvBackend *, size_t count, void **out, FvError *);
FvStatus fv_cuda_alloc_weights(FvBackend *, size_t count, void **out, FvError *);
void fv_cuda_weights_changed(FvBackend *, size_t count, const real *w);
void fv_cuda_forget(FvCuda *, const void *p); /* before p is freed; NULL: all */

/* Whether x points into operand tensors of bfloat16. */
bool fv_cuda_is_operand(const FvCuda *, const void *x);
/* False when it does: keeps the failure of operation `name`, which takes float. */
bool fv_cuda_is_float(FvCuda *, const char *name, const void *x);
/* The rounded copy of weights, an array of __nv_bfloat16; NULL where none is kept. */
void *fv_cuda_copy_of(const FvCuda *, const float *w);
/* Rounds n floats to an array of __nv_bfloat16. */
void fv_cuda_round(FvCuda *, size_t n, const float *x, void *y);

/* x [n] as a product reads it: x itself, the copy kept of weights, or rounded into *space, which
 * moves on by operand_bytes(); x NULL stays NULL. */
size_t fv_cuda_operand_bytes(const FvCuda *, size_t n, const float *x);
const void *fv_cuda_operand(FvCuda *, size_t n, const float *x, char **space);

/* checked.cu: the table `plain` with every operation on floats refusing operand tensors. */
void fv_cuda_check_floats(FvCuda *, const FvOps *plain);

/* --- linear.cu ---------------------------------------------------------------------------------
 */

/* sum [width] += sums over the rows of dy (x - mean) rstd, dy and x [rows, width], mean and rstd
 * [rows]; x NULL: of dy alone; mean NULL is 0, rstd NULL is 1. Uses the workspace. */
void fv_cuda_add_columns(FvCuda *, size_t rows, size_t width, const float *dy, const float *x,
                         const float *mean, const float *rstd, float *sum);
/* dy [rows, width] as fv_cuda_operand() gives it, and in the same pass dbias (NULL: not wanted) +=
 * its column sums; *space moves on by gradient_bytes(). */
size_t fv_cuda_gradient_bytes(const FvCuda *, size_t rows, size_t width, const float *dy,
                              bool dbias);
const void *fv_cuda_gradient(FvCuda *, size_t rows, size_t width, const float *dy, float *dbias,
                             char **space);

/* Every operation that a .cu file defines as fv_cuda_<name>; gives the prototypes here and the
 * table in backend.c. */
/* clang-format off */
#define FV_CUDA_FLOAT_OPS(X) /* take no operand tensor */                                          \
    X(add) X(copy_rows) X(residual) X(residual_back)                                               \
    X(gelu_back) X(relu) X(relu_back) X(swiglu_back)                                               \
    X(layernorm_back) X(rmsnorm_back) X(rescale) X(rescale_back)                                   \
    X(attention_back) X(rope) X(tokens) X(tokens_back) X(film) X(film_back)                        \
    X(mse) X(mse_back) X(cosine) X(cosine_back) X(entropy) X(entropy_back) X(entropy_hinge)        \
    X(normalize) X(normalize_back) X(softmax) X(cross_entropy) X(cross_entropy_back) X(approach)   \
    X(norm) X(adamw)
#define FV_CUDA_OPS(X)                                                                             \
    FV_CUDA_FLOAT_OPS(X)                                                                           \
    X(linear) X(linear_back) X(head_linear) X(head_linear_back)                                    \
    X(gelu) X(swiglu) X(layernorm) X(rmsnorm) X(attention) X(query) X(query_back) X(patchify) X(conv) X(conv_back) X(first_nonfinite)
/* clang-format on */
#define FV_CUDA_PROTOTYPE(name) extern __typeof__(*((FvOps *)0)->name) fv_cuda_##name;
FV_CUDA_OPS(FV_CUDA_PROTOTYPE)
#undef FV_CUDA_PROTOTYPE

#ifdef __cplusplus
}
#endif
#endif
