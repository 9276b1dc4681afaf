#include "run/partial.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

/* File: the key, padded with zeros; then records, each with its XXH3-64. */

static off_t place(const FvPartial *p, size_t index) {
    return (off_t)(FV_PARTIAL_KEY + index * (p->record + sizeof(uint64_t)));
}

/* False with errno; a file that ends too early is 0. */
static bool read_at(int file, void *out, size_t size, off_t at) {
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(file, (char *)out + done, size - done, at + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            errno = 0;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

static bool write_at(int file, const void *data, size_t size, off_t at) {
    for (size_t done = 0; done < size;) {
        ssize_t n = pwrite(file, (const char *)data + done, size - done, at + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

static FvStatus fail(const FvPartial *p, const char *what, FvError *err) {
    return FV_FAIL(err, FV_IO, "%s: cannot be %s: %s", p->path, what,
                   errno ? strerror(errno) : "it is damaged, remove it");
}

static bool read_record(const FvPartial *p, size_t index, void *out) {
    uint64_t sum;
    if (!read_at(p->file, out, p->record, place(p, index)) ||
        !read_at(p->file, &sum, sizeof sum, place(p, index) + (off_t)p->record))
        return false;
    errno = 0;
    return XXH3_64bits(out, p->record) == sum;
}

/* Counts the whole records of the same key, and cuts off what is behind them. A file that ends
 * within its key holds no work. */
static FvStatus take_over(FvPartial *p, const char *key, FvError *err) {
    char there[FV_PARTIAL_KEY], wanted[FV_PARTIAL_KEY] = "";
    snprintf(wanted, sizeof wanted, "%s", key);
    if (!read_at(p->file, there, sizeof there, 0)) {
        if (errno != 0)
            return fail(p, "read", err);
        if (ftruncate(p->file, 0) != 0 || !write_at(p->file, wanted, sizeof wanted, 0)) {
            FvStatus status = fail(p, "written", err);
            unlink(p->path);
            return status;
        }
        return FV_OK;
    }
    if (memcmp(there, wanted, sizeof there) != 0)
        return FV_FAIL(err, FV_USAGE,
                       "%s: keeps unfinished work of other weights or of other clips: finish that "
                       "first, or remove this file",
                       p->path);
    void *record = malloc(p->record);
    if (!record)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a record of %s", p->path);
    while (read_record(p, p->records, record))
        p->records++;
    free(record);
    return ftruncate(p->file, place(p, p->records)) == 0 ? FV_OK : fail(p, "written", err);
}

FvStatus fv_partial_open(const char *path, const char *key, size_t record, FvPartial *out,
                         FvError *err) {
    *out = (FvPartial){.file = -1, .record = record};
    FV_TRY(fv_path(err, out->path, sizeof out->path, "%s", path));
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0)
        return fail(out, "written", err);
    /* a file system without locks has to do without */
    if (flock(file, LOCK_EX | LOCK_NB) != 0 && errno != ENOLCK && errno != EOPNOTSUPP) {
        close(file);
        return FV_FAIL(err, FV_IO, "%s: another fovea is writing it: wait for it", path);
    }
    out->file = file;
    FvStatus status = take_over(out, key, err);
    if (status != FV_OK) { /* whatever is in it stays */
        close(file);
        out->file = -1;
    }
    return status;
}

FvStatus fv_partial_add(FvPartial *p, const void *record, FvError *err) {
    uint64_t sum = XXH3_64bits(record, p->record);
    off_t at = place(p, p->records);
    if (!write_at(p->file, record, p->record, at) ||
        !write_at(p->file, &sum, sizeof sum, at + (off_t)p->record))
        return FV_FAIL(err, FV_IO,
                       "%s: cannot be written: %s: run the command again when there is room, the "
                       "%zu clips done are kept",
                       p->path, strerror(errno), p->records);
    p->records++;
    return FV_OK;
}

FvStatus fv_partial_read(const FvPartial *p, size_t index, void *out, FvError *err) {
    return read_record(p, index, out) ? FV_OK : fail(p, "read", err);
}

void fv_partial_close(FvPartial *p) {
    if (p->file < 0)
        return;
    if (p->records == 0)
        unlink(p->path);
    close(p->file); /* what was lost of it is found by the checksums */
    p->file = -1;
}

FvStatus fv_partial_remove(FvPartial *p, FvError *err) {
    bool removed = unlink(p->path) == 0 || errno == ENOENT;
    int reason = errno;
    close(p->file); /* unlocks */
    p->file = -1;
    if (!removed)
        return FV_FAIL(err, FV_IO, "%s: cannot be removed: %s", p->path, strerror(reason));
    return FV_OK;
}

FvStatus fv_partial_discard(const char *path, const char *begin, FvError *err) {
    char key[FV_PARTIAL_KEY];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return FV_OK; /* none, or none of this user's */
    bool same = read_at(file, key, sizeof key, 0) && strncmp(key, begin, strlen(begin)) == 0;
    close(file); /* was only read */
    if (same && unlink(path) != 0 && errno != ENOENT)
        return FV_FAIL(err, FV_IO, "%s: cannot be removed: %s", path, strerror(errno));
    return FV_OK;
}
