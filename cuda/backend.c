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

/* With managed memory the host reads results at once. */
bool fv_cuda_ok(FvCuda *cuda, cudaError_t code, const char *what) {
    if (code == cudaSuccess && cuda->managed && cuda->stream && !cuda->capturing)
        code = cudaStreamSynchronize(cuda->stream);
    return code == cudaSuccess || fv_cuda_fail(cuda, what, cudaGetErrorString(code));
}

bool fv_cublas_ok(FvCuda *cuda, cublasStatus_t code, const char *what) {
    if (code == CUBLAS_STATUS_SUCCESS)
        return fv_cuda_ok(cuda, cudaSuccess, what);
    return fv_cuda_fail(cuda, what, cublasGetStatusString(code));
}

/* --- memory ---------------------------------------------------------------------------------- */

static cudaError_t take(const FvCuda *cuda, void **out, size_t bytes) {
    if (cuda->managed)
        return cudaMallocManaged(out, bytes, cudaMemAttachGlobal);
    return cudaMalloc(out, bytes);
}

/* A recording holds the address of the block it was made with: outgrown blocks stay until the end.
 * They double, so that they are few and together smaller than the last. */
void *fv_cuda_workspace(FvCuda *cuda, size_t bytes) {
    size_t blocks = cuda->scratch_blocks;
    if (blocks > 0 && bytes <= cuda->scratch_bytes)
        return cuda->scratch[blocks - 1];
    size_t more = bytes > 2 * cuda->scratch_bytes ? bytes : 2 * cuda->scratch_bytes;
    if (blocks == FV_SCRATCH_BLOCKS) {
        fv_cuda_fail(cuda, "workspace of an operation", "it grew too often");
        return NULL;
    }
    if (!fv_cuda_ok(cuda, cudaMalloc(&cuda->scratch[blocks], more), "workspace of an operation"))
        return NULL;
    cuda->scratch_blocks++;
    cuda->scratch_bytes = more;
    return cuda->scratch[blocks];
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
    if (!p)
        return;
    fv_cuda_forget(fv_cuda(backend), p);
    fv_cuda_ok(fv_cuda(backend), cudaFree(p), "freeing memory");
}

static size_t cuda_memory_left(FvBackend *backend) {
    FvCuda *cuda = fv_cuda(backend);
    size_t left = 0, whole;
    if (fv_cuda_ok(cuda, cudaSetDevice(cuda->device), "choosing the GPU"))
        fv_cuda_ok(cuda, cudaMemGetInfo(&left, &whole), "asking for free memory");
    return left;
}

/* --- transfers ------------------------------------------------------------------------------- */

static FvStatus cuda_host_alloc(FvBackend *backend, size_t bytes, void **out, FvError *err) {
    size_t padded = bytes ? bytes : 1;
    cudaError_t code = cudaSetDevice(fv_cuda(backend)->device);
    *out = NULL;
    if (code == cudaSuccess)
        code = cudaHostAlloc(out, padded, cudaHostAllocDefault);
    if (code != cudaSuccess)
        return FV_FAIL(err, FV_DEVICE, "%s: no %zu bytes of pinned memory of the host: %s",
                       backend->description, bytes, cudaGetErrorString(code));
    memset(*out, 0, padded);
    return FV_OK;
}

static void cuda_host_release(FvBackend *backend, void *p) {
    fv_cuda_ok(fv_cuda(backend), cudaFreeHost(p), "freeing memory of the host");
}

/* The next staging place, free and large enough; NULL after a failure. */
static FvStage *next_stage(FvCuda *cuda, size_t bytes) {
    FvStage *s = &cuda->stage[cuda->stages_used++ % FV_STAGES];
    bool ok = true;
    if (!s->taken)
        ok = fv_cuda_ok(cuda, cudaEventCreateWithFlags(&s->arrived, cudaEventDisableTiming),
                        "making an event") &&
             fv_cuda_ok(cuda, cudaEventCreateWithFlags(&s->taken, cudaEventDisableTiming),
                        "making an event");
    else
        ok = fv_cuda_ok(cuda, cudaEventSynchronize(s->taken), "waiting for an upload");
    if (ok && bytes > s->bytes) {
        cudaFreeHost(s->host);
        cudaFree(s->device);
        s->host = s->device = NULL;
        s->bytes = 0;
        ok = fv_cuda_ok(cuda, cudaHostAlloc(&s->host, bytes, cudaHostAllocDefault),
                        "pinned memory for uploads") &&
             fv_cuda_ok(cuda, cudaMalloc(&s->device, bytes), "memory for uploads");
        s->bytes = ok ? bytes : 0;
    }
    return ok ? s : NULL;
}

/* Over the copy stream into a place of its own, beside what the backend's stream is doing; there it
 * is copied to its tensor in the order of the operations. */
static void upload_beside(FvCuda *cuda, void *dst, const void *src, size_t bytes) {
    FvStage *s = next_stage(cuda, bytes);
    if (!s)
        return;
    memcpy(s->host, src, bytes);
    cudaError_t code =
        cudaMemcpyAsync(s->device, s->host, bytes, cudaMemcpyHostToDevice, cuda->copies);
    if (code == cudaSuccess)
        code = cudaEventRecord(s->arrived, cuda->copies);
    if (code == cudaSuccess)
        code = cudaStreamWaitEvent(cuda->stream, s->arrived, 0);
    if (code == cudaSuccess)
        code = cudaMemcpyAsync(dst, s->device, bytes, cudaMemcpyDeviceToDevice, cuda->stream);
    if (code == cudaSuccess)
        code = cudaEventRecord(s->taken, cuda->stream);
    fv_cuda_ok(cuda, code, "copying to the GPU");
}

/* Weights and the like go from pageable memory, which is staged before the call returns. */
static void cuda_upload(FvBackend *backend, void *dst, const void *src, size_t bytes) {
    const size_t most = (size_t)16 << 20;
    FvCuda *cuda = fv_cuda(backend);
    if (bytes > 0 && bytes <= most)
        upload_beside(cuda, dst, src, bytes);
    else if (bytes > 0)
        fv_cuda_ok(cuda, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, cuda->stream),
                   "copying to the GPU");
}

static void cuda_download_later(FvBackend *backend, void *dst, const void *src, size_t bytes) {
    FvCuda *cuda = fv_cuda(backend);
    if (bytes > 0)
        fv_cuda_ok(cuda, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, cuda->stream),
                   "copying from the GPU");
}

static void cuda_download(FvBackend *backend, void *dst, const void *src, size_t bytes) {
    cuda_download_later(backend, dst, src, bytes);
    fv_cuda_ok(fv_cuda(backend), cudaStreamSynchronize(fv_cuda(backend)->stream),
               "waiting for the GPU");
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

/* --- the queue ------------------------------------------------------------------------------- */

/* One of the two may be what another backend of the device has allocated. */
static void cuda_copy_operands(FvBackend *backend, size_t n, const real *x, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    if (cuda->bf16 && !fv_cuda_is_operand(cuda, x) && !fv_cuda_is_operand(cuda, y))
        fv_cuda_fail(cuda, "copy_operands", "was given no operand tensor");
    else if (n > 0)
        fv_cuda_ok(cuda,
                   cudaMemcpyAsync(y, x, n * backend->operand_bytes, cudaMemcpyDeviceToDevice,
                                   cuda->stream),
                   "copying on the GPU");
}

static FvStatus report_failure(FvCuda *cuda, FvError *err) {
    if (!cuda->failure[0])
        return FV_OK;
    FvStatus status = FV_FAIL(err, FV_DEVICE, "%s: %s", cuda->base.description, cuda->failure);
    cuda->failure[0] = '\0';
    return status;
}

static FvStatus cuda_sync(FvBackend *backend, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    fv_cuda_ok(cuda, cudaStreamSynchronize(cuda->stream), "waiting for the GPU");
    return report_failure(cuda, err);
}

static void cuda_mark(FvBackend *backend, size_t mark) {
    FvCuda *cuda = fv_cuda(backend);
    fv_cuda_ok(cuda, cudaEventRecord(cuda->marks[mark], cuda->stream), "marking the queue");
}

static bool cuda_reached(FvBackend *backend, size_t mark) {
    FvCuda *cuda = fv_cuda(backend);
    cudaError_t code = cudaEventQuery(cuda->marks[mark]);
    if (code == cudaErrorNotReady)
        return false;
    fv_cuda_ok(cuda, code, "computing");
    return true;
}

static FvStatus cuda_wait(FvBackend *backend, size_t mark, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    fv_cuda_ok(cuda, cudaEventSynchronize(cuda->marks[mark]), "waiting for the GPU");
    return report_failure(cuda, err);
}

static void cuda_unrecord(FvBackend *backend) {
    FvCuda *cuda = fv_cuda(backend);
    fv_cuda_ok(cuda, cudaStreamSynchronize(cuda->stream), "waiting for the GPU");
    if (cuda->recording)
        fv_cuda_ok(cuda, cudaGraphExecDestroy(cuda->recording), "dropping a recording");
    cuda->recording = NULL;
}

/* Other threads may allocate meanwhile, for jobs of their own. */
static FvStatus cuda_record(FvBackend *backend, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    cuda_unrecord(backend);
    fv_cuda_ok(cuda, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal),
               "recording a step");
    cuda->capturing = !cuda->failure[0];
    return report_failure(cuda, err);
}

static FvStatus cuda_recorded(FvBackend *backend, FvError *err) {
    FvCuda *cuda = fv_cuda(backend);
    cudaGraph_t graph = NULL;
    cuda->capturing = false;
    if (fv_cuda_ok(cuda, cudaStreamEndCapture(cuda->stream, &graph), "recording a step"))
        fv_cuda_ok(cuda, cudaGraphInstantiate(&cuda->recording, graph, 0), "preparing a recording");
    if (graph)
        fv_cuda_ok(cuda, cudaGraphDestroy(graph), "freeing a recording");
    return report_failure(cuda, err);
}

static void cuda_replay(FvBackend *backend) {
    FvCuda *cuda = fv_cuda(backend);
    fv_cuda_ok(cuda, cudaGraphLaunch(cuda->recording, cuda->stream), "computing a step");
}

void fv_cuda_version(char *out, size_t size) {
    int runtime = 0, driver = 0, blas[3] = {0};
    const libraryPropertyType parts[] = {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
    cudaRuntimeGetVersion(&runtime); /* a failing call leaves the zero */
    cudaDriverGetVersion(&driver);
    for (int i = 0; i < 3; i++)
        cublasGetProperty(parts[i], &blas[i]);
    snprintf(out, size, "CUDA %d.%d, driver for %d.%d, cuBLAS %d.%d.%d", runtime / 1000,
             runtime % 1000 / 10, driver / 1000, driver % 1000 / 10, blas[0], blas[1], blas[2]);
}

/* --- creation -------------------------------------------------------------------------------- */

static void cuda_destroy(FvBackend *backend) {
    FvCuda *cuda = fv_cuda(backend);
    cudaSetDevice(cuda->device);
    if (cuda->stream)
        cudaStreamSynchronize(cuda->stream);
    if (cuda->recording)
        cudaGraphExecDestroy(cuda->recording);
    if (cuda->blas)
        cublasDestroy(cuda->blas);
    for (size_t i = 0; i < cuda->scratch_blocks; i++)
        cudaFree(cuda->scratch[i]);
    cudaFree(cuda->blas_scratch);
    fv_cuda_forget(cuda, NULL);
    for (size_t i = 0; i < FV_STAGES; i++) {
        FvStage *s = &cuda->stage[i];
        cudaFreeHost(s->host);
        cudaFree(s->device);
        if (s->arrived)
            cudaEventDestroy(s->arrived);
        if (s->taken)
            cudaEventDestroy(s->taken);
    }
    for (size_t i = 0; i < FV_MARKS; i++)
        if (cuda->marks[i])
            cudaEventDestroy(cuda->marks[i]);
    if (cuda->copies)
        cudaStreamDestroy(cuda->copies);
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
                               .memory_left = cuda_memory_left,
                               .upload = cuda_upload,
                               .download = cuda_download,
                               .zero = cuda_zero,
                               .sync = cuda_sync,
                               .host_alloc = cuda_host_alloc,
                               .host_release = cuda_host_release,
                               .download_later = cuda_download_later,
                               .mark = cuda_mark,
                               .reached = cuda_reached,
                               .wait = cuda_wait,
                               .record = cuda_record,
                               .recorded = cuda_recorded,
                               .replay = cuda_replay,
                               .unrecord = cuda_unrecord,
                               .copy = cuda_copy,
                               .copy_operands = cuda_copy_operands,
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

static bool make_marks(FvCuda *cuda) {
    for (size_t i = 0; i < FV_MARKS; i++)
        if (!fv_cuda_ok(cuda,
                        cudaEventCreateWithFlags(&cuda->marks[i],
                                                 cudaEventDisableTiming | cudaEventBlockingSync),
                        "making an event"))
            return false;
    return true;
}

/* cuBLAS repeats its bits, and can be recorded, on one stream with a workspace of its own; 32 MiB
 * is what its manual recommends for Hopper. Parts of a sum are added in float also where the result
 * is bfloat16. */
static bool start(FvCuda *cuda) {
    const size_t bytes = (size_t)32 << 20;
    cudaGetLastError(); /* of this thread's last backend */
    return fv_cuda_ok(cuda, cudaSetDevice(cuda->device), "choosing the GPU") &&
           fv_cuda_ok(cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking),
                      "making a stream") &&
           fv_cuda_ok(cuda, cudaStreamCreateWithFlags(&cuda->copies, cudaStreamNonBlocking),
                      "making a stream") &&
           make_marks(cuda) && fv_cublas_ok(cuda, cublasCreate(&cuda->blas), "starting cuBLAS") &&
           fv_cublas_ok(cuda, cublasSetStream(cuda->blas, cuda->stream), "cuBLAS's stream") &&
           fv_cuda_ok(cuda, cudaMalloc(&cuda->blas_scratch, bytes), "cuBLAS's workspace") &&
           fv_cublas_ok(cuda, cublasSetWorkspace(cuda->blas, cuda->blas_scratch, bytes),
                        "cuBLAS's workspace") &&
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
    *cuda = (FvCuda){.base = {.ops = &cuda_ops,
                              .name = "cuda",
                              .on_host = options->managed,
                              .records = true,
                              .operand_bytes = options->bf16 ? 2 : sizeof(real)},
                     .device = (int)options->device,
                     .bf16 = options->bf16,
                     .managed = options->managed};
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
