/* One job's numbers for tables: means over the end of training, and the last evaluation. */
#ifndef FV_RUN_SUMMARY_H
#define FV_RUN_SUMMARY_H

#include "run/history.h"

enum {
    FV_SUMMARY_STEPS = 200,
    FV_CHOSEN_FRAME = 2 /* first frame, from 0, that a chosen query reads */
};

/* What has not been measured is NaN. */
typedef struct FvSummary {
    size_t steps;                   /* behind `last`: min(FV_SUMMARY_STEPS, steps done) */
    double last[FV_SERIES_COUNT];   /* means of the series over these steps */
    double held_out[FV_EVAL_COUNT]; /* last evaluation: means over clips and frames */
    double held_out_ratio;          /* mean loss_fine / mean loss_coarse */
    double held_out_ratio_chosen;   /* the same over frames from FV_CHOSEN_FRAME on */
    double held_out_step;           /* steps done before that evaluation */
} FvSummary;

void fv_summary(const FvHistory *, FvSummary *out);

#endif
