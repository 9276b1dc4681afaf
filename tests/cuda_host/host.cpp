/* Runs kernels on the CPU: see cuda_runtime.h. */
#include "cuda_runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
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

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

const size_t stack_bytes = 64 << 10, widest = 16, warp = 32;

enum class State { ready, at_block, at_warp, done };

struct Fiber {
    void *context = nullptr;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    void *fake = nullptr; /* AddressSanitizer's own stack of this fiber */
    State state = State::done;
    dim3 index;
    unsigned char given[widest];
};

/* One host thread's launches; fibers are kept from launch to launch. */
struct Runner {
    std::vector<std::unique_ptr<Fiber>> fibers;
    size_t current = 0, threads = 0;
    void *scheduler = nullptr;
    void *fake = nullptr;
    const void *stack = nullptr;
    size_t stack_size = 0;
    const std::function<void()> *kernel = nullptr;
    void *shared = nullptr;
};

thread_local Runner runner;

Fiber &self() {
    return *runner.fibers[runner.current];
}

void leave(State state, bool last) {
    Fiber &fiber = self();
    fiber.state = state;
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake, runner.stack, runner.stack_size);
    host_switch(&fiber.context, runner.scheduler);
    __sanitizer_finish_switch_fiber(fiber.fake, &runner.stack, &runner.stack_size);
    threadIdx = fiber.index;
}

void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &runner.stack, &runner.stack_size);
    threadIdx = self().index;
    (*runner.kernel)();
    leave(State::done, true);
}

void resume(size_t i) {
    Fiber &fiber = *runner.fibers[i];
    runner.current = i;
    __sanitizer_start_switch_fiber(&runner.fake, fiber.stack.get(), stack_bytes);
    host_switch(&runner.scheduler, fiber.context);
    __sanitizer_finish_switch_fiber(runner.fake, nullptr, nullptr);
}

/* Threads [from, to) are released once all that have not returned stand at the barrier. */
bool release(size_t from, size_t to, State barrier) {
    bool any = false;
    for (size_t i = from; i < to; i++) {
        State state = runner.fibers[i]->state;
        if (state != barrier && state != State::done)
            return false;
        any = any || state == barrier;
    }
    for (size_t i = from; any && i < to; i++)
        if (runner.fibers[i]->state == barrier)
            runner.fibers[i]->state = State::ready;
    return any;
}

/* False when no thread can go on though some have not returned: a barrier that not all reach. */
bool advance() {
    bool moved = false;
    for (size_t w = 0; w < runner.threads; w += warp) {
        size_t end = w + warp < runner.threads ? w + warp : runner.threads;
        do {
            for (size_t i = w; i < end; i++)
                if (runner.fibers[i]->state == State::ready) {
                    resume(i);
                    moved = true;
                }
        } while (release(w, end, State::at_warp));
    }
    return release(0, runner.threads, State::at_block) || moved;
}

bool finished() {
    for (size_t i = 0; i < runner.threads; i++)
        if (runner.fibers[i]->state != State::done)
            return false;
    return true;
}

void prepare(Fiber &fiber) {
    fiber.state = State::ready;
    /* as if enter() had been called with the stack aligned: six registers, its address, a return */
    uintptr_t top = (uintptr_t)(fiber.stack.get() + stack_bytes) / 16 * 16;
    void **frame = (void **)top - 8;
    std::fill(frame, frame + 8, nullptr);
    frame[6] = (void *)enter;
    fiber.context = frame;
}

void run_block(const char *name) {
    for (size_t i = 0; i < runner.threads; i++) {
        unsigned n = (unsigned)i;
        runner.fibers[i]->index =
            dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y));
        prepare(*runner.fibers[i]);
    }
    while (!finished())
        if (!advance()) {
            fprintf(stderr, "%s: threads wait at different barriers\n", name);
            abort();
        }
}

/* Names of kernels that ran, for the list of those that did not: appended to a file. */
void note(const char *name) {
    static thread_local std::map<std::string, bool> seen;
    const char *path = getenv("CUDA_HOST_KERNELS");
    if (!path || seen[name])
        return;
    seen[name] = true;
    if (FILE *file = fopen(path, "a")) {
        fprintf(file, "%s\n", name);
        fclose(file);
    }
}

} // namespace

void host_wait_block(void) {
    leave(State::at_block, false);
}

void host_wait_warp(void) {
    leave(State::at_warp, false);
}

unsigned host_lane(void) {
    return (unsigned)(runner.current % warp);
}

void host_give(const void *value, size_t bytes) {
    if (bytes > widest)
        abort();
    memcpy(self().given, value, bytes);
}

void host_take(unsigned lane, void *value, size_t bytes) {
    size_t i = runner.current / warp * warp + lane;
    if (i >= runner.threads) {
        fprintf(stderr, "a shuffle reads lane %u of a warp that is not full\n", lane);
        abort();
    }
    memcpy(value, runner.fibers[i]->given, bytes);
}

void *host_shared(void) {
    return runner.shared;
}

void host_launch(const char *name, dim3 grid, dim3 block, size_t shared,
                 const std::function<void()> &kernel) {
    note(name);
    runner.threads = (size_t)block.x * block.y * block.z;
    if (runner.threads == 0 || runner.threads > 1024 || shared > (227 << 10)) {
        fprintf(stderr, "%s: no GPU takes %zu threads and %zu bytes\n", name, runner.threads,
                shared);
        abort();
    }
    while (runner.fibers.size() < runner.threads)
        runner.fibers.emplace_back(new Fiber);
    runner.kernel = &kernel;
    runner.shared = shared ? aligned_alloc(16, (shared + 15) / 16 * 16) : nullptr;
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                if (shared) /* what the last block left must not be read */
                    memset(runner.shared, 0xff, shared);
                run_block(name);
            }
    free(runner.shared);
}
