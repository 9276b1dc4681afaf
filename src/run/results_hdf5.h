/* Building an HDF5 file in memory: groups, attributes, coordinates ("axes": dimension scales) and
 * columns on them. The first failure sticks: later calls do nothing and fv_h5_finish tells it.
 * fv_hdf5_lock is held from fv_h5_begin to the end of fv_h5_finish. */
#ifndef FV_RUN_RESULTS_HDF5_H
#define FV_RUN_RESULTS_HDF5_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef int64_t FvH5Id; /* hid_t */

typedef struct FvH5 {
    FvH5Id file, text, scalar; /* file; types that every call needs */
    bool failed;
    char why[256]; /* of the first failure */
} FvH5;

typedef enum FvH5Kind {
    FV_H5_F64,
    FV_H5_F32,
    FV_H5_I64,
    FV_H5_U64,
    FV_H5_U8,
    FV_H5_TEXT /* data: const char *[], UTF-8 */
} FvH5Kind;

void fv_h5_begin(FvH5 *);
/* Closes the file; *image is malloc'ed, the caller's, *size bytes. FV_IO naming `path`. */
FvStatus fv_h5_finish(FvH5 *, const char *path, void **image, size_t *size, FvError *err);

/* For failures outside HDF5. */
void fv_h5_fail(FvH5 *, const char *why);

FvH5Id fv_h5_group(FvH5 *, FvH5Id parent, const char *name);
FvH5Id fv_h5_open_group(FvH5 *, FvH5Id parent, const char *path);
void fv_h5_close_group(FvH5 *, FvH5Id group);
/* A second name for what is at from/name: to/name. */
void fv_h5_link(FvH5 *, FvH5Id from, FvH5Id to, const char *name);

void fv_h5_put_text(FvH5 *, FvH5Id object, const char *name, const char *text);
void fv_h5_put_int(FvH5 *, FvH5Id object, const char *name, int64_t value);
void fv_h5_put_real(FvH5 *, FvH5Id object, const char *name, double value);
void fv_h5_put_flag(FvH5 *, FvH5Id object, const char *name, bool value); /* int8, 0 or 1 */

typedef struct FvAxis {
    FvH5Id id;
    size_t size;
} FvAxis;

enum { FV_AXES = 6 };

typedef struct FvColumn {
    const char *name, *unit, *text; /* unit NULL: none; text: the long name */
    FvH5Kind kind;
    const void *data; /* row-major over the axes */
    bool packed;      /* compressed, one chunk per index of all but the last `chunk_rank` axes */
    size_t chunk_rank;
    const FvAxis *axes[FV_AXES + 1]; /* ends with NULL */
} FvColumn;

/* Makes the axis `column` with `size` values; to be closed. */
FvAxis fv_h5_axis(FvH5 *, FvH5Id group, const FvColumn *column, size_t size);
/* One that is there already. */
FvAxis fv_h5_open_axis(FvH5 *, FvH5Id group, const char *name, size_t size);
void fv_h5_close_axis(FvH5 *, FvAxis *);
void fv_h5_column(FvH5 *, FvH5Id group, const FvColumn *);

#endif
