/* The CUDA backend: devices, memory, and the table of operations. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/internal.h"

/* --- failures -------------------------------------------------------------------------------- */

bool fv_cuda_fail(FvCuda *cuda, const char *what, const char *why) {
    if (!cuda->failure[0])
        snprintf(cuda->failure, sizeof cuda->failure, "%s: %s", what, why);
    return false;
}

bool fv_cuda_ok(FvCuda *cuda, cudaError_t code, const char *what) {
    return code == cudaSuccess || fv_cuda_fail(cuda, what, cudaGetErrorString(code));
}

bool fv_cublas_ok(FvCuda *cuda, cublasStatus_t code, const char *what) {
    return code == CUBLAS_STATUS_SUCCESS || fv_cuda_fail(cuda, what, cublasGetStatusString(code));
}

/* --- memory ---------------------------------------------------------------------------------- */

static cudaError_t take(const FvCuda *cuda, void **out, size_t bytes) {
    if (cuda->managed)
        return cudaMallocManaged(out, bytes, cudaMemAttachGlobal);
    return cudaMalloc(out, bytes);
}

void *fv_cuda_workspace(FvCuda *cuda, size_t bytes) {
    if (bytes <= cuda->scratch_bytes)
        return cuda->scratch;
    cudaFree(cuda->scratch); /* waits for what uses it */
    cuda->scratch = NULL;
    cuda->scratch_bytes = 0;
    if (!fv_cuda_ok(cuda, cudaMalloc(&cuda->scratch, bytes), "workspace of an operation"))
        return NULL;
    cuda->scratch_bytes = bytes;
    return cuda->scratch;
}

static FvStatus cuda_alloc(FvBackend *backend, size_t bytes, void **out, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    size_t padded = bytes ? bytes : 1;
    *out = NULL;
    cudaError_t code = cudaSetDevice(cuda->device);
    if (code == cudaSuccess)
        code = take(cuda, out, padded);
    if (code == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* the next call starts clean */
        return FV_FAIL(err, FV_DEVICE,
                       "%s: no memory for %zu bytes; use a smaller batch, scale or "
                       "--jobs-per-rank",
                       backend->description, bytes);
    }
    if (code == cudaSuccess)
        code = cudaMemsetAsync(*out, 0, padded, cuda->stream);
    if (code == cudaSuccess)
        code = cudaStreamSynchronize(cuda->stream);
    if (code != cudaSuccess)
        return FV_FAIL(err, FV_DEVICE, "%s: %s", backend->description, cudaGetErrorString(code));
    return FV_OK;
}

static void cuda_release(FvBackend *backend, void *p) {
    fv_cuda_forget(fv_cuda(backend), p);
    fv_cuda_ok(fv_cuda(backend), cudaFree(p), "freeing memory");
}

/* From pageable memory the copy is staged before the call returns: src may change at once. */
static void cuda_upload(FvBackend *backend, void *dst, const void *src, size_t bytes) {
    FvCuda *cuda = fv_cuda(backend);
    if (bytes > 0)
        fv_cuda_ok(cuda, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, cuda->stream),
                   "copying to the GPU");
}

static void cuda_download(FvBackend *backend, void *dst, const void *src, size_t bytes) {
    FvCuda *cuda = fv_cuda(backend);
    if (bytes > 0)
        fv_cuda_ok(cuda, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, cuda->stream),
                   "copying from the GPU");
    fv_cuda_ok(cuda, cudaStreamSynchronize(cuda->stream), "waiting for the GPU");
}

static void cuda_zero(FvBackend *backend, void *dst, size_t bytes) {
    FvCuda *cuda = fv_cuda(backend);
    if (bytes > 0)
        fv_cuda_ok(cuda, cudaMemsetAsync(dst, 0, bytes, cuda->stream), "zeroing memory");
}

static void cuda_copy(FvBackend *backend, size_t n, const real *x, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    if (n > 0)
        fv_cuda_ok(cuda,
                   cudaMemcpyAsync(y, x, n * sizeof *y, cudaMemcpyDeviceToDevice, cuda->stream),
                   "copying on the GPU");
}

static FvStatus cuda_sync(FvBackend *backend, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    fv_cuda_ok(cuda, cudaStreamSynchronize(cuda->stream), "waiting for the GPU");
    if (!cuda->failure[0])
        return FV_OK;
    FvStatus status = FV_FAIL(err, FV_DEVICE, "%s: %s", backend->description, cuda->failure);
    cuda->failure[0] = '\0';
    return status;
}

/* --- creation -------------------------------------------------------------------------------- */

static void cuda_destroy(FvBackend *backend) {
    FvCuda *cuda = fv_cuda(backend);
    cudaSetDevice(cuda->device);
    if (cuda->blas)
        cublasDestroy(cuda->blas);
    cudaFree(cuda->scratch);
    fv_cuda_forget(cuda, NULL);
    if (cuda->stream)
        cudaStreamDestroy(cuda->stream);
    free(cuda);
}

#define FV_CUDA_ENTRY(name) .name = fv_cuda_##name,
static const FvOps cuda_ops = {.destroy = cuda_destroy,
                               .alloc = cuda_alloc,
                               .alloc_operands = fv_cuda_alloc_operands,
                               .alloc_weights = fv_cuda_alloc_weights,
                               .weights_changed = fv_cuda_weights_changed,
                               .release = cuda_release,
                               .upload = cuda_upload,
                               .download = cuda_download,
                               .zero = cuda_zero,
                               .sync = cuda_sync,
                               .copy = cuda_copy,
                               FV_CUDA_OPS(FV_CUDA_ENTRY)};

size_t fv_cuda_devices(char *why, size_t size) {
    int count = 0; /* a failing call leaves it untouched */
    cudaError_t code = cudaGetDeviceCount(&count);
    snprintf(why, size, "%s", code == cudaSuccess ? "" : cudaGetErrorString(code));
    return code == cudaSuccess ? (size_t)count : 0;
}

FvStatus fv_cuda_device(size_t index, FvCudaDevice *out, FvError *err) {
    struct cudaDeviceProp properties;
    cudaError_t code = cudaGetDeviceProperties(&properties, (int)index);
    if (code == cudaSuccess)
        code = cudaDeviceGetPCIBusId(out->bus, (int)sizeof out->bus, (int)index);
    if (code != cudaSuccess)
        return FV_FAIL(err, FV_DEVICE, "GPU %zu: %s", index, cudaGetErrorString(code));
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, properties.name);
    out->memory = properties.totalGlobalMem;
    return FV_OK;
}

/* cuBLAS repeats its bits on one stream with a workspace of its own. Parts of a sum are added in
 * float also where the result is bfloat16. */
static bool start(FvCuda *cuda) {
    return fv_cuda_ok(cuda, cudaSetDevice(cuda->device), "choosing the GPU") &&
           fv_cuda_ok(cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking),
                      "making a stream") &&
           fv_cublas_ok(cuda, cublasCreate(&cuda->blas), "starting cuBLAS") &&
           fv_cublas_ok(cuda, cublasSetStream(cuda->blas, cuda->stream), "cuBLAS's stream") &&
           fv_cublas_ok(
               cuda,
               cublasSetMathMode(cuda->blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION),
               "cuBLAS's mode");
}

FvStatus fv_cuda_backend_create(const FvCudaOptions *options, FvBackend **out, FvError *err) {
    FvCudaDevice device;
    FV_TRY(fv_cuda_device(options->device, &device, err));
    FvCuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a backend");
    *cuda = (FvCuda){.base = {.ops = &cuda_ops, .name = "cuda", .on_host = options->managed},
                     .device = (int)options->device,
                     .bf16 = options->bf16,
                     .managed = options->managed};
    cuda->base.operand_bytes = options->bf16 ? 2 : sizeof(real);
    if (options->bf16)
        fv_cuda_check_floats(cuda, &cuda_ops);
    snprintf(cuda->base.description, sizeof cuda->base.description, "%s, %s, %s", device.name,
             device.bus, options->bf16 ? "bf16" : "fp32");
    if (!start(cuda)) {
        FvStatus status = FV_FAIL(err, FV_DEVICE, "%s: %s", cuda->base.description, cuda->failure);
        cuda_destroy(&cuda->base);
        return status;
    }
    *out = &cuda->base;
    return FV_OK;
}
