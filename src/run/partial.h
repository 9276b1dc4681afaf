/* Work kept record by record in a file of its own, so that a command which is killed goes on where
 * it was. Every record carries a checksum: one that was cut short, or that a loss of power has
 * taken, is made again with all behind it. */
#ifndef FV_RUN_PARTIAL_H
#define FV_RUN_PARTIAL_H

#include <stddef.h>

#include "run/files.h"

enum { FV_PARTIAL_KEY = 256 }; /* bytes of the longest key, the final zero included */

typedef struct FvPartial {
    char path[FV_PATH];
    int file;
    size_t record, records; /* bytes of one; whole ones that are there */
} FvPartial;

/* Opens or makes `path` and locks it. The key says what the records belong to: a file of another
 * key is left as it is and FV_USAGE says so. FV_IO when another process has it or it cannot be
 * written. */
FvStatus fv_partial_open(const char *path, const char *key, size_t record, FvPartial *out,
                         FvError *err);
/* Appends; on failure (FV_IO: a full disk) the records before it are kept. */
FvStatus fv_partial_add(FvPartial *, const void *record, FvError *err);
/* FV_IO when the record cannot be read or is not what was written. */
FvStatus fv_partial_read(const FvPartial *, size_t index, void *out, FvError *err);
/* Unlocks; a file without records is removed. */
void fv_partial_close(FvPartial *);
/* Its work is done: removes the file too. */
FvStatus fv_partial_remove(FvPartial *, FvError *err);
/* Removes the file that `path` names if there is one and its key begins with `begin`. */
FvStatus fv_partial_discard(const char *path, const char *begin, FvError *err);

#endif
