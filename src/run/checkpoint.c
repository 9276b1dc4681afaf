#include "run/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/memory.h"
#include "run/files.h"

enum { STATE_NAME = FV_PARAM_NAME + 8 };

struct FvCheckpointer {
    char folder[FV_PATH];
    char *study;
    const FvFence *fence; /* of the folder's owner, or NULL */
    FvParams *params;
    FvBackend *be;
    real *state;       /* host copy of one block element after the other, in tensor order */
    FvTensor *tensors; /* weights, then moments of what is trained, then the caller's */
    char (*names)[STATE_NAME];
    uint64_t previous;           /* step of the checkpoint loaded or saved last; 0: none */
    size_t weights, count, more; /* tensors: weights only, with moments; the caller's at most */
};

size_t fv_checkpointer_bytes(size_t parameters, size_t trained) {
    return fv_mul(fv_add(parameters, fv_mul(2, trained)), sizeof(real));
}

static const char *const prefix[] = {
    [FV_BLOCK_W] = "", [FV_BLOCK_M] = "adam.m.", [FV_BLOCK_V] = "adam.v."};

static void list_tensors(FvCheckpointer *c, FvBlock block, real **next) {
    for (size_t i = 0; i < c->params->count; i++) {
        const FvParam *p = &c->params->list[i];
        if (block != FV_BLOCK_W && p->role != FV_TRAINED)
            continue;
        FvTensor *t = &c->tensors[c->count];
        snprintf(c->names[c->count], STATE_NAME, "%s%s", prefix[block], p->name);
        *t = (FvTensor){.name = c->names[c->count],
                        .type = sizeof(real) == sizeof(float) ? FV_F32 : FV_F64,
                        .rank = p->rank,
                        .data = *next,
                        .count = p->count};
        memcpy(t->shape, p->shape, sizeof p->shape);
        *next += p->count;
        c->count++;
    }
}

FvStatus fv_checkpointer_create(const char *folder, const char *study, const FvFence *fence,
                                FvParams *params, FvBackend *be, size_t more, FvCheckpointer **out,
                                FvError *err) {
    FvCheckpointer *c = calloc(1, sizeof *c);
    if (!c)
        return FV_FAIL(err, FV_DEVICE, "out of memory for checkpoints of %s", folder);
    size_t most = 3 * params->count + more;
    c->fence = fence;
    c->params = params;
    c->be = be;
    c->more = more;
    c->study = strdup(study);
    c->state = malloc(fv_checkpointer_bytes(params->total, params->trained));
    c->tensors = calloc(most, sizeof *c->tensors);
    c->names = calloc(most, sizeof *c->names);
    if (!c->study || !c->state || !c->tensors || !c->names) {
        fv_checkpointer_destroy(c);
        return FV_FAIL(err, FV_DEVICE, "out of memory for checkpoints of %s", folder);
    }
    snprintf(c->folder, sizeof c->folder, "%s", folder);
    real *next = c->state;
    list_tensors(c, FV_BLOCK_W, &next);
    c->weights = c->count;
    list_tensors(c, FV_BLOCK_M, &next);
    list_tensors(c, FV_BLOCK_V, &next);
    *out = c;
    return FV_OK;
}

void fv_checkpointer_destroy(FvCheckpointer *c) {
    if (!c)
        return;
    free(c->study);
    free(c->state);
    free(c->tensors);
    free(c->names);
    free(c);
}

/* Model to host copy, or back. */
static FvStatus exchange(FvCheckpointer *c, FvBlock block, size_t *tensor, bool to_host,
                         FvError *err) {
    for (size_t i = 0; i < c->params->count; i++) {
        const FvParam *p = &c->params->list[i];
        if (block != FV_BLOCK_W && p->role != FV_TRAINED)
            continue;
        real *host = c->state + ((const real *)c->tensors[*tensor].data - c->state);
        if (to_host)
            FV_TRY(fv_params_get(c->params, c->be, p, block, host, err));
        else
            FV_TRY(fv_params_set(c->params, c->be, p, block, host, err));
        ++*tensor;
    }
    return FV_OK;
}

static FvStatus exchange_all(FvCheckpointer *c, bool to_host, FvError *err) {
    size_t tensor = 0;
    FV_TRY(exchange(c, FV_BLOCK_W, &tensor, to_host, err));
    FV_TRY(exchange(c, FV_BLOCK_M, &tensor, to_host, err));
    FV_TRY(exchange(c, FV_BLOCK_V, &tensor, to_host, err));
    return c->be->ops->sync(c->be, err);
}

/* Zero-padded steps, so that the names' order is the steps' order. */
static void checkpoint_path(const FvCheckpointer *c, uint64_t step, char out[FV_PATH]) {
    snprintf(out, FV_PATH, "%.*s/checkpoint-%010" PRIu64 ".safetensors", FV_PATH - 64, c->folder,
             step);
}

static bool step_of(const char *file, uint64_t *step) {
    int end = 0;
    return sscanf(file, "checkpoint-%" SCNu64 ".safetensors%n", step, &end) == 1 && end > 0 &&
           file[end] == '\0';
}

static int is_checkpoint(const struct dirent *entry) {
    uint64_t step;
    return step_of(entry->d_name, &step);
}

static void free_names(struct dirent **names, int count) {
    for (int i = 0; i < count; i++)
        free(names[i]);
    free(names);
}

/* All but this one and the one before it: what is older, and what was found damaged. */
static FvStatus remove_others(const FvCheckpointer *c, uint64_t newest, FvError *err) {
    struct dirent **names = NULL;
    int count = scandir(c->folder, &names, is_checkpoint, alphasort);
    if (count < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be listed: %s", c->folder, strerror(errno));
    for (int i = 0; i < count; i++) {
        char path[FV_PATH];
        uint64_t step = 0;
        if (step_of(names[i]->d_name, &step) && step != newest && step != c->previous) {
            checkpoint_path(c, step, path);
            unlink(path); /* one too many does no harm */
        }
    }
    free_names(names, count);
    return FV_OK;
}

FvStatus fv_checkpoint_save(FvCheckpointer *c, const FvTensor *more, size_t more_count,
                            uint64_t step, size_t *bytes, FvError *err) {
    char path[FV_PATH], text[32];
    FV_TRY(exchange_all(c, true, err));
    FV_TRY(fv_make_folder(c->folder, err));
    size_t count = c->count + (more_count < c->more ? more_count : c->more);
    memcpy(c->tensors + c->count, more, (count - c->count) * sizeof *more);
    snprintf(text, sizeof text, "%" PRIu64, step);
    FvMeta meta[] = {{"format", "fovea-checkpoint-1"}, {"step", text}, {"study", c->study}};
    checkpoint_path(c, step, path);
    FV_TRY(fv_tensors_replace(path, c->tensors, count, meta, sizeof meta / sizeof *meta, c->fence,
                              err));
    *bytes = 0;
    for (size_t i = 0; i < count; i++)
        *bytes += fv_tensor_bytes(&c->tensors[i]);
    FV_TRY(remove_others(c, step, err));
    c->previous = step;
    return FV_OK;
}

FvStatus fv_checkpoint_save_model(FvCheckpointer *c, FvError *err) {
    char path[FV_PATH];
    FV_TRY(exchange_all(c, true, err));
    snprintf(path, sizeof path, "%.*s/model.safetensors", FV_PATH - 64, c->folder);
    FvMeta meta[] = {{"format", "pt"}, {"study", c->study}};
    return fv_tensors_replace(path, c->tensors, c->weights, meta, 2, c->fence, err);
}

static bool same_shape(const FvTensor *a, const FvTensor *b) {
    return a->rank == b->rank && memcmp(a->shape, b->shape, a->rank * sizeof *a->shape) == 0;
}

static FvStatus read_state(FvCheckpointer *c, const FvTensorFile *file, const char *path,
                           FvError *err) {
    const char *study = fv_tensors_metadata(file, "study");
    FV_TRY(fv_tensors_verify(file, err));
    if (!study || strcmp(study, c->study) != 0)
        return FV_FAIL(err, FV_DATA, "%s: is of another configuration", path);
    for (size_t i = 0; i < c->count; i++) {
        const FvTensor *t = fv_tensors_find(file, c->tensors[i].name);
        if (!t || !same_shape(t, &c->tensors[i]))
            return FV_FAIL(err, FV_DATA, "%s: %s is missing or has another shape", path,
                           c->tensors[i].name);
        FV_TRY(fv_tensors_readable(file, t, err));
        fv_tensor_read_real(t, 0, t->count,
                            c->state + ((const real *)c->tensors[i].data - c->state));
    }
    return FV_OK;
}

static FvStatus load_one(FvCheckpointer *c, const char *path, uint64_t step,
                         FvCheckpointReader *read, void *context, FvError *err) {
    FvTensorFile *file;
    FV_TRY(fv_tensors_open(path, &file, err));
    FvStatus status = read_state(c, file, path, err);
    if (status == FV_OK)
        status = read(context, file, step, err);
    if (status == FV_OK)
        status = exchange_all(c, false, err);
    fv_tensors_close(file);
    return status;
}

FvStatus fv_checkpoint_load(FvCheckpointer *c, FvCheckpointReader *read, void *context,
                            uint64_t *step, char *note, size_t note_size, FvError *err) {
    struct dirent **names = NULL;
    *step = 0;
    snprintf(note, note_size, "%s", "");
    int count = scandir(c->folder, &names, is_checkpoint, alphasort);
    if (count < 0 && errno == ENOENT)
        return FV_OK;
    if (count < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be listed: %s", c->folder, strerror(errno));
    FvStatus status = FV_OK;
    FvError why = {0};
    for (int i = count; i-- > 0 && *step == 0;) {
        char path[FV_PATH];
        uint64_t found = 0;
        if (!step_of(names[i]->d_name, &found))
            continue;
        checkpoint_path(c, found, path);
        status = load_one(c, path, found, read, context, &why);
        if (status == FV_OK)
            *step = c->previous = found;
        else if (status != FV_DATA)
            break;
        else if (!note[0])
            snprintf(note, note_size, "passed over: %.*s", (int)note_size - 16, why.text);
    }
    free_names(names, count);
    if (status != FV_OK && status != FV_DATA)
        return FV_FAIL(err, status, "%s", why.text);
    return FV_OK;
}
