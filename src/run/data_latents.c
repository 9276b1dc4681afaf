#include "run/data_latents.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"
#include "model/config.h"
#include "run/hdf5_lock.h"

/* --- what is there ---------------------------------------------------------------------------- */

/* The text of an attribute; "" when there is none of that form, or one of another length. */
static void read_text(hid_t object, const char *name, char *out, size_t size) {
    hid_t attribute = H5Aopen(object, name, H5P_DEFAULT);
    hid_t type = attribute >= 0 ? H5Aget_type(attribute) : -1;
    char *text = NULL;
    out[0] = '\0';
    if (type >= 0 && H5Tis_variable_str(type) > 0 && H5Aread(attribute, type, &text) >= 0 && text) {
        if (strlen(text) + 1 == size)
            memcpy(out, text, size);
        H5free_memory(text);
    }
    if (type >= 0)
        H5Tclose(type);
    if (attribute >= 0)
        H5Aclose(attribute);
}

FvStatus fv_latents_there(const FvClipFile *f, bool *there, char sha256[FV_SHA256_TEXT],
                          FvError *err) {
    sha256[0] = '\0';
    fv_hdf5_lock();
    htri_t exists = H5Lexists(f->file, "/latents", H5P_DEFAULT);
    hid_t dataset = exists > 0 ? H5Dopen2(f->file, "/latents", H5P_DEFAULT) : -1;
    if (dataset >= 0) {
        read_text(dataset, "vae_sha256", sha256, FV_SHA256_TEXT);
        H5Dclose(dataset);
    }
    fv_hdf5_unlock();
    *there = exists > 0;
    if (exists < 0)
        return FV_FAIL(err, FV_DATA, "%s: damaged: its datasets cannot be listed", f->path);
    return FV_OK;
}

/* --- the copy --------------------------------------------------------------------------------- */

/* Copies and sums; the files are open. */
static FvStatus copy_open(int from, int to, const char *path, FvSha256 *sum, FvError *err) {
    enum { PIECE = 1 << 20 };
    char *piece = malloc(PIECE);
    if (!piece)
        return FV_FAIL(err, FV_DEVICE, "out of memory for copying %s", path);
    FvStatus status = FV_OK;
    for (ssize_t n; status == FV_OK && (n = read(from, piece, PIECE)) != 0;) {
        if (n < 0)
            status = FV_FAIL(err, FV_IO, "%s: cannot be read: %s", path, strerror(errno));
        for (ssize_t done = 0, m; status == FV_OK && done < n; done += m) {
            m = write(to, piece + done, (size_t)(n - done));
            if (m <= 0)
                status = FV_FAIL(err, FV_IO, "%s: cannot be copied: %s", path, strerror(errno));
        }
        fv_sha256_add(sum, piece, n > 0 ? (size_t)n : 0);
    }
    free(piece);
    return status;
}

/* The copy gets room for `added` bytes more at once: HDF5 does not get over a disk that fills up
 * under it. What it does not need it cuts off when it closes the file. */
static FvStatus copy_file(const char *path, const char *sha256, const char *temporary, size_t added,
                          FvError *err) {
    struct stat info = {0};
    char got[FV_SHA256_TEXT];
    FvSha256 sum;
    int from = open(path, O_RDONLY | O_CLOEXEC), to = -1;
    FvStatus status = FV_OK;
    if (from < 0 || fstat(from, &info) != 0)
        status = FV_FAIL(err, FV_IO, "%s: cannot be opened: %s", path, strerror(errno));
    else if ((to = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, info.st_mode & 0777)) <
             0)
        status = FV_FAIL(err, FV_IO, "%s: cannot be written: %s", temporary, strerror(errno));
    if (status == FV_OK) {
        int reason = posix_fallocate(to, 0, info.st_size + (off_t)added);
        if (reason != 0)
            status = FV_FAIL(err, FV_IO, "%s: cannot be written: %s: needs room for a copy of %s",
                             temporary, strerror(reason), path);
    }
    fv_sha256_start(&sum);
    if (status == FV_OK)
        status = copy_open(from, to, path, &sum, err);
    if (from >= 0)
        close(from); /* was only read */
    if (to >= 0 && close(to) != 0 && status == FV_OK)
        status = FV_FAIL(err, FV_IO, "%s: cannot be copied: %s", path, strerror(errno));
    FV_TRY(status);
    fv_sha256_text(&sum, got);
    if (strcmp(got, sha256) != 0)
        return FV_FAIL(err, FV_DATA,
                       "%s: changed while its latents were computed: run the command again", path);
    return FV_OK;
}

/* --- the dataset ------------------------------------------------------------------------------ */

/* Contiguous, in the order of the clips: a clip is one piece of the file. No time stamps, so that
 * the same latents make the same file. What is not closed here closes with the file. */
static hid_t create_dataset(hid_t file, const FvLatents *l) {
    hsize_t shape[5] = {l->clips, l->frames, FV_LATENT_CHANNELS, l->side, l->side};
    htri_t there = H5Lexists(file, "/latents", H5P_DEFAULT);
    if (there < 0 || (there && H5Ldelete(file, "/latents", H5P_DEFAULT) < 0))
        return -1;
    hid_t space = H5Screate_simple(5, shape, NULL), list = H5Pcreate(H5P_DATASET_CREATE);
    if (space < 0 || list < 0 || H5Pset_obj_track_times(list, false) < 0)
        return -1;
    return H5Dcreate2(file, "/latents", H5T_IEEE_F32LE, space, H5P_DEFAULT, list, H5P_DEFAULT);
}

static bool write_clip(hid_t dataset, const FvLatents *l, size_t clip, const float *values) {
    hsize_t start[5] = {clip}, one[5] = {1, l->frames, FV_LATENT_CHANNELS, l->side, l->side};
    hid_t space = H5Dget_space(dataset), memory = H5Screate_simple(5, one, NULL);
    bool ok = space >= 0 && memory >= 0 &&
              H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, one, NULL) >= 0 &&
              H5Dwrite(dataset, H5T_NATIVE_FLOAT, memory, space, H5P_DEFAULT, values) >= 0;
    if (ok) { /* not after a failure, whose reason they would clear */
        H5Sclose(memory);
        H5Sclose(space);
    }
    return ok;
}

static FvStatus fail_hdf5(const char *path, FvError *err) {
    char reason[160];
    fv_hdf5_reason(reason, sizeof reason);
    return FV_FAIL(err, FV_IO, "%s: /latents cannot be written: %s", path, reason);
}

/* The lock is held, but for l->read. */
static FvStatus fill(hid_t file, const char *path, const FvLatents *l, FvError *err) {
    hid_t dataset = create_dataset(file, l);
    if (dataset < 0)
        return fail_hdf5(path, err);
    for (size_t clip = 0; clip < l->clips; clip++) {
        const float *values;
        fv_hdf5_unlock(); /* the caller's function may take its time, and the lock */
        FvStatus status = l->read(l->context, clip, &values, err);
        fv_hdf5_lock();
        FV_TRY(status);
        if (!write_clip(dataset, l, clip, values))
            return fail_hdf5(path, err);
    }
    if (!fv_hdf5_put_text(dataset, "units", "1") ||
        !fv_hdf5_put_text(dataset, "long_name",
                          "latents of the autoencoder: clip, frame, channel, y, x") ||
        !fv_hdf5_put_text(dataset, "vae", l->vae) ||
        !fv_hdf5_put_text(dataset, "vae_sha256", l->vae_sha256) ||
        H5Fflush(file, H5F_SCOPE_LOCAL) < 0)
        return fail_hdf5(path, err);
    return FV_OK;
}

FvStatus fv_latents_write(const char *path, const char *sha256, const char *temporary,
                          const FvLatents *l, FvError *err) {
    enum { MORE = 1 << 16 }; /* for what describes the dataset */
    size_t values = fv_mul4(l->clips, l->frames, fv_mul(l->side, l->side), FV_LATENT_CHANNELS);
    size_t added = fv_add(fv_mul(values, sizeof(float)), MORE);
    FvStatus status = copy_file(path, sha256, temporary, added, err);
    if (status == FV_OK) {
        fv_hdf5_lock();
        hid_t file = fv_hdf5_open_temporary(temporary, false);
        status = file >= 0 ? fill(file, path, l, err) : fail_hdf5(path, err);
        if (file >= 0 && H5Fclose(file) < 0 && status == FV_OK)
            status = fail_hdf5(path, err);
        fv_hdf5_unlock();
    }
    if (status != FV_OK)
        unlink(temporary); /* may never have been made */
    return status;
}
