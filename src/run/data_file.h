/* Reading a clips.h5: checks against the study first, then clips one by one or all at once. */
#ifndef FV_RUN_DATA_FILE_H
#define FV_RUN_DATA_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/real.h"
#include "base/status.h"
#include "run/config.h"

typedef struct FvClipFile {
    char path[FV_TEXT];
    size_t clips, frames, size; /* size: pixels per side */
    size_t max_tokens;          /* 0 unless the study wants captions */
    bool has_latents;           /* the study takes its targets from /latents */
    int64_t file, pixels, latents, tokens, token_count, split; /* HDF5's identifiers, or -1 */
    float *scratch; /* one clip of /latents as it lies in the file; used under the HDF5 lock */
} FvClipFile;

/* Nothing is open: may be closed. */
FvClipFile fv_clipfile_closed(void);

/* Opens the file that config->data names and compares type and shape of every dataset that the
 * study reads with what it needs. FV_DATA with file, dataset, what is there and what is needed;
 * nothing is open then. */
FvStatus fv_clipfile_open(const FvConfig *config, FvClipFile *out, FvError *err);
/* The frames alone, of any number of clips, frames and pixels that a study could use. */
FvStatus fv_clipfile_open_frames(const char *path, FvClipFile *out, FvError *err);
void fv_clipfile_close(FvClipFile *);

/* split [clips]: 0 training, 1 held-out; any other value in the file is FV_DATA. */
FvStatus fv_clipfile_split(const FvClipFile *, int32_t *split, FvError *err);

/* tokens [clips, max_tokens], count [clips]; ids outside 0 .. vocabulary - 1 and counts above
 * max_tokens are FV_DATA. Unused places become 0. */
FvStatus fv_clipfile_tokens(const FvClipFile *, size_t vocabulary, int32_t *tokens, int32_t *count,
                            FvError *err);

/* pixels [count, frames, size, size, 3] of clips first .. first + count - 1. */
FvStatus fv_clipfile_pixels(const FvClipFile *, size_t first, size_t count, uint8_t *pixels,
                            FvError *err);

/* latents [frames, size/8, size/8, 4] of one clip: channels last. */
FvStatus fv_clipfile_latents(const FvClipFile *, size_t clip, real *latents, FvError *err);

#endif
