/* The stand-in for CUDA where a test that passes on it could fail on a GPU: what capture records
 * and refuses, what a kernel's threads see of each other. */
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <thread>

extern "C" {
#include <cmocka.h>
}

#include "cublas_v2.h"
#include "cuda_bf16.h"

namespace {

/* What FV_LAUNCH asks of a backend. */
struct Launcher {
    cudaStream_t stream;
    cudaError_t failure;
};

void fv_cuda_ok(Launcher *launcher, cudaError_t code, const char *) {
    launcher->failure = code;
}

struct Setting {
    cudaStream_t stream, other;
    cudaEvent_t forked, done;
    float *x, *pinned; /* [64] each, on the device and on the host */
};

void make(Setting *s) {
    assert_int_equal(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&s->other, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&s->forked, cudaEventDisableTiming), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming), cudaSuccess);
    assert_int_equal(cudaMalloc((void **)&s->x, 64 * sizeof *s->x), cudaSuccess);
    assert_int_equal(cudaHostAlloc((void **)&s->pinned, 64 * sizeof *s->x, cudaHostAllocDefault),
                     cudaSuccess);
    assert_int_equal(cudaMemsetAsync(s->x, 0, 64 * sizeof *s->x, s->stream), cudaSuccess);
}

void discard(Setting *s) {
    assert_int_equal(cudaFree(s->x), cudaSuccess);
    assert_int_equal(cudaFreeHost(s->pinned), cudaSuccess);
    assert_int_equal(cudaEventDestroy(s->forked), cudaSuccess);
    assert_int_equal(cudaEventDestroy(s->done), cudaSuccess);
    assert_int_equal(cudaStreamDestroy(s->other), cudaSuccess);
    assert_int_equal(cudaStreamDestroy(s->stream), cudaSuccess);
}

void begin(Setting *s, cudaStreamCaptureMode mode) {
    assert_int_equal(cudaStreamBeginCapture(s->stream, mode), cudaSuccess);
}

/* Ends a capture that must fail, and leaves the stream as it was before. */
void ends_with(Setting *s, cudaError_t code) {
    cudaGraph_t graph;
    assert_int_equal(cudaStreamEndCapture(s->stream, &graph), code);
    assert_null(graph);
    assert_int_equal(cudaStreamSynchronize(s->stream), cudaSuccess);
}

__global__ void multiply_add(float factor, float term, float *x) {
    x[threadIdx.x] = factor * x[threadIdx.x] + term;
}

/* --- capture ---------------------------------------------------------------------------------- */

void graph_does_at_each_launch_what_was_recorded(void **) {
    Setting s;
    make(&s);
    Launcher launcher = {s.stream, cudaSuccess};
    float term = 1;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    size_t nodes;
    begin(&s, cudaStreamCaptureModeThreadLocal);
    FV_LAUNCH(&launcher, multiply_add, 1, 64, 0, 3.0f, term, s.x);
    assert_int_equal(launcher.failure, cudaSuccess);
    term = 100; /* the argument was taken */
    FV_LAUNCH(&launcher, multiply_add, 1, 64, 0, 2.0f, 0.0f, s.x);
    assert_int_equal(cudaMemcpyAsync(s.pinned, s.x, 256, cudaMemcpyDeviceToHost, s.stream),
                     cudaSuccess);
    s.pinned[7] = -1;
    assert_int_equal(cudaStreamEndCapture(s.stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
    assert_int_equal(nodes, 3);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    assert_true(s.pinned[7] == -1 && s.x[7] == 0); /* nothing was done */
    assert_int_equal(cudaGraphLaunch(exec, s.stream), cudaSuccess);
    assert_true(s.pinned[7] == 2);
    assert_int_equal(cudaGraphLaunch(exec, s.stream), cudaSuccess);
    assert_true(s.pinned[7] == 14);
    assert_int_equal(cudaGraphExecDestroy(exec), cudaSuccess);
    discard(&s);
}

void product_takes_its_scalars_when_it_is_recorded(void **) {
    Setting s;
    make(&s);
    cublasHandle_t blas;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float alpha = 2, beta = 0;
    __nv_bfloat16 *a = (__nv_bfloat16 *)s.x, *b = a + 16;
    a[0] = 3.0f, b[0] = 5.0f;
    assert_int_equal(cublasCreate(&blas), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(cublasSetStream(blas, s.stream), CUBLAS_STATUS_SUCCESS);
    begin(&s, cudaStreamCaptureModeRelaxed);
    assert_int_equal(cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &alpha, a, CUDA_R_16BF,
                                  1, b, CUDA_R_16BF, 1, &beta, s.x + 32, CUDA_R_32F, 1,
                                  CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                     CUBLAS_STATUS_SUCCESS);
    alpha = 0;
    assert_int_equal(cudaStreamEndCapture(s.stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphLaunch(exec, s.stream), cudaSuccess);
    assert_true(s.x[32] == 30);
    assert_int_equal(cudaGraphExecDestroy(exec), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    assert_int_equal(cublasDestroy(blas), CUBLAS_STATUS_SUCCESS);
    discard(&s);
}

void fork_and_join_record_in_one_graph(void **) {
    Setting s;
    make(&s);
    Launcher on_stream = {s.stream, cudaSuccess}, on_other = {s.other, cudaSuccess};
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamCaptureStatus status;
    begin(&s, cudaStreamCaptureModeThreadLocal);
    FV_LAUNCH(&on_stream, multiply_add, 1, 64, 0, 1.0f, 1.0f, s.x);
    assert_int_equal(cudaEventRecord(s.forked, s.stream), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(s.other, s.forked, 0), cudaSuccess);
    assert_int_equal(cudaStreamIsCapturing(s.other, &status), cudaSuccess);
    assert_int_equal(status, cudaStreamCaptureStatusActive);
    FV_LAUNCH(&on_other, multiply_add, 1, 64, 0, 5.0f, 0.0f, s.x);
    assert_int_equal(cudaEventRecord(s.done, s.other), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(s.stream, s.done, 0), cudaSuccess);
    FV_LAUNCH(&on_stream, multiply_add, 1, 64, 0, 1.0f, 2.0f, s.x);
    assert_int_equal(cudaStreamEndCapture(s.stream, &graph), cudaSuccess);
    assert_int_equal(cudaStreamIsCapturing(s.other, &status), cudaSuccess);
    assert_int_equal(status, cudaStreamCaptureStatusNone);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphLaunch(exec, s.stream), cudaSuccess);
    assert_true(s.x[0] == 7 && s.x[63] == 7);
    assert_int_equal(cudaGraphExecDestroy(exec), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    discard(&s);
}

void graph_shows_that_a_fork_is_not_ordered(void **) {
    Setting s;
    make(&s);
    Launcher on_stream = {s.stream, cudaSuccess}, on_other = {s.other, cudaSuccess};
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    begin(&s, cudaStreamCaptureModeThreadLocal);
    FV_LAUNCH(&on_stream, multiply_add, 1, 64, 0, 1.0f, 1.0f, s.x);
    assert_int_equal(cudaEventRecord(s.forked, s.stream), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(s.other, s.forked, 0), cudaSuccess);
    FV_LAUNCH(&on_other, multiply_add, 1, 64, 0, 5.0f, 0.0f, s.x);
    FV_LAUNCH(&on_stream, multiply_add, 1, 64, 0, 1.0f, 2.0f, s.x); /* beside it */
    assert_int_equal(cudaEventRecord(s.done, s.other), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(s.stream, s.done, 0), cudaSuccess);
    assert_int_equal(cudaStreamEndCapture(s.stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphLaunch(exec, s.stream), cudaSuccess);
    assert_true(s.x[0] == (0 + 1 + 2) * 5);
    assert_int_equal(cudaGraphLaunch(exec, s.stream), cudaSuccess);
    assert_true(s.x[0] == (15 + 1) * 5 + 2);
    assert_int_equal(cudaGraphExecDestroy(exec), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    discard(&s);
}

void work_of_a_fork_that_is_not_joined_is_an_error(void **) {
    Setting s;
    make(&s);
    Launcher on_other = {s.other, cudaSuccess};
    begin(&s, cudaStreamCaptureModeThreadLocal);
    assert_int_equal(cudaEventRecord(s.forked, s.stream), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(s.other, s.forked, 0), cudaSuccess);
    assert_int_equal(cudaEventRecord(s.done, s.other), cudaSuccess);
    FV_LAUNCH(&on_other, multiply_add, 1, 64, 0, 1.0f, 1.0f, s.x); /* after what is joined */
    assert_int_equal(cudaStreamWaitEvent(s.stream, s.done, 0), cudaSuccess);
    ends_with(&s, cudaErrorStreamCaptureUnjoined);
    discard(&s);
}

void waiting_on_the_host_spoils_a_capture(void **) {
    Setting s;
    float pageable[4];
    make(&s);
    begin(&s, cudaStreamCaptureModeRelaxed);
    assert_int_equal(cudaStreamSynchronize(s.stream), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaMemsetAsync(s.x, 0, 4, s.stream), cudaErrorStreamCaptureInvalidated);
    ends_with(&s, cudaErrorStreamCaptureInvalidated);
    begin(&s, cudaStreamCaptureModeRelaxed);
    assert_int_equal(cudaMemcpyAsync(pageable, s.x, 4, cudaMemcpyDeviceToHost, s.stream),
                     cudaErrorStreamCaptureUnsupported);
    ends_with(&s, cudaErrorStreamCaptureInvalidated);
    begin(&s, cudaStreamCaptureModeRelaxed);
    assert_int_equal(cudaEventRecord(s.done, s.stream), cudaSuccess);
    assert_int_equal(cudaEventSynchronize(s.done), cudaErrorCapturedEvent);
    ends_with(&s, cudaErrorStreamCaptureInvalidated);
    assert_int_equal(cudaGetLastError(), cudaErrorStreamCaptureInvalidated);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    discard(&s);
}

void allocating_spoils_captures_unless_relaxed(void **) {
    const struct {
        cudaStreamCaptureMode mode;
        bool here, elsewhere; /* whether it may be called on this host thread, on another */
    } cases[] = {{cudaStreamCaptureModeGlobal, false, false},
                 {cudaStreamCaptureModeThreadLocal, false, true},
                 {cudaStreamCaptureModeRelaxed, true, true}};
    for (const auto &c : cases)
        for (bool here : {true, false}) {
            Setting s;
            void *p = nullptr;
            cudaError_t code = cudaSuccess;
            cudaGraph_t graph;
            make(&s);
            begin(&s, c.mode);
            if (here)
                code = cudaMalloc(&p, 4);
            else
                std::thread([&] { code = cudaMalloc(&p, 4); }).join();
            bool good = here ? c.here : c.elsewhere;
            assert_int_equal(code, good ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
            if (good)
                assert_int_equal(cudaStreamEndCapture(s.stream, &graph), cudaSuccess);
            else
                ends_with(&s, cudaErrorStreamCaptureInvalidated);
            if (good)
                assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
            assert_int_equal(cudaFree(p), cudaSuccess);
            discard(&s);
        }
}

void capture_does_not_wait_for_what_is_outside(void **) {
    Setting s;
    make(&s);
    assert_int_equal(cudaEventRecord(s.done, s.other), cudaSuccess);
    begin(&s, cudaStreamCaptureModeThreadLocal);
    assert_int_equal(cudaStreamWaitEvent(s.stream, s.done, 0), cudaErrorStreamCaptureIsolation);
    ends_with(&s, cudaErrorStreamCaptureInvalidated);
    discard(&s);
}

/* --- work that is done late --------------------------------------------------------------------
 */

void late_work_is_done_when_something_waits(void **) {
    Setting s;
    float here[64];
    setenv("CUDA_HOST_LATE", "600000", 1);
    make(&s);
    unsetenv("CUDA_HOST_LATE");
    Launcher on_stream = {s.stream, cudaSuccess}, on_other = {s.other, cudaSuccess};
    FV_LAUNCH(&on_stream, multiply_add, 1, 64, 0, 0.0f, 4.0f, s.x);
    assert_int_equal(cudaStreamQuery(s.stream), cudaErrorNotReady);
    assert_int_equal(cudaEventRecord(s.forked, s.stream), cudaSuccess);
    assert_int_equal(cudaEventQuery(s.forked), cudaErrorNotReady);
    assert_int_equal(cudaStreamWaitEvent(s.other, s.forked, 0), cudaSuccess);
    FV_LAUNCH(&on_other, multiply_add, 1, 64, 0, 2.0f, 1.0f, s.x);
    s.pinned[0] = 7;
    assert_int_equal(cudaMemcpyAsync(s.pinned, s.x, 256, cudaMemcpyDeviceToHost, s.other),
                     cudaSuccess);
    assert_int_equal(cudaEventRecord(s.done, s.other), cudaSuccess);
    assert_true(s.pinned[0] == 7);
    assert_int_equal(cudaEventSynchronize(s.done), cudaSuccess); /* and so for s.forked */
    assert_true(s.pinned[0] == 9 && s.pinned[63] == 9);
    assert_int_equal(cudaEventQuery(s.forked), cudaSuccess);
    here[0] = 3;
    assert_int_equal(cudaMemcpyAsync(s.x, here, 4, cudaMemcpyHostToDevice, s.stream), cudaSuccess);
    here[0] = 5; /* pageable memory was read */
    assert_int_equal(cudaMemcpyAsync(here, s.x, 8, cudaMemcpyDeviceToHost, s.stream), cudaSuccess);
    assert_true(here[0] == 3 && here[1] == 9);
    discard(&s);
}

void late_work_is_done_after_a_while(void **) {
    Setting s;
    setenv("CUDA_HOST_LATE", "1", 1);
    make(&s);
    unsetenv("CUDA_HOST_LATE");
    assert_int_equal(cudaEventRecord(s.done, s.stream), cudaSuccess);
    while (cudaEventQuery(s.done) == cudaErrorNotReady)
        std::this_thread::yield();
    assert_int_equal(cudaEventQuery(s.done), cudaSuccess);
    discard(&s);
}

/* --- kernels ---------------------------------------------------------------------------------- */

/* Some threads return early, some wait at barriers, neighbours exchange values. */
__global__ void turn(unsigned alive, unsigned *y) {
    __shared__ unsigned sum[64];
    unsigned i = threadIdx.x + blockDim.x * threadIdx.y, all = blockDim.x * blockDim.y;
    if (i >= alive)
        return;
    sum[i] = i;
    __syncthreads();
    unsigned other = sum[(i + 1) % alive];
    for (unsigned n = 0; n < 3; n++)
        other = __shfl_xor_sync(0xffffffffu, other, 1);
    y[blockIdx.x * all + i] = other + 100 * blockIdx.x;
}

void threads_of_a_block_wait_for_each_other(void **) {
    Setting s;
    make(&s);
    Launcher launcher = {s.stream, cudaSuccess};
    unsigned *y = (unsigned *)s.x;
    FV_LAUNCH(&launcher, turn, 2, dim3(8, 4), 0, 20u, y);
    for (unsigned i = 0; i < 64; i++)
        assert_int_equal(y[i], i % 32 < 20 ? ((i % 32 ^ 1) + 1) % 20 + 100 * (i / 32) : 0);
    discard(&s);
}

void launch_needs_the_streams_device(void **) {
    Setting s;
    make(&s);
    Launcher launcher = {s.stream, cudaSuccess};
    assert_int_equal(cudaSetDevice(1), cudaSuccess);
    FV_LAUNCH(&launcher, multiply_add, 1, 64, 0, 1.0f, 1.0f, s.x);
    assert_int_equal(launcher.failure, cudaErrorInvalidResourceHandle);
    assert_int_equal(cudaSetDevice(0), cudaSuccess);
    assert_int_equal(cudaSetDevice(2), cudaErrorInvalidDevice);
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidDevice);
    assert_true(s.x[0] == 0);
    discard(&s);
}

void bfloat16_rounds_to_nearest_even(void **) {
    const float cases[][2] = {{1, 1},
                              {1 + 0x1p-8f, 1},
                              {1 + 0x1.8p-8f, 1 + 0x1p-7f},
                              {1 + 0x3p-8f, 1 + 0x1p-6f},
                              {-0x1.ffp127f, -INFINITY},
                              {INFINITY, INFINITY}};
    for (const auto &c : cases)
        assert_true(__bfloat162float(__float2bfloat16(c[0])) == c[1]);
    assert_true(std::isnan(__bfloat162float(__float2bfloat16(NAN))));
}

} // namespace

int main() {
    const CMUnitTest tests[] = {
        cmocka_unit_test(graph_does_at_each_launch_what_was_recorded),
        cmocka_unit_test(product_takes_its_scalars_when_it_is_recorded),
        cmocka_unit_test(fork_and_join_record_in_one_graph),
        cmocka_unit_test(graph_shows_that_a_fork_is_not_ordered),
        cmocka_unit_test(work_of_a_fork_that_is_not_joined_is_an_error),
        cmocka_unit_test(waiting_on_the_host_spoils_a_capture),
        cmocka_unit_test(allocating_spoils_captures_unless_relaxed),
        cmocka_unit_test(capture_does_not_wait_for_what_is_outside),
        cmocka_unit_test(late_work_is_done_when_something_waits),
        cmocka_unit_test(late_work_is_done_after_a_while),
        cmocka_unit_test(threads_of_a_block_wait_for_each_other),
        cmocka_unit_test(launch_needs_the_streams_device),
        cmocka_unit_test(bfloat16_rounds_to_nearest_even),
    };
    setenv("CUDA_HOST_DEVICES", "2", 1);
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
