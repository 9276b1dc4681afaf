/* Streams, events, capture and graphs of the stand-in for CUDA: see cuda_runtime.h. */
#include "stream.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <thread>

struct Node {
    std::function<void()> work;
    size_t stream; /* its number */
    Seen seen;     /* with itself */
};

struct Capture {
    cudaStreamCaptureMode mode;
    std::thread::id owner = std::this_thread::get_id();
    std::atomic<bool> spoilt = false;
    bool ended = false;
    std::vector<HostStream *> streams; /* the first began it */
    std::vector<Node> nodes;
};

using Time = std::chrono::steady_clock::time_point;

struct HostEvent {
    std::shared_ptr<Capture> capture; /* in which it was recorded last; NULL: in none */
    Seen seen;
    std::shared_ptr<HostQueue> queue; /* NULL: what it stands for was done at once */
    size_t count;                     /* of the queue's work comes before it */
    std::shared_ptr<Time> time;       /* NULL: never recorded */
};

struct HostGraph {
    std::vector<Node> nodes;
};

using Work = std::vector<std::function<void()>>;

struct HostGraphExec {
    std::array<std::shared_ptr<const Work>, 2> orders; /* taken in turn */
    size_t launches;
};

namespace {

std::mutex lock;
std::vector<std::shared_ptr<Capture>> captures; /* in progress */
std::vector<std::weak_ptr<HostQueue>> queues;

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
    if (!of && !stream->capture) {
        if (event->queue && event->queue != stream->queue)
            return host_enqueue(
                stream, [queue = event->queue, count = event->count] { queue->finish(count); });
        return cudaSuccess;
    }
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

/* Whether the host may ask for the event. */
cudaError_t ask_for(const HostEvent *event) {
    if (!event->capture)
        return host_unsafe_call();
    event->capture->spoilt = true;
    return cudaErrorCapturedEvent;
}

/* The recorded work in one of the orders that its dependencies allow: where it waits for nothing, a
 * fork's work comes after, or before, that of the stream that began the capture. */
Work in_order(const std::vector<Node> &nodes, bool forks_first) {
    std::vector<std::vector<const Node *>> streams;
    for (const Node &n : nodes) {
        streams.resize(std::max(streams.size(), n.stream + 1));
        streams[n.stream].push_back(&n);
    }
    std::vector<size_t> next(streams.size());
    auto waits = [&](const Node &n) {
        for (size_t s = 0; s < streams.size() && s < n.seen.size(); s++)
            if (s != n.stream && next[s] < streams[s].size() &&
                streams[s][next[s]]->seen[s] <= n.seen[s])
                return true;
        return false;
    };
    Work order;
    while (order.size() < nodes.size())
        for (size_t i = 0; i < streams.size(); i++) {
            size_t s = forks_first ? streams.size() - 1 - i : i;
            if (next[s] < streams[s].size() && !waits(*streams[s][next[s]])) {
                order.push_back(streams[s][next[s]++]->work);
                break;
            }
        }
    return order;
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
    if (!stream || (!stream->capture && !stream->queue)) {
        work();
    } else if (!stream->capture) {
        stream->queue->push(std::move(work));
    } else if (stream->capture->spoilt) {
        return host_error(cudaErrorStreamCaptureInvalidated);
    } else {
        stream->seen[stream->number]++;
        stream->capture->nodes.push_back({std::move(work), stream->number, stream->seen});
    }
    return cudaSuccess;
}

void host_finish_device(void) {
    std::vector<std::shared_ptr<HostQueue>> all;
    {
        std::lock_guard<std::mutex> guard(lock);
        std::erase_if(queues, [](const auto &q) { return q.expired(); });
        for (const auto &q : queues)
            if (auto queue = q.lock(); queue && queue->device == host_device())
                all.push_back(std::move(queue));
    }
    for (const auto &queue : all)
        queue->finish(queue->pushed());
}

extern "C" {

/* --- streams and events ----------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    const char *late = getenv("CUDA_HOST_LATE");
    if (flags > cudaStreamNonBlocking)
        return host_error(cudaErrorInvalidValue);
    *out = new HostStream{host_device(), nullptr, nullptr, 0, {}};
    if (late) {
        (*out)->queue =
            std::make_shared<HostQueue>(host_device(), std::chrono::milliseconds(atoi(late)));
        std::lock_guard<std::mutex> guard(lock);
        queues.push_back((*out)->queue);
    }
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (cudaError_t refused = host_not_in_capture(stream))
        return host_error(refused);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (cudaError_t refused = host_not_in_capture(stream))
        return host_error(refused);
    if (stream && stream->queue)
        stream->queue->finish(stream->queue->pushed());
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (cudaError_t refused = host_not_in_capture(stream))
        return host_error(refused);
    bool done = !stream || !stream->queue || stream->queue->done(stream->queue->pushed());
    return done ? cudaSuccess : cudaErrorNotReady;
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
    auto time = std::make_shared<Time>();
    *event = {nullptr, {}, nullptr, 0, time};
    if (stream && stream->capture) {
        event->capture = stream->capture;
        event->seen = stream->seen;
        return cudaSuccess;
    }
    host_enqueue(stream, [=] { *time = std::chrono::steady_clock::now(); });
    if (stream && stream->queue) {
        event->queue = stream->queue;
        event->count = stream->queue->pushed();
    }
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (cudaError_t refused = ask_for(event))
        return host_error(refused);
    return !event->queue || event->queue->done(event->count) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (cudaError_t refused = ask_for(event))
        return host_error(refused);
    if (event->queue)
        event->queue->finish(event->count);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from->time || !to->time)
        return host_error(cudaErrorInvalidResourceHandle);
    if (from->capture || to->capture)
        return host_error(cudaErrorCapturedEvent);
    for (cudaEvent_t event : {from, to})
        if (event->queue && !event->queue->done(event->count))
            return cudaErrorNotReady;
    *milliseconds = std::chrono::duration<float, std::milli>(*to->time - *from->time).count();
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
    *out = new HostGraph{std::move(capture->nodes)};
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
    *out = new HostGraphExec{{std::make_shared<Work>(in_order(graph->nodes, false)),
                              std::make_shared<Work>(in_order(graph->nodes, true))},
                             0};
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, void *nodes, size_t *count) {
    if (!graph || nodes)
        return host_error(cudaErrorInvalidValue);
    *count = graph->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    if (cudaError_t refused = host_not_in_capture(stream))
        return host_error(refused);
    return host_enqueue(stream, [order = graph->orders[graph->launches++ % 2]] {
        for (const auto &work : *order)
            work();
    });
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
