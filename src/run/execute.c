#include "run/execute.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/memory.h"
#include "run/evaluate.h"
#include "run/files.h"
#include "run/hdf5_lock.h"
#include "run/model_folder.h"
#include "run/outdir.h"
#include "run/plan.h"
#include "run/processor.h"
#include "run/ranking.h"
#include "run/sha256.h"
#include "run/stage.h"
#include "run/train.h"
#include "run/weights.h"
#include "run/weights_record.h"

/* Everything one rank holds during a study. */
typedef struct Session {
    const FvInvocation *in;
    FvStudy study;
    char out[FV_PATH];
    bool *wanted; /* [jobs] */
    int lock;     /* rank 0: of OUT */
    FvFence fence;
    size_t threads;
    FvDevice device;
    bool all_gpus, seed_fits;    /* every rank has a GPU; and models/ the seed scale's models */
    FvData **data;               /* [experiments]; experiments with equal data share one */
    const FvDataInfo **info;     /* [experiments] */
    uint8_t **map_pixels;        /* rank 0, [experiments], shared like data */
    char (*names)[FV_NAME + 32]; /* [jobs] */
    const char **name_list;
    char *hosts;
    char libraries[512], start[32];
    FvWeightsRecord weights;
    size_t memory_before; /* bytes held before the study's own */
    size_t memory_left;   /* bytes on the device for this rank, before it takes any */
    FvGroup group;
    FvLink link;
    FvWatchdog *watchdog;
    bool watched; /* on every rank */
    FvDisplay *display;
    FvCoordinator *coordinator;
} Session;

static size_t job_count(const Session *s) {
    return s->study.experiment_count * s->study.seed_count;
}

/* --- what is asked for ---------------------------------------------------------------------- */

static FvStatus check_ranks(const Session *s, FvError *err) {
    const FvOptions *o = &s->in->options;
    size_t ranks = o->ranks_per_experiment, size = s->in->world.size;
    if (size % ranks != 0)
        return FV_FAIL(err, FV_USAGE,
                       "--ranks-per-experiment %zu does not divide the %zu ranks that were started",
                       ranks, size);
    for (size_t e = 0; e < s->study.experiment_count; e++)
        if (s->study.experiments[e].config.batch % ranks != 0)
            return FV_FAIL(
                err, FV_USAGE, "--ranks-per-experiment %zu does not divide %s's batch of %zu clips",
                ranks, s->study.experiments[e].name, s->study.experiments[e].config.batch);
    return FV_OK;
}

static FvStatus check_precision(const Session *s, FvError *err) {
    FvError inner;
    bool bf16;
    for (size_t e = 0; e < s->study.experiment_count; e++) {
        const FvExperiment *x = &s->study.experiments[e];
        FvStatus status = fv_device_precision(&s->device, x->config.precision, &bf16, &inner);
        if (status != FV_OK)
            return FV_FAIL(err, status, "%s: %s", x->name, inner.text);
    }
    return FV_OK;
}

static FvStatus choose_jobs(Session *s, FvError *err) {
    const char *only = s->in->options.only;
    s->wanted = calloc(job_count(s) + 1, sizeof *s->wanted);
    if (!s->wanted)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %zu jobs", job_count(s));
    for (size_t j = 0; !only && j < job_count(s); j++)
        s->wanted[j] = true;
    while (only && *only) {
        size_t length = strcspn(only, ","), e = 0, seeds = s->study.seed_count;
        for (; e < s->study.experiment_count; e++)
            if (strlen(s->study.experiments[e].name) == length &&
                strncmp(s->study.experiments[e].name, only, length) == 0)
                break;
        if (e == s->study.experiment_count)
            return FV_FAIL(err, FV_USAGE,
                           "--only %.*s: %s has no such experiment; --list shows them", (int)length,
                           only, s->in->study_path);
        for (size_t i = 0; i < seeds; i++)
            s->wanted[e * seeds + i] = true;
        only += length + (only[length] == ',');
    }
    return FV_OK;
}

static FvStatus name_jobs(Session *s, FvError *err) {
    s->names = calloc(job_count(s) + 1, sizeof *s->names);
    s->name_list = calloc(job_count(s) + 1, sizeof *s->name_list);
    if (!s->names || !s->name_list)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %zu jobs", job_count(s));
    for (size_t j = 0; j < job_count(s); j++) {
        snprintf(s->names[j], sizeof s->names[j], "%s seed %llu",
                 s->study.experiments[j / s->study.seed_count].name,
                 (unsigned long long)s->study.seeds[j % s->study.seed_count]);
        s->name_list[j] = s->names[j];
    }
    return FV_OK;
}

static FvStatus read_study(Session *s, FvError *err) {
    const FvOptions *o = &s->in->options;
    FV_TRY(fv_study_load(s->in->study_path, o->overrides, o->override_count,
                         s->seed_fits ? "seed" : "small", &s->study, err));
    FV_TRY(check_ranks(s, err));
    FV_TRY(choose_jobs(s, err));
    FV_TRY(name_jobs(s, err));
    return o->out ? fv_path(err, s->out, sizeof s->out, "%s", o->out)
                  : fv_path(err, s->out, sizeof s->out, "runs/%s", s->study.name);
}

/* --- data ----------------------------------------------------------------------------------- */

static bool same_data(const FvConfig *a, const FvConfig *b) {
    return strcmp(a->data, b->data) == 0 && strcmp(a->latents, b->latents) == 0 &&
           strcmp(a->text, b->text) == 0 && a->clips_train == b->clips_train &&
           a->clips_held_out == b->clips_held_out && a->data_seed == b->data_seed &&
           a->frames == b->frames && a->image_size == b->image_size && a->batch == b->batch &&
           a->lm_vocab == b->lm_vocab && a->map_clips == b->map_clips;
}

/* Frames of the clips whose maps are kept, as results.h5 shows them. */
static FvStatus read_map_pixels(FvData *data, size_t clips, uint8_t **out, FvError *err) {
    const FvDataInfo *info = fv_data_info(data);
    FvBatch batch;
    *out = NULL;
    if (clips == 0)
        return FV_OK;
    FV_TRY(fv_batch_create(clips, info, info->max_tokens ? info->max_tokens : 1, &batch, err));
    FvStatus status = FV_OK;
    for (size_t i = 0; status == FV_OK && i < clips; i++)
        status = fv_data_read(data, FV_HELD_OUT, fv_map_clip(i, clips, info->count[FV_HELD_OUT]),
                              &batch, i, err);
    if (status == FV_OK) {
        *out = batch.pixels;
        batch.pixels = NULL;
    }
    fv_batch_free(&batch);
    return status;
}

/* An experiment's configuration against its data, before anything is allocated for it. */
static FvStatus check_experiment(const Session *s, size_t e, const FvDataInfo *data, FvError *err) {
    const FvConfig *c = &s->study.experiments[e].config;
    FvJobPlan plan;
    if (strcmp(c->text, "captions") == 0 && data->max_tokens == 0)
        return FV_FAIL(err, FV_DATA, "%s: has no /tokens, and %s has text: captions; use text=none",
                       c->data, s->study.experiments[e].name);
    FV_TRY(fv_plan_job(c, s->in->options.ranks_per_experiment, data, &plan, err));
    return fv_weights_check_model(c, &plan.model, err);
}

static bool is_staged(const Session *s, const FvConfig *c) {
    return s->in->options.stage && strcmp(c->data, "procedural") != 0;
}

/* One rank of each host copies; the others go on when all have agreed that it is done. */
static FvStatus stage_data(const Session *s, FvError *err) {
    if (s->in->world.local_rank != 0)
        return FV_OK;
    for (size_t e = 0; e < s->study.experiment_count; e++)
        if (is_staged(s, &s->study.experiments[e].config))
            FV_TRY(fv_stage(s->in->options.stage, s->study.experiments[e].config.data, err));
    return FV_OK;
}

static FvStatus open_one(const Session *s, const FvConfig *config, FvData **out, FvError *err) {
    FvConfig c = *config;
    char path[FV_PATH];
    if (!is_staged(s, config))
        return fv_data_open(config, out, err);
    FV_TRY(fv_stage_path(s->in->options.stage, config->data, path, err));
    if (strlen(path) >= sizeof c.data)
        return FV_FAIL(err, FV_DATA, "--stage %s: the path is too long", s->in->options.stage);
    memcpy(c.data, path, strlen(path) + 1);
    FV_TRY(fv_data_open(&c, out, err));
    fv_data_show_as(*out, config->data);
    return FV_OK;
}

static FvStatus open_data(Session *s, FvError *err) {
    size_t n = s->study.experiment_count;
    s->data = calloc(n, sizeof *s->data);
    s->info = calloc(n, sizeof *s->info);
    s->map_pixels = calloc(n, sizeof *s->map_pixels);
    if (!s->data || !s->info || !s->map_pixels)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %zu data sets", n);
    for (size_t e = 0; e < n; e++) {
        const FvConfig *c = &s->study.experiments[e].config;
        for (size_t f = 0; f < e && !s->data[e]; f++)
            if (same_data(c, &s->study.experiments[f].config)) {
                s->data[e] = s->data[f];
                s->map_pixels[e] = s->map_pixels[f];
            }
        if (!s->data[e]) {
            FV_TRY(open_one(s, c, &s->data[e], err));
            if (s->in->world.rank == 0)
                FV_TRY(read_map_pixels(s->data[e], c->map_clips, &s->map_pixels[e], err));
        }
        s->info[e] = fv_data_info(s->data[e]);
        FV_TRY(check_experiment(s, e, s->info[e], err));
    }
    return FV_OK;
}

static void close_data(Session *s) {
    for (size_t e = 0; s->data && e < s->study.experiment_count; e++) {
        bool shared = false;
        for (size_t f = 0; f < e; f++)
            shared = shared || s->data[f] == s->data[e];
        if (shared || !s->data[e])
            continue;
        fv_data_close(s->data[e]);
        free(s->map_pixels[e]);
    }
    free(s->data);
    free(s->info);
    free(s->map_pixels);
}

/* --- the first lines ------------------------------------------------------------------------ */

typedef struct RankLine {
    char host[FV_HOST];
    size_t group;
    char device[96];
} RankLine;

static FvStatus tell_ranks(Session *s, FvError *err) {
    const FvWorld *w = &s->in->world;
    RankLine mine = {.group = s->group.index};
    RankLine *all = w->rank == 0 ? calloc(w->size + 1, sizeof *all) : NULL;
    snprintf(mine.host, sizeof mine.host, "%s", w->host);
    snprintf(mine.device, sizeof mine.device, "%s", s->device.text);
    fv_world_gather(&mine, sizeof mine, all);
    if (w->rank != 0)
        return FV_OK;
    size_t room = fv_add(fv_mul(w->size, 240), 1), used = 0, jobs = 0;
    s->hosts = calloc(room, 1);
    if (!all || !s->hosts) {
        free(all);
        return FV_FAIL(err, FV_DEVICE, "out of memory for the table of ranks");
    }
    for (size_t j = 0; j < job_count(s); j++)
        jobs += s->wanted[j];
    int wide = 16;
    for (size_t r = 0; r < w->size; r++)
        wide = (int)strlen(all[r].device) > wide ? (int)strlen(all[r].device) : wide;
    size_t at_once = s->group.count * s->group.slots;
    fv_display_log(s->display, "%-5s %-20s %-*s %-6s %s", "rank", "host", wide, "device", "group",
                   "jobs");
    for (size_t r = 0; r < w->size; r++) {
        char does[48];
        if (all[r].group * s->group.slots >= jobs)
            snprintf(does, sizeof does, "idle: there are only %zu jobs", jobs);
        else
            snprintf(does, sizeof does, "%zu at a time", s->group.slots);
        fv_display_log(s->display, "%-5zu %-20s %-*s %-6zu %s", r, all[r].host, wide, all[r].device,
                       all[r].group, does);
        used += (size_t)snprintf(s->hosts + used, room - used, "rank %zu: %.*s, %s, group %zu\n", r,
                                 64, all[r].host, all[r].device, all[r].group);
    }
    if (at_once < jobs)
        fv_display_log(s->display,
                       "%zu jobs, %zu at once; each group takes the next when it is free", jobs,
                       at_once);
    free(all);
    return FV_OK;
}

/* What experiment e starts from, unless an earlier one does so too. */
static void tell_start(Session *s, size_t e) {
    const FvConfig *c = &s->study.experiments[e].config;
    bool told[3] = {false};
    for (size_t f = 0; f < e; f++) {
        const FvConfig *other = &s->study.experiments[f].config;
        told[0] = told[0] || strcmp(c->dino_from, other->dino_from) == 0;
        told[1] = told[1] || strcmp(c->lm_from, other->lm_from) == 0;
        told[2] = told[2] || strcmp(c->init_from, other->init_from) == 0;
    }
    if (!told[0] && strcmp(c->dino_from, "none") != 0)
        fv_display_log(s->display, "encoder: starts from %s", c->dino_from);
    else if (!told[0] && !c->init_from[0])
        fv_display_log(s->display,
                       "the encoder starts untrained (dino_from: none): what freeze_dino "
                       "preserves here is a random encoder, not a pretrained one");
    if (!told[1] && strcmp(c->lm_from, "none") != 0)
        fv_display_log(s->display, "language model: starts from %s", c->lm_from);
    if (!told[2] && c->init_from[0])
        fv_display_log(s->display, "parameters: start from %s", c->init_from);
}

static void tell_study(Session *s) {
    const FvConfig *c = &s->study.experiments[0].config;
    fv_display_log(s->display,
                   "study %s (%s), %s scale: %zu experiments x %zu seeds, %zu steps each",
                   s->study.name, s->in->study_path, c->scale, s->study.experiment_count,
                   s->study.seed_count, c->steps);
    fv_display_log(s->display, "data %s: %zu training and %zu held-out clips, targets: %s",
                   s->info[0]->source, s->info[0]->count[FV_TRAIN], s->info[0]->count[FV_HELD_OUT],
                   s->info[0]->latents);
    if (s->all_gpus && !s->seed_fits && !s->in->options.study && strcmp(c->scale, "small") == 0)
        fv_display_log(s->display, "models/ lacks the models of the seed scale (make weights); "
                                   "scale=seed runs its sizes without them");
    for (size_t e = 0; e < s->study.experiment_count; e++)
        tell_start(s, e);
    fv_display_log(s->display, "results: %s/results.h5", s->out);
}

/* Bytes of the largest job, and of the records of all. */
static FvStatus measure_jobs(const Session *s, size_t *largest, size_t *histories, FvError *err) {
    *largest = *histories = 0;
    for (size_t e = 0; e < s->study.experiment_count; e++) {
        FvJobPlan plan;
        const FvConfig *c = &s->study.experiments[e].config;
        FV_TRY(fv_plan_job(c, s->group.size, s->info[e], &plan, err));
        *largest = fv_plan_bytes(&plan) > *largest ? fv_plan_bytes(&plan) : *largest;
        *histories = fv_add(*histories, fv_mul(s->study.seed_count, plan.history));
    }
    return FV_OK;
}

/* Held at most, beside what --dry-run predicts for this rank. */
static void tell_memory(Session *s) {
    FvError ignored;
    size_t largest, histories, caches;
    if (measure_jobs(s, &largest, &histories, &ignored) != FV_OK ||
        fv_plan_caches(&s->study, s->info, s->memory_left, fv_mul(largest, s->group.slots), &caches,
                       &ignored) != FV_OK)
        return;
    size_t planned = fv_plan_rank_bytes(largest, s->group.slots, s->info[0]->bytes, caches,
                                        histories, s->threads);
    size_t peak = fv_memory_use().peak;
    if (peak > s->memory_before)
        fv_display_log(s->display,
                       "memory of rank 0: %.1f MB at most beyond the %.1f MB of the "
                       "program itself, %.1f MB planned",
                       (double)(peak - s->memory_before) / 1e6, (double)s->memory_before / 1e6,
                       (double)planned / 1e6);
}

/* --- running -------------------------------------------------------------------------------- */

/* One job slot of this rank: takes jobs until there are none. */
typedef struct Slot {
    Session *session;
    const FvRun *run;
    size_t index;
    FvStatus status; /* worst of its jobs, FV_JOB aside: the coordinator knows about failed jobs */
    FvError err;
} Slot;

/* After a GPU's failure: whether it can still be used. One that cannot would fail every further job
 * at once, which other ranks could do. */
static bool is_usable(const Session *s) {
    FvBackend *be;
    FvError ignored;
    if (!s->device.gpu)
        return true;
    if (fv_device_open(&s->device, "auto", 1, &be, &ignored) != FV_OK)
        return false;
    FvStatus status = be->ops->sync(be, &ignored);
    fv_backend_destroy(be);
    return status == FV_OK;
}

static void *run_slot(void *argument) {
    Slot *slot = argument;
    Session *s = slot->session;
    const FvGroup *g = &s->group;
    for (;;) {
        size_t job = FV_NO_JOB;
        FvError err = {0};
        FvStatus status = FV_OK;
        if (g->rank == 0)
            status = fv_coordinator_next(s->coordinator, slot->index, &job, &err);
        if (status == FV_OK)
            status = fv_group_broadcast(g, slot->index, &job, sizeof job, &err);
        if (status == FV_OK && job != FV_NO_JOB)
            status = fv_train(slot->run, slot->index, job, &err);
        bool job_only = status == FV_OK || status == FV_JOB || status == FV_STOPPED;
        if (!job_only && slot->status == FV_OK) {
            slot->status = status;
            slot->err = err;
        }
        if (job == FV_NO_JOB || (!job_only && (g->size > 1 || !is_usable(s))))
            return NULL;
    }
}

static FvStatus run_slots(Session *s, bool *abort, FvError *err) {
    FvEncoderCaches *caches = NULL;
    size_t largest, histories;
    FvStatus status = measure_jobs(s, &largest, &histories, err);
    if (status == FV_OK)
        status =
            fv_encoder_caches_create(&s->device, fv_mul(largest, s->group.slots), &caches, err);
    pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER;
    FvRun run = {.world = &s->in->world,
                 .group = &s->group,
                 .study = &s->study,
                 .out = s->out,
                 .fence = &s->fence,
                 .coordinator = s->coordinator,
                 .data = s->data,
                 .threads = s->threads > s->group.slots ? s->threads / s->group.slots : 1,
                 .device = s->device,
                 .caches = caches,
                 .link = &s->link,
                 .watchdog = s->watchdog,
                 .device_lock = &device_lock,
                 .stop = s->in->stop};
    Slot *slots = calloc(s->group.slots, sizeof *slots);
    pthread_t *threads = calloc(s->group.slots, sizeof *threads);
    if (status == FV_OK && (!slots || !threads))
        status = FV_FAIL(err, FV_DEVICE, "out of memory for slots");
    size_t started = 0;
    for (; status == FV_OK && started < s->group.slots; started++) {
        slots[started] = (Slot){.session = s, .run = &run, .index = started};
        if (pthread_create(&threads[started], NULL, run_slot, &slots[started]) != 0)
            status =
                FV_FAIL(err, FV_DEVICE, "thread for job slot %zu could not be started", started);
    }
    for (size_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    for (size_t i = 0; i < started && status == FV_OK; i++)
        if (slots[i].status != FV_OK) {
            *err = slots[i].err;
            status = slots[i].status;
        }
    free(slots);
    free(threads);
    fv_encoder_caches_destroy(caches);
    *abort = status != FV_OK && s->group.size > 1;
    return status;
}

static FvStatus start_coordinator(Session *s, FvError *err) {
    FvCoordinatorConfig config = {
        .world = &s->in->world,
        .group = &s->group,
        .study = &s->study,
        .out = s->out,
        .fence = &s->fence,
        .stop = s->in->stop,
        .wanted = s->wanted,
        .display = s->display,
        .provenance = {.command_line = s->in->command_line,
                       .revision = s->in->revision,
                       .hosts = s->hosts,
                       .start_time = s->start,
                       .end_time = "",
                       .weights = s->weights.paths,
                       .weights_sha256 = s->weights.sums,
                       .libraries = s->libraries},
        .data = s->info,
        .map_pixels = (const uint8_t *const *)s->map_pixels,
    };
    return fv_coordinator_start(&config, &s->coordinator, err);
}

static FvStatus open_out(Session *s, FvError *err) {
    return s->in->world.rank == 0
               ? fv_outdir_open(s->out, &s->study, s->in->options.fresh, &s->fence, &s->lock, err)
               : FV_OK;
}

static FvStatus keep_out(Session *s, FvError *err) {
    char path[FV_PATH];
    if (s->in->world.rank != 0)
        return FV_OK;
    if (!s->in->options.fresh)
        FV_TRY(fv_weights_record_check(&s->weights, s->out, err));
    FV_TRY(fv_outdir_keep(s->out, &s->study, s->in->options.fresh, err));
    FV_TRY(fv_weights_record_keep(&s->weights, s->out, err));
    FV_TRY(fv_path(err, path, sizeof path, "%s/log.txt", s->out));
    return fv_display_create(path, s->name_list, job_count(s),
                             fv_display_is_live(s->in->world.by_mpirun), &s->display, err);
}

static void note_versions(Session *s) {
    char mpi[128], hdf5[32], gpu[192];
    time_t seconds = time(NULL);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    strftime(s->start, sizeof s->start, "%Y-%m-%dT%H:%M:%SZ", &utc);
    fv_mpi_version(mpi, sizeof mpi);
    fv_hdf5_version(hdf5, sizeof hdf5);
    fv_device_versions(gpu, sizeof gpu);
    snprintf(s->libraries, sizeof s->libraries, "%s\nHDF5 %s\n%s\n%s", mpi, hdf5,
             fv_cpu_blas_name(), gpu);
}

static FvStatus list_jobs(const Session *s) {
    for (size_t j = 0; j < job_count(s); j++)
        printf("%s%s\n", s->names[j], s->wanted[j] ? "" : " (not selected)");
    return FV_OK;
}

/* Collective steps: each is done by all ranks, and a failure of one is everyone's. */
#define TOGETHER(call)                                                                             \
    do {                                                                                           \
        FvStatus agreed_ = fv_world_agree(&s->in->world, (call), speaker);                         \
        if (agreed_ != FV_OK)                                                                      \
            return agreed_;                                                                        \
    } while (0)

/* Where to compute, and what: nothing is written yet. */
static FvStatus choose(Session *s, bool *speaker, FvError *err) {
    const FvOptions *o = &s->in->options;
    const FvWorld *w = &s->in->world;
    s->memory_before = fv_memory_use().now;
    size_t cores = fv_claim_cores(w);
    s->threads = o->threads ? o->threads : cores;
    TOGETHER(fv_device_choose(o->device, w, s->threads, &s->device, err));
    fv_device_share(&s->device, w);
    s->all_gpus = fv_world_all(s->device.gpu);
    s->seed_fits = fv_world_all(s->all_gpus && fv_folder_has_seed());
    TOGETHER(read_study(s, err));
    TOGETHER(check_precision(s, err));
    if (!o->list)
        TOGETHER(fv_device_memory_left(&s->device, &s->memory_left, err));
    return FV_OK;
}

static FvStatus describe(Session *s, bool *speaker, FvError *err) {
    const FvOptions *o = &s->in->options;
    const FvWorld *w = &s->in->world;
    FvStatus made = FV_OK;
    if (w->rank == 0)
        made = o->list ? list_jobs(s)
                       : fv_plan_print(&s->study, w, o, s->threads, s->memory_left, s->out, err);
    TOGETHER(made);
    return FV_OK;
}

/* OUT, the data, the ranks' groups and those who watch over them. */
static FvStatus open_all(Session *s, bool *speaker, FvError *err) {
    const FvOptions *o = &s->in->options;
    const FvWorld *w = &s->in->world;
    FvStatus made = FV_OK;
    TOGETHER(open_out(s, err));
    TOGETHER(fv_world_broadcast(&s->fence, sizeof s->fence, err));
    s->fence.lock = s->lock; /* -1 but on rank 0 */
    TOGETHER(stage_data(s, err));
    TOGETHER(open_data(s, err));
    if (w->rank == 0) /* who records them */
        made = fv_weights_record_make(&s->study, &s->weights, err);
    TOGETHER(made);
    TOGETHER(keep_out(s, err));
    note_versions(s);
    TOGETHER(fv_group_create(w, o->ranks_per_experiment, o->jobs_per_rank, &s->group, err));
    if (w->rank == 0)
        tell_study(s);
    TOGETHER(tell_ranks(s, err));
    TOGETHER(start_coordinator(s, err));
    TOGETHER(fv_watchdog_start(w, &s->group, s->name_list, &s->watchdog, err));
    s->watched = true;
    return FV_OK;
}

/* What the study came to, when this rank's slots came to `status`. */
static FvStatus conclude(Session *s, FvStatus status, FvError *err) {
    FvError late;
    FvStatus finished = s->group.rank == 0 ? fv_coordinator_finish(s->coordinator, &late) : FV_OK;
    if (s->in->world.rank == 0) {
        tell_memory(s);
        fv_print_ranking(&s->study, fv_coordinator_records(s->coordinator), s->out);
    }
    if (status != FV_OK || finished == FV_OK)
        return status;
    *err = late;
    if (finished == FV_JOB)
        FV_FAIL(err, FV_JOB,
                "a job failed (its reason is above and in %s/results.h5); the others are done",
                s->out);
    if (finished == FV_STOPPED)
        FV_FAIL(err, FV_STOPPED, "stopped; the same command goes on from the checkpoints");
    return finished;
}

static FvStatus run_session(Session *s, bool *speaker, bool *abort, FvError *err) {
    const FvOptions *o = &s->in->options;
    FV_TRY(choose(s, speaker, err));
    if (o->list || o->dry_run)
        return describe(s, speaker, err);
    FV_TRY(open_all(s, speaker, err));
    FvStatus status = run_slots(s, abort, err);
    if (*abort) {
        *speaker = true;
        return status;
    }
    return fv_world_agree(&s->in->world, conclude(s, status, err), speaker);
}

FvStatus fv_execute(const FvInvocation *in, bool *speaker, bool *abort, FvError *err) {
    Session s = {.in = in, .lock = -1};
    *speaker = in->world.rank == 0;
    *abort = false;
    FvStatus status = run_session(&s, speaker, abort, err);
    if (*abort)
        return status;
    fv_watchdog_stop(s.watchdog, s.watched);
    fv_coordinator_destroy(s.coordinator);
    fv_display_destroy(s.display);
    fv_link_close(&s.link);
    if (s.group.comms)
        fv_group_free(&s.group);
    close_data(&s);
    fv_fence_release(s.lock);
    free(s.hosts);
    fv_weights_record_free(&s.weights);
    free(s.names);
    free(s.name_list);
    free(s.wanted);
    fv_study_free(&s.study);
    return status;
}
