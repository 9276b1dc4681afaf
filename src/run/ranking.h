/* The study's ranking on the terminal, in the published study's form. */
#ifndef FV_RUN_RANKING_H
#define FV_RUN_RANKING_H

#include "run/results.h"

/* Prints the experiments by their ratio (mean of the per-step ratios over the last 200 training
 * steps, averaged over seeds), best first, with the last held-out evaluation beside it; then what
 * the numbers cannot show. records: experiment e, seed s at e * seed_count + s. */
void fv_print_ranking(const FvStudy *, const FvJobRecord *records, const char *out);

/* `fovea status OUT`: every job's state, step, rate and last error, from the files alone. */
FvStatus fv_print_status(const char *out, FvError *err);

#endif
