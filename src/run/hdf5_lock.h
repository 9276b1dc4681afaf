/* The serial HDF5 library is not thread-safe: every call of it stands between these two. */
#ifndef FV_RUN_HDF5_LOCK_H
#define FV_RUN_HDF5_LOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Waits for the process-wide lock, and keeps HDF5 from printing its error stack. Not recursive. */
void fv_hdf5_lock(void);
void fv_hdf5_unlock(void);

/* "1.10.8" */
void fv_hdf5_version(char *out, size_t size);

/* With the lock held, right after a call that failed: HDF5's innermost reason, one line, such as
 * "No space left on device"; "unknown reason" when there is none. */
void fv_hdf5_reason(char *out, size_t size);

/* With the lock held: opens a file of a temporary name for writing, or creates it empty, unlocked;
 * closing it closes all that is in it. A hid_t, negative on failure. */
int64_t fv_hdf5_open_temporary(const char *path, bool create);

/* With the lock held: adds a UTF-8 text attribute to an object (a hid_t); false on failure. */
bool fv_hdf5_put_text(int64_t object, const char *name, const char *value);

#endif
