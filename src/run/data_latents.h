/* The dataset /latents of a clips.h5: what it was made with, and adding it. */
#ifndef FV_RUN_DATA_LATENTS_H
#define FV_RUN_DATA_LATENTS_H

#include <stdbool.h>
#include <stddef.h>

#include "run/data_file.h"
#include "run/sha256.h"

/* Whether the open file has /latents, and the SHA-256 of the autoencoder's file that made them: ""
 * where the dataset does not tell. */
FvStatus fv_latents_there(const FvClipFile *, bool *there, char sha256[FV_SHA256_TEXT],
                          FvError *err);

typedef struct FvLatents {
    size_t clips, frames, side; /* [clips, frames, 4, side, side] */
    const char *vae;            /* name of the autoencoder's file; an attribute */
    const char *vae_sha256;     /* and its sum */
    /* Gives one clip [frames, 4, side, side]; valid until the next call. */
    FvStatus (*read)(void *context, size_t clip, const float **out, FvError *err);
    void *context;
} FvLatents;

/* Writes `temporary`: the file `path`, whose sum must be `sha256`, with /latents added or replaced.
 * On failure there is no `temporary`; FV_DATA when the file has changed, FV_IO when the disk is
 * full. */
FvStatus fv_latents_write(const char *path, const char *sha256, const char *temporary,
                          const FvLatents *, FvError *err);

#endif
