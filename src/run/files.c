#include "run/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"

FvStatus fv_path(FvError *err, char *out, size_t size, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int length = vsnprintf(out, size, format, args);
    va_end(args);
    if (length < 0 || (size_t)length >= size)
        return FV_FAIL(err, FV_IO, "path longer than %zu bytes: %.200s...", size - 1, out);
    return FV_OK;
}

const char *fv_file_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

void fv_program_file(const char *relative, char out[FV_PATH]) {
    char program[FV_PATH];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    char *slash = n > 0 ? (program[n] = '\0', strrchr(program, '/')) : NULL;
    if (slash)
        *slash = '\0';
    if (!slash || (size_t)snprintf(out, FV_PATH, "%s/%s", program, relative) >= FV_PATH)
        snprintf(out, FV_PATH, "%s", relative);
}

void fv_beside_program(const char *relative, char out[FV_PATH]) {
    snprintf(out, FV_PATH, "%s", relative);
    if (access(out, F_OK) != 0)
        fv_program_file(relative, out);
}

FvStatus fv_make_folder(const char *path, FvError *err) {
    char part[FV_PATH];
    FV_TRY(fv_path(err, part, sizeof part, "%s", path));
    for (char *c = part + 1;; c++) {
        char end = *c;
        if (end != '/' && end != '\0')
            continue;
        *c = '\0';
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            return FV_FAIL(err, FV_IO, "%s: cannot be made: %s", part, strerror(errno));
        *c = end;
        if (end == '\0')
            break;
    }
    struct stat info;
    if (stat(path, &info) != 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be used: %s", path, strerror(errno));
    if (!S_ISDIR(info.st_mode))
        return FV_FAIL(err, FV_IO, "%s: is a file where a folder is needed", path);
    return FV_OK;
}

/* Grows as it reads, so that pipes and files that change meanwhile are read as well. */
static FvStatus read_all(int file, const char *path, char **text, size_t *size, FvError *err) {
    size_t capacity = 1 << 16, used = 0;
    char *buffer = malloc(capacity);
    for (;;) {
        if (used + 1 >= capacity) {
            capacity = fv_mul(2, capacity);
            char *larger = realloc(buffer, capacity);
            if (!larger)
                free(buffer);
            buffer = larger;
        }
        if (!buffer)
            return FV_FAIL(err, FV_DEVICE, "out of memory for %s", path);
        ssize_t n = read(file, buffer + used, capacity - used - 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            FvStatus status = FV_FAIL(err, FV_IO, "%s: cannot be read: %s", path, strerror(errno));
            free(buffer);
            return status;
        }
        if (n == 0)
            break;
        used += (size_t)n;
    }
    buffer[used] = '\0';
    *text = buffer;
    *size = used;
    return FV_OK;
}

FvStatus fv_file_read(const char *path, char **text, size_t *size, FvError *err) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be opened: %s", path, strerror(errno));
    FvStatus status = read_all(file, path, text, size, err);
    close(file); /* was only read: nothing to lose */
    return status;
}

/* --- writing -------------------------------------------------------------------------------- */

static bool write_all(int file, const FvBytes *part) {
    const char *next = part->data;
    for (size_t left = part->size; left > 0;) {
        ssize_t n = write(file, next, left);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        next += n;
        left -= (size_t)n;
    }
    return true;
}

/* False with errno. The file is on the disk, not only in memory, when it returns true. */
static bool write_synced(const char *path, const FvBytes *parts, size_t count) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file < 0)
        return false;
    bool good = true;
    for (size_t i = 0; i < count && good; i++)
        good = write_all(file, &parts[i]);
    good = good && fsync(file) == 0;
    int reason = errno;
    if (close(file) != 0 && good) { /* network file systems tell of a full disk only here */
        good = false;
        reason = errno;
    }
    errno = reason;
    return good;
}

/* Makes a rename last. File systems that cannot sync folders say EINVAL. */
static bool sync_folder_of(const char *path) {
    char folder[FV_PATH];
    const char *slash = strrchr(path, '/');
    int length = slash ? (int)(slash - path) : 0;
    snprintf(folder, sizeof folder, "%.*s", length, path);
    int file = open(slash ? (length ? folder : "/") : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (file < 0)
        return false;
    bool good = fsync(file) == 0 || errno == EINVAL;
    int reason = errno;
    close(file); /* holds no data */
    errno = reason;
    return good;
}

FvStatus fv_file_write_if(const char *path, const FvBytes *parts, size_t count,
                          FvPermission *allows, const void *context, FvError *err) {
    char temporary[FV_PATH];
    FvStatus status = FV_OK;
    FV_TRY(fv_path(err, temporary, sizeof temporary, "%s.tmp-%ld", path, (long)getpid()));
    if (!write_synced(temporary, parts, count))
        status = FV_FAIL(err, FV_IO, "%s: cannot be written: %s", path, strerror(errno));
    if (status == FV_OK && allows)
        status = allows(context, err);
    if (status == FV_OK && rename(temporary, path) != 0)
        status = FV_FAIL(err, FV_IO, "%s: cannot be written: %s", path, strerror(errno));
    if (status != FV_OK) {
        unlink(temporary); /* may never have been made */
        return status;
    }
    if (!sync_folder_of(path))
        return FV_FAIL(err, FV_IO, "%s: its folder cannot be synced: %s", path, strerror(errno));
    return FV_OK;
}

FvStatus fv_file_write(const char *path, const FvBytes *parts, size_t count, FvError *err) {
    return fv_file_write_if(path, parts, count, NULL, NULL, err);
}

FvStatus fv_file_publish(const char *temporary, const char *path, FvError *err) {
    int file = open(temporary, O_RDONLY | O_CLOEXEC);
    bool good = file >= 0 && fsync(file) == 0;
    int reason = errno;
    if (file >= 0)
        close(file); /* was only synced */
    errno = reason;
    if (!good || rename(temporary, path) != 0 || !sync_folder_of(path))
        return FV_FAIL(err, FV_IO, "%s: cannot be written: %s", path, strerror(errno));
    return FV_OK;
}

static bool is_temporary(const char *name) {
    const char *mark = NULL;
    for (const char *at = name; (at = strstr(at, ".tmp-")); at++)
        mark = at + strlen(".tmp-");
    return mark && *mark && mark[strspn(mark, "0123456789")] == '\0';
}

FvStatus fv_remove_temporaries(const char *folder, FvError *err) {
    DIR *dir = opendir(folder);
    if (!dir && errno == ENOENT)
        return FV_OK;
    if (!dir)
        return FV_FAIL(err, FV_IO, "%s: cannot be listed: %s", folder, strerror(errno));
    FvStatus status = FV_OK;
    for (struct dirent *entry; status == FV_OK && (entry = readdir(dir));)
        if (is_temporary(entry->d_name) && unlinkat(dirfd(dir), entry->d_name, 0) != 0 &&
            errno != ENOENT)
            status = FV_FAIL(err, FV_IO, "%s/%s: cannot be removed: %s", folder, entry->d_name,
                             strerror(errno));
    closedir(dir);
    return status;
}

/* --- text ----------------------------------------------------------------------------------- */

bool fv_ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* Bytes of the valid UTF-8 character at c, 0 when there is none. */
static size_t utf8_length(const unsigned char *c) {
    if (c[0] < 0x80)
        return 1;
    size_t length = c[0] >= 0xf0 ? 4 : c[0] >= 0xe0 ? 3 : 2;
    if (c[0] < 0xc2 || c[0] > 0xf4)
        return 0;
    for (size_t i = 1; i < length; i++)
        if ((c[i] & 0xc0) != 0x80) /* stops at the final zero, too */
            return 0;
    bool overlong = (c[0] == 0xe0 && c[1] < 0xa0) || (c[0] == 0xf0 && c[1] < 0x90);
    bool surrogate = c[0] == 0xed && c[1] > 0x9f;
    bool beyond = c[0] == 0xf4 && c[1] > 0x8f;
    return overlong || surrogate || beyond ? 0 : length;
}

bool fv_utf8_valid(const char *text) {
    size_t length = 1;
    for (const unsigned char *c = (const unsigned char *)text; *c && length; c += length)
        length = utf8_length(c);
    return length != 0;
}

void fv_utf8_clean(char *text) {
    for (unsigned char *c = (unsigned char *)text; *c;) {
        size_t length = utf8_length(c);
        if (length == 0)
            *c = '?';
        c += length ? length : 1;
    }
}
