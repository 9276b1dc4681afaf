/* Devices and memory of the stand-in for CUDA: see cuda_runtime.h. */
#include "stream.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current = 0; /* device, among those visible */

/* --- devices ---------------------------------------------------------------------------------- */

const size_t device_bytes = (size_t)1 << 32;

/* The devices that this process sees. */
std::vector<int> list_devices() {
    const char *count = getenv("CUDA_HOST_DEVICES"), *chosen = getenv("CUDA_VISIBLE_DEVICES");
    int all = count ? atoi(count) : 1;
    std::vector<int> visible;
    if (!chosen)
        for (int i = 0; i < all; i++)
            visible.push_back(i);
    for (char *end; chosen && *chosen; chosen = *end == ',' ? end + 1 : end) {
        long i = strtol(chosen, &end, 10);
        if (end == chosen || i < 0 || i >= all)
            break; /* what follows is not seen */
        visible.push_back((int)i);
    }
    return visible;
}

const std::vector<int> &devices() {
    static const std::vector<int> visible = list_devices();
    return visible;
}

bool is_device(int i) {
    return i >= 0 && (size_t)i < devices().size();
}

/* --- memory ----------------------------------------------------------------------------------- */

enum class Kind { pageable, device, managed, pinned };

struct Block {
    size_t bytes;
    Kind kind;
    int device;
};

std::mutex lock;
std::map<uintptr_t, Block> blocks; /* by address */
std::map<int, size_t> used;        /* bytes, by device */

Kind kind_of(const void *p) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = blocks.upper_bound((uintptr_t)p);
    if (next == blocks.begin())
        return Kind::pageable;
    const auto &[base, block] = *std::prev(next);
    return (uintptr_t)p < base + block.bytes ? block.kind : Kind::pageable;
}

/* New memory holds whatever was there: here NaN. */
cudaError_t take(void **out, size_t bytes, Kind kind) {
    *out = nullptr;
    if (!is_device(current))
        return host_error(cudaErrorNoDevice);
    if (cudaError_t refused = host_unsafe_call())
        return host_error(refused);
    std::lock_guard<std::mutex> guard(lock);
    size_t &of_device = used[host_device()];
    if (bytes > PTRDIFF_MAX - 256 || (kind == Kind::device && bytes > device_bytes - of_device))
        return host_error(cudaErrorMemoryAllocation);
    *out = aligned_alloc(256, (std::max<size_t>(bytes, 1) + 255) / 256 * 256);
    if (!*out)
        return host_error(cudaErrorMemoryAllocation);
    memset(*out, 0xff, bytes);
    blocks[(uintptr_t)*out] = {std::max<size_t>(bytes, 1), kind, host_device()};
    of_device += kind == Kind::device ? bytes : 0;
    return cudaSuccess;
}

cudaError_t give_back(void *p, bool pinned) {
    if (!p)
        return cudaSuccess;
    if (cudaError_t refused = host_unsafe_call())
        return host_error(refused);
    host_finish_device();
    std::lock_guard<std::mutex> guard(lock);
    auto found = blocks.find((uintptr_t)p);
    if (found == blocks.end() || (found->second.kind == Kind::pinned) != pinned)
        return host_error(cudaErrorInvalidValue);
    if (found->second.kind == Kind::device)
        used[found->second.device] -= found->second.bytes;
    blocks.erase(found);
    free(p);
    return cudaSuccess;
}

bool on_device(Kind kind) {
    return kind == Kind::device || kind == Kind::managed;
}

} // namespace

extern "C" {

const char *cudaGetErrorString(cudaError_t code) {
    switch (code) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
        return "invalid resource handle";
    case cudaErrorIllegalState:
        return "the operation cannot be performed in the present state";
    case cudaErrorNotReady:
        return "device not ready";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge:
        return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureUnmatched:
        return "capture was not ended in the same stream as it began";
    case cudaErrorStreamCaptureUnjoined:
        return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
        return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent:
        return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread:
        return "attempt to terminate a thread-local capture sequence from another thread";
    default:
        return "invalid argument";
    }
}

cudaError_t cudaGetLastError(void) {
    return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

cudaError_t cudaGetDeviceCount(int *count) {
    if (devices().empty())
        return host_error(cudaErrorNoDevice);
    *count = (int)devices().size();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (!is_device(device))
        return host_error(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (!is_device(device))
        return host_error(cudaErrorInvalidDevice);
    *p = {"kernels on the CPU", device_bytes, 9, 0, 4};
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) {
    if (!is_device(device))
        return host_error(cudaErrorInvalidDevice);
    snprintf(out, (size_t)size, "0000:%02x:00.0", devices()[(size_t)device]);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    if (cudaError_t refused = host_unsafe_call())
        return host_error(refused);
    host_finish_device();
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    return take(out, bytes, Kind::device);
}

cudaError_t cudaMallocManaged(void **out, size_t bytes, unsigned flags) {
    return flags == cudaMemAttachGlobal ? take(out, bytes, Kind::managed)
                                        : host_error(cudaErrorInvalidValue);
}

cudaError_t cudaFree(void *p) {
    return give_back(p, false);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    return flags <= 7 ? take(out, bytes, Kind::pinned) : host_error(cudaErrorInvalidValue);
}

cudaError_t cudaMallocHost(void **out, size_t bytes) {
    return take(out, bytes, Kind::pinned);
}

cudaError_t cudaFreeHost(void *p) {
    return give_back(p, true);
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 0; /* of no toolkit */
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    if (!is_device(current))
        return host_error(cudaErrorNoDevice);
    std::lock_guard<std::mutex> guard(lock);
    *total = device_bytes;
    *free = device_bytes - used[host_device()];
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    if (bytes > 0 && !on_device(kind_of(p)))
        return host_error(cudaErrorInvalidValue);
    return host_enqueue(stream, [=] { memset(p, value, bytes); });
}

/* Pageable memory has been read, or written, when the call returns, which a capture does not
 * allow. */
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    Kind to = kind_of(dst), from = kind_of(src);
    bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind != cudaMemcpyHostToDevice;
    if (bytes == 0)
        return cudaSuccess;
    if ((to_device ? !on_device(to) : to == Kind::device) ||
        (from_device ? !on_device(from) : from == Kind::device))
        return host_error(cudaErrorInvalidValue);
    if (to == Kind::pageable || from == Kind::pageable)
        if (cudaError_t refused = host_not_in_capture(stream))
            return host_error(refused);
    if (from == Kind::pageable) {
        std::vector<char> staged((const char *)src, (const char *)src + bytes);
        return host_enqueue(stream, [=] { memcpy(dst, staged.data(), bytes); });
    }
    cudaError_t code = host_enqueue(stream, [=] { memmove(dst, src, bytes); });
    return code == cudaSuccess && to == Kind::pageable ? cudaStreamSynchronize(stream) : code;
}

} /* extern "C" */

cudaError_t host_error(cudaError_t code) {
    if (code != cudaSuccess)
        last_error = code;
    return code;
}

int host_device(void) {
    return is_device(current) ? devices()[(size_t)current] : -1;
}
