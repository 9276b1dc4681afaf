#include "run/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef FV_CUDA
#include "cuda/cuda_backend.h"
#ifdef FV_NCCL
#include "cuda/collective.h"
#endif

static FvStatus choose_gpu(const FvWorld *world, bool must, FvDevice *out, FvError *err) {
    char why[128];
    FvCudaDevice gpu;
    size_t count = fv_cuda_devices(why, sizeof why);
    if (count == 0)
        return must
                   ? FV_FAIL(err, FV_DEVICE,
                             "--device cuda: this process on %s sees no GPU (%s); use --device cpu",
                             world->host, why[0] ? why : "none is visible")
                   : FV_OK;
    out->index = world->local_rank % count;
    FV_TRY(fv_cuda_device(out->index, &gpu, err));
    out->gpu = true;
    out->memory = gpu.memory;
    snprintf(out->bus, sizeof out->bus, "%s", gpu.bus);
    snprintf(out->text, sizeof out->text, "%s %s, %.0f GB", gpu.name, gpu.bus,
             (double)gpu.memory / 1e9);
    return FV_OK;
}

void fv_device_versions(char *out, size_t size) {
    fv_cuda_version(out, size);
    strncat(out, "\n", size - strlen(out) - 1);
#ifdef FV_NCCL
    size_t used = strlen(out);
    fv_collective_version(out + used, size - used);
    strncat(out, "\n", size - strlen(out) - 1);
#endif
}

static FvStatus open_gpu(const FvDevice *device, bool bf16, FvBackend **out, FvError *err) {
    const FvCudaOptions options = {.device = device->index, .bf16 = bf16};
    return fv_cuda_backend_create(&options, out, err);
}
#else
static FvStatus choose_gpu(const FvWorld *world, bool must, FvDevice *out, FvError *err) {
    (void)world, (void)out;
    return must ? FV_FAIL(err, FV_DEVICE,
                          "--device cuda: this build has no CUDA backend; use --device cpu, or "
                          "build where 'make info' finds the CUDA Toolkit")
                : FV_OK;
}

void fv_device_versions(char *out, size_t size) {
    snprintf(out, size, "%s", "");
}

static FvStatus open_gpu(const FvDevice *device, bool bf16, FvBackend **out, FvError *err) {
    (void)device, (void)bf16, (void)out;
    return FV_FAIL(err, FV_DEVICE, "this build has no CUDA backend");
}
#endif

FvStatus fv_device_choose(const char *wish, const FvWorld *world, size_t threads, FvDevice *out,
                          FvError *err) {
    *out = (FvDevice){.threads = threads, .ranks = 1};
    if (strcmp(wish, "cpu") != 0)
        FV_TRY(choose_gpu(world, strcmp(wish, "cuda") == 0, out, err));
    if (!out->gpu)
        snprintf(out->text, sizeof out->text, "cpu, %zu thread%s", threads,
                 threads == 1 ? "" : "s");
    return FV_OK;
}

FvStatus fv_device_precision(const FvDevice *device, const char *precision, bool *bf16,
                             FvError *err) {
    bool must = strcmp(precision, "bf16") == 0;
    *bf16 = device->gpu && strcmp(precision, "fp32") != 0;
    return must && !device->gpu
               ? FV_FAIL(err, FV_USAGE,
                         "precision bf16: the processor computes in fp32 alone; use precision=fp32 "
                         "or auto, or a GPU (--device cuda)")
               : FV_OK;
}

void fv_device_share(FvDevice *device, const FvWorld *world) {
    const size_t size = sizeof device->text;
    char *all = calloc(world->local_size, size);
    device->ranks = world->local_size;
    if (all && world->local_size > 1) {
        fv_host_gather(device->text, size, all);
        for (size_t r = 0; r < world->local_size; r++) /* the text of a GPU holds its address */
            device->ranks -= device->gpu && strcmp(all + r * size, device->text) != 0;
    }
    free(all);
}

FvStatus fv_device_memory_left(const FvDevice *device, size_t *out, FvError *err) {
    FvBackend *be;
    FV_TRY(fv_device_open(device, "auto", 1, &be, err));
    *out = be->ops->memory_left(be) / device->ranks;
    fv_backend_destroy(be);
    return FV_OK;
}

FvStatus fv_device_open(const FvDevice *device, const char *precision, size_t threads,
                        FvBackend **out, FvError *err) {
    bool bf16;
    FV_TRY(fv_device_precision(device, precision, &bf16, err));
    return device->gpu ? open_gpu(device, bf16, out, err)
                       : fv_cpu_backend_create(threads, out, err);
}
