#include "run/train.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/memory.h"
#include "run/checkpoint.h"
#include "run/evaluate.h"
#include "run/files.h"
#include "run/weights.h"

static const double history_seconds = 3; /* between rewrites of a job's history file */
static const double report_seconds = 0.25;

typedef struct FvTrainer {
    const FvRun *run;
    size_t slot, job;
    const FvConfig *config;
    uint64_t seed;
    FvData *data;
    FvBackend *be;
    FvModelConfig c;
    FvModel *model;
    FvExchange *exchange;
    FvEvaluator *evaluator;
    FvLoader *loader;
    FvCheckpointer *checkpointer;
    FvHistory history; /* filled on the root */
    FvJobInfo info;
    char folder[FV_PATH], history_path[FV_PATH];
    uint64_t step;  /* steps done */
    uint64_t begun; /* steps queued on the backend: those done, and at most two more */
    uint64_t eager; /* steps queued one operation at a time, since this start */
    const FvBatch *batch[FV_MARKS]; /* of the steps that are not done, by step % FV_MARKS */
    bool recorded;                  /* replay() is a step */
    bool stop, save; /* asked for, the same on every rank of the group: no step is begun ahead */
    double finished; /* when the last step was done */
    /* rows that an earlier start has already shown: a restart from an older checkpoint computes
     * them again, and what was shown must not shrink meanwhile */
    size_t shown_steps, shown_evals, shown_maps;
    bool knows_shown; /* these are known; before, nothing may be written over */
    double last_history, last_checkpoint, last_report, started;
    double rate_start; /* from here and rate_step on, steps per second are counted */
    uint64_t rate_step, checkpoint_step;
} FvTrainer;

static bool is_root(const FvTrainer *t) {
    return t->run->group->rank == 0;
}

static void doing(const FvTrainer *t, FvActivity activity) {
    fv_watchdog_at(t->run->watchdog, t->slot, t->job, t->step, activity, t->config->watchdog);
}

/* Rows at step 0, at every multiple and at the end. */
static size_t rows_over(size_t steps, size_t every) {
    return 1 + steps / every + (steps % every != 0);
}

size_t fv_eval_count(const FvConfig *c) {
    return rows_over(c->steps, c->eval_every);
}

size_t fv_map_count(const FvConfig *c) {
    return c->map_clips && c->vision ? rows_over(c->steps, c->map_every) : 0;
}

/* --- what is told --------------------------------------------------------------------------- */

/* Means over the last steps, so that the line is calm. */
static double recent(const FvHistory *h, int series) {
    size_t n = h->steps < 50 ? h->steps : 50;
    double sum = 0;
    for (size_t i = h->steps - n; i < h->steps; i++)
        sum += h->series[series][i];
    return n ? sum / (double)n : 0;
}

static void report(FvTrainer *t, const char *text) {
    if (!is_root(t))
        return;
    double seconds = fv_now() - t->rate_start;
    FvProgress p = {.job = t->job,
                    .state = t->info.state,
                    .step = t->step,
                    .steps = t->config->steps,
                    .loss_fine = recent(&t->history, FV_SERIES_loss_fine),
                    .loss_coarse = recent(&t->history, FV_SERIES_loss_coarse),
                    .ratio = recent(&t->history, FV_SERIES_ratio)};
    p.rate = seconds > 0 ? (double)(t->step - t->rate_step) / seconds : 0;
    snprintf(p.text, sizeof p.text, "%s", text);
    fv_coordinator_report(t->run->coordinator, &p);
    t->last_report = fv_now();
}

/* --- files ---------------------------------------------------------------------------------- */

static FvStatus save_history(FvTrainer *t, FvError *err) {
    const FvHistory *h = &t->history;
    t->last_history = fv_now();
    if (!is_root(t) || h->steps < t->shown_steps || h->evals < t->shown_evals ||
        h->maps < t->shown_maps)
        return FV_OK;
    return fv_history_save(t->history_path, h, &t->info, t->run->fence, err);
}

static FvStatus save_checkpoint(FvTrainer *t, FvError *err) {
    double start = fv_now();
    t->last_checkpoint = start;
    t->checkpoint_step = t->step;
    if (!is_root(t))
        return FV_OK;
    FvTensor history[FV_HISTORY_TENSORS];
    size_t count = fv_history_tensors(&t->history, history);
    FV_TRY(fv_checkpoint_save(t->checkpointer, history, count, t->step, &t->info.checkpoint_bytes,
                              err));
    t->info.checkpoint_seconds_last = fv_now() - start;
    return FV_OK;
}

/* Everything that decides a job's results, as text: a checkpoint of anything else is not ours. */
static void describe(const FvTrainer *t, char *out, size_t size) {
    size_t used = (size_t)snprintf(out, size, "seed=%" PRIu64 ";data=%s", t->seed,
                                   fv_data_info(t->data)->sha256);
    for (const FvKey *k = fv_config_keys(); k->name && used < size; k++) {
        char value[FV_TEXT];
        if (!fv_key_changes_results(k))
            continue;
        fv_config_format(t->config, k, value, sizeof value);
        used += (size_t)snprintf(out + used, size - used, ";%s=%s", k->name, value);
    }
}

/* Rows that the history file shows beyond the checkpoint: their times stay, the rest is computed
 * again to the same bits. */
static FvStatus respect_shown(FvTrainer *t, FvError *err) {
    FvHistory shown;
    FvJobInfo info;
    bool found = false;
    FV_TRY(fv_history_load(t->history_path, &shown, &info, &found, err));
    if (!found)
        return FV_OK;
    t->info.seconds = info.seconds;
    t->info.restarts = info.restarts + 1;
    t->shown_steps = shown.steps;
    t->shown_evals = shown.evals;
    t->shown_maps = shown.maps;
    size_t done = t->history.steps;
    if (shown.steps > done && shown.steps <= t->history.capacity_steps)
        memcpy(t->history.series[FV_SERIES_step_seconds] + done,
               shown.series[FV_SERIES_step_seconds] + done, (shown.steps - done) * sizeof(double));
    fv_history_free(&shown);
    return FV_OK;
}

static FvStatus read_history(void *history, const FvTensorFile *file, uint64_t step, FvError *err) {
    (void)step;
    return fv_history_read(history, file, err);
}

static FvStatus restore(FvTrainer *t, FvError *err) {
    char note[512] = "";
    if (is_root(t)) {
        FV_TRY(fv_make_folder(t->folder, err));
        FV_TRY(fv_checkpoint_load(t->checkpointer, read_history, &t->history, &t->step, note,
                                  sizeof note, err));
        FV_TRY(respect_shown(t, err));
        if (note[0])
            report(t, note);
    }
    t->knows_shown = true;
    return FV_OK;
}

/* --- the group ------------------------------------------------------------------------------ */

/* The root's state becomes everyone's. */
static FvStatus share(FvTrainer *t, FvError *err) {
    FvParams *p = fv_model_params(t->model);
    FV_TRY(fv_group_broadcast(t->run->group, t->slot, &t->step, sizeof t->step, err));
    FV_TRY(fv_exchange_share(t->exchange, p->w, p->memory, err));
    t->be->ops->weights_changed(t->be, p->memory, p->w);
    FV_TRY(fv_exchange_share(t->exchange, p->m, p->trained_memory, err));
    return fv_exchange_share(t->exchange, p->v, p->trained_memory, err);
}

/* --- one step ------------------------------------------------------------------------------- */

static double learning_rate(const FvConfig *c, uint64_t step) {
    if (step < c->warmup_steps)
        return c->lr * (double)(step + 1) / (double)c->warmup_steps;
    if (strcmp(c->schedule, "cosine") == 0) {
        const double pi = 3.141592653589793;
        double part = (double)(step - c->warmup_steps) / (double)(c->steps - c->warmup_steps);
        return 0.5 * c->lr * (1 + cos(pi * part));
    }
    return c->lr;
}

/* Means over all clips of the step, the same on every rank. */
typedef struct FvStepMeans {
    double loss_fine, loss_coarse, cosine, entropy_fine, entropy_coarse, hinge;
    double stop, save; /* share of the ranks that were asked to stop, and that want to save */
} FvStepMeans;

static double mean(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i];
    return sum / (double)n;
}

/* Time passes differently on every rank: when to save is the root's word, told with the measures.
 */
static bool wants_save(const FvTrainer *t) {
    return is_root(t) && fv_now() - t->last_checkpoint >= t->config->checkpoint_seconds;
}

static FvStatus average(FvTrainer *t, const FvMeasures *m, FvStepMeans *out, FvError *err) {
    size_t frames = t->c.clips * t->c.frames;
    double means[] = {mean(m->loss[FV_FINE], frames),
                      mean(m->loss[FV_COARSE], frames),
                      mean(m->cosine, frames),
                      mean(m->entropy[FV_FINE], frames),
                      mean(m->entropy[FV_COARSE], frames),
                      mean(m->hinge, t->c.clips),
                      *t->run->stop ? 1.0 : 0.0,
                      wants_save(t) ? 1.0 : 0.0};
    size_t n = sizeof means / sizeof *means;
    FV_TRY(fv_group_sum(t->run->group, t->slot, means, n, err));
    for (size_t i = 0; i < n; i++)
        means[i] /= (double)t->run->group->size;
    *out = (FvStepMeans){means[0], means[1], means[2], means[3],
                         means[4], means[5], means[6], means[7]};
    return FV_OK;
}

static double total_loss(const FvModelConfig *c, const FvStepMeans *m) {
    double total = m->loss_fine + c->lambda_coarse * m->loss_coarse;
    if (c->contrastive != 0)
        total += c->contrastive * m->cosine;
    if (c->entropy_margin > 0)
        total += 0.1 * m->hinge;
    return total;
}

/* The step that went bad has changed no parameter, nor has one begun after it: what it computed is
 * made again, one operation after the other. */
static FvStatus replay_failed(FvTrainer *t, const FvBatch *batch, FvError *err) {
    fv_model_on_ready(t->model, NULL, NULL);
    FV_TRY(fv_model_load(t->model, batch, err));
    fv_model_encode(t->model);
    fv_model_coarse(t->model);
    fv_model_fine(t->model);
    fv_model_backward(t->model);
    return FV_OK;
}

/* Says which tensor went bad first, on the first rank that sees one, and in which clips. */
static FvStatus fail_not_finite(FvTrainer *t, const FvBatch *batch, FvError *err) {
    enum { TEXT = 256 };
    const FvGroup *g = t->run->group;
    char mine[TEXT] = "", tensor[160];
    if (t->recorded)
        FV_TRY(replay_failed(t, batch, err));
    fv_model_first_bad(t->model, tensor, sizeof tensor);
    int used = snprintf(mine, sizeof mine, "%s; clips", tensor[0] ? tensor : "the loss");
    for (size_t b = 0; b < batch->clips && used > 0 && used < TEXT; b++)
        used += snprintf(mine + used, (size_t)(TEXT - used), " %" PRIu32, batch->clip[b]);
    char *all = calloc(g->size, TEXT);
    if (!all)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    FvStatus status = fv_group_gather(g, t->slot, mine, TEXT, all, err);
    size_t rank = 0;
    for (size_t r = g->size; is_root(t) && r-- > 0;)
        if (strncmp(all + r * TEXT, "the loss", 8) != 0)
            rank = r;
    if (status == FV_OK)
        status = FV_FAIL(err, FV_JOB, "step %" PRIu64 ": not finite: %s (rank %zu of the group)",
                         t->step + 1, is_root(t) ? all + rank * TEXT : mine, rank);
    free(all);
    return status;
}

static void record(FvTrainer *t, const FvStepMeans *m, double norm, double lr, double seconds) {
    FvHistory *h = &t->history;
    size_t i = h->steps++;
    h->series[FV_SERIES_loss_fine][i] = m->loss_fine;
    h->series[FV_SERIES_loss_coarse][i] = m->loss_coarse;
    h->series[FV_SERIES_loss_total][i] = total_loss(&t->c, m);
    h->series[FV_SERIES_ratio][i] = m->loss_fine / m->loss_coarse;
    h->series[FV_SERIES_feature_sim][i] = m->cosine;
    h->series[FV_SERIES_entropy_fine][i] = m->entropy_fine;
    h->series[FV_SERIES_entropy_coarse][i] = m->entropy_coarse;
    h->series[FV_SERIES_grad_norm][i] = norm;
    h->series[FV_SERIES_lr][i] = lr;
    if (i >= t->shown_steps)
        h->series[FV_SERIES_step_seconds][i] = seconds;
}

static FvAdamW adamw_of(const FvTrainer *t, uint64_t step) {
    return (FvAdamW){.lr = learning_rate(t->config, step),
                     .beta1 = t->config->beta1,
                     .beta2 = t->config->beta2,
                     .eps = t->config->adam_eps,
                     .weight_decay = t->config->weight_decay,
                     .clip_norm = t->config->clip_norm,
                     .step = step + 1};
}

static FvStatus average_gradients(FvTrainer *t, FvError *err) {
    if (fv_exchange_queues(t->exchange))
        return fv_exchange_finish(t->exchange, err);
    FV_TRY(t->be->ops->sync(t->be, err)); /* this rank's own part is done */
    doing(t, FV_WAITING);
    FV_TRY(fv_exchange_finish(t->exchange, err));
    doing(t, FV_COMPUTING);
    return FV_OK;
}

/* The training step, between its batch and its measures: on a GPU this is what is recorded. */
static FvStatus compute(FvTrainer *t, const FvAdamW *adamw, FvError *err) {
    FvModel *m = t->model;
    FvParams *p = fv_model_params(m);
    fv_exchange_begin(t->exchange, p->g, p->trained_memory);
    fv_model_encode(m);
    fv_model_coarse(m);
    fv_model_fine(m);
    fv_model_backward(m);
    FV_TRY(average_gradients(t, err));
    fv_model_norm(m);
    fv_model_update(m, adamw);
    return FV_OK;
}

static bool records(const FvTrainer *t) {
    return t->config->graph && t->be->records && fv_exchange_queues(t->exchange);
}

/* What another job does to the device meanwhile could spoil the recording. */
static FvStatus record_step(FvTrainer *t, const FvAdamW *adamw, FvError *err) {
    pthread_mutex_lock(t->run->device_lock);
    FvStatus status = t->be->ops->record(t->be, err);
    if (status == FV_OK)
        status = compute(t, adamw, err);
    if (status == FV_OK)
        status = t->be->ops->recorded(t->be, err);
    pthread_mutex_unlock(t->run->device_lock);
    t->recorded = status == FV_OK;
    return status;
}

/* The first steps run as they are called, so that every workspace has its size. */
static FvStatus compute_or_replay(FvTrainer *t, const FvAdamW *adamw, FvError *err) {
    const uint64_t warm_up = 2;
    if (!t->recorded && t->eager++ >= warm_up && records(t))
        FV_TRY(record_step(t, adamw, err));
    if (!t->recorded)
        return compute(t, adamw, err);
    t->be->ops->replay(t->be);
    return FV_OK;
}

static FvStatus begin_step(FvTrainer *t, FvError *err) {
    size_t place = t->begun % FV_MARKS;
    doing(t, FV_COMPUTING);
    FvAdamW adamw = adamw_of(t, t->begun);
    FV_TRY(fv_loader_next(t->loader, &t->batch[place], err));
    FV_TRY(fv_model_load(t->model, t->batch[place], err));
    fv_model_rates(t->model, &adamw);
    FV_TRY(compute_or_replay(t, &adamw, err));
    fv_model_measure_later(t->model, place);
    t->begun++;
    return FV_OK;
}

static FvStatus finish_step(FvTrainer *t, FvError *err) {
    FvMeasures measures;
    FvStepMeans means;
    size_t place = t->step % FV_MARKS;
    /* over NCCL the GPU itself waits for the other ranks' */
    doing(t,
          t->run->group->size > 1 && fv_exchange_queues(t->exchange) ? FV_WAITING : FV_COMPUTING);
    FV_TRY(fv_exchange_wait(t->exchange, place, err));
    FV_TRY(fv_model_measured(t->model, place, &measures, err));
    doing(t, FV_WAITING);
    FV_TRY(average(t, &measures, &means, err));
    if (!isfinite(total_loss(&t->c, &means)) || !isfinite(measures.norm))
        return fail_not_finite(t, t->batch[place], err);
    double now = fv_now();
    record(t, &means, measures.norm, learning_rate(t->config, t->step), now - t->finished);
    t->finished = now;
    t->step++;
    t->stop = t->stop || means.stop > 0;
    t->save = t->save || means.save > 0;
    doing(t, FV_COMPUTING);
    return FV_OK;
}

/* --- the job -------------------------------------------------------------------------------- */

static bool due(const FvTrainer *t, uint64_t step, size_t every) {
    return step % every == 0 || step == t->config->steps;
}

static bool checkpoint_due(const FvTrainer *t, uint64_t step) {
    return step - t->checkpoint_step >= t->config->checkpoint_steps || step == t->config->steps;
}

static FvStatus measure_if_due(FvTrainer *t, FvError *err) {
    if (due(t, t->step, t->config->eval_every))
        FV_TRY(fv_evaluate(t->evaluator, &t->history, t->step, err));
    if (due(t, t->step, t->config->map_every))
        FV_TRY(fv_map(t->evaluator, &t->history, t->step, err));
    return FV_OK;
}

/* Whether a step may be begun before the one before it is done: where the backend queues, and when
 * nothing is to be done between the two. Every rank of a group answers alike. */
static bool runs_ahead(const FvTrainer *t) {
    uint64_t next = t->begun;
    return t->recorded && !t->stop && !t->save && next < t->config->steps &&
           !due(t, next, t->config->eval_every) && !due(t, next, t->config->map_every) &&
           !checkpoint_due(t, next);
}

/* Between two steps, none of which is under way. */
static FvStatus rest(FvTrainer *t, FvError *err) {
    FV_TRY(measure_if_due(t, err));
    if (t->save || t->stop || checkpoint_due(t, t->step)) {
        doing(t, FV_COMPUTING);
        FV_TRY(save_checkpoint(t, err));
        doing(t, FV_COMPUTING);
        FV_TRY(save_history(t, err));
        t->save = false;
    }
    doing(t, FV_COMPUTING);
    t->finished = fv_now();
    return FV_OK;
}

static FvStatus train_loop(FvTrainer *t, FvError *err) {
    if (t->step == 0 && t->history.evals == 0)
        FV_TRY(measure_if_due(t, err));
    t->rate_start = t->finished = fv_now();
    while (t->step < t->config->steps && !(t->stop && t->begun == t->step)) {
        if (t->begun == t->step)
            FV_TRY(begin_step(t, err));
        if (t->begun == t->step + 1 && runs_ahead(t))
            FV_TRY(begin_step(t, err));
        FV_TRY(finish_step(t, err));
        if (t->begun == t->step)
            FV_TRY(rest(t, err));
        if (fv_now() - t->last_history >= history_seconds)
            FV_TRY(save_history(t, err));
        if (fv_now() - t->last_report >= report_seconds)
            report(t, "");
    }
    return t->stop && t->step < t->config->steps
               ? FV_FAIL(err, FV_STOPPED, "stopped after step %" PRIu64, t->step)
               : FV_OK;
}

static void evaluating(void *trainer, FvActivity activity) {
    doing(trainer, activity);
}

static FvStatus connect(FvTrainer *t, FvError *err) {
    const FvRun *run = t->run;
    const FvExchangeConfig config = {.comm = t->config->comm,
                                     .world = run->world,
                                     .group = run->group,
                                     .slot = t->slot,
                                     .device = &run->device,
                                     .backend = t->be,
                                     .link = run->link};
    FV_TRY(fv_exchange_create(&config, &t->exchange, err));
    fv_model_on_ready(t->model, fv_exchange_ready, t->exchange);
    return FV_OK;
}

static FvStatus create(FvTrainer *t, FvError *err) {
    const FvRun *run = t->run;
    const FvDataInfo *data = fv_data_info(t->data);
    size_t max_text = strcmp(t->config->text, "captions") == 0 ? data->max_tokens : 1;
    FV_TRY(fv_config_model(t->config, run->group->size, max_text, &t->c, err));
    FV_TRY(fv_history_create(t->config->steps, fv_eval_count(t->config), fv_map_count(t->config),
                             data->count[FV_HELD_OUT], t->c.frames, t->config->map_clips,
                             fv_grid(&t->c), &t->history, err));
    pthread_mutex_lock(run->device_lock);
    FvStatus opened = fv_device_open(&run->device, t->config->precision, run->threads, &t->be, err);
    pthread_mutex_unlock(run->device_lock);
    FV_TRY(opened);
    FV_TRY(fv_model_create(&t->c, t->be, &t->model, err));
    FV_TRY(connect(t, err));
    FV_TRY(fv_evaluator_create(t->model, t->data, &t->c, run->group, t->slot, t->config->map_clips,
                               &t->evaluator, err));
    fv_evaluator_watch(t->evaluator, evaluating, t);
    char study[8192];
    describe(t, study, sizeof study);
    FvParams *params = fv_model_params(t->model);
    FV_TRY(fv_checkpointer_create(t->folder, study, run->fence, params, t->be, FV_HISTORY_TENSORS,
                                  &t->checkpointer, err));
    t->info.parameters = params->total;
    t->info.trained = params->trained;
    t->info.ranks = run->group->size;
    snprintf(t->info.device, sizeof t->info.device, "%s", t->be->description);
    return FV_OK;
}

/* The first cache opens the device for itself. */
static FvStatus attach_cache(FvTrainer *t, FvError *err) {
    char note[128];
    if (!fv_encoder_stored(&t->c))
        return FV_OK;
    pthread_mutex_lock(t->run->device_lock);
    FvStatus status = fv_encoder_caches_attach(t->run->caches, t->model, &t->c, t->be,
                                               fv_data_info(t->data), note, sizeof note, err);
    pthread_mutex_unlock(t->run->device_lock);
    if (status == FV_OK && note[0])
        report(t, note);
    return status;
}

static FvStatus begin(FvTrainer *t, FvError *err) {
    const FvRun *run = t->run;
    FV_TRY(fv_weights_start(t->config, fv_model_params(t->model), t->be, t->seed, err));
    FV_TRY(restore(t, err));
    FV_TRY(share(t, err));
    doing(t, FV_COMPUTING);
    FV_TRY(attach_cache(t, err));
    FV_TRY(fv_loader_start(t->data, t->seed, t->config->batch, run->group->rank, run->group->size,
                           t->c.max_text, t->step, &t->loader, err));
    t->rate_step = t->checkpoint_step = t->begun = t->step;
    t->started = t->rate_start = t->last_checkpoint = t->last_history = fv_now();
    t->info.state = FV_JOB_RUNNING;
    char text[256] = "";
    const char *how = fv_exchange_text(t->exchange);
    if (t->step > 0)
        snprintf(text, sizeof text, "goes on after step %" PRIu64 "%s%s", t->step,
                 how[0] ? "; " : "", how);
    report(t, t->step > 0 ? text : how);
    return FV_OK;
}

/* A job that failed before it had read what is there records that in an empty folder only. */
static bool may_record(const FvTrainer *t) {
    FvError ignored;
    return t->history.block && (t->knows_shown || (access(t->history_path, F_OK) != 0 &&
                                                   fv_make_folder(t->folder, &ignored) == FV_OK));
}

/* Records how the job ended; the job's own failure comes before a failure to record it. */
static FvStatus end(FvTrainer *t, FvStatus status, FvError *err) {
    FvError second;
    t->info.state = status == FV_OK        ? FV_JOB_FINISHED
                    : status == FV_STOPPED ? FV_JOB_STOPPED
                                           : FV_JOB_FAILED;
    t->info.seconds += fv_now() - t->started;
    if (status != FV_OK && status != FV_STOPPED)
        snprintf(t->info.why, sizeof t->info.why, "%s", err->text);
    if (is_root(t) && t->checkpointer && status == FV_OK)
        status = fv_checkpoint_save_model(t->checkpointer, err);
    if (may_record(t) && save_history(t, &second) != FV_OK && status == FV_OK) {
        *err = second;
        status = second.status;
    }
    if (status != FV_OK && t->info.state == FV_JOB_FINISHED)
        t->info.state = FV_JOB_FAILED;
    report(t, t->info.why);
    return status;
}

static void destroy(FvTrainer *t) {
    pthread_mutex_lock(t->run->device_lock);
    fv_loader_stop(t->loader);
    fv_evaluator_destroy(t->evaluator);
    fv_checkpointer_destroy(t->checkpointer);
    fv_history_free(&t->history);
    fv_exchange_destroy(t->exchange);
    if (t->recorded) /* it names what the model holds */
        t->be->ops->unrecord(t->be);
    fv_model_destroy(t->model);
    fv_backend_destroy(t->be);
    pthread_mutex_unlock(t->run->device_lock);
    doing(t, FV_IDLE);
}

FvStatus fv_train(const FvRun *run, size_t slot, size_t job, FvError *err) {
    size_t experiment = job / run->study->seed_count;
    FvTrainer t = {.run = run,
                   .slot = slot,
                   .job = job,
                   .config = &run->study->experiments[experiment].config,
                   .seed = run->study->seeds[job % run->study->seed_count],
                   .data = run->data[experiment],
                   .started = fv_now()};
    fv_job_folder(run->out, run->study, job, t.folder, sizeof t.folder);
    snprintf(t.history_path, sizeof t.history_path, "%.*s/history.safetensors", FV_PATH - 64,
             t.folder);
    doing(&t, FV_COMPUTING);
    FvStatus status = create(&t, err);
    doing(&t, FV_COMPUTING);
    if (status == FV_OK)
        status = begin(&t, err);
    if (status == FV_OK)
        status = train_loop(&t, err);
    status = end(&t, status, err);
    destroy(&t);
    return status;
}
