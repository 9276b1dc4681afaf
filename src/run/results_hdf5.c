#include "run/results_hdf5.h"

#include <hdf5.h>
#include <hdf5_hl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run/files.h"
#include "run/hdf5_lock.h"

_Static_assert(sizeof(hid_t) == sizeof(FvH5Id), "FvH5Id stands for hid_t");

enum { GROWTH = 1 << 20 /* bytes by which the image grows */, GZIP_LEVEL = 1 };

/* Takes in what a call returned; false when this or an earlier one failed. */
static bool check(FvH5 *o, const char *what, hid_t result) {
    if (result < 0 && !o->failed) {
        char reason[160];
        fv_hdf5_reason(reason, sizeof reason);
        snprintf(o->why, sizeof o->why, "%s: %s", what, reason);
        o->failed = true;
    }
    return !o->failed;
}

/* --- file ----------------------------------------------------------------------------------- */

void fv_h5_begin(FvH5 *o) {
    *o = (FvH5){.file = -1, .text = -1, .scalar = -1};
    hid_t access = H5Pcreate(H5P_FILE_ACCESS), create = H5Pcreate(H5P_FILE_CREATE);
    check(o, "memory file", H5Pset_fapl_core(access, GROWTH, false));
    check(o, "memory file", H5Pset_fclose_degree(access, H5F_CLOSE_STRONG));
    check(o, "memory file",
          H5Pset_link_creation_order(create, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED));
    o->file = H5Fcreate("results.h5", H5F_ACC_TRUNC, create, access); /* no file is made */
    o->text = H5Tcopy(H5T_C_S1);
    o->scalar = H5Screate(H5S_SCALAR);
    check(o, "memory file", o->file);
    check(o, "string type", H5Tset_size(o->text, H5T_VARIABLE));
    check(o, "string type", H5Tset_cset(o->text, H5T_CSET_UTF8));
    check(o, "memory file", o->scalar);
    H5Pclose(create);
    H5Pclose(access);
}

static void *take_image(FvH5 *o, size_t *size) {
    check(o, "memory file", H5Fflush(o->file, H5F_SCOPE_GLOBAL));
    ssize_t bytes = o->failed ? -1 : H5Fget_file_image(o->file, NULL, 0);
    if (!check(o, "file image", bytes))
        return NULL;
    void *image = malloc((size_t)bytes);
    if (!image || H5Fget_file_image(o->file, image, (size_t)bytes) != bytes) {
        fv_h5_fail(o, "out of memory for the file's image");
        free(image);
        return NULL;
    }
    *size = (size_t)bytes;
    return image;
}

FvStatus fv_h5_finish(FvH5 *o, const char *path, void **image, size_t *size, FvError *err) {
    *image = take_image(o, size);
    if (o->scalar >= 0)
        H5Sclose(o->scalar);
    if (o->text >= 0)
        H5Tclose(o->text);
    if (o->file >= 0)
        H5Fclose(o->file); /* frees memory only: the image is taken */
    if (!*image)
        return FV_FAIL(err, FV_IO, "%s: cannot be made: %s", path, o->why);
    return FV_OK;
}

void fv_h5_fail(FvH5 *o, const char *why) {
    if (!o->failed)
        snprintf(o->why, sizeof o->why, "%s", why);
    o->failed = true;
}

/* --- groups and attributes ------------------------------------------------------------------ */

FvH5Id fv_h5_group(FvH5 *o, FvH5Id parent, const char *name) {
    if (o->failed)
        return -1;
    hid_t create = H5Pcreate(H5P_GROUP_CREATE);
    check(o, name, /* readers then list in the order of writing */
          H5Pset_link_creation_order(create, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED));
    hid_t group = H5Gcreate2(parent, name, H5P_DEFAULT, create, H5P_DEFAULT);
    check(o, name, group);
    H5Pclose(create);
    return group;
}

FvH5Id fv_h5_open_group(FvH5 *o, FvH5Id parent, const char *path) {
    hid_t group = o->failed ? -1 : H5Gopen2(parent, path, H5P_DEFAULT);
    check(o, path, group);
    return group;
}

void fv_h5_close_group(FvH5 *o, FvH5Id group) {
    if (group >= 0)
        check(o, "group", H5Gclose(group));
}

void fv_h5_link(FvH5 *o, FvH5Id from, FvH5Id to, const char *name) {
    if (!o->failed)
        check(o, name, H5Lcreate_hard(from, name, to, name, H5P_DEFAULT, H5P_DEFAULT));
}

static void put(FvH5 *o, hid_t object, const char *name, hid_t type, const void *value) {
    if (o->failed)
        return;
    hid_t attribute = H5Acreate2(object, name, type, o->scalar, H5P_DEFAULT, H5P_DEFAULT);
    if (check(o, name, attribute)) {
        check(o, name, H5Awrite(attribute, type, value));
        check(o, name, H5Aclose(attribute));
    }
}

void fv_h5_put_text(FvH5 *o, FvH5Id object, const char *name, const char *text) {
    char *clean = strdup(text);
    if (!clean) {
        fv_h5_fail(o, "out of memory");
        return;
    }
    fv_utf8_clean(clean);
    put(o, object, name, o->text, &clean);
    free(clean);
}

void fv_h5_put_int(FvH5 *o, FvH5Id object, const char *name, int64_t value) {
    put(o, object, name, H5T_NATIVE_INT64, &value);
}

void fv_h5_put_real(FvH5 *o, FvH5Id object, const char *name, double value) {
    put(o, object, name, H5T_NATIVE_DOUBLE, &value);
}

void fv_h5_put_flag(FvH5 *o, FvH5Id object, const char *name, bool value) {
    int8_t stored = value;
    put(o, object, name, H5T_NATIVE_INT8, &stored);
}

/* --- datasets ------------------------------------------------------------------------------- */

static hid_t type_of(const FvH5 *o, FvH5Kind kind) {
    switch (kind) {
    case FV_H5_F64:
        return H5T_NATIVE_DOUBLE;
    case FV_H5_F32:
        return H5T_NATIVE_FLOAT;
    case FV_H5_I64:
        return H5T_NATIVE_INT64;
    case FV_H5_U64:
        return H5T_NATIVE_UINT64;
    case FV_H5_U8:
        return H5T_NATIVE_UINT8;
    case FV_H5_TEXT:
        break;
    }
    return o->text;
}

static hid_t layout_of(FvH5 *o, const FvColumn *c, size_t rank, const hsize_t *dims) {
    hid_t layout = H5Pcreate(H5P_DATASET_CREATE);
    check(o, c->name, H5Pset_obj_track_times(layout, false));
    if (c->kind != FV_H5_TEXT) /* all is written at once; HDF5 insists on filling strings */
        check(o, c->name, H5Pset_fill_time(layout, H5D_FILL_TIME_NEVER));
    if (c->packed) {
        hsize_t chunk[FV_AXES];
        for (size_t i = 0; i < rank; i++)
            chunk[i] = i + c->chunk_rank < rank ? 1 : dims[i];
        check(o, c->name, H5Pset_chunk(layout, (int)rank, chunk));
        check(o, c->name, H5Pset_shuffle(layout));
        check(o, c->name, H5Pset_deflate(layout, GZIP_LEVEL));
    }
    return layout;
}

static void put_fill(FvH5 *o, hid_t dataset, FvH5Kind kind) {
    float single = NAN;
    double full = NAN;
    if (kind == FV_H5_F32)
        put(o, dataset, "_FillValue", H5T_NATIVE_FLOAT, &single);
    if (kind == FV_H5_F64)
        put(o, dataset, "_FillValue", H5T_NATIVE_DOUBLE, &full);
}

static hid_t write_dataset(FvH5 *o, hid_t group, const FvColumn *c, size_t rank,
                           const hsize_t *dims) {
    if (o->failed)
        return -1;
    hid_t type = type_of(o, c->kind);
    hid_t space = H5Screate_simple((int)rank, dims, NULL);
    hid_t layout = layout_of(o, c, rank, dims);
    hid_t dataset = H5Dcreate2(group, c->name, type, space, H5P_DEFAULT, layout, H5P_DEFAULT);
    check(o, c->name, dataset);
    H5Pclose(layout);
    H5Sclose(space);
    if (!o->failed)
        check(o, c->name, H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, c->data));
    if (c->unit)
        fv_h5_put_text(o, dataset, "units", c->unit);
    fv_h5_put_text(o, dataset, "long_name", c->text);
    return dataset;
}

FvAxis fv_h5_axis(FvH5 *o, FvH5Id group, const FvColumn *column, size_t size) {
    hsize_t dims[] = {size};
    FvAxis axis = {write_dataset(o, group, column, 1, dims), size};
    if (!o->failed)
        check(o, column->name, H5DSset_scale(axis.id, column->name));
    return axis;
}

FvAxis fv_h5_open_axis(FvH5 *o, FvH5Id group, const char *name, size_t size) {
    FvAxis axis = {o->failed ? -1 : H5Dopen2(group, name, H5P_DEFAULT), size};
    check(o, name, axis.id);
    return axis;
}

void fv_h5_close_axis(FvH5 *o, FvAxis *axis) {
    if (axis->id >= 0)
        check(o, "axis", H5Dclose(axis->id));
    axis->id = -1;
}

void fv_h5_column(FvH5 *o, FvH5Id group, const FvColumn *c) {
    hsize_t dims[FV_AXES];
    size_t rank = 0;
    for (; rank < FV_AXES && c->axes[rank]; rank++)
        dims[rank] = c->axes[rank]->size;
    hid_t dataset = write_dataset(o, group, c, rank, dims);
    put_fill(o, dataset, c->kind);
    for (size_t i = 0; i < rank && !o->failed; i++)
        check(o, c->name, H5DSattach_scale(dataset, c->axes[i]->id, (unsigned)i));
    if (dataset >= 0)
        check(o, c->name, H5Dclose(dataset));
}
