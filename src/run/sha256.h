/* SHA-256 (FIPS 180-4), for the provenance of data and weights. */
#ifndef FV_RUN_SHA256_H
#define FV_RUN_SHA256_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { FV_SHA256_TEXT = 65 }; /* 64 hexadecimal digits and the end */

typedef struct FvSha256 {
    uint32_t state[8];
    uint64_t bytes;    /* taken so far */
    uint8_t block[64]; /* the last bytes % 64 of them */
} FvSha256;

void fv_sha256_start(FvSha256 *);
void fv_sha256_add(FvSha256 *, const void *data, size_t bytes);
/* Ends the sum; the state is spent. */
void fv_sha256_text(FvSha256 *, char out[FV_SHA256_TEXT]);

/* Sum of a file, streamed. FV_DATA with the reason when it cannot be read. */
FvStatus fv_sha256_file(const char *path, char out[FV_SHA256_TEXT], FvError *err);

#endif
