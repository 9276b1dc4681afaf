/* NCCL's stand-in among the ranks of mpirun (or alone): two communicators made and used at once by
 * two threads of each rank, one of them by way of a graph. A GPU for each rank. */
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>

extern "C" {
#include <cmocka.h>
}

#define OMPI_SKIP_MPICXX 1 /* the C interface alone */
#include <mpi.h>

#include "nccl.h"

namespace {

int rank, ranks;

/* What a thread found; cmocka's assertions belong to the main thread. */
struct Found {
    ncclResult_t made, added, averaged, later;
    float sum[2];
    double mean;
};

/* sum of (rank + 1, 10 rank), a second time of the sums where a graph does it; mean of rank */
void reduce(const ncclUniqueId *id, bool captured, Found *out) {
    ncclComm_t comm;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float *x;
    double *y;
    cudaSetDevice(rank);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaMalloc((void **)&x, 2 * sizeof *x);
    cudaMalloc((void **)&y, sizeof *y);
    x[0] = (float)rank + 1, x[1] = 10 * (float)rank, *y = rank;
    out->made = ncclCommInitRank(&comm, ranks, *id, rank);
    if (out->made != ncclSuccess)
        return;
    if (captured)
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    out->added = ncclAllReduce(x, x, 2, ncclFloat, ncclSum, comm, stream);
    if (captured) {
        cudaStreamEndCapture(stream, &graph);
        cudaGraphInstantiate(&exec, graph, 0);
        cudaGraphLaunch(exec, stream);
        cudaGraphLaunch(exec, stream);
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
    }
    out->averaged = ncclAllReduce(y, y, 1, ncclDouble, ncclAvg, comm, stream);
    ncclCommGetAsyncError(comm, &out->later);
    out->sum[0] = x[0], out->sum[1] = x[1], out->mean = *y;
    ncclCommDestroy(comm);
    cudaFree(x);
    cudaFree(y);
    cudaStreamDestroy(stream);
}

void check(const Found &found, float times) {
    float n = (float)ranks;
    assert_int_equal(found.made, ncclSuccess);
    assert_int_equal(found.added, ncclSuccess);
    assert_int_equal(found.averaged, ncclSuccess);
    assert_int_equal(found.later, ncclSuccess);
    assert_true(found.sum[0] == times * n * (n + 1) / 2);
    assert_true(found.sum[1] == times * 10 * n * (n - 1) / 2);
    assert_true(found.mean == (double)(ranks - 1) / 2);
}

void ranks_add_in_two_communicators_at_once(void **) {
    ncclUniqueId id[2];
    Found eager = {}, graph = {};
    int maker = ranks - 1; /* any of the ranks may be the one */
    for (ncclUniqueId &i : id)
        if (rank == maker)
            assert_int_equal(ncclGetUniqueId(&i), ncclSuccess);
    MPI_Bcast(id, sizeof id, MPI_BYTE, maker, MPI_COMM_WORLD);
    std::thread first([&] { reduce(&id[0], false, &eager); });
    std::thread second([&] { reduce(&id[1], true, &graph); });
    first.join();
    second.join();
    check(eager, 1);
    check(graph, (float)ranks); /* the second launch added the sums */
}

} // namespace

int main(int argc, char **argv) {
    int provided;
    setenv("CUDA_HOST_DEVICES", "8", 1);
    MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    const CMUnitTest tests[] = {cmocka_unit_test(ranks_add_in_two_communicators_at_once)};
    int failed = cmocka_run_group_tests(tests, nullptr, nullptr);
    MPI_Finalize();
    return failed;
}
