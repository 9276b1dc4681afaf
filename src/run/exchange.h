/* How a job's gradients and weights travel within its rank group: not at all (one rank), over MPI
 * by way of the host's memory, or over NCCL from GPU to GPU, beside the backward pass. */
#ifndef FV_RUN_EXCHANGE_H
#define FV_RUN_EXCHANGE_H

#include "backend/backend.h"
#include "run/comm.h"
#include "run/device.h"

typedef struct FvExchange FvExchange;

/* What the jobs of a rank share, one after the other: the NCCL communicator. Starts as {0}. */
typedef struct FvLink {
    struct FvCollective *collective;
    bool failed;
} FvLink;
void fv_link_close(FvLink *);

typedef struct FvExchangeConfig {
    const char *comm; /* auto, mpi or nccl; auto takes NCCL where every rank has its own GPU */
    const FvWorld *world;
    const FvGroup *group;
    size_t slot;
    const FvDevice *device;
    FvBackend *backend;
    FvLink *link;
} FvExchangeConfig;

/* Collective over the group. FV_DEVICE: nccl is asked for and cannot be. */
FvStatus fv_exchange_create(const FvExchangeConfig *, FvExchange **out, FvError *);
void fv_exchange_destroy(FvExchange *);
/* "gradients over MPI: this build has no NCCL", or "" for a rank alone */
const char *fv_exchange_text(const FvExchange *);

/* True when an average only queues work on the backend, which may be recorded and replayed. */
bool fv_exchange_queues(const FvExchange *);

/* FV_DEVICE from these: MPI, NCCL or the GPU failed. Tensors in the backend's memory. The root's
 * data [count] becomes everyone's. */
FvStatus fv_exchange_share(FvExchange *, real *data, size_t count, FvError *);

/* One step's average of g [count]: begin; ready (an FvReady of the model) with falling `from` as
 * gradients become final; finish for the rest. The averages are there for what is queued after. */
void fv_exchange_begin(FvExchange *, real *g, size_t count);
void fv_exchange_ready(void *exchange, size_t from);
FvStatus fv_exchange_finish(FvExchange *, FvError *);

/* Waits for a mark of the backend, with NCCL at most until it has found an error. */
FvStatus fv_exchange_wait(FvExchange *, size_t mark, FvError *);

#endif
