#include "run/ranking.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>

#include "run/coordinator.h"
#include "run/fence.h"
#include "run/files.h"
#include "run/summary.h"

typedef struct Row {
    const char *name;
    size_t seeds, steps; /* finished seeds; steps behind the means */
    double ratio, similarity, fine, coarse, copy, other, held_ratio, chosen;
} Row;

static Row row_of(const FvStudy *study, const FvJobRecord *records, size_t e) {
    Row r = {.name = study->experiments[e].name};
    for (size_t s = 0; s < study->seed_count; s++) {
        const FvJobRecord *j = &records[e * study->seed_count + s];
        if (!j->present || j->history.steps == 0)
            continue;
        FvSummary m;
        fv_summary(&j->history, &m);
        r.seeds++;
        r.steps = m.steps;
        r.ratio += m.last[FV_SERIES_ratio];
        r.similarity += m.last[FV_SERIES_feature_sim];
        r.fine += m.held_out[FV_EVAL_loss_fine];
        r.coarse += m.held_out[FV_EVAL_loss_coarse];
        r.copy += m.held_out[FV_EVAL_loss_copy];
        r.other += m.held_out[FV_EVAL_loss_fine_other];
        r.held_ratio += m.held_out_ratio;
        r.chosen += m.held_out_ratio_chosen;
    }
    double *means[] = {&r.ratio, &r.similarity, &r.fine,       &r.coarse,
                       &r.copy,  &r.other,      &r.held_ratio, &r.chosen};
    for (size_t i = 0; i < sizeof means / sizeof *means; i++)
        *means[i] = r.seeds ? *means[i] / (double)r.seeds : NAN;
    return r;
}

/* Best first; what has no ratio comes last. */
static int by_ratio(const void *a, const void *b) {
    double x = ((const Row *)a)->ratio, y = ((const Row *)b)->ratio;
    if (isnan(x) || isnan(y))
        return isnan(x) - isnan(y);
    return (x > y) - (x < y);
}

void fv_print_ranking(const FvStudy *study, const FvJobRecord *records, const char *out) {
    Row *rows = calloc(study->experiment_count, sizeof *rows);
    if (!rows)
        return;
    for (size_t e = 0; e < study->experiment_count; e++)
        rows[e] = row_of(study, records, e);
    qsort(rows, study->experiment_count, sizeof *rows, by_ratio);
    printf("\n%-4s %-20s %8s %11s | %9s %9s %9s %9s %8s %8s\n", "", "", "training", "", "held-out",
           "", "", "", "", "");
    printf("%-4s %-20s %8s %11s | %9s %9s %9s %9s %8s %8s\n", "rank", "experiment", "ratio",
           "feature sim", "fine", "coarse", "other", "copy", "ratio", "chosen");
    size_t rank = 0, seeds = 0;
    for (size_t i = 0; i < study->experiment_count; i++) {
        const Row *r = &rows[i];
        seeds = r->seeds > seeds ? r->seeds : seeds;
        if (r->seeds == 0) {
            printf("%-4s %-20s nothing measured\n", "-", r->name);
            continue;
        }
        printf("%-4zu %-20s %8.4f %11.4f | %9.4f %9.4f %9.4f %9.4f %8.4f %8.4f\n", ++rank, r->name,
               r->ratio, r->similarity, r->fine, r->coarse, r->other, r->copy, r->held_ratio,
               r->chosen);
    }
    printf("\nratio = loss_fine / loss_coarse, below 1 the fine pass predicts better; training: "
           "mean of the last %d steps; chosen: frames that read a chosen query;\nother: fine pass "
           "with the queries chosen for another clip; copy: the previous latent as prediction.\n",
           FV_SUMMARY_STEPS);
    if (seeds < 2)
        printf("One seed: differences this small may be chance. Add seeds (seeds=0,1,2,3,4).\n");
    printf("%s/results.h5\n", out);
    free(rows);
}

static double seconds_since(const char *path) {
    struct stat info;
    struct timespec now;
    if (stat(path, &info) != 0 || clock_gettime(CLOCK_REALTIME, &now) != 0)
        return NAN;
    return (double)(now.tv_sec - info.st_mtim.tv_sec);
}

/* A run that was killed leaves its jobs "running": the age of what it wrote last tells. */
static void print_job(const char *name, uint64_t seed, const FvJobRecord *r, const char *path) {
    size_t done = r->present ? r->history.steps : 0;
    double rate = 0;
    size_t n = done < 50 ? done : 50;
    for (size_t i = done - n; i < done; i++)
        rate += r->history.series[FV_SERIES_step_seconds][i];
    rate = rate > 0 ? (double)n / rate : 0;
    printf("%-20s seed %-4llu %-9s %7zu/%-7zu", name, (unsigned long long)seed,
           fv_job_state_name(r->present ? r->info.state : FV_JOB_WAITING), done,
           r->present ? r->history.capacity_steps : 0);
    if (rate > 0)
        printf(" %8.1f steps/s", rate);
    if (rate > 0 && r->info.state == FV_JOB_RUNNING)
        printf(" %8.0f s left, written %.0f s ago",
               (double)(r->history.capacity_steps - done) / rate, seconds_since(path));
    printf("%s%s\n", r->present && r->info.why[0] ? "  " : "", r->present ? r->info.why : "");
}

FvStatus fv_print_status(const char *out, FvError *err) {
    char path[FV_PATH], owner[FV_OWNER];
    size_t states[FV_JOB_STATES] = {0};
    FvStudy study;
    FV_TRY(fv_path(err, path, sizeof path, "%s/study.yaml", out));
    FV_TRY(fv_study_load(path, NULL, 0, "small", &study, err));
    FvStatus status = FV_OK;
    size_t jobs = study.experiment_count * study.seed_count;
    for (size_t j = 0; status == FV_OK && j < jobs; j++) {
        char folder[FV_PATH];
        FvJobRecord r = {0};
        fv_job_folder(out, &study, j, folder, sizeof folder);
        status = fv_path(err, path, sizeof path, "%s/history.safetensors", folder);
        if (status == FV_OK)
            status = fv_history_load(path, &r.history, &r.info, &r.present, err);
        if (status != FV_OK)
            break;
        states[r.present ? r.info.state : FV_JOB_WAITING]++;
        print_job(study.experiments[j / study.seed_count].name, study.seeds[j % study.seed_count],
                  &r, path);
        if (r.present)
            fv_history_free(&r.history);
    }
    fv_study_free(&study);
    FV_TRY(status);
    printf("%zu jobs:", jobs);
    for (int i = 0; i < FV_JOB_STATES; i++)
        printf("%s %zu %s", i ? "," : "", states[i], fv_job_state_name((FvJobState)i));
    fv_fence_describe(out, owner, sizeof owner);
    printf("\nlast started: %s\n", owner);
    return FV_OK;
}
