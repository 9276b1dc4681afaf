/* The part of the CUDA runtime that the backend uses, on the CPU: kernels run one block after the
 * other, a block's threads as fibers that switch at barriers and shuffles. Device memory is host
 * memory, so AddressSanitizer sees every access. A launch has run when it returns. */
#ifndef TESTS_CUDA_HOST_CUDA_RUNTIME_H
#define TESTS_CUDA_HOST_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidDevice = 101
} cudaError_t;
typedef struct HostStream *cudaStream_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaMemAttachGlobal = 1, cudaStreamNonBlocking = 1 };

const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError(void);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *, int device);
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaMallocManaged(void **out, size_t bytes, unsigned flags);
cudaError_t cudaFree(void *);
cudaError_t cudaMemGetInfo(size_t *left, size_t *whole);
cudaError_t cudaMemsetAsync(void *, int value, size_t bytes, cudaStream_t);
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind,
                            cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);

#ifdef __cplusplus
}

#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__   static thread_local

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {
    }
};

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

/* Waits for the warp's (or block's) other threads that have not returned. */
void host_wait_block(void);
void host_wait_warp(void);
/* Where the calling lane leaves a value, and where it finds another lane's. */
void host_give(const void *value, size_t bytes);
void host_take(unsigned lane, void *value, size_t bytes);
unsigned host_lane(void);
void *host_shared(void);
void host_launch(const char *name, dim3 grid, dim3 block, size_t shared,
                 const std::function<void()> &kernel);

static inline void __syncthreads(void) {
    host_wait_block();
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    (void)mask;
    host_wait_warp();
}
template <typename T> static inline T host_shuffle(T value, unsigned lane) {
    T out = value;
    host_give(&value, sizeof value);
    host_wait_warp();
    host_take(lane, &out, sizeof out);
    host_wait_warp();
    return out;
}
template <typename T> static inline T __shfl_sync(unsigned, T value, int lane, int = 32) {
    return host_shuffle(value, (unsigned)lane % 32);
}
template <typename T> static inline T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    return host_shuffle(value, host_lane() ^ (unsigned)mask);
}
template <typename T> static inline T __shfl_down_sync(unsigned, T value, unsigned n, int = 32) {
    return host_shuffle(value, host_lane() + n < 32 ? host_lane() + n : host_lane());
}

#define FV_LAUNCH(cuda, kernel, blocks, threads, shared, ...)                                      \
    do {                                                                                           \
        (void)(cuda);                                                                              \
        host_launch(#kernel, (blocks), (threads), (shared), [&] { kernel(__VA_ARGS__); });         \
    } while (0)
#define FV_SHARED(type, name) type *name = (type *)host_shared()
#endif
#endif
