/* `fovea latents`: computes /latents of a clips.h5 with TAESD's encoder. */
#ifndef FV_RUN_LATENTS_COMMAND_H
#define FV_RUN_LATENTS_COMMAND_H

#include "base/status.h"

/* argv[0] is "latents". Work is kept in clips.h5.latents-partial and goes on from there after a
 * signal (FV_STOPPED) or a kill; clips.h5 is replaced whole at the end, or stays as it was.
 * FV_USAGE when other weights' latents are there without --replace, or others' work is kept. */
FvStatus fv_latents_command(int argc, char **argv, FvError *err);

#endif
