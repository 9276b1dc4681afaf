/* `fovea prepare`: a clips.h5 from videos, or from the procedural source. */
#ifndef FV_RUN_PREPARE_H
#define FV_RUN_PREPARE_H

#include "base/status.h"

/* argv[0] is "prepare". FV_USAGE for the command line, FV_DATA when no video gives a clip, FV_IO
 * when the file cannot be written, FV_STOPPED after Ctrl-C or TERM; in each of these cases nothing
 * has changed under the output's name. Uses getopt_long's state and blocks INT, TERM and HUP while
 * it works: call it from main, with no other thread about. */
FvStatus fv_prepare(int argc, char **argv, FvError *err);

#endif
