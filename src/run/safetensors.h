/* Safetensors files: memory-mapped reading with every check of the format, of one file or of the
 * shards that an index names, and writing by temporary name, sync and rename. */
#ifndef FV_RUN_SAFETENSORS_H
#define FV_RUN_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/real.h"
#include "base/status.h"

/* Elements of the types before FV_BOOL can be read; the others have a size and a name, so that a
 * file that also holds such tensors can be used. */
typedef enum FvType {
    FV_F64,
    FV_F32,
    FV_F16,
    FV_BF16,
    FV_I64,
    FV_I32,
    FV_U8,
    FV_BOOL,
    FV_I8,
    FV_I16,
    FV_U16,
    FV_U32,
    FV_U64,
    FV_F8_E4M3,
    FV_F8_E5M2,
    FV_F8_E8M0,
    FV_F8_E4M3FNUZ,
    FV_F8_E5M2FNUZ,
    FV_C64,
    FV_TYPES
} FvType;

size_t fv_type_size(FvType);
const char *fv_type_name(FvType); /* as in files: "F64", "BF16", ... */

enum { FV_MAX_RANK = 8 };

typedef struct FvTensor {
    const char *name;
    FvType type;
    size_t rank, shape[FV_MAX_RANK];
    const void *data; /* reading: into the mapped file, unaligned; writing: the caller's */
    size_t count;     /* product of shape */
} FvTensor;

size_t fv_tensor_bytes(const FvTensor *);

typedef struct FvTensorFile FvTensorFile;

/* Opens a file, or the shards beside an index (a path that ends in ".index.json") as if they were
 * one file. FV_DATA with path, tensor and what is wrong for a file that is missing, cut or
 * malformed, and for shards that hold not exactly what the index says. The tensors, their names
 * and the metadata belong to the file and live until it is closed. */
FvStatus fv_tensors_open(const char *path, FvTensorFile **out, FvError *err);
void fv_tensors_close(FvTensorFile *); /* NULL: nothing to do */
const char *fv_tensors_path(const FvTensorFile *);
/* The files read: one, or the index and its shards. */
size_t fv_tensors_files(const FvTensorFile *);
const char *fv_tensors_file(const FvTensorFile *, size_t index);
size_t fv_tensors_count(const FvTensorFile *);
/* In the order of their data; shard after shard. */
const FvTensor *fv_tensors_at(const FvTensorFile *, size_t index);
const FvTensor *fv_tensors_find(const FvTensorFile *, const char *name); /* NULL: not there */
/* Of the file, or of the index; NULL: not there, or no text. */
const char *fv_tensors_metadata(const FvTensorFile *, const char *key);

/* Whether the path names an index, or names or begins like a safetensors file. */
bool fv_tensors_recognise(const char *path);

/* FV_DATA, naming the file, when the tensor's elements cannot be read: their type is none of
 * those before FV_BOOL. */
FvStatus fv_tensors_readable(const FvTensorFile *, const FvTensor *, FvError *err);

/* Elements first .. first + count of a readable tensor, converted from the stored type. Exact,
 * except that integers beyond 2^53 are rounded, and what `real` cannot hold. */
void fv_tensor_read(const FvTensor *, size_t first, size_t count, double *out);
void fv_tensor_read_real(const FvTensor *, size_t first, size_t count, real *out);

typedef struct FvMeta {
    const char *key, *value;
} FvMeta;

/* Writes path by temporary name, sync and rename: it ends whole, or stays as it was. FV_IO naming
 * path and the system's reason. Tensors of larger elements come first, so that all are aligned. A
 * metadata key "checksum" is added: XXH3-64 in hexadecimal over header (with zeros for these
 * digits) and data. Metadata that is not UTF-8 is stored with '?' in place of the odd bytes. */
FvStatus fv_tensors_write(const char *path, const FvTensor *tensors, size_t count,
                          const FvMeta *meta, size_t meta_count, FvError *err);
/* The same in a folder that has one writer (run/fence.h). */
struct FvFence;
FvStatus fv_tensors_replace(const char *path, const FvTensor *tensors, size_t count,
                            const FvMeta *meta, size_t meta_count, const struct FvFence *,
                            FvError *err);

/* FV_DATA when a file (any shard) carries a "checksum" that its contents do not have; a file
 * without one passes. */
FvStatus fv_tensors_verify(const FvTensorFile *, FvError *err);

#endif
