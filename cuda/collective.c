#include "cuda/collective.h"

#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/internal.h"

static const char averaging[] = "averaging gradients";

struct FvCollective {
    ncclComm_t comm;
    cudaStream_t stream;
    cudaEvent_t ready, done; /* gradients are computed; averages are made */
};

static FvStatus check(ncclResult_t code, const char *what, FvError *err) {
    return code == ncclSuccess || code == ncclInProgress
               ? FV_OK
               : FV_FAIL(err, FV_DEVICE,
                         "NCCL: %s: %s; NCCL_DEBUG=INFO says more, comm=mpi does "
                         "without it",
                         what, ncclGetErrorString(code));
}

void fv_collective_version(char *out, size_t size) {
    int v = 0;
    out[0] = '\0';
    if (ncclGetVersion(&v) == ncclSuccess)
        snprintf(out, size, "NCCL %d.%d.%d", v / 10000, v / 100 % 100, v % 100);
}

FvStatus fv_collective_id(char id[FV_COLLECTIVE_ID], FvError *err) {
    ncclUniqueId made;
    _Static_assert(sizeof made == FV_COLLECTIVE_ID, "size of NCCL's id");
    FV_TRY(check(ncclGetUniqueId(&made), "making an id", err));
    memcpy(id, &made, sizeof made);
    return FV_OK;
}

static cudaError_t make_queue(FvCollective *c) {
    cudaError_t code = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (code == cudaSuccess)
        code = cudaEventCreateWithFlags(&c->ready, cudaEventDisableTiming);
    if (code == cudaSuccess)
        code = cudaEventCreateWithFlags(&c->done, cudaEventDisableTiming);
    return code;
}

FvStatus fv_collective_create(size_t device, const char id[FV_COLLECTIVE_ID], size_t rank,
                              size_t size, FvCollective **out, FvError *err) {
    ncclUniqueId given;
    memcpy(&given, id, sizeof given);
    FvCollective *c = calloc(1, sizeof *c);
    if (!c)
        return FV_FAIL(err, FV_DEVICE, "out of memory for NCCL");
    FvStatus status = FV_OK;
    cudaError_t code = cudaSetDevice((int)device);
    if (code == cudaSuccess)
        code = make_queue(c);
    if (code != cudaSuccess)
        status = FV_FAIL(err, FV_DEVICE, "GPU %zu: %s", device, cudaGetErrorString(code));
    if (status == FV_OK)
        status = check(ncclCommInitRank(&c->comm, (int)size, given, (int)rank),
                       "meeting the ranks of the group", err);
    if (status != FV_OK) {
        fv_collective_destroy(c, true);
        return status;
    }
    *out = c;
    return FV_OK;
}

void fv_collective_destroy(FvCollective *c, bool failed) {
    if (!c)
        return;
    if (c->comm && failed)
        ncclCommAbort(c->comm);
    else if (c->comm)
        ncclCommDestroy(c->comm);
    if (c->ready)
        cudaEventDestroy(c->ready);
    if (c->done)
        cudaEventDestroy(c->done);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    free(c);
}

void fv_collective_average(FvCollective *c, FvBackend *backend, real *x, size_t count) {
    FvCuda *cuda = fv_cuda(backend);
    if (!fv_cuda_ok(cuda, cudaEventRecord(c->ready, cuda->stream), averaging) ||
        !fv_cuda_ok(cuda, cudaStreamWaitEvent(c->stream, c->ready, 0), averaging))
        return;
    ncclResult_t code = ncclAllReduce(x, x, count, ncclFloat, ncclAvg, c->comm, c->stream);
    if (code != ncclSuccess)
        fv_cuda_fail(cuda, averaging, ncclGetErrorString(code));
}

void fv_collective_join(FvCollective *c, FvBackend *backend) {
    FvCuda *cuda = fv_cuda(backend);
    if (fv_cuda_ok(cuda, cudaEventRecord(c->done, c->stream), averaging))
        fv_cuda_ok(cuda, cudaStreamWaitEvent(cuda->stream, c->done, 0), averaging);
}

FvStatus fv_collective_check(FvCollective *c, FvError *err) {
    ncclResult_t found = ncclSuccess;
    FV_TRY(check(ncclCommGetAsyncError(c->comm, &found), "looking for errors", err));
    return check(found, averaging, err);
}
