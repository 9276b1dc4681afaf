#include "run/data_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"
#include "run/files.h"
#include "run/hdf5_lock.h"

struct FvClipWriter {
    FvClipSpec spec;
    char path[FV_PATH], temporary[FV_PATH];
    hid_t file, frames;
    size_t clips, capacity;
    char **source, **caption; /* [clips] */
};

/* The lock is held, and the call that failed was HDF5's last. */
static FvStatus fail_hdf5(FvError *err, const FvClipWriter *w, const char *what) {
    char reason[160];
    fv_hdf5_reason(reason, sizeof reason);
    return FV_FAIL(err, FV_IO, "%s: %s cannot be written: %s", w->path, what, reason);
}

static bool add_number(hid_t object, const char *name, uint64_t value) {
    hid_t space = H5Screate(H5S_SCALAR), attribute = -1;
    bool ok = space >= 0 &&
              (attribute =
                   H5Acreate2(object, name, H5T_STD_U64LE, space, H5P_DEFAULT, H5P_DEFAULT)) >= 0 &&
              H5Awrite(attribute, H5T_NATIVE_UINT64, &value) >= 0;
    if (attribute >= 0)
        H5Aclose(attribute);
    if (space >= 0)
        H5Sclose(space);
    return ok;
}

static bool describe(hid_t dataset, const char *units, const char *long_name) {
    return fv_hdf5_put_text(dataset, "units", units) &&
           fv_hdf5_put_text(dataset, "long_name", long_name);
}

/* Properties of a new dataset: no time stamps, so that the same clips make the same file. */
static hid_t create_properties(void) {
    hid_t list = H5Pcreate(H5P_DATASET_CREATE);
    if (list >= 0)
        H5Pset_obj_track_times(list, false); /* where that fails there are stamps: no harm */
    return list;
}

/* One clip per chunk: a reader that wants one clip unpacks nothing else. Level 1 of deflate makes
 * video about a third smaller and reads faster than most disks deliver. */
static hid_t create_frames(const FvClipWriter *w) {
    hsize_t t = w->spec.frames, s = w->spec.size;
    hsize_t now[5] = {0, t, s, s, 3}, most[5] = {H5S_UNLIMITED, t, s, s, 3},
            chunk[5] = {1, t, s, s, 3};
    hid_t space = H5Screate_simple(5, now, most), list = create_properties(), out = -1;
    if (space >= 0 && list >= 0 && H5Pset_chunk(list, 5, chunk) >= 0 &&
        H5Pset_deflate(list, 1) >= 0)
        out = H5Dcreate2(w->file, "/frames", H5T_STD_U8LE, space, H5P_DEFAULT, list, H5P_DEFAULT);
    if (list >= 0)
        H5Pclose(list);
    if (space >= 0)
        H5Sclose(space);
    return out;
}

static hid_t create_file(const char *path) {
    hid_t list = H5Pcreate(H5P_FILE_ACCESS);
    if (list < 0 || H5Pset_fclose_degree(list, H5F_CLOSE_STRONG) < 0) /* with all that is in it */
        return -1;
#if H5_VERSION_GE(1, 10, 7)
    /* Nobody else knows the temporary name, and some cluster file systems refuse locks. */
    H5Pset_file_locking(list, false, true);
#endif
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, list);
    if (file >= 0) /* a failed call keeps its reason until the next call that succeeds */
        H5Pclose(list);
    return file;
}

static FvStatus create(FvClipWriter *w, FvError *err) {
    struct stat info;
    if (stat(w->path, &info) == 0 && S_ISDIR(info.st_mode))
        return FV_FAIL(err, FV_IO, "%s: is a folder: name the file to write", w->path);
    int probe = open(w->temporary, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
    if (probe < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be written: %s", w->path, strerror(errno));
    close(probe);
    w->file = create_file(w->temporary);
    if (w->file < 0)
        return fail_hdf5(err, w, "the file");
    w->frames = create_frames(w);
    if (w->frames < 0 || !describe(w->frames, "1", "pixels: clip, frame, y, x, RGB"))
        return fail_hdf5(err, w, "/frames");
    return FV_OK;
}

FvStatus fv_clipwriter_create(const char *path, const FvClipSpec *spec, FvClipWriter **out,
                              FvError *err) {
    *out = NULL;
    if (fv_mul4(spec->frames, spec->size, spec->size, 3) > UINT32_MAX)
        return FV_FAIL(err, FV_USAGE,
                       "a clip of %zu frames of %zu x %zu pixels is too large for "
                       "HDF5 (4 GiB): lower --frames or --size",
                       spec->frames, spec->size, spec->size);
    FvClipWriter *w = calloc(1, sizeof *w);
    if (!w)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    w->spec = *spec;
    w->file = w->frames = -1;
    FvStatus status = fv_path(err, w->path, sizeof w->path, "%s", path);
    if (status == FV_OK)
        status =
            fv_path(err, w->temporary, sizeof w->temporary, "%s.tmp-%ld", path, (long)getpid());
    if (status == FV_OK) {
        fv_hdf5_lock();
        status = create(w, err);
        fv_hdf5_unlock();
    }
    if (status != FV_OK) {
        fv_clipwriter_abandon(w);
        return status;
    }
    *out = w;
    return FV_OK;
}

/* Keeps copies of the clip's texts until the end, when datasets of strings are written whole. */
static FvStatus keep_texts(FvClipWriter *w, const char *source, const char *caption, FvError *err) {
    if (w->clips == w->capacity) {
        size_t capacity = w->capacity ? 2 * w->capacity : 64;
        char **sources = realloc(w->source, capacity * sizeof *sources);
        if (sources)
            w->source = sources;
        char **captions = realloc(w->caption, capacity * sizeof *captions);
        if (captions)
            w->caption = captions;
        if (!sources || !captions)
            return FV_FAIL(err, FV_DEVICE, "out of memory after %zu clips", w->clips);
        w->capacity = capacity;
    }
    char *a = strdup(source), *b = strdup(caption ? caption : "");
    if (!a || !b) {
        free(a);
        free(b);
        return FV_FAIL(err, FV_DEVICE, "out of memory after %zu clips", w->clips);
    }
    fv_utf8_clean(a);
    fv_utf8_clean(b);
    w->source[w->clips] = a;
    w->caption[w->clips++] = b;
    return FV_OK;
}

static bool append(const FvClipWriter *w, const uint8_t *pixels) {
    hsize_t t = w->spec.frames, s = w->spec.size;
    hsize_t all[5] = {w->clips + 1, t, s, s, 3}, start[5] = {w->clips}, one[5] = {1, t, s, s, 3};
    if (H5Dset_extent(w->frames, all) < 0)
        return false;
    hid_t space = H5Dget_space(w->frames), memory = H5Screate_simple(5, one, NULL);
    bool ok = space >= 0 && memory >= 0 &&
              H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, one, NULL) >= 0 &&
              H5Dwrite(w->frames, H5T_NATIVE_UINT8, memory, space, H5P_DEFAULT, pixels) >= 0;
    if (ok) { /* not after a failure, whose reason they would clear */
        H5Sclose(memory);
        H5Sclose(space);
    }
    return ok;
}

FvStatus fv_clipwriter_add(FvClipWriter *w, const uint8_t *pixels, const char *source,
                           const char *caption, FvError *err) {
    fv_hdf5_lock();
    FvStatus status = append(w, pixels) ? FV_OK : fail_hdf5(err, w, "/frames");
    fv_hdf5_unlock();
    FV_TRY(status);
    return keep_texts(w, source, caption, err);
}

/* Writes a whole dataset [rows] or, with columns, [rows, columns]. */
static bool write_dataset(hid_t file, const char *name, size_t rows, size_t columns, hid_t stored,
                          hid_t native, const void *data, const char *long_name) {
    hsize_t shape[2] = {rows, columns};
    hid_t space = H5Screate_simple(columns ? 2 : 1, shape, NULL), list = create_properties();
    hid_t dataset = -1;
    bool ok =
        space >= 0 && list >= 0 &&
        (dataset = H5Dcreate2(file, name, stored, space, H5P_DEFAULT, list, H5P_DEFAULT)) >= 0 &&
        H5Dwrite(dataset, native, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0 &&
        describe(dataset, "1", long_name);
    if (ok) { /* not after a failure, whose reason they would clear */
        H5Pclose(list);
        H5Sclose(space);
        ok = H5Dclose(dataset) >= 0;
    }
    return ok;
}

static bool write_strings(const FvClipWriter *w, const char *name, char **strings,
                          const char *long_name) {
    hid_t type = H5Tcopy(H5T_C_S1);
    bool ok = type >= 0 && H5Tset_size(type, H5T_VARIABLE) >= 0 &&
              H5Tset_cset(type, H5T_CSET_UTF8) >= 0 &&
              write_dataset(w->file, name, w->clips, 0, type, type, strings, long_name);
    if (ok)
        H5Tclose(type);
    return ok;
}

static FvStatus write_tokens(const FvClipWriter *w, FvError *err) {
    size_t columns = w->spec.max_tokens;
    int32_t *tokens = calloc(w->clips, columns * sizeof *tokens);
    int32_t *count = calloc(w->clips, sizeof *count);
    FvStatus status = FV_OK;
    if (!tokens || !count)
        status = FV_FAIL(err, FV_DEVICE, "out of memory for the tokens of %zu clips", w->clips);
    for (size_t c = 0; status == FV_OK && c < w->clips; c++)
        for (const char *p = w->caption[c]; *p && (size_t)count[c] < columns; p++)
            tokens[c * columns + (size_t)count[c]++] = (unsigned char)*p;
    if (status == FV_OK &&
        (!write_dataset(w->file, "/tokens", w->clips, columns, H5T_STD_I32LE, H5T_NATIVE_INT32,
                        tokens, "the caption's bytes: clip, place") ||
         !write_dataset(w->file, "/token_count", w->clips, 0, H5T_STD_I32LE, H5T_NATIVE_INT32,
                        count, "tokens of the clip's caption") ||
         !write_strings(w, "/caption", w->caption, "what the clip shows")))
        status = fail_hdf5(err, w, "captions");
    free(tokens);
    free(count);
    return status;
}

static FvStatus write_rest(FvClipWriter *w, const uint8_t *split, FvError *err) {
    const FvClipSpec *s = &w->spec;
    if (!write_dataset(w->file, "/split", w->clips, 0, H5T_STD_U8LE, H5T_NATIVE_UINT8, split,
                       "0: training, 1: held-out"))
        return fail_hdf5(err, w, "/split");
    if (!write_strings(w, "/source", w->source, "where the clip comes from"))
        return fail_hdf5(err, w, "/source");
    if (s->max_tokens)
        FV_TRY(write_tokens(w, err));
    if (!fv_hdf5_put_text(w->file, "format", "fovea-clips") ||
        !add_number(w->file, "format_version", 1) ||
        !fv_hdf5_put_text(w->file, "made_from", s->made_from) ||
        !add_number(w->file, "frames", s->frames) || !add_number(w->file, "stride", s->stride) ||
        !add_number(w->file, "size", s->size) || !fv_hdf5_put_text(w->file, "crop", s->crop) ||
        !add_number(w->file, "seed", s->seed))
        return fail_hdf5(err, w, "attributes");
    if (H5Fflush(w->file, H5F_SCOPE_LOCAL) < 0)
        return fail_hdf5(err, w, "the file");
    bool closed = H5Dclose(w->frames) >= 0;
    w->frames = -1;
    closed = H5Fclose(w->file) >= 0 && closed;
    w->file = -1;
    return closed ? FV_OK : fail_hdf5(err, w, "the file");
}

FvStatus fv_clipwriter_finish(FvClipWriter *w, const uint8_t *split, FvError *err) {
    fv_hdf5_lock();
    FvStatus status = write_rest(w, split, err);
    fv_hdf5_unlock();
    if (status == FV_OK)
        status = fv_file_publish(w->temporary, w->path, err);
    fv_clipwriter_abandon(w); /* a renamed file has no temporary left to remove */
    return status;
}

void fv_clipwriter_abandon(FvClipWriter *w) {
    if (!w)
        return;
    fv_hdf5_lock();
    /* After a disk has filled up HDF5 still wants to write the rest, and crashes when it cannot:
     * the space that the thrown-away file gives back lets it end. Where that fails it stays open.
     */
    bool room = w->file < 0 || truncate(w->temporary, 0) == 0;
    if (room && w->frames >= 0)
        H5Dclose(w->frames);
    if (room && w->file >= 0)
        H5Fclose(w->file);
    fv_hdf5_unlock();
    if (*w->temporary)
        unlink(w->temporary);
    for (size_t i = 0; i < w->clips; i++) {
        free(w->source[i]);
        free(w->caption[i]);
    }
    free(w->source);
    free(w->caption);
    free(w);
}
