/* Captions of videos: read from a text file, turned into tokens, found by the video's name. */
#ifndef FV_RUN_CAPTIONS_H
#define FV_RUN_CAPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "run/sha256.h"

enum { FV_BYTE_TOKENS = 256 }; /* vocabulary of texts whose tokens are their UTF-8 bytes */

typedef struct FvCaption {
    char *name, *text; /* of the video; UTF-8 */
    size_t line;       /* of the file, from 1 on */
    int32_t *tokens;   /* [token_count]; NULL until fv_captions_tokenize */
    size_t token_count;
    bool used; /* fv_captions_find has returned it */
} FvCaption;

typedef struct FvCaptions {
    const char *path;
    FvCaption *items; /* [count], by name */
    size_t count, capacity;
    size_t vocabulary;                     /* token ids lie below */
    char tokenizer_sha256[FV_SHA256_TEXT]; /* "" for bytes */
} FvCaptions;

/* Reads lines `name TAB caption`, or JSON lines: objects with "video" or "file" and "caption" or
 * "text"; a file whose first character is { holds JSON lines. Empty lines are passed over. FV_DATA
 * with file and line for anything else. The path has to outlive the captions; what *out holds is
 * freed by fv_captions_free, also after a failure. */
FvStatus fv_captions_read(const char *path, FvCaptions *out, FvError *err);

/* Makes the tokens: bytes, or with a tokenizer.json those of the Python package `tokenizers`, which
 * scripts/tokenize_captions.py calls under $PYTHON or python3. FV_DATA when a caption has more than
 * max_tokens, when the tokenizer is none, or when Python or the package is missing. INT, TERM and
 * HUP, where they are blocked, end the wait: the caller asks for them first. */
FvStatus fv_captions_tokenize(FvCaptions *, const char *tokenizer, size_t max_tokens, FvError *err);

/* The caption of a video, or NULL. */
const FvCaption *fv_captions_find(FvCaptions *, const char *name);

void fv_captions_free(FvCaptions *);

#endif
