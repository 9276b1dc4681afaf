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

/* What is small is kept until the end, when its datasets are written whole. */
typedef struct Kept {
    char *source, *caption;
    int32_t *tokens; /* [token_count] */
    size_t token_count;
    uint8_t objects[FV_CLIP_OBJECTS][2];
} Kept;

struct FvClipWriter {
    FvClipSpec spec;
    char path[FV_PATH], temporary[FV_PATH];
    hid_t file, frames, masks; /* masks: -1 without labels */
    size_t clips, capacity;
    Kept *kept; /* [clips] */
};

/* The lock is held, and the call that failed was HDF5's last. */
static FvStatus fail_hdf5(FvError *err, const FvClipWriter *w, const char *what) {
    char reason[160];
    fv_hdf5_reason(reason, sizeof reason);
    return FV_FAIL(err, FV_IO, "%s: %s cannot be written: %s", w->path, what, reason);
}

static hid_t create_text_type(void) { /* of any length */
    hid_t type = H5Tcopy(H5T_C_S1);
    if (type >= 0 && (H5Tset_size(type, H5T_VARIABLE) < 0 || H5Tset_cset(type, H5T_CSET_UTF8) < 0))
        return -1;
    return type;
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

/* A dataset of bytes that grows clip by clip: [clips, T, S, S, 3], or with rank 4 [clips, T, S, S].
 * One clip per chunk: a reader that wants one clip unpacks nothing else. Level 1 of deflate makes
 * video about a third smaller and reads faster than most disks deliver. */
static hid_t create_growing(const FvClipWriter *w, const char *name, int rank) {
    hsize_t t = w->spec.frames, s = w->spec.size;
    hsize_t now[5] = {0, t, s, s, 3}, most[5] = {H5S_UNLIMITED, t, s, s, 3},
            chunk[5] = {1, t, s, s, 3};
    hid_t space = H5Screate_simple(rank, now, most), list = create_properties(), out = -1;
    if (space >= 0 && list >= 0 && H5Pset_chunk(list, rank, chunk) >= 0 &&
        H5Pset_deflate(list, 1) >= 0)
        out = H5Dcreate2(w->file, name, H5T_STD_U8LE, space, H5P_DEFAULT, list, H5P_DEFAULT);
    if (list >= 0)
        H5Pclose(list);
    if (space >= 0)
        H5Sclose(space);
    return out;
}

static FvStatus create(FvClipWriter *w, FvError *err) {
    struct stat info;
    if (stat(w->path, &info) == 0 && S_ISDIR(info.st_mode))
        return FV_FAIL(err, FV_IO, "%s: is a folder: name the file to write", w->path);
    int probe = open(w->temporary, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
    if (probe < 0)
        return FV_FAIL(err, FV_IO, "%s: cannot be written: %s", w->path, strerror(errno));
    close(probe);
    w->file = fv_hdf5_open_temporary(w->temporary, true);
    if (w->file < 0)
        return fail_hdf5(err, w, "the file");
    w->frames = create_growing(w, "/frames", 5);
    if (w->frames < 0 || !describe(w->frames, "1", "pixels: clip, frame, y, x, RGB"))
        return fail_hdf5(err, w, "/frames");
    if (!w->spec.labels)
        return FV_OK;
    w->masks = create_growing(w, "/masks", 4);
    if (w->masks < 0 ||
        !describe(w->masks, "1", "object that covers the pixel, 0 none: clip, frame, y, x"))
        return fail_hdf5(err, w, "/masks");
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
    w->file = w->frames = w->masks = -1;
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

static FvStatus keep(FvClipWriter *w, const FvClip *clip, FvError *err) {
    if (w->clips == w->capacity) {
        size_t capacity = w->capacity ? 2 * w->capacity : 64;
        Kept *grown = realloc(w->kept, fv_mul(capacity, sizeof *grown));
        if (!grown)
            return FV_FAIL(err, FV_DEVICE, "out of memory after %zu clips", w->clips);
        w->kept = grown;
        w->capacity = capacity;
    }
    Kept *k = &w->kept[w->clips++];
    *k = (Kept){.source = strdup(clip->source),
                .caption = strdup(clip->caption ? clip->caption : ""),
                .tokens = calloc(clip->token_count + 1, sizeof *k->tokens),
                .token_count = clip->token_count};
    if (!k->source || !k->caption || !k->tokens)
        return FV_FAIL(err, FV_DEVICE, "out of memory after %zu clips", w->clips);
    fv_utf8_clean(k->source);
    fv_utf8_clean(k->caption);
    if (clip->token_count)
        memcpy(k->tokens, clip->tokens, clip->token_count * sizeof *k->tokens);
    if (w->spec.labels)
        memcpy(k->objects, clip->labels->objects, sizeof k->objects);
    return FV_OK;
}

static bool append(const FvClipWriter *w, hid_t dataset, int rank, const uint8_t *values) {
    hsize_t t = w->spec.frames, s = w->spec.size;
    hsize_t all[5] = {w->clips + 1, t, s, s, 3}, start[5] = {w->clips}, one[5] = {1, t, s, s, 3};
    if (H5Dset_extent(dataset, all) < 0)
        return false;
    hid_t space = H5Dget_space(dataset), memory = H5Screate_simple(rank, one, NULL);
    bool ok = space >= 0 && memory >= 0 &&
              H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, one, NULL) >= 0 &&
              H5Dwrite(dataset, H5T_NATIVE_UINT8, memory, space, H5P_DEFAULT, values) >= 0;
    if (ok) { /* not after a failure, whose reason they would clear */
        H5Sclose(memory);
        H5Sclose(space);
    }
    return ok;
}

FvStatus fv_clipwriter_add(FvClipWriter *w, const FvClip *clip, FvError *err) {
    FvStatus status = FV_OK;
    fv_hdf5_lock();
    if (!append(w, w->frames, 5, clip->pixels))
        status = fail_hdf5(err, w, "/frames");
    else if (w->spec.labels && !append(w, w->masks, 4, clip->labels->masks))
        status = fail_hdf5(err, w, "/masks");
    fv_hdf5_unlock();
    FV_TRY(status);
    return keep(w, clip, err);
}

/* Writes a whole dataset, which stays open for its attributes. */
static hid_t write_open(hid_t file, const char *name, int rank, const hsize_t *shape, hid_t stored,
                        hid_t native, const void *data, const char *long_name) {
    hid_t space = H5Screate_simple(rank, shape, NULL), list = create_properties();
    hid_t dataset = -1;
    bool ok =
        space >= 0 && list >= 0 &&
        (dataset = H5Dcreate2(file, name, stored, space, H5P_DEFAULT, list, H5P_DEFAULT)) >= 0 &&
        H5Dwrite(dataset, native, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0 &&
        describe(dataset, "1", long_name);
    if (ok) { /* not after a failure, whose reason they would clear */
        H5Pclose(list);
        H5Sclose(space);
    }
    return ok ? dataset : -1;
}

/* Writes a whole dataset [rows] or, with columns, [rows, columns]. */
static bool write_dataset(hid_t file, const char *name, size_t rows, size_t columns, hid_t stored,
                          hid_t native, const void *data, const char *long_name) {
    const hsize_t shape[2] = {rows, columns};
    hid_t dataset = write_open(file, name, columns ? 2 : 1, shape, stored, native, data, long_name);
    return dataset >= 0 && H5Dclose(dataset) >= 0;
}

static FvStatus write_strings(const FvClipWriter *w, const char *name, bool captions,
                              const char *long_name, FvError *err) {
    const char **strings = calloc(w->clips, sizeof *strings);
    if (!strings)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the texts of %zu clips", w->clips);
    for (size_t i = 0; i < w->clips; i++)
        strings[i] = captions ? w->kept[i].caption : w->kept[i].source;
    hid_t type = create_text_type();
    bool ok =
        type >= 0 && write_dataset(w->file, name, w->clips, 0, type, type, strings, long_name);
    free(strings);
    if (!ok)
        return fail_hdf5(err, w, name);
    H5Tclose(type);
    return FV_OK;
}

/* An attribute that lists the names 0, 1, ... */
static bool add_names(hid_t object, const char *name, const char *(*name_of)(size_t)) {
    enum { MOST = 16 };
    const char *names[MOST];
    hsize_t count = 0;
    for (; count < MOST && name_of(count); count++)
        names[count] = name_of(count);
    hid_t type = create_text_type(), space = H5Screate_simple(1, &count, NULL), attribute = -1;
    bool ok = type >= 0 && space >= 0 &&
              (attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT)) >= 0 &&
              H5Awrite(attribute, type, names) >= 0;
    if (ok) { /* not after a failure, whose reason they would clear */
        H5Aclose(attribute);
        H5Sclose(space);
        H5Tclose(type);
    }
    return ok;
}

static FvStatus write_objects(const FvClipWriter *w, FvError *err) {
    const hsize_t shape[3] = {w->clips, FV_CLIP_OBJECTS, 2};
    uint8_t(*objects)[FV_CLIP_OBJECTS][2] = calloc(w->clips, sizeof *objects);
    if (!objects)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the objects of %zu clips", w->clips);
    for (size_t i = 0; i < w->clips; i++)
        memcpy(objects[i], w->kept[i].objects, sizeof *objects);
    hid_t dataset =
        write_open(w->file, "/objects", 3, shape, H5T_STD_U8LE, H5T_NATIVE_UINT8, objects,
                   "mask value i + 1 is what: clip, i, (colour, shape), 255 none");
    free(objects);
    if (dataset < 0 || !add_names(dataset, "colours", fv_clip_colour) ||
        !add_names(dataset, "shapes", fv_clip_shape) || H5Dclose(dataset) < 0)
        return fail_hdf5(err, w, "/objects");
    return FV_OK;
}

static bool write_ids(const FvClipWriter *w, const int32_t *tokens) {
    const FvClipSpec *s = &w->spec;
    const hsize_t shape[2] = {w->clips, s->max_tokens};
    hid_t dataset = write_open(w->file, "/tokens", 2, shape, H5T_STD_I32LE, H5T_NATIVE_INT32,
                               tokens, "ids of the caption's tokens: clip, place");
    return dataset >= 0 && fv_hdf5_put_text(dataset, "tokenizer", s->tokenizer) &&
           fv_hdf5_put_text(dataset, "tokenizer_sha256", s->tokenizer_sha256) &&
           add_number(dataset, "vocabulary", s->vocabulary) && H5Dclose(dataset) >= 0;
}

static FvStatus write_tokens(const FvClipWriter *w, FvError *err) {
    size_t columns = w->spec.max_tokens;
    int32_t *tokens = calloc(w->clips, fv_mul(columns, sizeof *tokens));
    int32_t *count = calloc(w->clips, sizeof *count);
    bool room = tokens && count, ok = room;
    for (size_t c = 0; room && c < w->clips; c++) {
        const Kept *k = &w->kept[c];
        count[c] = (int32_t)k->token_count;
        memcpy(tokens + c * columns, k->tokens, k->token_count * sizeof *tokens);
    }
    ok = ok && write_ids(w, tokens) &&
         write_dataset(w->file, "/token_count", w->clips, 0, H5T_STD_I32LE, H5T_NATIVE_INT32, count,
                       "tokens of the clip's caption, 0: it has none");
    free(tokens);
    free(count);
    if (!room)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the tokens of %zu clips", w->clips);
    if (!ok)
        return fail_hdf5(err, w, "captions");
    return write_strings(w, "/caption", true, "what the clip shows", err);
}

static FvStatus write_rest(FvClipWriter *w, const uint8_t *split, FvError *err) {
    const FvClipSpec *s = &w->spec;
    if (!write_dataset(w->file, "/split", w->clips, 0, H5T_STD_U8LE, H5T_NATIVE_UINT8, split,
                       "0: training, 1: held-out"))
        return fail_hdf5(err, w, "/split");
    FV_TRY(write_strings(w, "/source", false, "where the clip comes from", err));
    if (s->labels)
        FV_TRY(write_objects(w, err));
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
    if (w->masks >= 0)
        closed = H5Dclose(w->masks) >= 0 && closed;
    w->frames = w->masks = -1;
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
    if (room && w->masks >= 0)
        H5Dclose(w->masks);
    if (room && w->file >= 0)
        H5Fclose(w->file);
    fv_hdf5_unlock();
    if (*w->temporary)
        unlink(w->temporary);
    for (size_t i = 0; i < w->clips; i++) {
        free(w->kept[i].source);
        free(w->kept[i].caption);
        free(w->kept[i].tokens);
    }
    free(w->kept);
    free(w);
}
