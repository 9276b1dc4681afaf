/* Runs kernels on the CPU: see cuda_runtime.h. */
#include "stream.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void **, const void *, size_t) {
}
static void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {
}
#endif

#ifndef __x86_64__
#error "host_switch() is written for x86-64"
#endif
/* Keeps the caller's registers on its stack and that stack's place in *from; goes on where `to`
 * was left. (swapcontext() asks the kernel twice each time, which made the suite ten times slower.)
 */
extern "C" void host_switch(void **from, void *to);
asm(R"(
.text
.globl host_switch
.type host_switch, @function
host_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size host_switch, .-host_switch
)");

/* Functions that every switch runs; sanitized they take half the suite's time. */
#define UNCHECKED __attribute__((no_sanitize("address"), no_sanitize("undefined")))

constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

const size_t stack_bytes = 64 << 10, warp = 32, most_threads = 1024;

/* A stack, on which threads run one after the other: a thread that waits keeps it, one that returns
 * leaves it to the next. */
struct Fiber {
    void *context = nullptr;
    void *fake = nullptr; /* AddressSanitizer's own stack of this fiber */
    const void *stack = nullptr;
    size_t bytes = 0;
    std::unique_ptr<char[]> memory;
};

struct Thread {
    dim3 index;
    Fiber *fiber;      /* NULL: has not begun */
    unsigned shuffles; /* that it has given a value to */
    uint64_t given[2];
};

/* Bit i is lane i's. A lane that is in none of the sets has returned. */
struct Warp {
    uint32_t ready, at_warp, at_block;
};

/* One host thread's launches; fibers are kept from launch to launch. */
struct Runner {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber *> idle;
    Fiber caller; /* the host thread's own stack */
    Thread thread[most_threads];
    Warp warps[most_threads / warp];
    size_t threads = 0, current = 0;
    Fiber *running = &caller, *left = nullptr;
    const char *name = nullptr;
    const std::function<void()> *kernel = nullptr;
    void *shared = nullptr;
};

constinit thread_local Runner *runner = nullptr;

thread_local std::unique_ptr<Runner> owner;

/* The bounds of the host thread's stack, which AddressSanitizer tells on leaving it and wants told
 * on the way back. */
UNCHECKED void arrive(void *fake) {
    Runner &r = *runner;
    const void *stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake, &stack, &bytes);
    if (r.left == &r.caller) {
        r.caller.stack = stack;
        r.caller.bytes = bytes;
    }
}

UNCHECKED void go_to(Fiber *to) {
    Runner &r = *runner;
    Fiber *from = r.running;
    r.left = from;
    r.running = to;
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->bytes);
    host_switch(&from->context, to->context);
    arrive(from->fake);
}

void work();

Fiber *idle_fiber() {
    Runner &r = *runner;
    if (r.idle.empty()) {
        /* Tops of stacks at different places of the cache's sets. */
        size_t shift = r.fibers.size() % 61 * 64;
        auto fiber = std::make_unique<Fiber>();
        fiber->memory.reset(new char[stack_bytes]);
        fiber->stack = fiber->memory.get();
        fiber->bytes = stack_bytes;
        /* as if work() had been called with the stack aligned: six registers, its address, a return
         */
        uintptr_t top = ((uintptr_t)(fiber->memory.get() + stack_bytes) - shift) / 16 * 16;
        void **frame = (void **)top - 8;
        std::fill(frame, frame + 8, nullptr);
        frame[6] = (void *)work;
        fiber->context = frame;
        r.idle.push_back(fiber.get());
        r.fibers.push_back(std::move(fiber));
    }
    Fiber *fiber = r.idle.back();
    r.idle.pop_back();
    return fiber;
}

/* Goes on in a warp: with the next ready lane in their order, once all that have not returned stand
 * at the warp's barrier with all of them. False: none can. */
UNCHECKED bool choose_lane(size_t index, size_t after) {
    Warp &w = runner->warps[index];
    if (w.ready == 0 && w.at_block == 0) {
        w.ready = w.at_warp;
        w.at_warp = 0;
    }
    if (w.ready == 0)
        return false;
    uint32_t later = after + 1 < warp ? w.ready & ~0u << (after + 1) : 0;
    runner->current = index * warp + (size_t)std::countr_zero(later ? later : w.ready);
    return true;
}

/* Chooses the thread that goes on; false when all have returned. */
UNCHECKED bool choose() {
    Runner &r = *runner;
    if (choose_lane(r.current / warp, r.current % warp))
        return true;
    size_t count = (r.threads + warp - 1) / warp;
    for (size_t w = 0; w < count; w++)
        if (choose_lane(w, warp))
            return true;
    bool any = false;
    for (size_t w = 0; w < count; w++) {
        if (r.warps[w].at_warp) {
            fprintf(stderr, "%s: threads wait at different barriers\n", r.name);
            abort();
        }
        any = any || r.warps[w].at_block;
        r.warps[w].ready = r.warps[w].at_block;
        r.warps[w].at_block = 0;
    }
    return any && choose();
}

/* Leaves a thread that waits; returns when it goes on. */
UNCHECKED void leave(uint32_t Warp::*barrier) {
    Runner &r = *runner;
    size_t i = r.current;
    Warp &w = r.warps[i / warp];
    w.ready &= ~(1u << i % warp);
    w.*barrier |= 1u << i % warp;
    choose(); /* this one has not returned: there is one */
    if (r.current == i)
        return;
    Fiber *fiber = r.thread[r.current].fiber;
    go_to(fiber ? fiber : idle_fiber());
    threadIdx = r.thread[i].index;
}

/* A fiber's life: the current thread and all after it that have not begun, until one is to go on
 * that waits on another fiber. */
void work() {
    arrive(nullptr);
    for (;;) {
        Runner &r = *runner;
        Thread &t = r.thread[r.current];
        t.fiber = r.running;
        threadIdx = t.index;
        (*r.kernel)();
        r.warps[r.current / warp].ready &= ~(1u << r.current % warp);
        bool more = choose();
        if (more && !r.thread[r.current].fiber)
            continue;
        r.idle.push_back(r.running);
        go_to(more ? r.thread[r.current].fiber : &r.caller);
    }
}

void run_block() {
    Runner &r = *runner;
    unsigned n = 0;
    for (unsigned z = 0; z < blockDim.z; z++)
        for (unsigned y = 0; y < blockDim.y; y++)
            for (unsigned x = 0; x < blockDim.x; x++, n++) {
                r.thread[n].index = dim3(x, y, z);
                r.thread[n].fiber = nullptr;
                r.thread[n].shuffles = 0;
            }
    for (size_t i = 0; i < r.threads; i += warp)
        r.warps[i / warp] = {r.threads - i < warp ? (1u << (r.threads - i)) - 1 : ~0u, 0, 0};
    r.current = 0;
    go_to(idle_fiber());
}

/* FILE:KERNEL of those that ran, for the list of those that did not: appended to a file. */
void note(const char *name) {
    static const char *path = getenv("CUDA_HOST_KERNELS");
    static std::mutex lock;
    static std::set<std::string> seen;
    if (!path)
        return;
    std::lock_guard<std::mutex> guard(lock);
    if (!seen.insert(name).second)
        return;
    if (FILE *file = fopen(path, "a")) {
        fprintf(file, "%s\n", name);
        fclose(file);
    }
}

void refuse(const char *name, const char *what) {
    fprintf(stderr, "%s: no GPU takes %s\n", name, what);
    abort();
}

void run(const char *name, dim3 grid, dim3 block, size_t shared,
         const std::function<void()> &kernel) {
    if (!runner) {
        owner = std::make_unique<Runner>();
        runner = owner.get();
    }
    note(name);
    Runner &r = *runner;
    r.threads = (size_t)block.x * block.y * block.z;
    r.name = name;
    r.kernel = &kernel;
    r.shared = shared ? aligned_alloc(16, (shared + 15) / 16 * 16) : nullptr;
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                if (shared) /* what the last block left must not be read */
                    memset(r.shared, 0xff, shared);
                run_block();
            }
    free(r.shared);
}

} // namespace

UNCHECKED void host_wait_block(void) {
    leave(&Warp::at_block);
}

UNCHECKED void host_wait_warp(void) {
    leave(&Warp::at_warp);
}

UNCHECKED unsigned host_lane(void) {
    return (unsigned)(runner->current % warp);
}

/* A lane's value stays until its second shuffle after this one, which no lane reaches before all
 * have taken this one's: one barrier is enough. */
UNCHECKED uint64_t host_shuffle_bits(uint64_t value, unsigned lane) {
    Runner &r = *runner;
    size_t self = r.current, other = self / warp * warp + lane;
    unsigned shuffle = ++r.thread[self].shuffles;
    r.thread[self].given[shuffle % 2] = value;
    leave(&Warp::at_warp);
    if (other >= r.threads || r.thread[other].shuffles - shuffle > 1) {
        fprintf(stderr, "%s: a shuffle reads lane %u, which does not take part\n", r.name, lane);
        abort();
    }
    return r.thread[other].given[shuffle % 2];
}

void *host_shared(void) {
    return runner->shared;
}

cudaError_t host_launch(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                        std::function<void()> kernel) {
    size_t threads = (size_t)block.x * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return cudaSuccess;
    if (threads == 0 || threads > most_threads || block.z > 64)
        refuse(name, "that block");
    if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX)
        refuse(name, "that grid");
    if (shared > 48 << 10)
        refuse(name, "that much shared memory unasked");
    if (stream && stream->device != host_device())
        return host_error(cudaErrorInvalidResourceHandle);
    return host_enqueue(
        stream, [=, kernel = std::move(kernel)] { run(name, grid, block, shared, kernel); });
}
