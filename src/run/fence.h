/* One writer for a folder, also when a cluster starts a job again while processes of its first
 * start live on: OUT/owner names the run that may write, and it is read again before every file is
 * replaced. A run that finds another's name there stops. */
#ifndef FV_RUN_FENCE_H
#define FV_RUN_FENCE_H

#include "run/files.h"

enum { FV_OWNER = 512 };

typedef struct FvFence {
    char folder[FV_PATH];
    char owner[FV_OWNER]; /* the text of OUT/owner; "" before it is taken: nothing is checked */
    int lock;             /* the process that has taken it: OUT/lock, open; others -1 */
} FvFence;

/* Takes the folder's lock and writes OUT/owner; *lock is for fv_fence_release. FV_IO when another
 * run holds it, unless that is an earlier start of this same Slurm job, or where the file system
 * has no locks, a process that is gone. */
FvStatus fv_fence_take(const char *folder, FvFence *, int *lock, FvError *);
void fv_fence_release(int lock);

/* "process 71 on node3, job 512 (restart 1)" of OUT/owner, or "unknown" */
void fv_fence_describe(const char *folder, char *out, size_t size);

/* Also gets the lock as soon as the orphan that it was taken over from is gone.
 * FV_IO when another run has taken over, or the folder is gone. NULL is never refused. */
FvStatus fv_fence_check(const FvFence *, FvError *);

/* fv_file_write in the fence's folder: what is there is replaced only by the run that may. */
FvStatus fv_file_replace(const char *path, const FvBytes *parts, size_t count, const FvFence *,
                         FvError *err);

#endif
