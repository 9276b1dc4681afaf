/* Counts a program's calls of the CUDA runtime, and how long the GPU waits between graphs:
 *
 *     LD_PRELOAD=count_calls.so COUNT_CALLS=FILE program
 *
 * writes "name number" lines to FILE at the end. `busy_ms` is the time from start to end of graphs
 * on the GPU, `span_ms` from the start of each to the start of the next, by events around each
 * launch; the last graphs are left out. What waits inside a graph is not seen. One stream at a
 * time. */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime.h>

enum { RING = 256 }; /* graphs before a pair of events is used again: long done by then */

typedef struct Graphs {
    cudaEvent_t begin[RING], end[RING];
    size_t launched;
    double busy_ms, span_ms;
} Graphs;

/* One program is watched: its counters are the library's only state. */
static struct {
    size_t graph_launches, kernel_launches, waits_stream, waits_device, waits_event, copies_waiting,
        copies, memsets;
    Graphs graphs;
} counts;

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "count_calls: the program's CUDA runtime has no %s\n", name);
        exit(2);
    }
    return found;
}

/* Adds the pair of events that is used again now, and the start of the one after it. */
static void read_pair(Graphs *g, size_t slot) {
    float busy, span;
    if (cudaEventElapsedTime(&busy, g->begin[slot], g->end[slot]) == cudaSuccess &&
        cudaEventElapsedTime(&span, g->begin[slot], g->begin[(slot + 1) % RING]) == cudaSuccess) {
        g->busy_ms += (double)busy;
        g->span_ms += (double)span;
    }
}

static bool ready(Graphs *g, size_t slot) {
    if (g->launched >= RING) {
        read_pair(g, slot);
        return true;
    }
    return cudaEventCreate(&g->begin[slot]) == cudaSuccess &&
           cudaEventCreate(&g->end[slot]) == cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    typedef cudaError_t Real(cudaGraphExec_t, cudaStream_t);
    Real *real = (Real *)next("cudaGraphLaunch");
    Graphs *g = &counts.graphs;
    size_t slot = g->launched % RING;
    bool timed = ready(g, slot) && cudaEventRecord(g->begin[slot], stream) == cudaSuccess;
    cudaError_t code = real(graph, stream);
    if (timed && cudaEventRecord(g->end[slot], stream) == cudaSuccess)
        g->launched++;
    counts.graph_launches++;
    return code;
}

/* How nvcc's <<<>>> launches from CUDA 13 on, and before. */
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t);
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args,
                               size_t shared, cudaStream_t stream) {
    typedef cudaError_t Real(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t);
    Real *real = (Real *)next("__cudaLaunchKernel");
    counts.kernel_launches++;
    return real(kernel, grid, block, args, shared, stream);
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared,
                             cudaStream_t stream) {
    typedef cudaError_t Real(const void *, dim3, dim3, void **, size_t, cudaStream_t);
    Real *real = (Real *)next("cudaLaunchKernel");
    counts.kernel_launches++;
    return real(kernel, grid, block, args, shared, stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    typedef cudaError_t Real(cudaStream_t);
    Real *real = (Real *)next("cudaStreamSynchronize");
    counts.waits_stream++;
    return real(stream);
}

cudaError_t cudaDeviceSynchronize(void) {
    typedef cudaError_t Real(void);
    Real *real = (Real *)next("cudaDeviceSynchronize");
    counts.waits_device++;
    return real();
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    typedef cudaError_t Real(cudaEvent_t);
    Real *real = (Real *)next("cudaEventSynchronize");
    counts.waits_event++;
    return real(event);
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind) {
    typedef cudaError_t Real(void *, const void *, size_t, enum cudaMemcpyKind);
    Real *real = (Real *)next("cudaMemcpy");
    counts.copies_waiting++;
    return real(dst, src, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    typedef cudaError_t Real(void *, const void *, size_t, enum cudaMemcpyKind, cudaStream_t);
    Real *real = (Real *)next("cudaMemcpyAsync");
    counts.copies++;
    return real(dst, src, bytes, kind, stream);
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream) {
    typedef cudaError_t Real(void *, int, size_t, cudaStream_t);
    Real *real = (Real *)next("cudaMemsetAsync");
    counts.memsets++;
    return real(dst, value, bytes, stream);
}

__attribute__((destructor)) static void write_counts(void) {
    const char *path = getenv("COUNT_CALLS");
    FILE *file = path && counts.copies > 0 ? fopen(path, "w") : NULL; /* not a launcher's shell */
    if (!file)
        return;
    fprintf(file,
            "graph_launches %zu\nkernel_launches %zu\nwaits_stream %zu\nwaits_device %zu\n"
            "waits_event %zu\ncopies_waiting %zu\ncopies %zu\nmemsets %zu\nbusy_ms %.6f\n"
            "span_ms %.6f\n",
            counts.graph_launches, counts.kernel_launches, counts.waits_stream, counts.waits_device,
            counts.waits_event, counts.copies_waiting, counts.copies, counts.memsets,
            counts.graphs.busy_ms, counts.graphs.span_ms);
    if (fclose(file) != 0)
        fprintf(stderr, "count_calls: %s could not be written\n", path);
}
