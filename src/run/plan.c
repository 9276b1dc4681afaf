#include "run/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/memory.h"
#include "run/checkpoint.h"
#include "run/encoder_caches.h"
#include "run/history.h"
#include "run/train.h"
#include "run/weights.h"

FvStatus fv_plan_job(const FvConfig *config, size_t ranks, const FvDataInfo *data, FvJobPlan *p,
                     FvError *err) {
    bool captions = strcmp(config->text, "captions") == 0;
    size_t max_text = !captions ? 1 : data ? data->max_tokens : fv_data_max_tokens(config);
    if (max_text == 0) /* a dry run before the data is there */
        max_text = FV_CAPTION_TOKENS;
    size_t held_out = data ? data->count[FV_HELD_OUT] : config->clips_held_out;
    size_t evals = fv_eval_count(config), maps = fv_map_count(config);
    *p = (FvJobPlan){0};
    FV_TRY(fv_config_model(config, ranks, max_text, &p->model, err));
    FV_TRY(fv_model_plan(&p->model, &p->memory, &p->parameters, &p->trained, err));
    p->history = fv_history_bytes(config->steps, evals, maps, held_out, config->frames,
                                  config->map_clips, fv_grid(&p->model));
    size_t share = (held_out + ranks - 1) / ranks;
    size_t pixels =
        fv_mul4(p->model.clips * config->frames, config->image_size, config->image_size, 3);
    p->evaluation =
        fv_add(fv_mul4(share, FV_EVAL_COUNT * config->frames, 1 + ranks, sizeof(double)),
               fv_mul(6, pixels)); /* evaluation's batch, and those read ahead */
    p->staging = fv_checkpointer_bytes(p->parameters, p->trained);
    p->checkpoint = fv_add(p->staging, p->history);
    return FV_OK;
}

size_t fv_plan_bytes(const FvJobPlan *p) {
    size_t device = fv_add(fv_add(p->memory.weights, p->memory.gradients),
                           fv_add(p->memory.moments, p->memory.activations));
    device = fv_add(device, p->memory.operands);
    return fv_add(device, fv_add(p->history, fv_add(p->evaluation, p->staging)));
}

/* The encoder's weights come from the same place (a drawn one differs with the seed), so do the
 * clips, and what is kept has the same sizes. */
static bool same_encoded(const FvConfig *a, const FvConfig *b) {
    return strcmp(a->dino_from, b->dino_from) == 0 && strcmp(a->init_from, b->init_from) == 0 &&
           strcmp(a->pos_interp, b->pos_interp) == 0 && strcmp(a->data, b->data) == 0 &&
           strcmp(a->query_mode, b->query_mode) == 0 && a->data_seed == b->data_seed &&
           a->clips_train == b->clips_train && a->clips_held_out == b->clips_held_out &&
           a->frames == b->frames && a->image_size == b->image_size && a->patch == b->patch &&
           a->dino_width == b->dino_width && a->dino_heads == b->dino_heads &&
           a->dino_layers == b->dino_layers && a->dino_mlp == b->dino_mlp;
}

/* Clips of both splits. */
static size_t clips_of(const FvConfig *c, const FvDataInfo *data) {
    return data ? data->count[FV_TRAIN] + data->count[FV_HELD_OUT]
                : c->clips_train + c->clips_held_out;
}

FvStatus fv_plan_caches(const FvStudy *study, const FvDataInfo *const *info, size_t left,
                        size_t reserve, size_t *bytes, FvError *err) {
    *bytes = 0;
    left -= reserve < left ? reserve : left;
    for (size_t e = 0; e < study->experiment_count; e++) {
        const FvConfig *c = &study->experiments[e].config;
        FvModelConfig model;
        bool known = false;
        FV_TRY(fv_config_model(c, 1, 1, &model, err));
        for (size_t f = 0; f < e; f++) {
            const FvConfig *other = &study->experiments[f].config;
            known = known || (other->vision && other->freeze_dino && other->cache_encoder &&
                              same_encoded(c, other));
        }
        size_t encoders = strcmp(c->dino_from, "none") == 0 ? study->seed_count : 1;
        size_t clip = fv_encoder_cache_clip_bytes(&model, sizeof(real));
        for (size_t i = 0; fv_encoder_stored(&model) && !known && i < encoders; i++)
            *bytes += clip * fv_encoder_cache_fitting(clips_of(c, info ? info[e] : NULL), clip,
                                                      left - *bytes);
    }
    return FV_OK;
}

/* Measured at the small scale: a thread's stack, allocator and BLAS buffers come to some 4 MB, the
 * libraries that a run touches to 8 MB; results.h5 is made in memory of a copy of the records, and
 * grows by doubling. */
size_t fv_plan_rank_bytes(size_t largest_job, size_t slots, size_t clips, size_t caches,
                          size_t histories, size_t threads) {
    const size_t thread = 4000000, libraries = 8000000, copies = 4;
    size_t fixed = fv_add(libraries, fv_mul(threads, thread));
    size_t jobs = fv_add(fv_mul(largest_job, slots), fv_add(clips, caches));
    return fv_add(fv_add(jobs, fv_mul(histories, copies)), fixed);
}

/* --- the dry run ---------------------------------------------------------------------------- */

static void print_bytes(const char *what, size_t bytes) {
    printf("  %-22s %10.1f MB\n", what, (double)bytes / 1e6);
}

/* A batch of zeros costs what a real one costs. */
static FvStatus zero_batch(const FvModelConfig *c, FvBatch *b, FvError *err) {
    const FvDataInfo info = {.frames = c->frames, .size = c->size};
    return fv_batch_create(c->clips, &info, c->max_text, b, err);
}

static FvStatus time_steps(FvModel *m, const FvBatch *batch, bool train, double *best,
                           FvError *err) {
    double spent = 0;
    *best = 1e30;
    for (int i = 0; i < 12 && (i < 2 || spent < 2); i++) { /* the first one warms up */
        double start = fv_now();
        FV_TRY(fv_model_load(m, batch, err));
        fv_model_encode(m);
        fv_model_coarse(m);
        fv_model_fine(m);
        if (train)
            fv_model_backward(m);
        else
            fv_model_fine_other(m);
        double seconds = fv_now() - start;
        spent += seconds;
        if (i > 0 && seconds < *best)
            *best = seconds;
    }
    return FV_OK;
}

/* Seconds of one training step and of one evaluation batch: [0] with its clips encoded, [1] with
 * the encoder's outputs found in a cache, where they are stored. */
typedef struct Times {
    double step[2], evaluation[2];
} Times;

static FvStatus time_model(FvModel *m, const FvModelConfig *c, FvBackend *be, Times *out,
                           FvError *err) {
    FvBatch batch;
    FvEncoderCache *cache = NULL;
    FV_TRY(zero_batch(c, &batch, err));
    FvStatus status = fv_params_init(fv_model_params(m), be, 0, NULL, err);
    for (int found = 0; status == FV_OK && found < (fv_encoder_stored(c) ? 2 : 1); found++) {
        if (found) /* the zeros of the batch are all clip 0 */
            status = fv_encoder_cache_create(
                be, 1, 1, fv_encoder_cache_clip_bytes(c, be->operand_bytes), &cache, err);
        if (status == FV_OK && found)
            fv_model_use_cache(m, cache);
        if (status == FV_OK)
            status = time_steps(m, &batch, true, &out->step[found], err);
        if (status == FV_OK)
            status = time_steps(m, &batch, false, &out->evaluation[found], err);
    }
    fv_encoder_cache_destroy(cache);
    fv_batch_free(&batch);
    return status;
}

static FvStatus trial(const FvModelConfig *c, size_t threads, Times *out, FvError *err) {
    FvBackend *be;
    FvModel *m = NULL;
    FV_TRY(fv_cpu_backend_create(threads, &be, err));
    FvStatus status = fv_model_create(c, be, &m, err);
    if (status == FV_OK)
        status = time_model(m, c, be, out, err);
    fv_model_destroy(m);
    fv_backend_destroy(be);
    return status;
}

static size_t free_memory(void) {
    long pages = sysconf(_SC_AVPHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? fv_mul((size_t)pages, (size_t)size) : 0;
}

/* Of a cache that holds part of the clips, that part is found, once each was encoded. */
static FvStatus estimate_seconds(const FvConfig *config, const FvJobPlan *p, size_t threads,
                                 size_t left, double *seconds, FvError *err) {
    Times t;
    FV_TRY(trial(&p->model, threads, &t, err));
    double steps = (double)config->steps, per_batch = (double)p->model.clips;
    size_t batches = (config->clips_held_out + p->model.clips - 1) / p->model.clips;
    double evaluations = (double)(batches * fv_eval_count(config));
    *seconds = t.step[0] * steps + t.evaluation[0] * evaluations;
    if (!fv_encoder_stored(&p->model))
        return FV_OK;
    size_t clips = clips_of(config, NULL);
    size_t clip_bytes = fv_encoder_cache_clip_bytes(&p->model, sizeof(real));
    double kept = (double)fv_encoder_cache_fitting(clips, clip_bytes, left);
    double found = kept / (double)clips, encoding = t.step[0] - t.step[1];
    double all_found = t.step[1] * steps + t.evaluation[1] * evaluations;
    *seconds = found * all_found + (1 - found) * *seconds + kept / per_batch * encoding;
    return FV_OK;
}

FvStatus fv_plan_print(const FvStudy *study, const FvWorld *world, const FvOptions *o,
                       size_t threads, size_t left, const char *out, FvError *err) {
    size_t jobs = study->experiment_count * study->seed_count;
    size_t groups = world->size / o->ranks_per_experiment, disk = 0, most = 0, histories = 0;
    double total = 0;
    bool timed = true;
    printf("study %s: %zu experiments x %zu seeds = %zu jobs, on %zu groups of %zu ranks, %zu at "
           "a time each\nresults: %s/results.h5\n\n",
           study->name, study->experiment_count, study->seed_count, jobs, groups,
           o->ranks_per_experiment, o->jobs_per_rank, out);
    printf("%-20s %8s %12s %12s %14s %14s %10s\n", "experiment", "steps", "parameters", "trained",
           "memory MB", "checkpoint MB", "time s");
    for (size_t e = 0; e < study->experiment_count; e++) {
        const FvConfig *c = &study->experiments[e].config;
        FvJobPlan p;
        double seconds = 0;
        FV_TRY(fv_plan_job(c, o->ranks_per_experiment, NULL, &p, err));
        FV_TRY(fv_weights_check_model(c, &p.model, err));
        size_t bytes = fv_plan_bytes(&p);
        bool fits = bytes < free_memory() / 2;
        if (fits)
            FV_TRY(estimate_seconds(c, &p, threads, left, &seconds, err));
        timed = timed && fits;
        total += seconds;
        most = bytes > most ? bytes : most;
        histories = fv_add(histories, fv_mul(study->seed_count, p.history));
        disk = fv_add(disk, fv_mul(study->seed_count,
                                   fv_add(fv_mul(2, p.checkpoint),
                                          fv_add(p.memory.weights, fv_mul(2, p.history)))));
        printf("%-20s %8zu %12zu %12zu %14.1f %14.1f ", study->experiments[e].name, c->steps,
               p.parameters, p.trained, (double)bytes / 1e6, (double)p.checkpoint / 1e6);
        if (fits)
            printf("%10.0f\n", seconds);
        else
            printf("%10s\n", "not tried");
    }
    printf("\nper rank, with %zu threads:\n", threads);
    size_t clips = fv_data_bytes(&study->experiments[0].config), caches;
    FV_TRY(fv_plan_caches(study, NULL, left, fv_mul(most, o->jobs_per_rank), &caches, err));
    print_bytes("jobs", fv_mul(most, o->jobs_per_rank));
    print_bytes("clips", clips);
    print_bytes("encoded clips", caches);
    print_bytes("all, on rank 0",
                fv_plan_rank_bytes(most, o->jobs_per_rank, clips, caches, histories, threads));
    print_bytes("free now", free_memory());
    printf("disk:\n");
    print_bytes("checkpoints, results", disk);
    if (timed)
        printf("time: about %.0f s (from trial steps just now)\n",
               total * (double)study->seed_count / (double)groups);
    else
        printf("time: not estimated, a trial step would not fit the free memory\n");
    return FV_OK;
}
