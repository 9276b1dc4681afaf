/* Writing a clips.h5. It grows under a temporary name; only a finished file gets its own. */
#ifndef FV_RUN_DATA_WRITER_H
#define FV_RUN_DATA_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "run/data.h"

typedef struct FvClipWriter FvClipWriter;

typedef struct FvClipSpec {
    size_t frames, size;          /* of every clip: T, and S pixels per side */
    size_t stride;                /* frames of the video per frame of the clip; an attribute */
    size_t max_tokens;            /* room for a caption's tokens; 0: no captions */
    size_t vocabulary;            /* the tokens' ids lie below; an attribute, as are the next two */
    const char *tokenizer;        /* the file's name, or "bytes" */
    const char *tokenizer_sha256; /* "" for bytes */
    bool labels;                  /* /masks and /objects too */
    uint64_t seed;                /* of the split or the drawing; an attribute */
    const char *crop;             /* "center", "none"; an attribute */
    const char *made_from;        /* "videos", "procedural"; an attribute */
} FvClipSpec;

/* Creates `path`.tmp-PID. FV_IO with the reason when that cannot be. */
FvStatus fv_clipwriter_create(const char *path, const FvClipSpec *, FvClipWriter **out,
                              FvError *err);

typedef struct FvClip {
    const uint8_t *pixels; /* [frames, size, size, 3] */
    const char *source;    /* where it comes from */
    const char *caption;   /* or NULL; it and the tokens need a spec with tokens */
    const int32_t *tokens; /* [token_count], max_tokens at the most */
    size_t token_count;
    const FvClipLabels *labels; /* where the spec wants them */
} FvClip;

/* Appends one clip; everything is written or copied. */
FvStatus fv_clipwriter_add(FvClipWriter *, const FvClip *, FvError *err);

/* Writes split [clips] (0 training, 1 held-out) and what describes the clips, syncs and renames.
 * The writer is gone afterwards, and on failure the temporary file too. */
FvStatus fv_clipwriter_finish(FvClipWriter *, const uint8_t *split, FvError *err);

/* Ends without a file under `path`. NULL is allowed. */
void fv_clipwriter_abandon(FvClipWriter *);

#endif
