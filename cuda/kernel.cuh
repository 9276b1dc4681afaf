/* For files with kernels: launching, and sums whose order is fixed by the shape alone. Nothing here
 * uses atomics, so the same launch gives the same bits. */
#ifndef FV_CUDA_KERNEL_CUH
#define FV_CUDA_KERNEL_CUH

#include <cuda_bf16.h>

#include "cuda/internal.h"

enum { FV_WARP = 32, FV_BLOCK = 256 };

/* FV_LAUNCH(cuda, kernel, blocks, threads, dynamic shared bytes, arguments...) on the backend's
 * stream; no blocks, no launch. FV_SHARED(type, name) is the dynamic shared memory in a kernel.
 * tests/cuda_host has another meaning for both, which runs the kernel on the CPU. */
#ifdef __CUDACC__
#define FV_LAUNCH(cuda, kernel, blocks, threads, shared, ...)                                      \
    do {                                                                                           \
        dim3 fv_grid_(blocks);                                                                     \
        if (fv_grid_.x > 0 && fv_grid_.y > 0 && fv_grid_.z > 0) {                                  \
            kernel<<<fv_grid_, (threads), (shared), (cuda)->stream>>>(__VA_ARGS__);                \
            fv_cuda_ok((cuda), cudaGetLastError(), #kernel);                                       \
        }                                                                                          \
    } while (0)
#define FV_SHARED(type, name)                                                                      \
    extern __shared__ __align__(16) unsigned char fv_shared_[];                                    \
    type *name = (type *)fv_shared_
#endif

/* Blocks of `threads` that give each of n elements a thread. */
static inline unsigned fv_blocks(size_t n, size_t threads) {
    return (unsigned)((n + threads - 1) / threads);
}

static __device__ inline size_t fv_thread(void) { /* of the whole grid */
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

/* --- elements of operand tensors ---------------------------------------------------------------
 */

static __device__ inline float fv_load(const float *x) {
    return *x;
}
static __device__ inline float fv_load(const __nv_bfloat16 *x) {
    return __bfloat162float(*x);
}
static __device__ inline void fv_store(float *y, float value) {
    *y = value;
}
static __device__ inline void fv_store(__nv_bfloat16 *y, float value) {
    *y = __float2bfloat16_rn(value);
}

/* call(x), with x of the type that its elements have. */
template <typename Call> static void fv_with_elements(FvCuda *cuda, real *x, Call call) {
    if (fv_cuda_is_operand(cuda, x))
        call((__nv_bfloat16 *)x);
    else
        call(x);
}

/* For operations that take some operand tensors: false when one of these others is one. */
template <typename... T>
static bool fv_are_floats(FvCuda *cuda, const char *name, const T *...tensors) {
    return (fv_cuda_is_float(cuda, name, tensors) && ...);
}

/* The workspace for `bytes`, which may be 0; false when there is none. */
static inline bool fv_take_space(FvCuda *cuda, size_t bytes, char **space) {
    *space = bytes > 0 ? (char *)fv_cuda_workspace(cuda, bytes) : NULL;
    return bytes == 0 || *space;
}

/* --- sums --------------------------------------------------------------------------------------
 */

/* All lanes of the warp must call these; all receive the result. */
template <typename T> static __device__ inline T fv_warp_sum(T x) {
    for (int lane = FV_WARP / 2; lane > 0; lane /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}
template <typename T> static __device__ inline T fv_warp_max(T x) {
    for (int lane = FV_WARP / 2; lane > 0; lane /= 2) {
        T other = __shfl_xor_sync(0xffffffffu, x, lane);
        x = other > x || other != other ? other : x; /* a NaN stays */
    }
    return x;
}

/* All threads of the block must call these (blockDim.x a multiple of 32, at most 1024); all receive
 * the result. */
template <typename T> static __device__ inline T fv_block_sum(T x) {
    __shared__ T part[FV_WARP];
    unsigned warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    x = fv_warp_sum(x);
    __syncthreads(); /* the last call's readers are done */
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    return fv_warp_sum(lane < blockDim.x / FV_WARP ? part[lane] : T(0));
}
template <typename T> static __device__ inline T fv_block_max(T x) {
    __shared__ T part[FV_WARP];
    unsigned warp = threadIdx.x / FV_WARP, lane = threadIdx.x % FV_WARP;
    x = fv_warp_max(x);
    __syncthreads();
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    return fv_warp_max(part[lane < blockDim.x / FV_WARP ? lane : 0]);
}

#endif
