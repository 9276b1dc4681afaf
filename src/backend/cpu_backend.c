/* The CPU backend: creation, memory, and the table of operations. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/cpu.h"

/* --- workspace ------------------------------------------------------------------------------- */

bool fv_cpu_grow(FvCpu *cpu, FvScratch *scratch, size_t bytes) {
    if (bytes <= scratch->bytes)
        return true;
    free(scratch->data);
    *scratch = (FvScratch){0};
    size_t padded = fv_add(bytes, FV_ALIGN - 1) / FV_ALIGN * FV_ALIGN;
    void *data = padded <= PTRDIFF_MAX - FV_ALIGN ? aligned_alloc(FV_ALIGN, padded) : NULL;
    if (!data) {
        if (cpu->refused == 0)
            cpu->refused = bytes;
        return false;
    }
    *scratch = (FvScratch){data, padded};
    return true;
}

bool fv_cpu_workspace(FvCpu *cpu, size_t own_bytes, size_t shared_bytes) {
    for (size_t t = 0; t < fv_pool_threads(cpu->pool); t++)
        if (!fv_cpu_grow(cpu, &cpu->own[t], own_bytes))
            return false;
    return fv_cpu_grow(cpu, &cpu->shared, shared_bytes);
}

size_t fv_cpu_workspace_bytes(const FvBackend *backend) {
    const FvCpu *cpu = (const FvCpu *)backend;
    size_t bytes = cpu->shared.bytes + cpu->rope.table.bytes;
    for (size_t t = 0; t < fv_pool_threads(cpu->pool); t++)
        bytes += cpu->own[t].bytes;
    return bytes;
}

void fv_cpu_run(FvCpu *cpu, size_t tiles, double cost, FvTile *run, void *arg) {
    const double worth_sharing = 6000;
    if (cost >= worth_sharing) {
        fv_pool_run(cpu->pool, tiles, run, arg);
        return;
    }
    for (size_t tile = 0; tile < tiles; tile++)
        run(arg, tile, 0);
}

/* --- memory ---------------------------------------------------------------------------------- */

/* Large blocks ask for large pages: a step streams through all of its activations, and with small
 * pages the address translations do not fit the processor's tables. */
static FvStatus cpu_alloc(FvBackend *backend, size_t bytes, void **out, FvError *err) {
    (void)backend;
    const size_t huge = (size_t)2 << 20, align = bytes >= 2 * huge ? huge : FV_ALIGN;
    size_t padded = fv_add(bytes, align) / align * align;
    *out = padded <= PTRDIFF_MAX - align ? aligned_alloc(align, padded) : NULL;
    if (!*out)
        return FV_FAIL(err, FV_DEVICE,
                       "no memory for %zu bytes; use a smaller batch, scale or --jobs-per-rank",
                       bytes);
    if (align == huge)
        madvise(*out, padded, MADV_HUGEPAGE); /* a wish: without it all works, slower */
    memset(*out, 0, padded);
    return FV_OK;
}

/* Operand tensors and weights are floats like all others. */
static FvStatus cpu_alloc_real(FvBackend *backend, size_t count, void **out, FvError *err) {
    return cpu_alloc(backend, fv_mul(count, sizeof(real)), out, err);
}

static void cpu_weights_changed(FvBackend *backend, size_t count, const real *w) {
    (void)backend, (void)count, (void)w;
}

static void cpu_release(FvBackend *backend, void *p) {
    (void)backend;
    free(p);
}

static void cpu_transfer(FvBackend *backend, void *dst, const void *src, size_t bytes) {
    (void)backend;
    if (bytes > 0)
        memcpy(dst, src, bytes);
}

static void cpu_zero(FvBackend *backend, void *dst, size_t bytes) {
    (void)backend;
    if (bytes > 0)
        memset(dst, 0, bytes);
}

/* Operations have run when they return: every mark is reached when it is set. */
static void cpu_mark(FvBackend *backend, size_t mark) {
    (void)backend, (void)mark;
}

static bool cpu_reached(FvBackend *backend, size_t mark) {
    (void)backend, (void)mark;
    return true;
}

/* Reports a refused workspace once: the next job on this backend may be smaller. */
static FvStatus cpu_sync(FvBackend *backend, FvError *err) {
    FvCpu *cpu = fv_cpu(backend);
    size_t refused = cpu->refused;
    cpu->refused = 0;
    if (refused > 0)
        return FV_FAIL(err, FV_DEVICE,
                       "no memory for %zu bytes of workspace; use a smaller batch or scale, or "
                       "fewer --jobs-per-rank",
                       refused);
    return FV_OK;
}

static FvStatus cpu_wait(FvBackend *backend, size_t mark, FvError *err) {
    (void)mark;
    return cpu_sync(backend, err);
}

/* --- creation -------------------------------------------------------------------------------- */

static void cpu_destroy(FvBackend *backend) {
    FvCpu *cpu = fv_cpu(backend);
    for (size_t t = 0; t < fv_pool_threads(cpu->pool); t++)
        free(cpu->own[t].data);
    fv_pool_destroy(cpu->pool);
    free(cpu->own);
    free(cpu->shared.data);
    free(cpu->rope.table.data);
    free(cpu);
}

static const FvOps cpu_ops = {
    .destroy = cpu_destroy,
    .alloc = cpu_alloc,
    .alloc_operands = cpu_alloc_real,
    .alloc_weights = cpu_alloc_real,
    .weights_changed = cpu_weights_changed,
    .release = cpu_release,
    .memory_left = fv_cpu_memory_left,
    .upload = cpu_transfer,
    .download = cpu_transfer,
    .zero = cpu_zero,
    .sync = cpu_sync,
    .host_alloc = cpu_alloc,
    .host_release = cpu_release,
    .download_later = cpu_transfer,
    .mark = cpu_mark,
    .reached = cpu_reached,
    .wait = cpu_wait,
    .copy = fv_cpu_copy,
    .copy_operands = fv_cpu_copy,
    .add = fv_cpu_add,
    .copy_rows = fv_cpu_copy_rows,
    .residual = fv_cpu_residual,
    .residual_back = fv_cpu_residual_back,
    .linear = fv_cpu_linear,
    .linear_back = fv_cpu_linear_back,
    .head_linear = fv_cpu_head_linear,
    .head_linear_back = fv_cpu_head_linear_back,
    .gelu = fv_cpu_gelu,
    .gelu_back = fv_cpu_gelu_back,
    .relu = fv_cpu_relu,
    .relu_back = fv_cpu_relu_back,
    .swiglu = fv_cpu_swiglu,
    .swiglu_back = fv_cpu_swiglu_back,
    .layernorm = fv_cpu_layernorm,
    .layernorm_back = fv_cpu_layernorm_back,
    .rmsnorm = fv_cpu_rmsnorm,
    .rmsnorm_back = fv_cpu_rmsnorm_back,
    .rescale = fv_cpu_rescale,
    .rescale_back = fv_cpu_rescale_back,
    .attention = fv_cpu_attention,
    .attention_back = fv_cpu_attention_back,
    .query = fv_cpu_query,
    .query_back = fv_cpu_query_back,
    .rope = fv_cpu_rope,
    .patchify = fv_cpu_patchify,
    .tokens = fv_cpu_tokens,
    .tokens_back = fv_cpu_tokens_back,
    .conv = fv_cpu_conv,
    .conv_back = fv_cpu_conv_back,
    .film = fv_cpu_film,
    .film_back = fv_cpu_film_back,
    .mse = fv_cpu_mse,
    .mse_back = fv_cpu_mse_back,
    .cosine = fv_cpu_cosine,
    .cosine_back = fv_cpu_cosine_back,
    .entropy = fv_cpu_entropy,
    .entropy_back = fv_cpu_entropy_back,
    .entropy_hinge = fv_cpu_entropy_hinge,
    .normalize = fv_cpu_normalize,
    .normalize_back = fv_cpu_normalize_back,
    .softmax = fv_cpu_softmax,
    .cross_entropy = fv_cpu_cross_entropy,
    .cross_entropy_back = fv_cpu_cross_entropy_back,
    .approach = fv_cpu_approach,
    .norm = fv_cpu_norm,
    .adamw = fv_cpu_adamw,
    .first_nonfinite = fv_cpu_first_nonfinite,
};

/* The first "model name" of /proc/cpuinfo, or "CPU" where there is none. */
static void processor_name(char *name, size_t bytes) {
    snprintf(name, bytes, "CPU");
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (!file)
        return;
    char line[256];
    while (fgets(line, sizeof line, file)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon) {
            const char *value = colon + 1 + strspn(colon + 1, " \t");
            snprintf(name, bytes, "%.*s", (int)strcspn(value, "\n"), value);
            break;
        }
    }
    fclose(file);
}

static void fill_pixel_table(FvCpu *cpu) {
    static const double mean[3] = {0.485, 0.456, 0.406}, deviation[3] = {0.229, 0.224, 0.225};
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++)
            cpu->pixel[c][v] = (real)((v / 255.0 - mean[c]) / deviation[c]);
}

FvStatus fv_cpu_backend_create(size_t threads, FvBackend **out, FvError *err) {
    *out = NULL;
    FvCpu *cpu = calloc(1, sizeof *cpu);
    FvScratch *own = calloc(threads ? threads : 1, sizeof *own);
    if (!cpu || !own) {
        free(cpu);
        free(own);
        return FV_FAIL(err, FV_DEVICE, "no memory for a CPU backend of %zu threads", threads);
    }
    FvStatus status = fv_pool_create(threads, &cpu->pool, err);
    if (status != FV_OK) {
        free(own);
        free(cpu);
        return status;
    }
    openblas_set_num_threads(1); /* threads are ours, above BLAS */
    cpu->base.ops = &cpu_ops;
    cpu->base.name = "cpu";
    cpu->base.on_host = true;
    cpu->base.operand_bytes = sizeof(real);
    cpu->own = own;
    fill_pixel_table(cpu);
    char name[64];
    processor_name(name, sizeof name);
    snprintf(cpu->base.description, sizeof cpu->base.description, "%s, %zu thread%s", name, threads,
             threads == 1 ? "" : "s");
    *out = &cpu->base;
    return FV_OK;
}
