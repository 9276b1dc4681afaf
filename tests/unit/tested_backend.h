/* The backend under test: the CPU's, or with FV_TEST_CUDA the CUDA backend, in memory that the host
 * reaches too. On a GPU run with CUDA_LAUNCH_BLOCKING=1: the tests read results at once. */
#ifndef TESTS_UNIT_TESTED_BACKEND_H
#define TESTS_UNIT_TESTED_BACKEND_H

#include "backend/backend.h"

#ifdef FV_TEST_CUDA
#include "cuda/cuda_backend.h"

static inline FvStatus tested_backend_create(size_t threads, FvBackend **out, FvError *err) {
    const FvCudaOptions options = {.managed = true};
    (void)threads;
    return fv_cuda_backend_create(&options, out, err);
}
/* The one whose products round what they read, where there is one: CUDA's in bf16 mode. */
static inline FvStatus tested_rounding_create(size_t threads, FvBackend **out, FvError *err) {
    const FvCudaOptions options = {.managed = true, .bf16 = true};
    (void)threads;
    return fv_cuda_backend_create(&options, out, err);
}
#else
static inline FvStatus tested_backend_create(size_t threads, FvBackend **out, FvError *err) {
    return fv_cpu_backend_create(threads, out, err);
}
static inline FvStatus tested_rounding_create(size_t threads, FvBackend **out, FvError *err) {
    return fv_cpu_backend_create(threads, out, err);
}
#endif

#endif
