#include "run/results.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "run/fence.h"
#include "run/files.h"
#include "run/hdf5_lock.h"
#include "run/results_hdf5.h"
#include "run/summary.h"

enum { FORMAT_VERSION = 1 };

/* Where the frames of the clips with maps stand in the file, for the runs that show the same. */
typedef struct Shown {
    const uint8_t *pixels;
    const FvHistory *history; /* of the run that holds them; NULL: none yet */
    char group[2 * FV_NAME];  /* its attention group */
} Shown;

typedef struct Results {
    FvH5 h5;
    const FvStudy *study;
    const FvJobRecord *records;
    const uint8_t *const *map_pixels;
    const FvDataInfo *const *data;
    const FvProvenance *provenance;
    Shown *shown; /* [experiments] */
} Results;

typedef struct Label {
    const char *name, *unit, *text;
} Label;

static const Label series[FV_SERIES_COUNT] = {
#define X(name, unit, text) {#name, unit, text},
    FV_SERIES(X)
#undef X
};
static const Label evals[FV_EVAL_COUNT] = {
#define X(name, unit, text) {#name, unit, text},
    FV_EVALS(X)
#undef X
};

/* --- axes ----------------------------------------------------------------------------------- */

/* first, first + 1, ... */
static FvAxis put_count(FvH5 *o, FvH5Id group, Label label, size_t n, int64_t first) {
    int64_t *values = malloc(fv_mul(n + 1, sizeof *values));
    if (!values)
        fv_h5_fail(o, "out of memory");
    for (size_t i = 0; values && i < n; i++)
        values[i] = first + (int64_t)i;
    FvAxis axis = fv_h5_axis(o, group,
                             &(FvColumn){.name = label.name,
                                         .unit = label.unit,
                                         .text = label.text,
                                         .kind = FV_H5_I64,
                                         .data = values},
                             n);
    free(values);
    return axis;
}

/* Centres of patches, on the pixels' own axis: pixel 0 has its centre at 0. */
static FvAxis put_centres(FvH5 *o, FvH5Id group, Label label, size_t grid, size_t patch) {
    double *values = malloc(fv_mul(grid + 1, sizeof *values));
    if (!values)
        fv_h5_fail(o, "out of memory");
    for (size_t i = 0; values && i < grid; i++)
        values[i] = ((double)i + 0.5) * (double)patch - 0.5;
    FvAxis axis = fv_h5_axis(o, group,
                             &(FvColumn){.name = label.name,
                                         .unit = label.unit,
                                         .text = label.text,
                                         .kind = FV_H5_F64,
                                         .data = values},
                             grid);
    free(values);
    return axis;
}

static FvAxis put_axis(FvH5 *o, FvH5Id group, Label label, FvH5Kind kind, size_t n,
                       const void *values) {
    return fv_h5_axis(o, group,
                      &(FvColumn){.name = label.name,
                                  .unit = label.unit,
                                  .text = label.text,
                                  .kind = kind,
                                  .data = values},
                      n);
}

/* --- one run -------------------------------------------------------------------------------- */

static void put_series(FvH5 *o, FvH5Id group, const FvHistory *h) {
    FvAxis step = put_count(o, group, (Label){"step", "1", "training step"}, h->steps, 1);
    for (size_t i = 0; i < FV_SERIES_COUNT; i++)
        fv_h5_column(o, group,
                     &(FvColumn){.name = series[i].name,
                                 .unit = series[i].unit,
                                 .text = series[i].text,
                                 .kind = FV_H5_F64,
                                 .data = h->series[i],
                                 .axes = {&step}});
    fv_h5_close_axis(o, &step);
}

static void put_evaluations(FvH5 *o, FvH5Id run, const FvHistory *h) {
    if (h->evals == 0)
        return;
    FvH5Id group = fv_h5_group(o, run, "eval");
    FvAxis step =
        put_axis(o, group, (Label){"eval_step", "1", "training steps done before the evaluation"},
                 FV_H5_I64, h->evals, h->eval_step);
    FvAxis clip =
        put_count(o, group, (Label){"clip", "1", "clip of the held-out split"}, h->clips, 0);
    FvAxis frame = put_count(o, group, (Label){"frame", "1", "frame of the clip"}, h->frames, 1);
    for (size_t i = 0; i < FV_EVAL_COUNT; i++)
        fv_h5_column(o, group,
                     &(FvColumn){.name = evals[i].name,
                                 .unit = evals[i].unit,
                                 .text = evals[i].text,
                                 .kind = FV_H5_F64,
                                 .data = h->eval[i],
                                 .axes = {&step, &clip, &frame}});
    fv_h5_close_axis(o, &step);
    fv_h5_close_axis(o, &clip);
    fv_h5_close_axis(o, &frame);
    fv_h5_close_group(o, group);
}

static void put_pixels(FvH5 *o, FvH5Id group, const FvAxis *clip, const FvAxis *frame,
                       const uint8_t *pixels, size_t size) {
    static const char *const colours[] = {"red", "green", "blue"};
    FvAxis y = put_count(o, group, (Label){"pixel_y", "pixel", "row of the frame"}, size, 0);
    FvAxis x = put_count(o, group, (Label){"pixel_x", "pixel", "column of the frame"}, size, 0);
    FvAxis rgb = put_axis(o, group, (Label){"rgb", NULL, "colour channel"}, FV_H5_TEXT, 3, colours);
    fv_h5_column(o, group,
                 &(FvColumn){.name = "pixels",
                             .unit = "1",
                             .text = "frames that the attention maps belong to, 0 to 255",
                             .kind = FV_H5_U8,
                             .data = pixels,
                             .packed = true,
                             .chunk_rank = 4,
                             .axes = {clip, frame, &y, &x, &rgb}});
    fv_h5_close_axis(o, &y);
    fv_h5_close_axis(o, &x);
    fv_h5_close_axis(o, &rgb);
}

/* The run that holds the frames of job `job`, or an entry to fill in; NULL: it shows none. */
static Shown *find_shown(Results *r, size_t job) {
    size_t experiment = job / r->study->seed_count;
    const uint8_t *pixels = r->map_pixels ? r->map_pixels[experiment] : NULL;
    const FvHistory *h = &r->records[job].history;
    if (!pixels || !r->data[experiment])
        return NULL;
    for (size_t i = 0; i < r->study->experiment_count; i++) {
        Shown *s = &r->shown[i];
        if (!s->history)
            s->pixels = pixels;
        if (s->pixels == pixels &&
            (!s->history ||
             (s->history->map_clips == h->map_clips && s->history->frames == h->frames &&
              memcmp(s->history->map_clip, h->map_clip, h->map_clips * sizeof *h->map_clip) == 0)))
            return s;
    }
    return NULL;
}

/* Makes the axes clip and frame, and the pixels on them; or second names for those of an earlier
 * run with the same frames. */
static void put_shown(Results *r, FvH5Id group, size_t job, FvAxis *clip, FvAxis *frame) {
    static const char *const links[] = {"clip", "frame", "pixel_y", "pixel_x", "rgb", "pixels"};
    FvH5 *o = &r->h5;
    size_t experiment = job / r->study->seed_count;
    const FvHistory *h = &r->records[job].history;
    Shown *shown = find_shown(r, job);
    if (shown && shown->history) {
        FvH5Id from = fv_h5_open_group(o, o->file, shown->group);
        for (size_t i = 0; i < sizeof links / sizeof *links; i++)
            fv_h5_link(o, from, group, links[i]);
        fv_h5_close_group(o, from);
        *clip = fv_h5_open_axis(o, group, "clip", h->map_clips);
        *frame = fv_h5_open_axis(o, group, "frame", h->frames);
        return;
    }
    *clip = put_axis(o, group, (Label){"clip", "1", "clip of the held-out split"}, FV_H5_I64,
                     h->map_clips, h->map_clip);
    *frame = put_count(o, group, (Label){"frame", "1", "frame of the clip"}, h->frames, 1);
    if (!shown)
        return;
    put_pixels(o, group, clip, frame, shown->pixels, r->data[experiment]->size);
    shown->history = h;
    snprintf(shown->group, sizeof shown->group, "/runs/%s/seed_%" PRIu64 "/attention",
             r->study->experiments[experiment].name, r->study->seeds[job % r->study->seed_count]);
}

static void put_attention(Results *r, FvH5Id run, size_t job) {
    static const char *const passes[] = {"coarse", "fine"};
    FvH5 *o = &r->h5;
    const FvHistory *h = &r->records[job].history;
    size_t patch = r->study->experiments[job / r->study->seed_count].config.patch;
    if (h->maps == 0 || h->map_clips == 0)
        return;
    FvAxis clip, frame;
    FvH5Id group = fv_h5_group(o, run, "attention");
    FvAxis step = put_axis(o, group, (Label){"map_step", "1", "training steps done before the map"},
                           FV_H5_I64, h->maps, h->map_step);
    FvAxis pass = put_axis(o, group, (Label){"pass", NULL, "pass"}, FV_H5_TEXT, 2, passes);
    put_shown(r, group, job, &clip, &frame);
    FvAxis y =
        put_centres(o, group, (Label){"y", "pixel", "row of the patch's centre"}, h->grid, patch);
    FvAxis x = put_centres(o, group, (Label){"x", "pixel", "column of the patch's centre"}, h->grid,
                           patch);
    fv_h5_column(
        o, group,
        &(FvColumn){.name = "map",
                    .unit = "1",
                    .text = "query's attention to the patches, last layer, mean over heads",
                    .kind = FV_H5_F32,
                    .data = h->map,
                    .packed = true,
                    .chunk_rank = 5,
                    .axes = {&step, &pass, &clip, &frame, &y, &x}});
    fv_h5_column(o, group,
                 &(FvColumn){.name = "cls",
                             .unit = "1",
                             .text = "query's attention to the CLS token; map and cls add up to 1",
                             .kind = FV_H5_F32,
                             .data = h->cls,
                             .axes = {&step, &pass, &clip, &frame}});
    FvAxis *axes[] = {&step, &pass, &clip, &frame, &y, &x};
    for (size_t i = 0; i < sizeof axes / sizeof *axes; i++)
        fv_h5_close_axis(o, axes[i]);
    fv_h5_close_group(o, group);
}

static void put_config(FvH5 *o, FvH5Id group, const FvConfig *config) {
    for (const FvKey *key = fv_config_keys(); key->name; key++) {
        const char *at = (const char *)config + key->offset;
        switch (key->kind) {
        case FV_KEY_size:
            fv_h5_put_int(o, group, key->name, (int64_t) * (const size_t *)(const void *)at);
            break;
        case FV_KEY_real:
            fv_h5_put_real(o, group, key->name, *(const double *)(const void *)at);
            break;
        case FV_KEY_flag:
            fv_h5_put_flag(o, group, key->name, *(const bool *)(const void *)at);
            break;
        case FV_KEY_text:
            fv_h5_put_text(o, group, key->name, at);
            break;
        }
    }
}

static void put_info(Results *r, FvH5Id group, size_t job) {
    FvH5 *o = &r->h5;
    const FvJobRecord *record = &r->records[job];
    const FvJobInfo *info = &record->info;
    const FvDataInfo *data = r->data[job / r->study->seed_count];
    FvModelConfig model;
    FvJobState state = record->present ? info->state : FV_JOB_WAITING;
    fv_h5_put_int(o, group, "seed", (int64_t)r->study->seeds[job % r->study->seed_count]);
    put_config(o, group, &r->study->experiments[job / r->study->seed_count].config);
    if (fv_config_model(&r->study->experiments[job / r->study->seed_count].config, 1,
                        data && data->max_tokens ? data->max_tokens : 1, &model, NULL) == FV_OK)
        fv_h5_put_int(o, group, "hard_attn_k_effective", (int64_t)model.hard_attn_k);
    fv_h5_put_text(o, group, "data_sha256", data ? data->sha256 : "");
    fv_h5_put_text(o, group, "latents_used", data ? data->latents : "");
    fv_h5_put_text(o, group, "status", fv_job_state_name(state));
    fv_h5_put_text(o, group, "why", info->why);
    fv_h5_put_int(o, group, "steps_done", (int64_t)record->history.steps);
    fv_h5_put_int(o, group, "parameters", (int64_t)info->parameters);
    fv_h5_put_int(o, group, "trained", (int64_t)info->trained);
    fv_h5_put_text(o, group, "device", info->device);
    fv_h5_put_int(o, group, "ranks", (int64_t)info->ranks);
    fv_h5_put_real(o, group, "seconds", info->seconds);
    fv_h5_put_int(o, group, "restarts", (int64_t)info->restarts);
    fv_h5_put_real(o, group, "checkpoint_write_seconds", info->checkpoint_seconds_last);
    fv_h5_put_int(o, group, "checkpoint_bytes", (int64_t)info->checkpoint_bytes);
}

static void put_runs(Results *r) {
    FvH5 *o = &r->h5;
    const FvStudy *study = r->study;
    FvH5Id runs = fv_h5_group(o, o->file, "runs");
    for (size_t e = 0; e < study->experiment_count; e++) {
        FvH5Id experiment = fv_h5_group(o, runs, study->experiments[e].name);
        for (size_t s = 0; s < study->seed_count; s++) {
            char name[32];
            size_t job = e * study->seed_count + s;
            snprintf(name, sizeof name, "seed_%" PRIu64, study->seeds[s]);
            FvH5Id run = fv_h5_group(o, experiment, name);
            put_info(r, run, job);
            put_series(o, run, &r->records[job].history);
            put_evaluations(o, run, &r->records[job].history);
            put_attention(r, run, job);
            fv_h5_close_group(o, run);
        }
        fv_h5_close_group(o, experiment);
    }
    fv_h5_close_group(o, runs);
}

/* --- summary -------------------------------------------------------------------------------- */

static size_t job_count(const Results *r) {
    return r->study->experiment_count * r->study->seed_count;
}

/* Series `which` of all jobs, padded with NaN to `steps`. */
static void put_curves(Results *r, FvH5Id group, size_t which, const FvAxis *const axes[3],
                       double *table) {
    size_t steps = axes[2]->size;
    for (size_t j = 0; j < job_count(r); j++) {
        const FvHistory *h = &r->records[j].history;
        if (h->steps > 0)
            memcpy(table + j * steps, h->series[which], h->steps * sizeof *table);
        for (size_t i = h->steps; i < steps; i++)
            table[j * steps + i] = NAN;
    }
    fv_h5_column(&r->h5, group,
                 &(FvColumn){.name = series[which].name,
                             .unit = series[which].unit,
                             .text = series[which].text,
                             .kind = FV_H5_F64,
                             .data = table,
                             .axes = {axes[0], axes[1], axes[2]}});
}

/* One number per job: member `offset` of its FvSummary. */
static void put_number(Results *r, FvH5Id group, const FvAxis *const axes[3], Label label,
                       const FvSummary *summaries, size_t offset, double *table) {
    for (size_t j = 0; j < job_count(r); j++)
        table[j] = *(const double *)(const void *)((const char *)&summaries[j] + offset);
    fv_h5_column(&r->h5, group,
                 &(FvColumn){.name = label.name,
                             .unit = label.unit,
                             .text = label.text,
                             .kind = FV_H5_F64,
                             .data = table,
                             .axes = {axes[0], axes[1]}});
}

static void put_numbers(Results *r, FvH5Id group, const FvAxis *const axes[3],
                        const FvSummary *summaries, double *table) {
    char name[64], text[160];
    for (size_t i = 0; i < FV_SERIES_COUNT; i++) {
        snprintf(name, sizeof name, "%s_last200", series[i].name);
        snprintf(text, sizeof text, "mean over the last 200 steps: %s", series[i].text);
        put_number(r, group, axes, (Label){name, series[i].unit, text}, summaries,
                   offsetof(FvSummary, last) + i * sizeof(double), table);
    }
    for (size_t i = 0; i < FV_EVAL_COUNT; i++) {
        snprintf(name, sizeof name, "held_out_%s", evals[i].name);
        snprintf(text, sizeof text, "last evaluation, held-out mean: %s", evals[i].text);
        put_number(r, group, axes, (Label){name, evals[i].unit, text}, summaries,
                   offsetof(FvSummary, held_out) + i * sizeof(double), table);
    }
    put_number(r, group, axes,
               (Label){"held_out_ratio", "1", "held_out_loss_fine / held_out_loss_coarse"},
               summaries, offsetof(FvSummary, held_out_ratio), table);
    put_number(r, group, axes,
               (Label){"held_out_ratio_chosen", "1",
                       "held-out ratio over frames from the third on, which chosen queries read"},
               summaries, offsetof(FvSummary, held_out_ratio_chosen), table);
    put_number(r, group, axes,
               (Label){"held_out_step", "1", "training steps done before the last evaluation"},
               summaries, offsetof(FvSummary, held_out_step), table);
}

static void put_status(Results *r, FvH5Id group, const FvAxis *const axes[3], const char **names) {
    for (size_t j = 0; j < job_count(r); j++)
        names[j] =
            fv_job_state_name(r->records[j].present ? r->records[j].info.state : FV_JOB_WAITING);
    fv_h5_column(&r->h5, group,
                 &(FvColumn){.name = "status",
                             .text = "waiting, running, finished, stopped or failed",
                             .kind = FV_H5_TEXT,
                             .data = names,
                             .axes = {axes[0], axes[1]}});
}

static void put_tables(Results *r, FvH5Id group, const FvAxis *const axes[3]) {
    size_t jobs = job_count(r), most = axes[2]->size > 1 ? axes[2]->size : 1;
    FvSummary *summaries = calloc(jobs, sizeof *summaries);
    double *table = malloc(fv_mul3(jobs, most, sizeof *table));
    const char **names = calloc(jobs, sizeof *names);
    if (summaries && table && names) {
        for (size_t j = 0; j < jobs; j++)
            fv_summary(&r->records[j].history, &summaries[j]);
        put_status(r, group, axes, names);
        put_numbers(r, group, axes, summaries, table);
        for (size_t i = 0; i < FV_SERIES_COUNT; i++)
            put_curves(r, group, i, axes, table);
    } else {
        fv_h5_fail(&r->h5, "out of memory for the summary");
    }
    free(summaries);
    free(table);
    free(names);
}

static void put_summary(Results *r) {
    FvH5 *o = &r->h5;
    const FvStudy *study = r->study;
    size_t steps = 0;
    for (size_t j = 0; j < job_count(r); j++)
        if (r->records[j].history.steps > steps)
            steps = r->records[j].history.steps;
    const char **names = calloc(study->experiment_count, sizeof *names);
    if (!names)
        fv_h5_fail(o, "out of memory for the summary");
    for (size_t e = 0; names && e < study->experiment_count; e++)
        names[e] = study->experiments[e].name;
    FvH5Id group = fv_h5_group(o, o->file, "summary");
    FvAxis experiment = put_axis(o, group, (Label){"experiment", NULL, "experiment"}, FV_H5_TEXT,
                                 study->experiment_count, names);
    FvAxis seed = put_axis(o, group, (Label){"seed", "1", "seed of weights and data order"},
                           FV_H5_U64, study->seed_count, study->seeds);
    FvAxis step = put_count(o, group, (Label){"step", "1", "training step"}, steps, 1);
    const FvAxis *axes[] = {&experiment, &seed, &step};
    put_tables(r, group, axes);
    fv_h5_close_axis(o, &experiment);
    fv_h5_close_axis(o, &seed);
    fv_h5_close_axis(o, &step);
    fv_h5_close_group(o, group);
    free(names);
}

/* --- root ----------------------------------------------------------------------------------- */

/* Sources or sums of the study's data sets, one line each, every one once. */
static void put_data(Results *r, const char *name, bool sums) {
    size_t size = fv_add(fv_mul(r->study->experiment_count, FV_TEXT + 1), 1), used = 0;
    char *text = calloc(1, size);
    if (!text) {
        fv_h5_fail(&r->h5, "out of memory");
        return;
    }
    for (size_t e = 0; e < r->study->experiment_count; e++) {
        bool known = !r->data[e];
        for (size_t before = 0; before < e && !known; before++)
            known = r->data[before] && strcmp(r->data[before]->sha256, r->data[e]->sha256) == 0 &&
                    strcmp(r->data[before]->source, r->data[e]->source) == 0;
        if (!known)
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? "\n" : "",
                                     sums ? r->data[e]->sha256 : r->data[e]->source);
    }
    fv_h5_put_text(&r->h5, r->h5.file, name, text);
    free(text);
}

static void put_root(Results *r) {
    FvH5 *o = &r->h5;
    const FvProvenance *p = r->provenance;
    char *resolved = fv_study_format(r->study);
    if (!resolved)
        fv_h5_fail(o, "out of memory");
    fv_h5_put_text(o, o->file, "format", "fovea-results");
    fv_h5_put_int(o, o->file, "format_version", FORMAT_VERSION);
    fv_h5_put_text(o, o->file, "study", r->study->name);
    fv_h5_put_text(o, o->file, "study_text", resolved ? resolved : "");
    fv_h5_put_text(o, o->file, "study_source", r->study->source ? r->study->source : "");
    free(resolved);
    fv_h5_put_text(o, o->file, "command_line", p->command_line);
    fv_h5_put_text(o, o->file, "revision", p->revision);
    fv_h5_put_text(o, o->file, "libraries", p->libraries);
    fv_h5_put_text(o, o->file, "hosts", p->hosts);
    fv_h5_put_text(o, o->file, "start_time", p->start_time);
    fv_h5_put_text(o, o->file, "end_time", p->end_time);
    fv_h5_put_text(o, o->file, "weights", p->weights);
    fv_h5_put_text(o, o->file, "weights_sha256", p->weights_sha256);
    put_data(r, "data", false);
    put_data(r, "data_sha256", true);
}

FvStatus fv_results_write(const char *out_dir, const FvStudy *study, const FvJobRecord *records,
                          const uint8_t *const *map_pixels, const FvDataInfo *const *data,
                          const FvProvenance *provenance, const FvFence *fence, FvError *err) {
    char path[FV_PATH];
    FV_TRY(fv_path(err, path, sizeof path, "%s/results.h5", out_dir));
    Results r = {.study = study,
                 .records = records,
                 .map_pixels = map_pixels,
                 .data = data,
                 .provenance = provenance,
                 .shown = calloc(study->experiment_count, sizeof *r.shown)};
    if (!r.shown)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", path);
    void *image = NULL;
    size_t size = 0;
    fv_hdf5_lock();
    fv_h5_begin(&r.h5);
    put_root(&r);
    put_runs(&r);
    put_summary(&r);
    FvStatus status = fv_h5_finish(&r.h5, path, &image, &size, err);
    fv_hdf5_unlock();
    free(r.shown);
    if (status == FV_OK)
        status = fv_file_replace(path, &(FvBytes){image, size}, 1, fence, err);
    free(image);
    return status;
}
