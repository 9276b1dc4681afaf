#include "run/pretrain.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/memory.h"
#include "base/rng.h"
#include "model/distill.h"
#include "run/bar.h"
#include "run/checkpoint.h"
#include "run/crops.h"
#include "run/data.h"
#include "run/data_file.h"
#include "run/fence.h"
#include "run/files.h"
#include "run/outdir.h"
#include "run/pretrain_config.h"
#include "run/processor.h"
#include "run/weights.h"

/* Measures of every step. */
#define COLUMNS(X)                                                                                 \
    X(loss)                                                                                        \
    X(patch_loss)                                                                                  \
    X(teacher_entropy)                                                                             \
    X(patch_entropy)                                                                               \
    X(grad_norm)                                                                                   \
    X(lr)                                                                                          \
    X(weight_decay)                                                                                \
    X(momentum)                                                                                    \
    X(teacher_temperature)

enum {
#define X(name) COLUMN_##name,
    COLUMNS(X)
#undef X
        COLUMN_COUNT
};

static const char *const column_names[COLUMN_COUNT] = {
#define X(name) #name,
    COLUMNS(X)
#undef X
};

typedef struct Pretrain {
    const FvInvocation *in;
    FvPretrainConfig c;
    const char *source, *out;
    int lock; /* rank 0: of OUT */
    FvFence fence;
    FvGroup group;
    FvData *data;
    char *settings;            /* everything that decides the result, as text */
    size_t frames, frame_size; /* of the clips: T, and pixels per side */
    FvBackend *be;
    FvDistill *model;
    FvCheckpointer *checkpointer;
    FvOrder order;
    uint32_t *clips; /* [batch] */
    FvBatch clip;    /* one clip */
    uint8_t *globals, *locals;
    size_t patches, hidden;       /* of a large crop; those that the student does not see */
    int32_t *masked;              /* [2, images, hidden] */
    uint32_t *order_of_patches;   /* [patches] */
    double *column[COLUMN_COUNT]; /* [steps] */
    uint64_t step, first_step;    /* steps done, at the start of this process */
    double started, last_checkpoint;
    FvBar bar;
    uint64_t checkpoint_step;
} Pretrain;

static bool is_root(const Pretrain *p) {
    return p->group.rank == 0;
}

static size_t share(const Pretrain *p) {
    return p->c.batch / p->group.size;
}

static FvStatus open_data(Pretrain *p, FvError *err) {
    const FvPretrainConfig *c = &p->c;
    FvConfig d = *fv_config_defaults();
    snprintf(d.data, sizeof d.data, "%s", p->source);
    snprintf(d.latents, sizeof d.latents, "blocks");
    d.batch = c->batch;
    d.clips_train = c->clips;
    d.clips_held_out = 1;
    d.data_seed = c->data_seed;
    d.frames = c->frames;
    d.image_size = c->image_size;
    if (strlen(p->source) >= sizeof d.data)
        return FV_FAIL(err, FV_USAGE, "%.100s...: path is too long", p->source);
    if (strcmp(d.data, "procedural") != 0) {
        FvClipFile file;
        FV_TRY(fv_clipfile_open_frames(d.data, &file, err));
        d.frames = file.frames;
        d.image_size = file.size;
        fv_clipfile_close(&file);
    }
    FV_TRY(fv_data_open_pixels(&d, &p->data, err));
    const FvDataInfo *info = fv_data_info(p->data);
    p->frames = info->frames;
    p->frame_size = info->size;
    FV_TRY(fv_order_create(c->seed, info->count[FV_TRAIN], c->batch, &p->order, err));
    p->settings = fv_pretrain_describe(c, info->sha256);
    if (!p->settings)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    return fv_batch_create(1, info, 1, &p->clip, err);
}

/* --- OUT ------------------------------------------------------------------------------------ */

/* What pretraining writes into OUT, by how the names begin. */
static const char *const ours[] = {"checkpoint-", "model.safetensors", "config.json", "pretrain.",
                                   NULL};

static FvStatus open_out(Pretrain *p, FvError *err) {
    char path[FV_PATH];
    if (!is_root(p))
        return FV_OK;
    FV_TRY(fv_make_folder(p->out, err));
    FV_TRY(fv_fence_take(p->out, &p->fence, &p->lock, err));
    bool begun = fv_outdir_has(p->out, "pretrain.yaml");
    if (fv_outdir_has(p->out, "study.yaml") ||
        (!begun &&
         (fv_outdir_has(p->out, "model.safetensors") || fv_outdir_has(p->out, "config.json"))))
        return FV_FAIL(err, FV_USAGE,
                       "%s: holds %s that pretrain has not made; choose another --out", p->out,
                       fv_outdir_has(p->out, "study.yaml") ? "a study" : "a model");
    FV_TRY(fv_path(err, path, sizeof path, "%s/pretrain.yaml", p->out));
    return p->in->options.fresh || !begun ? FV_OK : fv_pretrain_same(path, p->settings, err);
}

/* Once the settings are known to run: what was there goes when --fresh asks for it. */
static FvStatus keep_out(Pretrain *p, FvError *err) {
    char path[FV_PATH];
    if (!is_root(p))
        return FV_OK;
    if (p->in->options.fresh)
        FV_TRY(fv_outdir_clear(p->out, ours, err));
    FV_TRY(fv_remove_temporaries(p->out, err));
    FV_TRY(fv_path(err, path, sizeof path, "%s/pretrain.yaml", p->out));
    return fv_file_write(path, &(FvBytes){p->settings, strlen(p->settings)}, 1, err);
}

/* --- state ---------------------------------------------------------------------------------- */

static size_t columns_as_tensors(const Pretrain *p, FvTensor out[COLUMN_COUNT]) {
    for (size_t i = 0; i < COLUMN_COUNT; i++)
        out[i] = (FvTensor){.name = column_names[i],
                            .type = FV_F64,
                            .rank = 1,
                            .shape = {p->step},
                            .count = p->step,
                            .data = p->column[i]};
    return COLUMN_COUNT;
}

static FvStatus read_columns(void *context, const FvTensorFile *file, uint64_t step, FvError *err) {
    Pretrain *p = context;
    for (size_t i = 0; i < COLUMN_COUNT; i++) {
        const FvTensor *t = fv_tensors_find(file, column_names[i]);
        if (!t || t->count != step || step > p->c.steps)
            return FV_FAIL(err, FV_DATA, "%s: %s is missing or has another length",
                           fv_tensors_path(file), column_names[i]);
        FV_TRY(fv_tensors_readable(file, t, err));
        fv_tensor_read(t, 0, t->count, p->column[i]);
    }
    return FV_OK;
}

/* The table of all steps so far; the whole file each time, so that a kill leaves no half line. */
static FvStatus write_table(const Pretrain *p, FvError *err) {
    enum { CELL = 32 };
    size_t room = fv_mul3(p->step + 1, COLUMN_COUNT + 1, CELL), used = 0;
    char path[FV_PATH], *text = malloc(room);
    if (!text)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the table of %" PRIu64 " steps", p->step);
    used += (size_t)snprintf(text, room, "step");
    for (size_t i = 0; i < COLUMN_COUNT; i++)
        used += (size_t)snprintf(text + used, room - used, "\t%s", column_names[i]);
    for (uint64_t s = 0; s < p->step; s++) {
        used += (size_t)snprintf(text + used, room - used, "\n%" PRIu64, s + 1);
        for (size_t i = 0; i < COLUMN_COUNT; i++)
            used += (size_t)snprintf(text + used, room - used, "\t%.9g", p->column[i][s]);
    }
    used += (size_t)snprintf(text + used, room - used, "\n");
    FvStatus status = fv_path(err, path, sizeof path, "%s/pretrain.tsv", p->out);
    if (status == FV_OK)
        status = fv_file_replace(path, &(FvBytes){text, used}, 1, &p->fence, err);
    free(text);
    return status;
}

static FvStatus save(Pretrain *p, FvError *err) {
    p->last_checkpoint = fv_now();
    p->checkpoint_step = p->step;
    if (!is_root(p))
        return FV_OK;
    FvTensor columns[COLUMN_COUNT];
    size_t bytes, count = columns_as_tensors(p, columns);
    FV_TRY(fv_checkpoint_save(p->checkpointer, columns, count, p->step, &bytes, err));
    return write_table(p, err);
}

static FvStatus restore(Pretrain *p, FvError *err) {
    char note[512];
    FvParams *params = fv_distill_params(p->model);
    FV_TRY(fv_distill_init(p->model, p->c.seed, err));
    if (is_root(p)) {
        FV_TRY(
            fv_checkpoint_load(p->checkpointer, read_columns, p, &p->step, note, sizeof note, err));
        if (note[0])
            fprintf(stderr, "pretrain: %s\n", note);
        if (p->step > 0)
            fprintf(stderr, "pretrain: goes on after step %" PRIu64 "\n", p->step);
    }
    FV_TRY(fv_group_broadcast(&p->group, 0, &p->step, sizeof p->step, err));
    FV_TRY(fv_group_broadcast(&p->group, 0, params->w, params->memory * sizeof(real), err));
    p->be->ops->weights_changed(p->be, params->memory, params->w);
    FV_TRY(fv_group_broadcast(&p->group, 0, params->m, params->trained_memory * sizeof(real), err));
    return fv_group_broadcast(&p->group, 0, params->v, params->trained_memory * sizeof(real), err);
}

static FvStatus create(Pretrain *p, FvError *err) {
    const FvPretrainConfig *c = &p->c;
    size_t cores = fv_claim_cores(&p->in->world), threads = p->in->options.threads;
    FvDistillConfig config = {.patch_weight = c->patch_weight,
                              .images = share(p),
                              .size = c->crop_size,
                              .local_size = c->local_size,
                              .locals = c->locals,
                              .patch = c->patch,
                              .width = c->dino_width,
                              .heads = c->dino_heads,
                              .layers = c->dino_layers,
                              .mlp = c->dino_mlp,
                              .head_width = c->head_width,
                              .head_out = c->head_out,
                              .prototypes = c->prototypes};
    p->patches = fv_distill_patches(&config);
    p->hidden = config.masked = (size_t)lround(c->mask_share * (double)p->patches);
    FV_TRY(fv_cpu_backend_create(threads ? threads : cores, &p->be, err));
    FV_TRY(fv_distill_create(&config, p->be, &p->model, err));
    size_t globals = fv_mul4(FV_GLOBAL_CROPS * share(p), c->crop_size, c->crop_size, 3);
    size_t locals = fv_mul4(fv_mul(c->locals, share(p)), c->local_size, c->local_size, 3);
    p->clips = calloc(c->batch, sizeof *p->clips);
    p->globals = malloc(globals);
    p->locals = malloc(fv_add(locals, 1));
    p->masked = calloc(fv_add(fv_mul3(FV_GLOBAL_CROPS, share(p), p->hidden), 1), sizeof *p->masked);
    p->order_of_patches = calloc(p->patches + 1, sizeof *p->order_of_patches);
    bool ok = p->clips && p->globals && p->locals && p->masked && p->order_of_patches;
    for (size_t i = 0; i < COLUMN_COUNT; i++)
        ok = (p->column[i] = calloc(c->steps, sizeof(double))) && ok;
    if (!ok)
        return FV_FAIL(err, FV_DEVICE, "out of memory for pretraining");
    return fv_checkpointer_create(p->out, p->settings, &p->fence, fv_distill_params(p->model),
                                  p->be, COLUMN_COUNT, &p->checkpointer, err);
}

/* --- one step ------------------------------------------------------------------------------- */

/* From `start` to `end` over the steps, along half a cosine. */
static double cosine(const Pretrain *p, double start, double end) {
    const double pi = 3.141592653589793;
    return end + 0.5 * (start - end) * (1 + cos(pi * (double)p->step / (double)p->c.steps));
}

static double learning_rate(const Pretrain *p) {
    const FvPretrainConfig *c = &p->c;
    double warm = (double)(p->step + 1) / (double)(c->warmup_steps + 1);
    return p->step < c->warmup_steps ? c->lr * warm : cosine(p, c->lr, c->lr_end);
}

static double teacher_temperature(const Pretrain *p) {
    const FvPretrainConfig *c = &p->c;
    double part = p->step < c->teacher_warmup ? (double)p->step / (double)c->teacher_warmup : 1;
    return c->teacher_temperature_start +
           part * (c->teacher_temperature - c->teacher_temperature_start);
}

/* A random choice of patches of one large crop. */
static void hide_patches(Pretrain *p, uint64_t key, size_t crop) {
    fv_permutation(key, p->patches, p->order_of_patches);
    for (size_t i = 0; i < p->hidden; i++)
        p->masked[crop * p->hidden + i] = (int32_t)(crop * p->patches + p->order_of_patches[i]);
}

/* The crops of this rank's images; image i of step s draws from a stream of its own, whatever the
 * number of ranks. */
static FvStatus draw_crops(Pretrain *p, FvError *err) {
    const FvPretrainConfig *c = &p->c;
    size_t images = share(p), first = p->group.rank * images;
    size_t global = c->crop_size * c->crop_size * 3, local = c->local_size * c->local_size * 3;
    const FvCropRecipe large = {c->crop_area, 1, c->jitter, c->grey, c->blur};
    const FvCropRecipe small = {c->local_area, c->crop_area, c->jitter, c->grey, c->blur};
    uint64_t stream = fv_random(fv_stream(c->seed, "crops"), p->step);
    fv_order_step(&p->order, p->step, p->clips);
    for (size_t i = 0; i < images; i++) {
        uint64_t key = fv_random(stream, first + i);
        FV_TRY(fv_data_read(p->data, FV_TRAIN, p->clips[first + i], &p->clip, 0, err));
        size_t frame = (size_t)fv_random_below(key, 0, p->frames);
        const uint8_t *pixels = p->clip.pixels + frame * p->frame_size * p->frame_size * 3;
        for (size_t g = 0; g < FV_GLOBAL_CROPS; g++) {
            size_t crop = g * images + i;
            fv_crop(pixels, p->frame_size, &large, fv_random(key, 1 + g), c->crop_size,
                    p->globals + crop * global);
            hide_patches(p, fv_random(key, 101 + g), crop);
        }
        for (size_t l = 0; l < c->locals; l++)
            fv_crop(pixels, p->frame_size, &small, fv_random(key, 201 + l), c->local_size,
                    p->locals + (l * images + i) * local);
    }
    return fv_distill_load(p->model, p->globals, p->locals, p->masked, err);
}

static void record(Pretrain *p, const double *means, double norm, const FvAdamW *adamw,
                   double momentum) {
    const double values[COLUMN_COUNT] = {means[0],
                                         means[1],
                                         means[2],
                                         means[3],
                                         norm,
                                         adamw->lr,
                                         adamw->weight_decay,
                                         momentum,
                                         teacher_temperature(p)};
    for (size_t i = 0; i < COLUMN_COUNT; i++)
        p->column[i][p->step] = values[i];
}

/* One step of student and teacher. */
static FvStatus train_step(Pretrain *p, bool *stop, FvError *err) {
    const FvPretrainConfig *c = &p->c;
    FvDistill *m = p->model;
    FvParams *params = fv_distill_params(m);
    FvDistillMeasures measures;

    FV_TRY(draw_crops(p, err));
    fv_distill_forward(m, teacher_temperature(p), c->student_temperature);
    fv_distill_backward(m, p->step < c->still_steps);
    FV_TRY(fv_group_average(&p->group, 0, params->g, params->trained_memory, err));
    FV_TRY(fv_group_average(&p->group, 0, fv_distill_batch_center(m), 2 * c->prototypes, err));
    fv_distill_norm(m);
    FV_TRY(fv_distill_measure(m, &measures, err));
    double means[] = {measures.loss, measures.patch_loss, measures.teacher_entropy,
                      measures.patch_entropy, *p->in->stop ? 1 : 0};
    FV_TRY(fv_group_sum(&p->group, 0, means, 5, err));
    for (size_t i = 0; i < 5; i++)
        means[i] /= (double)p->group.size;
    if (!isfinite(means[0] + means[1]) || !isfinite(measures.norm))
        return FV_FAIL(err, FV_JOB,
                       "pretrain: step %" PRIu64 ": loss %g, gradient norm %g: not "
                       "finite; lower lr",
                       p->step + 1, means[0] + means[1], measures.norm);
    FvAdamW adamw = {.lr = learning_rate(p),
                     .beta1 = 0.9,
                     .beta2 = 0.999,
                     .eps = 1e-8,
                     .weight_decay = cosine(p, c->weight_decay, c->weight_decay_end),
                     .clip_norm = c->clip_norm,
                     .step = p->step + 1};
    double momentum = cosine(p, c->momentum, 1);
    fv_distill_update(m, &adamw);
    fv_distill_follow(m, momentum, c->center_momentum);
    record(p, means, measures.norm, &adamw, momentum);
    p->step++;
    *stop = means[4] > 0;
    return FV_OK;
}

/* --- the whole ------------------------------------------------------------------------------ */

static void tell(Pretrain *p) {
    const double *const *c = (const double *const *)p->column;
    uint64_t last = p->step - 1;
    double rate = (double)(p->step - p->first_step) / (fv_now() - p->started);
    if (is_root(p))
        fv_bar_show(&p->bar, p->step, p->c.steps,
                    "steps, loss %.3f (teacher's entropy %.3f), patches %.3f (%.3f), %.1f images/s",
                    c[COLUMN_loss][last], c[COLUMN_teacher_entropy][last],
                    c[COLUMN_patch_loss][last], c[COLUMN_patch_entropy][last],
                    rate * (double)p->c.batch);
}

static FvStatus train(Pretrain *p, FvError *err) {
    bool stop = false;
    FV_TRY(restore(p, err));
    p->first_step = p->checkpoint_step = p->step;
    p->started = p->last_checkpoint = fv_now();
    while (p->step < p->c.steps && !stop) {
        FV_TRY(train_step(p, &stop, err));
        tell(p);
        if (p->step - p->checkpoint_step >= p->c.checkpoint_steps || stop ||
            fv_now() - p->last_checkpoint >= p->c.checkpoint_seconds || p->step == p->c.steps)
            FV_TRY(save(p, err));
    }
    if (p->step < p->c.steps)
        return FV_FAIL(err, FV_STOPPED, "stopped after step %" PRIu64 "; the same command goes on",
                       p->step);
    if (!is_root(p))
        return FV_OK;
    FvDinoSizes sizes = {.image_size = p->c.crop_size,
                         .patch = p->c.patch,
                         .width = p->c.dino_width,
                         .heads = p->c.dino_heads,
                         .layers = p->c.dino_layers,
                         .mlp = p->c.dino_mlp};
    return fv_weights_write_dino(p->out, &sizes, fv_distill_params(p->model), "teacher.", p->be,
                                 err);
}

#define TOGETHER(call)                                                                             \
    do {                                                                                           \
        FvStatus agreed_ = fv_world_agree(&p->in->world, (call), speaker);                         \
        if (agreed_ != FV_OK)                                                                      \
            return agreed_;                                                                        \
    } while (0)

static FvStatus run(Pretrain *p, bool *speaker, bool *abort, FvError *err) {
    TOGETHER(fv_pretrain_read(&p->in->options, p->in->world.size, &p->c, err));
    TOGETHER(fv_group_create(&p->in->world, p->in->world.size, 1, &p->group, err));
    TOGETHER(open_data(p, err));
    TOGETHER(open_out(p, err));
    TOGETHER(create(p, err));
    TOGETHER(keep_out(p, err));
    p->bar = fv_bar_start("pretrain");
    FvStatus status = train(p, err);
    if (is_root(p))
        fv_bar_clear(&p->bar);
    /* all ranks stop together, or find together that the loss is not finite */
    bool together = status == FV_OK || status == FV_STOPPED || status == FV_JOB;
    *abort = !together && p->group.size > 1;
    if (*abort) {
        *speaker = true;
        return status;
    }
    if (status == FV_OK && is_root(p))
        printf("%s/model.safetensors and config.json: dino_from=%s trains a study on it\n", p->out,
               p->out);
    return fv_world_agree(&p->in->world, status, speaker);
}

FvStatus fv_pretrain(const FvInvocation *in, bool *speaker, bool *abort, FvError *err) {
    const FvOptions *o = &in->options;
    Pretrain p = {
        .in = in, .source = o->study, .out = o->out ? o->out : "runs/pretrain", .lock = -1};
    *speaker = in->world.rank == 0;
    *abort = false;
    FvStatus status = run(&p, speaker, abort, err);
    if (*abort)
        return status;
    fv_checkpointer_destroy(p.checkpointer);
    fv_distill_destroy(p.model);
    if (p.be)
        fv_backend_destroy(p.be);
    fv_order_free(&p.order);
    fv_batch_free(&p.clip);
    fv_data_close(p.data);
    if (p.group.comms)
        fv_group_free(&p.group);
    fv_fence_release(p.lock);
    for (size_t i = 0; i < COLUMN_COUNT; i++)
        free(p.column[i]);
    free(p.settings);
    free(p.clips);
    free(p.globals);
    free(p.locals);
    free(p.masked);
    free(p.order_of_patches);
    return status;
}
