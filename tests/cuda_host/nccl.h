/* The part of NCCL that the backend uses, mapped to MPI messages between the ranks. */
#ifndef TESTS_CUDA_HOST_NCCL_H
#define TESTS_CUDA_HOST_NCCL_H

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NCCL_MAJOR           2
#define NCCL_MINOR           28
#define NCCL_PATCH           0
#define NCCL_VERSION_CODE    22800
#define NCCL_UNIQUE_ID_BYTES 128

typedef struct ncclComm *ncclComm_t;
typedef struct {
    char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId;
typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7
} ncclResult_t;
typedef enum { ncclSum = 0, ncclAvg = 4 } ncclRedOp_t;
typedef enum { ncclFloat32 = 7, ncclFloat = 7, ncclFloat64 = 8, ncclDouble = 8 } ncclDataType_t;
typedef struct {
    int blocking;
} ncclConfig_t;
#define NCCL_CONFIG_INITIALIZER                                                                    \
    { 1 }

ncclResult_t ncclGetVersion(int *version);
const char *ncclGetErrorString(ncclResult_t);
const char *ncclGetLastError(ncclComm_t);
/* The id's maker must be one of the ranks that use it. */
ncclResult_t ncclGetUniqueId(ncclUniqueId *);
ncclResult_t ncclCommInitRank(ncclComm_t *, int ranks, ncclUniqueId, int rank);
/* Returns when the communicator stands, whatever `blocking`. */
ncclResult_t ncclCommInitRankConfig(ncclComm_t *, int ranks, ncclUniqueId, int rank,
                                    ncclConfig_t *);
ncclResult_t ncclCommCount(ncclComm_t, int *ranks);
ncclResult_t ncclCommUserRank(ncclComm_t, int *rank);
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *);
ncclResult_t ncclCommFinalize(ncclComm_t);
ncclResult_t ncclCommDestroy(ncclComm_t);
ncclResult_t ncclCommAbort(ncclComm_t);
/* With CUDA_HOST_NCCL_FAIL=n the n-th and later ones of a communicator do nothing but leave
 * ncclRemoteError to be found by ncclCommGetAsyncError. */
ncclResult_t ncclAllReduce(const void *send, void *receive, size_t count, ncclDataType_t,
                           ncclRedOp_t, ncclComm_t, cudaStream_t);
/* A group's calls are made one after the other. */
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);

#ifdef __cplusplus
}
#endif
#endif
