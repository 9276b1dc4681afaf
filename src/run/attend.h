/* `fovea attend`: where a trained experiment looks in a video. */
#ifndef FV_RUN_ATTEND_H
#define FV_RUN_ATTEND_H

#include "base/status.h"

/* argv[0] is "attend". Reads the final weights of OUT/NAME (its first seed, or OUT/NAME/seed_N),
 * cuts the video into clips of the model's frames and writes an HDF5 file with frames and attention
 * of both passes, laid out as docs/analysis.md says. FV_USAGE: no such run, or one without vision;
 * FV_DATA: no weights yet, or a video that cannot be read or is too short. */
FvStatus fv_attend(int argc, char **argv, FvError *err);

#endif
