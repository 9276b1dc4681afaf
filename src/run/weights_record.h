/* Which files a study's start values came from, and their sums: for results.h5, and so that what is
 * in OUT goes on from the same weights. */
#ifndef FV_RUN_WEIGHTS_RECORD_H
#define FV_RUN_WEIGHTS_RECORD_H

#include "run/config.h"

typedef struct FvWeightsRecord {
    char *paths, *sums; /* one a line each, in the same order; "" for random weights */
} FvWeightsRecord;

/* Reads all files of all experiments (the shards behind an index, too), each once. */
FvStatus fv_weights_record_make(const FvStudy *, FvWeightsRecord *, FvError *err);
void fv_weights_record_free(FvWeightsRecord *);

/* OUT/weights.sha256 has lines of sha256sum. FV_USAGE when a file has another sum there: a finished
 * job must not stand beside one that starts from other weights under the same name. */
FvStatus fv_weights_record_check(const FvWeightsRecord *, const char *out, FvError *err);
FvStatus fv_weights_record_keep(const FvWeightsRecord *, const char *out, FvError *err);

#endif
