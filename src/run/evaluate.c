#include "run/evaluate.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"

struct FvEvaluator {
    FvModel *model;
    FvData *data;
    FvModelConfig c;
    const FvGroup *group;
    size_t slot, held_out, share, map_clips; /* share: clips per rank, the last may have fewer */
    FvBatch batch;
    double *mine, *all; /* [share, FV_EVAL_COUNT, T], and every rank's on the root */
    FvProgressCall *progress;
    void *context;
    double *attention; /* [clips * T, 1 + N] */
};

FvStatus fv_evaluator_create(FvModel *model, FvData *data, const FvModelConfig *config,
                             const FvGroup *group, size_t slot, size_t map_clips, FvEvaluator **out,
                             FvError *err) {
    FvEvaluator *e = calloc(1, sizeof *e);
    if (!e)
        return FV_FAIL(err, FV_DEVICE, "out of memory for evaluations");
    const FvDataInfo *info = fv_data_info(data);
    e->model = model;
    e->data = data;
    e->c = *config;
    e->group = group;
    e->slot = slot;
    e->held_out = info->count[FV_HELD_OUT];
    e->share = (e->held_out + group->size - 1) / group->size;
    e->map_clips = map_clips;
    size_t values = fv_mul3(e->share, FV_EVAL_COUNT, config->frames);
    e->mine = calloc(values, sizeof(double));
    e->all = calloc(fv_mul(values, group->size), sizeof(double));
    e->attention =
        calloc(fv_mul3(config->clips, config->frames, fv_patches(config) + 1), sizeof(double));
    FvStatus status = fv_batch_create(config->clips, info, config->max_text, &e->batch, err);
    if (status == FV_OK && (!e->mine || !e->all || !e->attention))
        status = FV_FAIL(err, FV_DEVICE, "out of memory for evaluations");
    if (status != FV_OK) {
        fv_evaluator_destroy(e);
        return status;
    }
    *out = e;
    return FV_OK;
}

void fv_evaluator_destroy(FvEvaluator *e) {
    if (!e)
        return;
    fv_batch_free(&e->batch);
    free(e->mine);
    free(e->all);
    free(e->attention);
    free(e);
}

void fv_evaluator_watch(FvEvaluator *e, FvProgressCall *call, void *context) {
    e->progress = call;
    e->context = context;
}

static void tell(const FvEvaluator *e, FvActivity activity) {
    if (e->progress)
        e->progress(e->context, activity);
}

/* Loads held-out clips first, first + 1, ...; slots beyond `end` repeat the last clip. */
static FvStatus load_clips(FvEvaluator *e, size_t first, size_t end, FvError *err) {
    for (size_t b = 0; b < e->c.clips; b++) {
        size_t clip = first + b < end ? first + b : end - 1;
        FV_TRY(fv_data_read(e->data, FV_HELD_OUT, (uint32_t)clip, &e->batch, b, err));
    }
    return fv_model_load(e->model, &e->batch, err);
}

/* Copies one batch's measures to this rank's rows. */
static void keep(FvEvaluator *e, const FvMeasures *m, size_t row, size_t clips) {
    const double *from[FV_EVAL_COUNT] = {
        [FV_EVAL_loss_fine] = m->loss[FV_FINE],
        [FV_EVAL_loss_coarse] = m->loss[FV_COARSE],
        [FV_EVAL_cosine] = m->cosine,
        [FV_EVAL_entropy_fine] = m->entropy[FV_FINE],
        [FV_EVAL_entropy_coarse] = m->entropy[FV_COARSE],
        [FV_EVAL_loss_copy] = m->loss_copy,
        [FV_EVAL_loss_fine_other] = m->loss_other,
    };
    size_t frames = e->c.frames;
    for (size_t b = 0; b < clips; b++)
        for (size_t i = 0; i < FV_EVAL_COUNT; i++)
            memcpy(e->mine + ((row + b) * FV_EVAL_COUNT + i) * frames, from[i] + b * frames,
                   frames * sizeof(double));
}

static FvStatus evaluate_share(FvEvaluator *e, size_t first, size_t end, FvError *err) {
    FvModel *m = e->model;
    if (first >= end)
        return FV_OK;
    /* the first clip's "other" queries come from the clip before it, cyclically */
    size_t before = (first + e->held_out - 1) % e->held_out;
    FV_TRY(load_clips(e, before, before + 1, err));
    fv_model_encode(m);
    fv_model_coarse(m);
    fv_model_keep_last(m);
    for (size_t clip = first; clip < end; clip += e->c.clips) {
        FvMeasures measures;
        size_t count = end - clip < e->c.clips ? end - clip : e->c.clips;
        tell(e, FV_COMPUTING);
        FV_TRY(load_clips(e, clip, end, err));
        fv_model_encode(m);
        fv_model_coarse(m);
        fv_model_fine(m);
        fv_model_fine_other(m);
        fv_model_keep_last(m);
        FV_TRY(fv_model_measure(m, &measures, err));
        keep(e, &measures, clip - first, count);
    }
    return FV_OK;
}

FvStatus fv_evaluate(FvEvaluator *e, FvHistory *h, size_t step, FvError *err) {
    size_t first = e->group->rank * e->share, frames = e->c.frames;
    size_t end = first + e->share < e->held_out ? first + e->share : e->held_out;
    FV_TRY(evaluate_share(e, first, end, err));
    size_t bytes = e->share * FV_EVAL_COUNT * frames * sizeof(double);
    tell(e, FV_WAITING);
    FV_TRY(fv_group_gather(e->group, e->slot, e->mine, bytes, e->all, err));
    tell(e, FV_COMPUTING);
    if (e->group->rank != 0)
        return FV_OK;
    for (size_t clip = 0; clip < e->held_out; clip++)
        for (size_t i = 0; i < FV_EVAL_COUNT; i++)
            memcpy(h->eval[i] + (h->evals * e->held_out + clip) * frames,
                   e->all + (clip * FV_EVAL_COUNT + i) * frames, frames * sizeof(double));
    h->eval_step[h->evals++] = (int64_t)step;
    return FV_OK;
}

uint32_t fv_map_clip(size_t i, size_t count, size_t held_out) {
    return (uint32_t)(i * held_out / count);
}

/* One pass's maps of map clips first .. first + count. */
static void keep_maps(FvEvaluator *e, FvHistory *h, FvPass pass, size_t first, size_t count) {
    size_t frames = e->c.frames, patches = fv_patches(&e->c);
    fv_model_attention(e->model, pass, e->attention);
    for (size_t b = 0; b < count; b++)
        for (size_t t = 0; t < frames; t++) {
            const double *from = e->attention + (b * frames + t) * (patches + 1);
            size_t row = ((h->maps * FV_PASSES + pass) * e->map_clips + first + b) * frames + t;
            h->cls[row] = (float)from[0];
            for (size_t n = 0; n < patches; n++)
                h->map[row * patches + n] = (float)from[1 + n];
        }
}

FvStatus fv_map(FvEvaluator *e, FvHistory *h, size_t step, FvError *err) {
    FvModel *m = e->model;
    if (e->group->rank != 0 || e->map_clips == 0 || !e->c.vision)
        return FV_OK;
    for (size_t first = 0; first < e->map_clips; first += e->c.clips) {
        size_t left = e->map_clips - first, count = left < e->c.clips ? left : e->c.clips;
        tell(e, FV_COMPUTING);
        for (size_t b = 0; b < e->c.clips; b++) {
            size_t i = b < count ? first + b : e->map_clips - 1;
            uint32_t clip = fv_map_clip(i, e->map_clips, e->held_out);
            h->map_clip[i] = clip;
            FV_TRY(fv_data_read(e->data, FV_HELD_OUT, clip, &e->batch, b, err));
        }
        FV_TRY(fv_model_load(m, &e->batch, err));
        fv_model_encode(m);
        fv_model_coarse(m);
        fv_model_fine(m);
        keep_maps(e, h, FV_COARSE, first, count);
        keep_maps(e, h, FV_FINE, first, count);
    }
    h->map_step[h->maps++] = (int64_t)step;
    return FV_OK;
}
