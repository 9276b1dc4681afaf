/* results.h5: the whole study as one closed, self-contained HDF5 file, rewritten under a temporary
 * name and renamed, so that a reader sees a valid file at any moment. docs/results.md describes
 * its contents. */
#ifndef FV_RUN_RESULTS_H
#define FV_RUN_RESULTS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "run/config.h"
#include "run/data.h"
#include "run/history.h"

typedef struct FvProvenance { /* root attributes */
    const char *command_line, *revision, *hosts /* one line per rank */,
        *start_time /* ISO 8601 UTC */;
    const char *end_time;                 /* "" while running */
    const char *weights, *weights_sha256; /* files of start values, "" for none */
    const char *libraries;                /* versions, one line each */
} FvProvenance;

typedef struct FvJobRecord { /* experiment e, seed s stands at e * seed_count + s */
    FvHistory history;       /* steps 0 when nothing is measured yet */
    FvJobInfo info;
    bool present; /* false: waiting, history is empty and has no capacity */
} FvJobRecord;

/* Writes OUT/results.h5; FV_IO leaves an earlier one as it was. pixels: the frames of the clips
 * with maps, per data set of the study: every experiment's `map_pixels[e]` is [map_clips, frames,
 * size, size, 3] or NULL (no maps); experiments that share the pointer share the dataset in the
 * file (hard link). data[e] may be NULL while the data is not known; pixels need it. */
FvStatus fv_results_write(const char *out_dir, const FvStudy *, const FvJobRecord *records,
                          const uint8_t *const *map_pixels, const FvDataInfo *const *data,
                          const FvProvenance *, const FvFence *, FvError *err);

#endif
