/* What bf16 mode keeps in bfloat16: operand tensors, copies of weights, and floats that are rounded
 * for one product. A pointer's address tells which it is. */
#include <stdlib.h>

#include "cuda/kernel.cuh"

typedef struct FvCudaBlock {
    struct FvCudaBlock *next;
    char *base; /* operand tensors, or weights in float, of which copy holds as many */
    size_t bytes;
    __nv_bfloat16 *copy; /* behind the weights; NULL: operand tensors */
} FvCudaBlock;

/* --- blocks ------------------------------------------------------------------------------------
 */

static const FvCudaBlock *block_of(const FvCuda *cuda, const void *x) {
    const char *p = (const char *)x;
    const FvCudaBlock *block = cuda->blocks;
    while (block && !(p >= block->base && p < block->base + block->bytes))
        block = block->next;
    return block;
}

/* A block of `count` elements of `each` bytes, and `copy_each` behind them, which are remembered.
 */
static FvStatus remember(FvBackend *backend, size_t count, size_t each, size_t copy_each,
                         void **out, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    *out = NULL;
    FvCudaBlock *block = (FvCudaBlock *)calloc(1, sizeof *block);
    if (!block)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a block's record");
    /* what is too large for a size_t must stay too large */
    bool fits = count <= (SIZE_MAX - 256) / (each + copy_each);
    size_t bytes = count * each, copy_at = fv_cuda_aligned(bytes);
    size_t all = fits ? copy_at + count * copy_each : SIZE_MAX;
    FvStatus status = backend->ops->alloc(backend, all, out, err);
    if (status != FV_OK) {
        free(block);
        return status;
    }
    *block = {cuda->blocks, (char *)*out, bytes,
              copy_each > 0 ? (__nv_bfloat16 *)((char *)*out + copy_at) : nullptr};
    cuda->blocks = block;
    return FV_OK;
}

static FvStatus alloc_floats(FvBackend *backend, size_t count, void **out, FvError *err) {
    size_t bytes = count <= SIZE_MAX / sizeof(real) ? count * sizeof(real) : SIZE_MAX;
    return backend->ops->alloc(backend, bytes, out, err);
}

FvStatus fv_cuda_alloc_operands(FvBackend *backend, size_t count, void **out, FvError *err) {
    return fv_cuda(backend)->bf16 ? remember(backend, count, sizeof(__nv_bfloat16), 0, out, err)
                                  : alloc_floats(backend, count, out, err);
}

FvStatus fv_cuda_alloc_weights(FvBackend *backend, size_t count, void **out, FvError *err) {
    return fv_cuda(backend)->bf16
               ? remember(backend, count, sizeof(real), sizeof(__nv_bfloat16), out, err)
               : alloc_floats(backend, count, out, err);
}

void fv_cuda_forget(FvCuda *cuda, const void *p) {
    for (FvCudaBlock **at = &cuda->blocks; *at;) {
        FvCudaBlock *block = *at;
        if (!p || block->base == p) {
            *at = block->next;
            free(block);
        } else {
            at = &block->next;
        }
    }
}

bool fv_cuda_is_operand(const FvCuda *cuda, const void *x) {
    const FvCudaBlock *block = block_of(cuda, x);
    return block && !block->copy;
}

bool fv_cuda_is_float(FvCuda *cuda, const char *name, const void *x) {
    return !fv_cuda_is_operand(cuda, x) ||
           fv_cuda_fail(cuda, name, "takes float, but was given an operand tensor");
}

void *fv_cuda_copy_of(const FvCuda *cuda, const float *w) {
    const FvCudaBlock *block = block_of(cuda, w);
    return block && block->copy ? block->copy + (w - (const float *)block->base) : nullptr;
}

/* --- rounding ----------------------------------------------------------------------------------
 */

static __global__ void round_floats(size_t n, const float *x, __nv_bfloat16 *y) {
    size_t i = fv_thread();
    if (i < n)
        fv_store(y + i, x[i]);
}

void fv_cuda_round(FvCuda *cuda, size_t n, const float *x, void *y) {
    FV_LAUNCH(cuda, round_floats, fv_blocks(n, FV_BLOCK), FV_BLOCK, 0, n, x, (__nv_bfloat16 *)y);
}

void fv_cuda_weights_changed(FvBackend *backend, size_t count, const real *w) {
    FvCuda *cuda = fv_cuda(backend);
    void *copy = fv_cuda_copy_of(cuda, w);
    if (copy)
        fv_cuda_round(cuda, count, w, copy);
}

size_t fv_cuda_operand_bytes(const FvCuda *cuda, size_t n, const float *x) {
    bool rounds = cuda->bf16 && x && !block_of(cuda, x);
    return rounds ? fv_cuda_aligned(n * sizeof(__nv_bfloat16)) : 0;
}

const void *fv_cuda_operand(FvCuda *cuda, size_t n, const float *x, char **space) {
    size_t bytes = fv_cuda_operand_bytes(cuda, n, x);
    if (bytes == 0) {
        const void *copy = fv_cuda_copy_of(cuda, x);
        return copy ? copy : x;
    }
    void *rounded = *space;
    *space += bytes;
    fv_cuda_round(cuda, n, x, rounded);
    return rounded;
}
