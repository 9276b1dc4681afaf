/* The part of the CUDA runtime that the backend uses, on the CPU: kernels run one block after the
 * other, a block's threads as fibers that switch at barriers and shuffles. Device memory is host
 * memory, so AddressSanitizer sees every access.
 *
 * Work has been done when the call that gives it to a stream returns; with CUDA_HOST_LATE=MS, when
 * something waits for it, or MS milliseconds later. During capture it is recorded, with its
 * arguments, and done at each launch of the graph, in turn with forks as early and as late as they
 * may be. What CUDA refuses during capture is refused with CUDA's error. */
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
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorIllegalState = 401,
    cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureMerge = 902,
    cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorCapturedEvent = 907,
    cudaErrorStreamCaptureWrongThread = 908
} cudaError_t;
typedef struct HostStream *cudaStream_t;
typedef struct HostEvent *cudaEvent_t;
typedef struct HostGraph *cudaGraph_t;
typedef struct HostGraphExec *cudaGraphExec_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
};
enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
    cudaStreamCaptureStatusInvalidated
};
typedef void (*cudaHostFn_t)(void *);
enum { cudaMemAttachGlobal = 1, cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
typedef enum { MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL } libraryPropertyType;

const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);

/* Devices: CUDA_HOST_DEVICES of them, 1 unless told; CUDA_VISIBLE_DEVICES chooses among them. */
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *, int device);
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceSynchronize(void);

cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaMallocManaged(void **out, size_t bytes, unsigned flags);
cudaError_t cudaFree(void *);
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags);
cudaError_t cudaMallocHost(void **out, size_t bytes);
cudaError_t cudaFreeHost(void *);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaMemsetAsync(void *, int value, size_t bytes, cudaStream_t);
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind,
                            cudaStream_t);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamQuery(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags);
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t, void *data);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned flags);
cudaError_t cudaEventCreate(cudaEvent_t *);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventQuery(cudaEvent_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t);

cudaError_t cudaStreamBeginCapture(cudaStream_t, enum cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *);
cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus *);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long flags);
cudaError_t cudaGraphGetNodes(cudaGraph_t, void *must_be_null, size_t *count);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);

#ifdef __cplusplus
}

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

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

extern constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

/* Waits for the warp's (or block's) other threads that have not returned. */
void host_wait_block(void);
void host_wait_warp(void);
/* Gives the warp's other lanes a value; returns that of a lane, which must take part. */
uint64_t host_shuffle_bits(uint64_t value, unsigned lane);
unsigned host_lane(void);
void *host_shared(void);
/* Aborts on what no GPU takes. */
cudaError_t host_launch(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t,
                        std::function<void()> kernel);

static inline void __syncthreads(void) {
    host_wait_block();
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    (void)mask;
    host_wait_warp();
}
template <typename T> static inline T host_shuffle(T value, unsigned lane) {
    uint64_t bits = 0;
    static_assert(sizeof value <= sizeof bits);
    memcpy(&bits, &value, sizeof value);
    bits = host_shuffle_bits(bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
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

/* The arguments are taken when the kernel is launched, not when it runs. */
template <typename Kernel, typename... A>
static inline cudaError_t host_call(const char *name, Kernel kernel, dim3 grid, dim3 block,
                                    size_t shared, cudaStream_t stream, A... arguments) {
    return host_launch(
        name, grid, block, shared, stream,
        [kernel, values = std::tuple<A...>(arguments...)] { std::apply(kernel, values); });
}

#define FV_LAUNCH(cuda, kernel, blocks, threads, shared, ...)                                      \
    do {                                                                                           \
        host_call(                                                                                 \
            __FILE__ ":" #kernel, [](auto... host_values) { kernel(host_values...); }, (blocks),   \
            (threads), (shared), (cuda)->stream, __VA_ARGS__);                                     \
        fv_cuda_ok((cuda), cudaGetLastError(), #kernel);                                           \
    } while (0)
#define FV_SHARED(type, name) type *name = (type *)host_shared()
#endif
#endif
