/* The CUDA backend as the program sees it: no CUDA header is needed to include this. */
#ifndef FV_CUDA_CUDA_BACKEND_H
#define FV_CUDA_CUDA_BACKEND_H

#include "backend/backend.h"

typedef struct FvCudaDevice {
    char name[64], bus[16]; /* "NVIDIA H200", "0000:1b:00.0" */
    size_t memory;          /* bytes */
} FvCudaDevice;

typedef struct FvCudaOptions {
    size_t device;
    bool bf16;    /* matrix products from bfloat16 operands, sums in float; else float */
    bool managed; /* tensors that the host may touch between operations: for tests */
} FvCudaOptions;

/* GPUs that this process sees; 0 also without a driver, then `why` says so. */
size_t fv_cuda_devices(char *why, size_t size);
FvStatus fv_cuda_device(size_t index, FvCudaDevice *out, FvError *err);

/* "CUDA 13.0, driver for 13.0, cuBLAS 13.1.0"; driver for 0.0: there is none */
void fv_cuda_version(char *out, size_t size);

/* One backend has one stream and serves one job at a time. */
FvStatus fv_cuda_backend_create(const FvCudaOptions *, FvBackend **out, FvError *err);

#endif
