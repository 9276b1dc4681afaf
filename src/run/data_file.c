#include "run/data_file.h"

#include <errno.h>
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/memory.h"
#include "model/config.h"
#include "run/hdf5_lock.h"

enum { MAX_RANK = 5 };

typedef struct Shape {
    int rank;
    hsize_t dim[MAX_RANK]; /* 0 in a wanted shape: any */
} Shape;

FvClipFile fv_clipfile_closed(void) {
    return (FvClipFile){
        .file = -1, .pixels = -1, .latents = -1, .tokens = -1, .token_count = -1, .split = -1};
}

/* "[120, 16, 96, 96, 3]"; a dimension of 0 reads `any`. */
static const char *shape_text(const Shape *s, const char *any, char *out, size_t size) {
    size_t used = 0;
    for (int i = 0; i < s->rank && i < MAX_RANK && used < size; i++) {
        const char *comma = i ? ", " : "[";
        int n = s->dim[i] || !any ? snprintf(out + used, size - used, "%s%llu", comma,
                                             (unsigned long long)s->dim[i])
                                  : snprintf(out + used, size - used, "%s%s", comma, any);
        used += n > 0 ? (size_t)n : 0;
    }
    if (used < size)
        snprintf(out + used, size - used, s->rank ? "]" : "a single value");
    return out;
}

static FvStatus fail_hdf5(FvError *err, const FvClipFile *f, const char *what) {
    char reason[160];
    fv_hdf5_reason(reason, sizeof reason);
    return FV_FAIL(err, FV_DATA, "%s: %s: %s: copy or prepare the file again", f->path, what,
                   reason);
}

/* Opens a dataset, reads its type and shape. bytes: size of an element, 0 for any. */
static FvStatus open_dataset(const FvClipFile *f, const char *name, H5T_class_t class, size_t bytes,
                             const char *needed, hid_t *out, Shape *shape, FvError *err) {
    *out = H5Dopen2(f->file, name, H5P_DEFAULT);
    if (*out < 0)
        return FV_FAIL(err, FV_DATA, "%s: no dataset %s, the study needs it as %s", f->path, name,
                       needed);
    hid_t type = H5Dget_type(*out), space = H5Dget_space(*out);
    bool fits = type >= 0 && H5Tget_class(type) == class && (!bytes || H5Tget_size(type) == bytes);
    if (fits && bytes == 1)
        fits = H5Tget_sign(type) == H5T_SGN_NONE;
    int rank = space >= 0 ? H5Sget_simple_extent_ndims(space) : -1;
    *shape = (Shape){.rank = rank};
    if (rank > 0 && rank <= MAX_RANK && H5Sget_simple_extent_dims(space, shape->dim, NULL) < 0)
        rank = -1;
    if (type >= 0)
        H5Tclose(type);
    if (space >= 0)
        H5Sclose(space);
    if (rank < 0)
        return fail_hdf5(err, f, name);
    if (!fits)
        return FV_FAIL(err, FV_DATA, "%s: %s holds values of another type, the study needs %s",
                       f->path, name, needed);
    if (rank > MAX_RANK)
        return FV_FAIL(err, FV_DATA, "%s: %s has %d dimensions, the study needs %s", f->path, name,
                       rank, needed);
    return FV_OK;
}

static bool same_shape(const Shape *there, const Shape *needed) {
    if (there->rank != needed->rank)
        return false;
    for (int i = 0; i < needed->rank; i++)
        if (needed->dim[i] && there->dim[i] != needed->dim[i])
            return false;
    return true;
}

static FvStatus fail_shape(FvError *err, const FvClipFile *f, const char *name, const Shape *there,
                           const Shape *needed, const char *advice) {
    char a[128], b[128];
    return FV_FAIL(err, FV_DATA, "%s: %s is %s, the study needs %s: %s", f->path, name,
                   shape_text(there, NULL, a, sizeof a), shape_text(needed, "clips", b, sizeof b),
                   advice);
}

static FvStatus open_frames(FvClipFile *f, FvError *err) {
    Shape there = {0}, needed = {5, {0, f->frames, f->size, f->size, 3}};
    FV_TRY(open_dataset(f, "/frames", H5T_INTEGER, 1, "unsigned 8-bit [clips, T, S, S, 3]",
                        &f->pixels, &there, err));
    if (!same_shape(&there, &needed)) {
        char advice[96] = "prepare the file again";
        if (there.rank == 5 && there.dim[2] == there.dim[3] && there.dim[4] == 3 &&
            there.dim[2] % FV_LATENT_STRIDE == 0)
            snprintf(advice, sizeof advice,
                     "set frames=%llu image_size=%llu or prepare the file "
                     "again",
                     (unsigned long long)there.dim[1], (unsigned long long)there.dim[2]);
        return fail_shape(err, f, "/frames", &there, &needed, advice);
    }
    if (there.dim[0] == 0 || there.dim[0] > UINT32_MAX)
        return FV_FAIL(err, FV_DATA, "%s: /frames holds %llu clips: prepare the file again",
                       f->path, (unsigned long long)there.dim[0]);
    f->clips = there.dim[0];
    return FV_OK;
}

static FvStatus open_latents(FvClipFile *f, const char *wanted, FvError *err) {
    htri_t there_is = H5Lexists(f->file, "/latents", H5P_DEFAULT);
    if (!strcmp(wanted, "blocks") || (!strcmp(wanted, "auto") && there_is <= 0))
        return FV_OK;
    size_t side = f->size / FV_LATENT_STRIDE;
    Shape there = {0}, needed = {5, {f->clips, f->frames, FV_LATENT_CHANNELS, side, side}};
    FV_TRY(open_dataset(f, "/latents", H5T_FLOAT, 0,
                        "16- or 32-bit floats [clips, T, 4, S/8, S/8]"
                        " (or set latents=blocks)",
                        &f->latents, &there, err));
    if (!same_shape(&there, &needed))
        return fail_shape(err, f, "/latents", &there, &needed,
                          "set latents=blocks or make the latents again");
    f->has_latents = true;
    f->scratch = calloc(fv_mul4(f->frames, FV_LATENT_CHANNELS, side, side), sizeof *f->scratch);
    if (!f->scratch)
        return FV_FAIL(err, FV_DEVICE, "%s: out of memory for one clip's latents", f->path);
    return FV_OK;
}

static FvStatus open_tokens(FvClipFile *f, FvError *err) {
    Shape there = {0}, needed = {2, {f->clips, 0}}, counts = {1, {f->clips}};
    FV_TRY(open_dataset(f, "/tokens", H5T_INTEGER, 0,
                        "integers [clips, max_tokens] (or set "
                        "text=none)",
                        &f->tokens, &there, err));
    if (!same_shape(&there, &needed) || there.dim[1] == 0 || there.dim[1] > INT32_MAX) {
        char a[128];
        return FV_FAIL(err, FV_DATA,
                       "%s: /tokens is %s, the study needs [%zu, max_tokens]: set "
                       "text=none or make the tokens again",
                       f->path, shape_text(&there, NULL, a, sizeof a), f->clips);
    }
    f->max_tokens = there.dim[1];
    FV_TRY(open_dataset(f, "/token_count", H5T_INTEGER, 0, "integers [clips]", &f->token_count,
                        &there, err));
    if (!same_shape(&there, &counts))
        return fail_shape(err, f, "/token_count", &there, &counts, "make the tokens again");
    return FV_OK;
}

/* otherwise: what else the user may name, for the message */
static FvStatus open_file(FvClipFile *f, const char *otherwise, FvError *err) {
    if (access(f->path, R_OK) != 0)
        return FV_FAIL(err, FV_DATA, "%s: %s: name a file made by `fovea prepare`%s", f->path,
                       strerror(errno), otherwise);
    if (H5Fis_hdf5(f->path) <= 0)
        return FV_FAIL(err, FV_DATA, "%s: not an HDF5 file: name a file made by `fovea prepare`%s",
                       f->path, otherwise);
    hid_t access_list = H5Pcreate(H5P_FILE_ACCESS);
    if (access_list < 0)
        return fail_hdf5(err, f, "cannot be opened");
#if H5_VERSION_GE(1, 10, 7)
    /* Only read: no lock, which some cluster file systems refuse. On failure the default stands. */
    H5Pset_file_locking(access_list, false, true);
#endif
    f->file = H5Fopen(f->path, H5F_ACC_RDONLY, access_list);
    FvStatus status = f->file < 0 ? fail_hdf5(err, f, "damaged or cut short") : FV_OK;
    H5Pclose(access_list); /* after the message: a call that succeeds clears HDF5's reasons */
    return status;
}

static FvStatus open_all(FvClipFile *f, const FvConfig *config, FvError *err) {
    FV_TRY(open_file(f, ", or data=procedural", err));
    FV_TRY(open_frames(f, err));
    Shape there = {0}, needed = {1, {f->clips}};
    FV_TRY(open_dataset(f, "/split", H5T_INTEGER, 0, "integers [clips]", &f->split, &there, err));
    if (!same_shape(&there, &needed))
        return fail_shape(err, f, "/split", &there, &needed, "prepare the file again");
    FV_TRY(open_latents(f, config->latents, err));
    if (!strcmp(config->text, "captions"))
        FV_TRY(open_tokens(f, err));
    return FV_OK;
}

static void close_all(FvClipFile *f) {
    hid_t datasets[] = {f->pixels, f->latents, f->tokens, f->token_count, f->split};
    for (size_t i = 0; i < sizeof datasets / sizeof *datasets; i++)
        if (datasets[i] >= 0)
            H5Dclose(datasets[i]);
    if (f->file >= 0)
        H5Fclose(f->file); /* only read: nothing to lose */
    free(f->scratch);
    *f = fv_clipfile_closed();
}

FvStatus fv_clipfile_open(const FvConfig *config, FvClipFile *out, FvError *err) {
    *out = fv_clipfile_closed();
    out->frames = config->frames;
    out->size = config->image_size;
    snprintf(out->path, sizeof out->path, "%s", config->data);
    fv_hdf5_lock();
    FvStatus status = open_all(out, config, err);
    if (status != FV_OK)
        close_all(out);
    fv_hdf5_unlock();
    return status;
}

static FvStatus open_any_frames(FvClipFile *f, FvError *err) {
    Shape there = {0};
    FV_TRY(open_file(f, "", err));
    FV_TRY(open_frames(f, err)); /* frames and size 0: any */
    hid_t space = H5Dget_space(f->pixels);
    bool good = space >= 0 && H5Sget_simple_extent_dims(space, there.dim, NULL) == 5;
    FvStatus status = good ? FV_OK : fail_hdf5(err, f, "/frames");
    if (space >= 0)
        H5Sclose(space);
    FV_TRY(status);
    f->frames = there.dim[1];
    f->size = there.dim[2];
    if (f->frames == 0 || f->size == 0 || there.dim[3] != f->size || f->size % FV_LATENT_STRIDE)
        return FV_FAIL(
            err, FV_DATA,
            "%s: /frames holds clips of %zu frames, %zu x %zu pixels: needs squares of a "
            "multiple of %d pixels: prepare the file again",
            f->path, f->frames, f->size, (size_t)there.dim[3], FV_LATENT_STRIDE);
    return FV_OK;
}

FvStatus fv_clipfile_open_frames(const char *path, FvClipFile *out, FvError *err) {
    *out = fv_clipfile_closed();
    if (strlen(path) >= sizeof out->path)
        return FV_FAIL(err, FV_DATA, "%.200s...: the path is longer than %zu bytes", path,
                       sizeof out->path - 1);
    snprintf(out->path, sizeof out->path, "%s", path);
    fv_hdf5_lock();
    FvStatus status = open_any_frames(out, err);
    if (status != FV_OK)
        close_all(out);
    fv_hdf5_unlock();
    return status;
}

void fv_clipfile_close(FvClipFile *f) {
    fv_hdf5_lock();
    close_all(f);
    fv_hdf5_unlock();
}

/* Reads `count` entries of the first dimension, from `first` on, all of the others. */
static FvStatus read_rows(const FvClipFile *f, hid_t dataset, const char *name, size_t first,
                          size_t count, hid_t type, void *out, FvError *err) {
    hsize_t start[MAX_RANK] = {first}, extent[MAX_RANK] = {0};
    hid_t space = H5Dget_space(dataset), memory = -1;
    bool ok = space >= 0 && H5Sget_simple_extent_dims(space, extent, NULL) >= 0;
    if (ok) {
        extent[0] = count;
        memory = H5Screate_simple(H5Sget_simple_extent_ndims(space), extent, NULL);
        ok = memory >= 0 &&
             H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, extent, NULL) >= 0 &&
             H5Dread(dataset, type, memory, space, H5P_DEFAULT, out) >= 0;
    }
    FvStatus status = FV_OK;
    if (!ok) {
        char what[96];
        snprintf(what, sizeof what, "%s cannot be read from clip %zu on", name, first);
        status = fail_hdf5(err, f, what);
    }
    if (memory >= 0)
        H5Sclose(memory);
    if (space >= 0)
        H5Sclose(space);
    return status;
}

FvStatus fv_clipfile_split(const FvClipFile *f, int32_t *split, FvError *err) {
    fv_hdf5_lock();
    FvStatus status = read_rows(f, f->split, "/split", 0, f->clips, H5T_NATIVE_INT32, split, err);
    fv_hdf5_unlock();
    FV_TRY(status);
    for (size_t i = 0; i < f->clips; i++)
        if (split[i] != 0 && split[i] != 1)
            return FV_FAIL(err, FV_DATA,
                           "%s: /split[%zu] is %d, allowed are 0 (training) and 1 "
                           "(held-out)",
                           f->path, i, (int)split[i]);
    return FV_OK;
}

static FvStatus check_tokens(const FvClipFile *f, size_t vocabulary, int32_t *tokens,
                             const int32_t *count, FvError *err) {
    for (size_t c = 0; c < f->clips; c++) {
        if (count[c] < 0 || (size_t)count[c] > f->max_tokens)
            return FV_FAIL(err, FV_DATA, "%s: /token_count[%zu] is %d, /tokens has room for %zu",
                           f->path, c, (int)count[c], f->max_tokens);
        int32_t *row = tokens + c * f->max_tokens;
        for (size_t i = 0; i < (size_t)count[c]; i++)
            if (row[i] < 0 || (size_t)row[i] >= vocabulary)
                return FV_FAIL(err, FV_DATA,
                               "%s: /tokens[%zu, %zu] is %d, the language model's "
                               "vocabulary has %zu tokens: set lm_vocab or make the tokens again",
                               f->path, c, i, (int)row[i], vocabulary);
        for (size_t i = (size_t)count[c]; i < f->max_tokens; i++)
            row[i] = 0;
    }
    return FV_OK;
}

FvStatus fv_clipfile_tokens(const FvClipFile *f, size_t vocabulary, int32_t *tokens, int32_t *count,
                            FvError *err) {
    fv_hdf5_lock();
    FvStatus status =
        read_rows(f, f->tokens, "/tokens", 0, f->clips, H5T_NATIVE_INT32, tokens, err);
    if (status == FV_OK)
        status =
            read_rows(f, f->token_count, "/token_count", 0, f->clips, H5T_NATIVE_INT32, count, err);
    fv_hdf5_unlock();
    FV_TRY(status);
    return check_tokens(f, vocabulary, tokens, count, err);
}

FvStatus fv_clipfile_pixels(const FvClipFile *f, size_t first, size_t count, uint8_t *pixels,
                            FvError *err) {
    fv_hdf5_lock();
    FvStatus status =
        read_rows(f, f->pixels, "/frames", first, count, H5T_NATIVE_UINT8, pixels, err);
    fv_hdf5_unlock();
    return status;
}

FvStatus fv_clipfile_latents(const FvClipFile *f, size_t clip, real *latents, FvError *err) {
    size_t side = f->size / FV_LATENT_STRIDE, area = side * side;
    fv_hdf5_lock();
    FvStatus status =
        read_rows(f, f->latents, "/latents", clip, 1, H5T_NATIVE_FLOAT, f->scratch, err);
    for (size_t t = 0; status == FV_OK && t < f->frames; t++)
        for (size_t i = 0; i < area; i++)
            for (size_t c = 0; c < FV_LATENT_CHANNELS; c++)
                latents[(t * area + i) * FV_LATENT_CHANNELS + c] =
                    (real)f->scratch[(t * FV_LATENT_CHANNELS + c) * area + i];
    fv_hdf5_unlock();
    return status;
}
