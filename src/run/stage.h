/* A copy of the data file on a disk of the host's own, where a shared file system is slow. */
#ifndef FV_RUN_STAGE_H
#define FV_RUN_STAGE_H

#include "run/files.h"

/* Path of the copy of `file` in `folder`, which no other file's copy has. FV_DATA: there is no such
 * file; FV_IO: too long a path. */
FvStatus fv_stage_path(const char *folder, const char *file, char out[FV_PATH], FvError *);

/* Copies `file` into `folder`, unless a copy of the same size and time is there, and compares the
 * checksums of both; removes what killed processes have left of such a copy. For one process of a
 * host; readers of an earlier copy keep it. FV_DATA: the file cannot be read or copied. */
FvStatus fv_stage(const char *folder, const char *file, FvError *);

#endif
