/* Frames of a video file as square RGB pictures (FFmpeg's libraries). */
#ifndef FV_RUN_VIDEO_H
#define FV_RUN_VIDEO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct FvVideo FvVideo;

/* FV_USAGE with the packages to install when this build has no FFmpeg. */
FvStatus fv_video_available(FvError *err);

/* Opens the best video stream of a local file. center: the largest centred square, else the whole
 * frame squeezed into one. FV_DATA with the reason alone (the caller knows the name) when there is
 * nothing to read. */
FvStatus fv_video_open(const char *path, size_t size, bool center, FvVideo **out, FvError *err);

/* The next frame in order of display: pixels [size, size, 3], or NULL to pass over it. *end: there
 * is none. FV_DATA: damaged from here on. Transparent parts are white, turned videos upright. */
FvStatus fv_video_next(FvVideo *, uint8_t *pixels, bool *end, FvError *err);

void fv_video_close(FvVideo *);

#endif
