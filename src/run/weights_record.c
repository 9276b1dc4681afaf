#include "run/weights_record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/memory.h"
#include "run/files.h"
#include "run/model_folder.h"
#include "run/safetensors.h"
#include "run/sha256.h"

/* What an experiment starts from: safetensors files or indices; "" for none. */
static FvStatus list_weights(const FvConfig *c, char paths[3][FV_TEXT], FvError *err) {
    const char *const models[] = {c->dino_from, c->lm_from};
    char config[FV_TEXT];
    memset(paths, 0, 3 * FV_TEXT);
    for (size_t i = 0; i < 2; i++)
        if (strcmp(models[i], "none") != 0)
            FV_TRY(fv_folder_find(models[i], paths[i], config, err));
    memcpy(paths[2], c->init_from, FV_TEXT);
    return FV_OK;
}

/* Adds a line; a text that is NULL has run out of memory. */
static void add_line(char **text, const char *line) {
    size_t used = *text ? strlen(*text) : 0, room = used + strlen(line) + 2;
    char *longer = *text ? realloc(*text, room) : NULL;
    if (!longer)
        free(*text);
    else
        snprintf(longer + used, room - used, "%s%s", used ? "\n" : "", line);
    *text = longer;
}

static bool has_line(const char *text, const char *line) {
    size_t n = strlen(line);
    for (const char *at = text; at && (at = strstr(at, line)); at += n)
        if ((at == text || at[-1] == '\n') && (at[n] == '\n' || at[n] == '\0'))
            return true;
    return false;
}

/* Path and sum of a file, or of an index and its shards, unless they are there already. */
static FvStatus note_file(FvWeightsRecord *r, const char *path, FvError *err) {
    FvTensorFile *file;
    char sum[FV_SHA256_TEXT];
    FvStatus status = FV_OK;
    if (!path[0] || has_line(r->paths, path))
        return FV_OK;
    FV_TRY(fv_tensors_open(path, &file, err));
    for (size_t i = 0; status == FV_OK && i < fv_tensors_files(file); i++) {
        status = fv_sha256_file(fv_tensors_file(file, i), sum, err);
        add_line(&r->paths, fv_tensors_file(file, i));
        add_line(&r->sums, sum);
    }
    fv_tensors_close(file);
    return status;
}

FvStatus fv_weights_record_make(const FvStudy *study, FvWeightsRecord *r, FvError *err) {
    r->paths = calloc(1, 1);
    r->sums = calloc(1, 1);
    for (size_t e = 0; e < study->experiment_count; e++) {
        char paths[3][FV_TEXT];
        FV_TRY(list_weights(&study->experiments[e].config, paths, err));
        for (size_t i = 0; i < 3; i++)
            FV_TRY(note_file(r, paths[i], err));
    }
    return r->paths && r->sums
               ? FV_OK
               : FV_FAIL(err, FV_DEVICE, "out of memory for the list of weights files");
}

void fv_weights_record_free(FvWeightsRecord *r) {
    free(r->paths);
    free(r->sums);
    *r = (FvWeightsRecord){0};
}

/* The line that starts at *text, which moves to the next; its length. */
static size_t next_line(const char **text, const char **line) {
    size_t length = strcspn(*text, "\n");
    *line = *text;
    *text += length + ((*text)[length] == '\n');
    return length;
}

FvStatus fv_weights_record_check(const FvWeightsRecord *r, const char *out, FvError *err) {
    char path[FV_PATH], *kept;
    const char *paths = r->paths, *sums = r->sums, *name, *sum;
    size_t size;
    FV_TRY(fv_path(err, path, sizeof path, "%s/weights.sha256", out));
    if (access(path, F_OK) != 0)
        return FV_OK;
    FV_TRY(fv_file_read(path, &kept, &size, err));
    FvStatus status = FV_OK;
    while (status == FV_OK && *paths) {
        char line[FV_PATH + FV_SHA256_TEXT];
        size_t named = next_line(&paths, &name), summed = next_line(&sums, &sum);
        snprintf(line, sizeof line, "  %.*s\n", (int)named, name);
        const char *there = strstr(kept, line);
        if (there && (size_t)(there - kept) >= summed && strncmp(there - summed, sum, summed) != 0)
            status = FV_FAIL(err, FV_USAGE,
                             "%.*s: has changed since %s was begun: use --fresh to start over, or "
                             "another --out",
                             (int)named, name, out);
    }
    free(kept);
    return status;
}

FvStatus fv_weights_record_keep(const FvWeightsRecord *r, const char *out, FvError *err) {
    char path[FV_PATH];
    const char *paths = r->paths, *sums = r->sums, *name, *sum;
    size_t room = fv_add(fv_mul(2, strlen(paths)), fv_add(fv_mul(2, strlen(sums)), 64)), used = 0;
    char *text = *paths ? malloc(room) : NULL;
    if (!*paths)
        return FV_OK;
    if (!text)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the list of weights files");
    while (*paths) {
        size_t named = next_line(&paths, &name), summed = next_line(&sums, &sum);
        used += (size_t)snprintf(text + used, room - used, "%.*s  %.*s\n", (int)summed, sum,
                                 (int)named, name);
    }
    FvStatus status = fv_path(err, path, sizeof path, "%s/weights.sha256", out);
    if (status == FV_OK)
        status = fv_file_write(path, &(FvBytes){text, used}, 1, err);
    free(text);
    return status;
}
