/* What the sources of safetensors files share. */
#ifndef FV_RUN_SAFETENSORS_PARTS_H
#define FV_RUN_SAFETENSORS_PARTS_H

#include <jansson.h>

#include "run/safetensors.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are stored little-endian");

/* A file: the header's length, the header, data. */
enum { LENGTH_BYTES = 8, MAX_HEADER = 100 * 1000 * 1000 };

/* One mapped file. */
typedef struct Shard {
    const char *name; /* in the index; the path when there is none */
    char *path;
    unsigned char *map; /* the whole file, or NULL */
    size_t size;
    const unsigned char *data; /* behind the header */
    size_t header_size, data_size;
    json_t *header; /* owns the tensors' names and the metadata */
} Shard;

struct FvTensorFile {
    char *path; /* of the index, when there is one */
    json_t *index;
    Shard *shards;
    size_t shard_count;
    const json_t *metadata; /* of the header or the index; NULL: none */
    FvTensor *tensors;
    const FvTensor **by_name; /* sorted */
    size_t count;
};

#endif
