#include "run/outdir.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "run/coordinator.h"
#include "run/files.h"

/* What a study writes into its folders, by how the names begin. */
static const char *const ours[] = {
    "checkpoint-", "history.safetensors", "model.safetensors", "results.h5",
    "study.yaml",  "weights.sha256",      "log.txt",           NULL};

static bool begins_with_one(const char *name, const char *const *names) {
    for (; *names; names++)
        if (strncmp(name, *names, strlen(*names)) == 0)
            return true;
    return false;
}

FvStatus fv_outdir_clear(const char *folder, const char *const *names, FvError *err) {
    DIR *dir = opendir(folder);
    FvStatus status = FV_OK;
    if (!dir)
        return errno == ENOENT
                   ? FV_OK
                   : FV_FAIL(err, FV_IO, "%s: cannot be listed: %s", folder, strerror(errno));
    for (struct dirent *entry; status == FV_OK && (entry = readdir(dir)) != NULL;) {
        char path[FV_PATH];
        if (!begins_with_one(entry->d_name, names))
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
        FV_TRY(fv_outdir_clear(folder, ours, err));
    }
    return fv_outdir_clear(out, ours, err);
}

bool fv_outdir_has(const char *out, const char *name) {
    char path[FV_PATH];
    FvError ignored;
    return fv_path(&ignored, path, sizeof path, "%s/%s", out, name) == FV_OK &&
           access(path, F_OK) == 0;
}

FvStatus fv_outdir_open(const char *out, const FvStudy *study, bool fresh, FvFence *fence,
                        int *lock, FvError *err) {
    char path[FV_PATH];
    *lock = -1;
    FV_TRY(fv_make_folder(out, err));
    FV_TRY(fv_fence_take(out, fence, lock, err));
    if (fv_outdir_has(out, "pretrain.yaml"))
        return FV_FAIL(err, FV_USAGE, "%s: holds a pretrained encoder; choose another --out", out);
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
