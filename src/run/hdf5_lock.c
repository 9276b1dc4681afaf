#include "run/hdf5_lock.h"

#include <hdf5.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static pthread_mutex_t hdf5_mutex = PTHREAD_MUTEX_INITIALIZER;

void fv_hdf5_lock(void) {
    pthread_mutex_lock(&hdf5_mutex); /* cannot fail: an ordinary mutex, never taken twice */
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

void fv_hdf5_unlock(void) {
    pthread_mutex_unlock(&hdf5_mutex);
}

static herr_t copy_reason(unsigned n, const H5E_error2_t *entry, void *out) {
    (void)n;
    *(const char **)out = entry->desc;
    return 0;
}

void fv_hdf5_reason(char *out, size_t size) {
    const char *reason = NULL;
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, copy_reason, &reason); /* the last call is innermost */
    if (!reason || !*reason) {
        snprintf(out, size, "unknown reason");
        return;
    }
    /* system errors read "file write failed: time = ..., error message = 'No space ...', buf = 0x"
     */
    const char *mark = "error message = '", *start = strstr(reason, mark);
    if (start) {
        start += strlen(mark);
        snprintf(out, size, "%.*s", (int)strcspn(start, "'"), start);
    } else {
        snprintf(out, size, "%.*s", (int)strcspn(reason, "\n"), reason);
    }
}

int64_t fv_hdf5_open_temporary(const char *path, bool create) {
    hid_t list = H5Pcreate(H5P_FILE_ACCESS);
    if (list < 0 || H5Pset_fclose_degree(list, H5F_CLOSE_STRONG) < 0) /* with all that is in it */
        return -1;
#if H5_VERSION_GE(1, 10, 7)
    /* Nobody else knows the temporary name, and some cluster file systems refuse locks. */
    H5Pset_file_locking(list, false, true);
#endif
    hid_t file = create ? H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, list)
                        : H5Fopen(path, H5F_ACC_RDWR, list);
    if (file >= 0) /* a failed call keeps its reason until the next call that succeeds */
        H5Pclose(list);
    return file;
}

bool fv_hdf5_put_text(int64_t object, const char *name, const char *value) {
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR), attribute = -1;
    bool ok = type >= 0 && space >= 0 && H5Tset_size(type, H5T_VARIABLE) >= 0 &&
              H5Tset_cset(type, H5T_CSET_UTF8) >= 0 &&
              (attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT)) >= 0 &&
              H5Awrite(attribute, type, &value) >= 0;
    if (attribute >= 0)
        H5Aclose(attribute);
    if (space >= 0)
        H5Sclose(space);
    if (type >= 0)
        H5Tclose(type);
    return ok;
}

void fv_hdf5_version(char *out, size_t size) {
    unsigned major = 0, minor = 0, release = 0;
    H5get_libversion(&major, &minor, &release);
    snprintf(out, size, "%u.%u.%u", major, minor, release);
}
