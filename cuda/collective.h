/* Averages over the GPUs of a rank group, with NCCL. Averages run on a stream of their own, beside
 * the operations that a backend has queued since, and may be part of what a backend records. Only
 * in builds with NCCL. */
#ifndef FV_CUDA_COLLECTIVE_H
#define FV_CUDA_COLLECTIVE_H

#include "backend/backend.h"

typedef struct FvCollective FvCollective;

enum { FV_COLLECTIVE_ID = 128 }; /* bytes that one rank makes and all ranks of a group are given */

/* "NCCL 2.28.9" */
void fv_collective_version(char *out, size_t size);

FvStatus fv_collective_id(char id[FV_COLLECTIVE_ID], FvError *);
/* Meets the other ranks of the group, each with a GPU of its own. Lives longer than the recordings
 * of the backends that it averages for. */
FvStatus fv_collective_create(size_t device, const char id[FV_COLLECTIVE_ID], size_t rank,
                              size_t size, FvCollective **out, FvError *);
/* Of one that failed: without waiting for ranks that will not answer. */
void fv_collective_destroy(FvCollective *, bool failed);

/* Queues x [count] = its mean over the ranks, behind what the backend has queued so far. */
void fv_collective_average(FvCollective *, FvBackend *, real *x, size_t count);
/* What the backend queues from here on comes behind the averages. */
void fv_collective_join(FvCollective *, FvBackend *);
/* Errors that NCCL has found meanwhile: another rank's end, a broken connection. */
FvStatus fv_collective_check(FvCollective *, FvError *);

#endif
