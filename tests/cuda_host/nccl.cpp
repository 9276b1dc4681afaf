/* NCCL of the stand-in for CUDA: see nccl.h. A communicator's ranks know each other's rank in MPI
 * and send messages with a tag of its own; rank 0 adds in the order of the ranks. */
#include "nccl.h"
#include "stream.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#define OMPI_SKIP_MPICXX 1 /* the C interface alone */
#include <mpi.h>

namespace {

struct Member {
    int rank, world, device;
};

struct Id {
    int root, tag; /* who made it, in MPI's world */
};

} // namespace

struct ncclComm {
    int rank, tag, device;
    std::vector<Member> members;
    size_t reductions;
    std::atomic<ncclResult_t> failure;
};

namespace {

int world_rank() {
    int started = 0, rank = 0;
    MPI_Initialized(&started);
    if (started)
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}

void send(const void *data, size_t bytes, int to, int tag) {
    const char *from = (const char *)data;
    for (size_t n; bytes > 0; bytes -= n, from += n) {
        n = std::min<size_t>(bytes, 1 << 30);
        MPI_Send(from, (int)n, MPI_BYTE, to, tag, MPI_COMM_WORLD);
    }
}

void receive(void *data, size_t bytes, int from, int tag) {
    char *to = (char *)data;
    for (size_t n; bytes > 0; bytes -= n, to += n) {
        n = std::min<size_t>(bytes, 1 << 30);
        MPI_Recv(to, (int)n, MPI_BYTE, from, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    }
}

/* The maker of the id hears of all ranks and tells all of them. */
std::vector<Member> meet(const Id &id, Member me, size_t ranks) {
    std::vector<Member> all(ranks);
    size_t bytes = ranks * sizeof(Member);
    if (id.root != me.world) {
        send(&me, sizeof me, id.root, id.tag);
        receive(all.data(), bytes, id.root, id.tag);
        return all;
    }
    all[(size_t)me.rank] = me;
    for (size_t i = 1; i < ranks; i++) {
        Member other;
        receive(&other, sizeof other, MPI_ANY_SOURCE, id.tag);
        all[(size_t)other.rank] = other;
    }
    for (const Member &other : all)
        if (other.rank != me.rank)
            send(all.data(), bytes, other.world, id.tag);
    return all;
}

template <typename T> void reduce(const ncclComm &comm, const T *x, T *y, size_t n, bool average) {
    int first = comm.members[0].world;
    size_t ranks = comm.members.size();
    if (comm.rank > 0) {
        send(x, n * sizeof *x, first, comm.tag);
        receive(y, n * sizeof *y, first, comm.tag);
        return;
    }
    std::vector<T> sum(x, x + n), other(n);
    for (size_t r = 1; r < ranks; r++) {
        receive(other.data(), n * sizeof(T), comm.members[r].world, comm.tag);
        for (size_t i = 0; i < n; i++)
            sum[i] += other[i];
    }
    for (size_t i = 0; average && i < n; i++)
        sum[i] /= (T)ranks;
    for (size_t r = 1; r < ranks; r++)
        send(sum.data(), n * sizeof(T), comm.members[r].world, comm.tag);
    std::copy(sum.begin(), sum.end(), y);
}

void run(ncclComm &comm, const void *x, void *y, size_t n, ncclDataType_t type, bool average) {
    static const char *failing = getenv("CUDA_HOST_NCCL_FAIL");
    if (++comm.reductions >= (failing ? strtoull(failing, nullptr, 10) : SIZE_MAX))
        comm.failure = ncclRemoteError;
    else if (type == ncclFloat32)
        reduce(comm, (const float *)x, (float *)y, n, average);
    else
        reduce(comm, (const double *)x, (double *)y, n, average);
}

} // namespace

extern "C" {

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t code) {
    static const char *const texts[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "NCCL operation in progress"};
    return (size_t)code < sizeof texts / sizeof *texts ? texts[code] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t) {
    return "";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *out) {
    static std::atomic<int> made = 0;
    const int ids = 1 << 10, base = 1 << 20; /* tags above those of the program */
    Id id = {world_rank(), 0};
    id.tag = base + id.root * ids + made++ % ids;
    *out = {};
    memcpy(out->internal, &id, sizeof id);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *out, int ranks, ncclUniqueId unique, int rank) {
    Id id;
    memcpy(&id, unique.internal, sizeof id);
    *out = nullptr;
    if (ranks < 1 || rank < 0 || rank >= ranks)
        return ncclInvalidArgument;
    if (host_device() < 0)
        return ncclUnhandledCudaError;
    Member me = {rank, world_rank(), host_device()};
    std::vector<Member> all = meet(id, me, (size_t)ranks);
    for (const Member &other : all) /* NCCL: Duplicate GPU detected */
        if (std::count_if(all.begin(), all.end(),
                          [&](const Member &m) { return m.device == other.device; }) > 1)
            return ncclInvalidUsage;
    *out = new ncclComm{rank, id.tag, host_device(), all, 0, ncclSuccess};
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *) {
    return ncclCommInitRank(out, ranks, id, rank);
}

ncclResult_t ncclCommCount(ncclComm_t comm, int *ranks) {
    *ranks = (int)comm->members.size();
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *code) {
    *code = comm->failure;
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    return comm ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    host_finish_device();
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *x, void *y, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    if (!comm || (type != ncclFloat32 && type != ncclFloat64) || (op != ncclSum && op != ncclAvg) ||
        (stream && stream->device != comm->device))
        return ncclInvalidArgument;
    if (comm->failure != ncclSuccess)
        return comm->failure;
    cudaError_t code = host_enqueue(stream, [=] { run(*comm, x, y, count, type, op == ncclAvg); });
    return code == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclGroupStart(void) {
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
    return ncclSuccess;
}

} /* extern "C" */
