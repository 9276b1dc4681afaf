#include "run/outdir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "run/coordinator.h"
#include "run/files.h"

FvStatus fv_outdir_lock(const char *out, int *lock, FvError *err) {
    char path[FV_PATH];
    FV_TRY(fv_path(err, path, sizeof path, "%s/lock", out));
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be written: %s; choose another --out", path,
                       strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 || errno == ENOLCK || errno == EOPNOTSUPP) {
        *lock = fd; /* a file system without locks has to do without */
        return FV_OK;
    }
    close(fd);
    return FV_FAIL(err, FV_IO,
                   "%s: another fovea is writing there; wait for it or choose another "
                   "--out",
                   out);
}

/* Our own files only: a folder may hold notes and figures of its owner's. */
static bool ours(const char *name) {
    return strncmp(name, "checkpoint-", 11) == 0 || strncmp(name, "history.safetensors", 19) == 0 ||
           strncmp(name, "model.safetensors", 17) == 0 || strncmp(name, "results.h5", 10) == 0 ||
           strncmp(name, "study.yaml", 10) == 0 || strncmp(name, "pretrain.", 9) == 0 ||
           strcmp(name, "log.txt") == 0;
}

FvStatus fv_outdir_clear(const char *folder, FvError *err) {
    DIR *dir = opendir(folder);
    FvStatus status = FV_OK;
    if (!dir)
        return errno == ENOENT
                   ? FV_OK
                   : FV_FAIL(err, FV_IO, "%s: cannot be listed: %s", folder, strerror(errno));
    for (struct dirent *entry; status == FV_OK && (entry = readdir(dir)) != NULL;) {
        char path[FV_PATH];
        if (!ours(entry->d_name))
            continue;
        status = fv_path(err, path, sizeof path, "%s/%s", folder, entry->d_name);
        if (status == FV_OK && unlink(path) != 0 && errno != ENOENT)
            status = FV_FAIL(err, FV_IO, "%s: cannot be removed: %s", path, strerror(errno));
    }
    closedir(dir);
    return status;
}

static FvStatus start_over(const char *out, const FvStudy *study, FvError *err) {
    for (size_t j = 0; j < study->experiment_count * study->seed_count; j++) {
        char folder[FV_PATH];
        fv_job_folder(out, study, j, folder, sizeof folder);
        FV_TRY(fv_outdir_clear(folder, err));
    }
    return fv_outdir_clear(out, err);
}

FvStatus fv_outdir_open(const char *out, const FvStudy *study, bool fresh, int *lock,
                        FvError *err) {
    char path[FV_PATH];
    *lock = -1;
    FV_TRY(fv_make_folder(out, err));
    FV_TRY(fv_outdir_lock(out, lock, err));
    FV_TRY(fv_path(err, path, sizeof path, "%s/study.yaml", out));
    return fresh || access(path, F_OK) != 0 ? FV_OK : fv_study_same(path, study, err);
}

FvStatus fv_outdir_keep(const char *out, const FvStudy *study, bool fresh, FvError *err) {
    char path[FV_PATH];
    if (fresh)
        FV_TRY(start_over(out, study, err));
    FV_TRY(fv_remove_temporaries(out, err));
    for (size_t j = 0; j < study->experiment_count * study->seed_count; j++) {
        char folder[FV_PATH];
        fv_job_folder(out, study, j, folder, sizeof folder);
        FV_TRY(fv_remove_temporaries(folder, err));
    }
    FV_TRY(fv_path(err, path, sizeof path, "%s/study.yaml", out));
    char *text = fv_study_format(study);
    if (!text)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the study's text");
    FvBytes bytes = {text, strlen(text)};
    FvStatus status = fv_file_write(path, &bytes, 1, err);
    free(text);
    return status;
}

void fv_outdir_close(int lock) {
    if (lock >= 0)
        close(lock); /* releases it */
}
