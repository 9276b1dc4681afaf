/* Streams, events, capture and graphs of the stand-in for CUDA: see cuda_runtime.h. Work of all
 * streams of a capture is done in the order in which it was recorded. */
#include "stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

using Work = std::vector<std::function<void()>>;

struct Capture {
    cudaStreamCaptureMode mode;
    std::thread::id owner = std::this_thread::get_id();
    std::atomic<bool> spoilt = false;
    bool ended = false;
    std::vector<HostStream *> streams; /* the first began it */
    std::shared_ptr<Work> work = std::make_shared<Work>();
};

struct HostEvent {
    bool recorded;
    std::shared_ptr<Capture> capture; /* in which it was recorded last; NULL: in none */
    Seen seen;
    std::chrono::steady_clock::time_point time;
};

struct HostGraph {
    std::shared_ptr<const Work> work;
};

struct HostGraphExec {
    std::shared_ptr<const Work> work;
};

namespace {

std::mutex lock;
std::vector<std::shared_ptr<Capture>> captures; /* in progress */

void spoil(HostStream *stream) {
    stream->capture->spoilt = true;
}

void join(HostStream *stream, const std::shared_ptr<Capture> &capture, const Seen &seen) {
    stream->capture = capture;
    stream->number = capture->streams.size();
    stream->seen = seen;
    stream->seen.resize(std::max(stream->seen.size(), stream->number + 1));
    stream->seen[stream->number]++; /* that it was forked must be seen by whom it joins */
    capture->streams.push_back(stream);
}

void merge(Seen &into, const Seen &from) {
    into.resize(std::max(into.size(), from.size()));
    for (size_t i = 0; i < from.size(); i++)
        into[i] = std::max(into[i], from[i]);
}

/* Whether the stream that began the capture comes after all that was recorded. */
bool joined(const Capture &capture) {
    const Seen &seen = capture.streams[0]->seen;
    for (const HostStream *s : capture.streams)
        if (s->number >= seen.size() || seen[s->number] != s->seen[s->number])
            return false;
    return true;
}

void leave(Capture &capture) {
    capture.ended = true;
    for (HostStream *s : capture.streams)
        s->capture.reset();
    std::lock_guard<std::mutex> guard(lock);
    std::erase_if(captures, [&](const auto &c) { return c.get() == &capture; });
}

cudaError_t wait_for(HostStream *stream, const HostEvent *event) {
    const std::shared_ptr<Capture> &of = event->capture;
    if (stream->capture && stream->capture->spoilt)
        return cudaErrorStreamCaptureInvalidated;
    if (!of && !stream->capture)
        return cudaSuccess;
    if (!of) {
        spoil(stream);
        return cudaErrorStreamCaptureIsolation;
    }
    if (of->ended)
        return cudaErrorCapturedEvent;
    if (stream->capture && stream->capture != of) {
        spoil(stream);
        of->spoilt = true;
        return cudaErrorStreamCaptureMerge;
    }
    if (stream->capture)
        merge(stream->seen, event->seen);
    else
        join(stream, of, event->seen);
    return cudaSuccess;
}

cudaError_t wait_on_host(const HostEvent *event) {
    if (!event->capture)
        return host_unsafe_call();
    event->capture->spoilt = true;
    return cudaErrorCapturedEvent;
}

} // namespace

cudaError_t host_unsafe_call(void) {
    std::lock_guard<std::mutex> guard(lock);
    cudaError_t code = cudaSuccess;
    for (const auto &c : captures)
        if (c->mode == cudaStreamCaptureModeGlobal ||
            (c->mode == cudaStreamCaptureModeThreadLocal &&
             c->owner == std::this_thread::get_id())) {
            c->spoilt = true;
            code = cudaErrorStreamCaptureUnsupported;
        }
    return code;
}

cudaError_t host_not_in_capture(cudaStream_t stream) {
    if (!stream || !stream->capture)
        return cudaSuccess;
    spoil(stream);
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t host_enqueue(cudaStream_t stream, std::function<void()> work) {
    if (!stream || !stream->capture) {
        work();
        return cudaSuccess;
    }
    if (stream->capture->spoilt)
        return host_error(cudaErrorStreamCaptureInvalidated);
    stream->capture->work->push_back(std::move(work));
    stream->seen[stream->number]++;
    return cudaSuccess;
}

extern "C" {

/* --- streams and events ----------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    if (flags > cudaStreamNonBlocking)
        return host_error(cudaErrorInvalidValue);
    *out = new HostStream{host_device(), nullptr, 0, {}};
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (cudaError_t refused = host_not_in_capture(stream))
        return host_error(refused);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return host_error(host_not_in_capture(stream));
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return host_error(host_not_in_capture(stream));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return host_error(flags != 0 || !event ? cudaErrorInvalidValue
                      : stream             ? wait_for(stream, event)
                                           : cudaSuccess);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    return host_enqueue(stream, [=] { function(data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    if (flags > 7)
        return host_error(cudaErrorInvalidValue);
    *out = new HostEvent{};
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out) {
    return cudaEventCreateWithFlags(out, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (stream && stream->capture && stream->capture->spoilt)
        return host_error(cudaErrorStreamCaptureInvalidated);
    event->recorded = true;
    event->capture = stream ? stream->capture : nullptr;
    event->seen = stream ? stream->seen : Seen{};
    event->time = std::chrono::steady_clock::now();
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    return host_error(wait_on_host(event));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return host_error(wait_on_host(event));
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from->recorded || !to->recorded)
        return host_error(cudaErrorInvalidResourceHandle);
    if (from->capture || to->capture)
        return host_error(cudaErrorCapturedEvent);
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return cudaSuccess;
}

/* --- capture and graphs ----------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (!stream)
        return host_error(cudaErrorStreamCaptureUnsupported);
    if (stream->capture)
        return host_error(cudaErrorIllegalState);
    auto capture = std::make_shared<Capture>();
    capture->mode = mode;
    join(stream, capture, {});
    std::lock_guard<std::mutex> guard(lock);
    captures.push_back(capture);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    std::shared_ptr<Capture> capture = stream ? stream->capture : nullptr;
    *out = nullptr;
    if (!capture)
        return host_error(cudaErrorIllegalState);
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        capture->owner != std::this_thread::get_id())
        return host_error(cudaErrorStreamCaptureWrongThread);
    if (capture->streams[0] != stream) {
        spoil(stream);
        return host_error(cudaErrorStreamCaptureUnmatched);
    }
    bool good = joined(*capture), spoilt = capture->spoilt;
    leave(*capture);
    if (spoilt)
        return host_error(cudaErrorStreamCaptureInvalidated);
    if (!good)
        return host_error(cudaErrorStreamCaptureUnjoined);
    *out = new HostGraph{capture->work};
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out) {
    *out = !stream || !stream->capture ? cudaStreamCaptureStatusNone
           : stream->capture->spoilt   ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                 unsigned long long flags) {
    if (!graph || flags != 0)
        return host_error(cudaErrorInvalidValue);
    *out = new HostGraphExec{graph->work};
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, void *nodes, size_t *count) {
    if (!graph || nodes)
        return host_error(cudaErrorInvalidValue);
    *count = graph->work->size();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    if (cudaError_t refused = host_not_in_capture(stream))
        return host_error(refused);
    for (const auto &work : *graph->work)
        work();
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

} /* extern "C" */
