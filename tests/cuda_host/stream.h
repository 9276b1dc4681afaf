/* Inside the stand-in for CUDA: what a stream does with the work it is given. */
#ifndef TESTS_CUDA_HOST_STREAM_H
#define TESTS_CUDA_HOST_STREAM_H

#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "queue.h"

struct Capture;

/* How much of each of a capture's streams, by its number, comes before a point. */
using Seen = std::vector<size_t>;

struct HostStream {
    int device;
    std::shared_ptr<HostQueue> queue; /* NULL: work is done at once */
    std::shared_ptr<Capture> capture; /* NULL: none */
    size_t number;                    /* among the capture's streams */
    Seen seen;
};

/* Keeps the host thread's last error; returns it. */
cudaError_t host_error(cudaError_t);

/* Does the work or queues it; records it where the stream is being captured. */
cudaError_t host_enqueue(cudaStream_t, std::function<void()> work);
/* Waits for the host thread's device. */
void host_finish_device(void);
/* A call that may wait for the device or change it: captures that forbid it are spoilt by it, and
 * the call fails. */
cudaError_t host_unsafe_call(void);
/* A call that a stream which is being captured does not take: its capture is spoilt. */
cudaError_t host_not_in_capture(cudaStream_t);

/* The host thread's device among all, whatever is visible. */
int host_device(void);

#endif
