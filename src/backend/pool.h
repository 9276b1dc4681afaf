/* A pool of threads that runs the tiles of one operation at a time.
 *
 * The caller computes too, as thread 0. Tiles are claimed in any order by whichever thread is
 * free, so a tile's result must depend on its index alone. Between operations the workers spin
 * for some tens of microseconds and then sleep: ranks may share cores. */
#ifndef FV_BACKEND_POOL_H
#define FV_BACKEND_POOL_H

#include <stddef.h>

#include "base/status.h"

typedef struct FvPool FvPool;

typedef void FvTile(void *arg, size_t tile, size_t thread);

/* threads >= 1, counting the caller. Signals are blocked in the workers, so that they reach the
 * program's own threads. FV_DEVICE when a thread cannot be started. */
FvStatus fv_pool_create(size_t threads, FvPool **out, FvError *err);
void fv_pool_destroy(FvPool *); /* NULL is fine */
size_t fv_pool_threads(const FvPool *);

/* Calls run(arg, tile, thread) once for every tile in [0, tiles), thread in [0, threads), and
 * returns when all are done. Not reentrant, and for one calling thread at a time. */
void fv_pool_run(FvPool *, size_t tiles, FvTile *run, void *arg);

#endif
