/* Files: joined paths, folders, reading whole, and writing that either finishes or leaves what was
 * there before. */
#ifndef FV_RUN_FILES_H
#define FV_RUN_FILES_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

enum { FV_PATH = 4096 }; /* bytes of a path, the final zero included */

/* Writes a path as printf would; FV_IO when it does not fit. */
FvStatus fv_path(FvError *err, char *out, size_t size, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* The part of a path after its last slash. */
const char *fv_file_name(const char *path);

/* Makes a folder and those above it; one that is there already is as good. */
FvStatus fv_make_folder(const char *path, FvError *err);

/* Reads a whole file: *text is malloc'ed, the caller's, with a zero after its *size bytes. */
FvStatus fv_file_read(const char *path, char **text, size_t *size, FvError *err);

typedef struct FvBytes {
    const void *data;
    size_t size;
} FvBytes;

/* Writes the parts one after the other as `path`.tmp-PID, syncs, renames that to `path` and syncs
 * the folder: at any moment, power loss included, `path` is the old file or the new one, whole. On
 * failure the temporary file is removed and FV_IO tells path and reason. */
FvStatus fv_file_write(const char *path, const FvBytes *parts, size_t count, FvError *err);
/* The same, if `allows` says FV_OK when all but the last step is done: the file is renamed to
 * `path` or removed. */
typedef FvStatus FvPermission(const void *context, FvError *err);
FvStatus fv_file_write_if(const char *path, const FvBytes *parts, size_t count,
                          FvPermission *allows, const void *context, FvError *err);

/* Syncs a written file, renames it to `path` and syncs the folder: what `path` names is replaced
 * whole. FV_IO tells path and reason; the temporary file is the caller's then. */
FvStatus fv_file_publish(const char *temporary, const char *path, FvError *err);

/* Removes temporary files that killed processes have left in a folder that nobody else writes to;
 * a folder that is not there holds none. */
FvStatus fv_remove_temporaries(const char *folder, FvError *err);

/* Path of a file that comes with the program, in the program's own folder. */
void fv_program_file(const char *relative, char out[FV_PATH]);

/* The same for data (configs/..., models/...): `relative` itself where it is there from the current
 * folder. */
void fv_beside_program(const char *relative, char out[FV_PATH]);

bool fv_ends_with(const char *text, const char *end);

bool fv_utf8_valid(const char *text);

/* Replaces every byte that is no part of valid UTF-8 (RFC 3629) by '?', in place. */
void fv_utf8_clean(char *text);

#endif
