#include "run/summary.h"

#include <math.h>

static double mean(const double *values, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += values[i];
    return sum / (double)n;
}

/* Mean of values [clips, frames] over frames first .. frames - 1. */
static double frames_mean(const double *values, size_t clips, size_t frames, size_t first) {
    double sum = 0;
    for (size_t i = 0; i < clips; i++)
        for (size_t t = first; t < frames; t++)
            sum += values[i * frames + t];
    return first < frames ? sum / (double)(clips * (frames - first)) : NAN;
}

static void summarise_evaluation(const FvHistory *h, FvSummary *out) {
    size_t last = (h->evals - 1) * h->clips * h->frames;
    const double *fine = h->eval[FV_EVAL_loss_fine] + last;
    const double *coarse = h->eval[FV_EVAL_loss_coarse] + last;
    for (size_t i = 0; i < FV_EVAL_COUNT; i++)
        out->held_out[i] = frames_mean(h->eval[i] + last, h->clips, h->frames, 0);
    out->held_out_ratio = out->held_out[FV_EVAL_loss_fine] / out->held_out[FV_EVAL_loss_coarse];
    out->held_out_ratio_chosen = frames_mean(fine, h->clips, h->frames, FV_CHOSEN_FRAME) /
                                 frames_mean(coarse, h->clips, h->frames, FV_CHOSEN_FRAME);
    out->held_out_step = (double)h->eval_step[h->evals - 1];
}

void fv_summary(const FvHistory *h, FvSummary *out) {
    size_t n = h->steps < FV_SUMMARY_STEPS ? h->steps : FV_SUMMARY_STEPS;
    out->steps = n;
    for (size_t i = 0; i < FV_SERIES_COUNT; i++)
        out->last[i] = n > 0 ? mean(h->series[i] + h->steps - n, n) : NAN;
    for (size_t i = 0; i < FV_EVAL_COUNT; i++)
        out->held_out[i] = NAN;
    out->held_out_ratio = out->held_out_ratio_chosen = out->held_out_step = NAN;
    if (h->evals > 0)
        summarise_evaluation(h, out);
}
