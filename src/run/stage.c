#include "run/stage.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "run/sha256.h"

enum { PIECE = 1 << 20 };

FvStatus fv_stage_path(const char *folder, const char *file, char out[FV_PATH], FvError *err) {
    char *whole = realpath(file, NULL);
    if (!whole)
        return FV_FAIL(err, FV_DATA, "%s: %s", file, strerror(errno));
    uint64_t hash = XXH3_64bits(whole, strlen(whole));
    free(whole);
    return fv_path(err, out, FV_PATH, "%s/%016" PRIx64 "-%s", folder, hash, fv_file_name(file));
}

static FvStatus trouble(const char *file, const char *copy, FvError *err) {
    return FV_FAIL(err, FV_DATA,
                   "%s: cannot be copied to %s: %s; leave --stage out or name a folder "
                   "with room",
                   file, copy, strerror(errno));
}

static bool write_all(int to, const char *data, size_t bytes) {
    while (bytes > 0) {
        ssize_t n = write(to, data, bytes);
        if (n < 0 && errno != EINTR)
            return false;
        if (n > 0) {
            data += n;
            bytes -= (size_t)n;
        }
    }
    return true;
}

/* False with errno. */
static bool copy_bytes(int from, int to, FvSha256 *sum) {
    char *piece = malloc(PIECE);
    bool good = piece != NULL;
    for (ssize_t n = 1; good && n != 0;) {
        n = read(from, piece, PIECE);
        good = n >= 0 || errno == EINTR;
        if (n > 0) {
            fv_sha256_add(sum, piece, (size_t)n);
            good = write_all(to, piece, (size_t)n);
        }
    }
    int reason = errno;
    free(piece);
    errno = reason;
    return good;
}

/* The copy's time becomes the file's, so that the next run knows it again. */
static FvStatus copy_file(const char *file, const struct stat *info, const char *temporary,
                          char sum[FV_SHA256_TEXT], FvError *err) {
    const struct timespec times[2] = {info->st_atim, info->st_mtim};
    FvSha256 sha;
    int from = open(file, O_RDONLY | O_CLOEXEC);
    if (from < 0)
        return trouble(file, temporary, err);
    int to = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    fv_sha256_start(&sha);
    bool good = to >= 0 && copy_bytes(from, to, &sha) && fsync(to) == 0 && futimens(to, times) == 0;
    FvStatus status = good ? FV_OK : trouble(file, temporary, err);
    close(from); /* was only read */
    if (to >= 0 && close(to) != 0 && status == FV_OK)
        status = trouble(file, temporary, err);
    fv_sha256_text(&sha, sum);
    return status;
}

static bool is_there(const char *copy, const struct stat *wanted) {
    struct stat info;
    return stat(copy, &info) == 0 && info.st_size == wanted->st_size &&
           info.st_mtim.tv_sec == wanted->st_mtim.tv_sec &&
           info.st_mtim.tv_nsec == wanted->st_mtim.tv_nsec;
}

/* Those of `copy` whose process is gone: a killed one may have left half a data file. */
static void remove_abandoned(const char *folder, const char *copy) {
    const char *name = fv_file_name(copy);
    size_t length = strlen(name);
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        long pid = 0;
        if (strncmp(entry->d_name, name, length) == 0 &&
            sscanf(entry->d_name + length, ".tmp-%ld", &pid) == 1 && pid > 0 &&
            kill((pid_t)pid, 0) != 0 && errno == ESRCH)
            unlinkat(dirfd(dir), entry->d_name, 0); /* one too many does no harm */
    }
    if (dir)
        closedir(dir);
}

FvStatus fv_stage(const char *folder, const char *file, FvError *err) {
    char copy[FV_PATH], temporary[FV_PATH], sum[FV_SHA256_TEXT], copied[FV_SHA256_TEXT];
    struct stat info;
    if (stat(file, &info) != 0)
        return FV_FAIL(err, FV_DATA, "%s: %s", file, strerror(errno));
    FV_TRY(fv_stage_path(folder, file, copy, err));
    if (is_there(copy, &info))
        return FV_OK;
    FvError why;
    if (fv_make_folder(folder, &why) != FV_OK)
        return FV_FAIL(err, FV_DATA, "--stage: %s", why.text);
    remove_abandoned(folder, copy);
    FV_TRY(fv_path(err, temporary, sizeof temporary, "%s.tmp-%ld", copy, (long)getpid()));
    FvStatus status = copy_file(file, &info, temporary, sum, err);
    if (status == FV_OK)
        status = fv_sha256_file(temporary, copied, err);
    if (status == FV_OK && strcmp(sum, copied) != 0)
        status = FV_FAIL(err, FV_DATA, "%s: its copy in %s has another checksum: the disk is bad",
                         file, folder);
    if (status == FV_OK && rename(temporary, copy) != 0)
        status = trouble(file, copy, err);
    if (status != FV_OK)
        unlink(temporary); /* may never have been made */
    return status;
}
