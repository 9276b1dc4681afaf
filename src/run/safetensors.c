#include "run/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"
#include "run/files.h"
#include "run/safetensors_parts.h"

/* --- one file ------------------------------------------------------------------------------- */

/* `wanted` ends the message for a path that cannot hold it. */
static FvStatus map_file(Shard *s, const char *wanted, FvError *err) {
    /* O_NONBLOCK: a pipe without a writer is refused instead of waited for */
    int file = open(s->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        FvStatus status =
            FV_FAIL(err, FV_DATA, "%s: cannot be opened: %s", s->path, strerror(errno));
        if (file >= 0)
            close(file);
        return status;
    }
    FvStatus status = FV_OK;
    if (!S_ISREG(info.st_mode) || info.st_size < LENGTH_BYTES)
        status = FV_FAIL(err, FV_DATA, "%s: is no %s (%s)", s->path, wanted,
                         S_ISREG(info.st_mode) ? "too short for a header" : "not a regular file");
    else {
        void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
        if (map == MAP_FAILED)
            status = FV_FAIL(err, FV_DATA, "%s: cannot be mapped: %s", s->path, strerror(errno));
        else {
            s->map = map;
            s->size = (size_t)info.st_size;
        }
    }
    close(file); /* the mapping stays */
    return status;
}

/* An object of JSON; `part` names it in messages: "header", "index". NULL with FV_DATA. */
static json_t *parse_json(const Shard *s, size_t begin, size_t size, const char *part,
                          FvError *err) {
    json_error_t why;
    json_t *value = json_loadb((const char *)s->map + begin, size, JSON_REJECT_DUPLICATES, &why);
    if (!value && json_error_code(&why) == json_error_duplicate_key)
        FV_FAIL(err, FV_DATA, "%s: %s names something twice (byte %d)", s->path, part,
                why.position);
    else if (!value)
        FV_FAIL(err, FV_DATA, "%s: %s is not valid JSON (byte %d)", s->path, part, why.position);
    return value;
}

static FvStatus parse_header(Shard *s, FvError *err) {
    uint64_t length;
    memcpy(&length, s->map, LENGTH_BYTES);
    if (length > MAX_HEADER)
        return FV_FAIL(err, FV_DATA, "%s: is no safetensors file (header of %" PRIu64 " bytes)",
                       s->path, length);
    if (length > s->size - LENGTH_BYTES)
        return FV_FAIL(err, FV_DATA, "%s: is cut: a header of %" PRIu64 " bytes in %zu", s->path,
                       length, s->size);
    s->header_size = (size_t)length;
    s->data = s->map + LENGTH_BYTES + length;
    s->data_size = s->size - LENGTH_BYTES - s->header_size;
    if (length == 0 || s->map[LENGTH_BYTES] != '{')
        return FV_FAIL(err, FV_DATA, "%s: is no safetensors file (header starts without '{')",
                       s->path);
    s->header = parse_json(s, LENGTH_BYTES, s->header_size, "header", err);
    return s->header ? FV_OK : FV_DATA;
}

static FvStatus open_shard(Shard *s, FvError *err) {
    FV_TRY(map_file(s, "safetensors file", err));
    return parse_header(s, err);
}

/* --- entries of a header -------------------------------------------------------------------- */

static FvStatus check_metadata(const Shard *s, json_t *meta, FvError *err) {
    const char *key;
    json_t *value;
    if (!json_is_object(meta))
        return FV_FAIL(err, FV_DATA, "%s: __metadata__ is not an object", s->path);
    json_object_foreach(meta, key, value) {
        if (!json_is_string(value))
            return FV_FAIL(err, FV_DATA, "%s: metadata %.100s is not a string", s->path, key);
    }
    return FV_OK;
}

/* A JSON integer that is a size; false for anything else. */
static bool read_size(const json_t *value, size_t *out) {
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return false;
    *out = (size_t)json_integer_value(value);
    return true;
}

static FvStatus read_type(const Shard *s, const json_t *value, FvTensor *t, FvError *err) {
    static const char *const small[] = {"F4", "F6_E2M3", "F6_E3M2"};
    const char *name = json_string_value(value);
    if (!name)
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s has no dtype", s->path, t->name);
    for (int i = 0; i < FV_TYPES; i++) {
        if (strcmp(name, fv_type_name((FvType)i)) == 0) {
            t->type = (FvType)i;
            return FV_OK;
        }
    }
    bool known = false;
    for (size_t i = 0; i < sizeof small / sizeof *small; i++)
        known = known || strcmp(name, small[i]) == 0;
    return FV_FAIL(err, FV_DATA, "%s: tensor %.100s has dtype %.20s, %s", s->path, t->name, name,
                   known ? "elements smaller than a byte, which are not supported"
                         : "which is not known here");
}

static FvStatus read_shape(const Shard *s, const json_t *shape, FvTensor *t, FvError *err) {
    if (!json_is_array(shape) || json_array_size(shape) > FV_MAX_RANK)
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: shape is not a list of up to %d sizes",
                       s->path, t->name, FV_MAX_RANK);
    t->rank = json_array_size(shape);
    t->count = 1;
    bool empty = false;
    for (size_t i = 0; i < t->rank; i++) {
        if (!read_size(json_array_get(shape, i), &t->shape[i]))
            return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: shape holds something that is no size",
                           s->path, t->name);
        empty = empty || t->shape[i] == 0;
        t->count = fv_mul(t->count, t->shape[i]); /* a saturated product matches no range */
    }
    if (empty)
        t->count = 0;
    return FV_OK;
}

static FvStatus read_entry(const Shard *s, const json_t *entry, FvTensor *t, FvError *err) {
    size_t begin, end;
    if (!json_is_object(entry))
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s is not described by an object", s->path,
                       t->name);
    FV_TRY(read_type(s, json_object_get(entry, "dtype"), t, err));
    FV_TRY(read_shape(s, json_object_get(entry, "shape"), t, err));
    const json_t *range = json_object_get(entry, "data_offsets");
    if (!json_is_array(range) || json_array_size(range) != 2 ||
        !read_size(json_array_get(range, 0), &begin) || !read_size(json_array_get(range, 1), &end))
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: data_offsets are not two sizes", s->path,
                       t->name);
    if (begin > end || end > s->data_size)
        return FV_FAIL(err, FV_DATA,
                       "%s: is cut or damaged: tensor %.100s at bytes %zu to %zu of %zu", s->path,
                       t->name, begin, end, s->data_size);
    if (end - begin != fv_tensor_bytes(t))
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: shape and data_offsets disagree", s->path,
                       t->name);
    t->data = s->data + begin;
    return FV_OK;
}

static int by_place(const void *a, const void *b) {
    const FvTensor *x = a, *y = b;
    const unsigned char *p = x->data, *q = y->data;
    if (p != q)
        return p < q ? -1 : 1;
    /* empty tensors before the one they touch */
    size_t m = fv_tensor_bytes(x), n = fv_tensor_bytes(y);
    return (m > n) - (m < n);
}

/* Appends the shard's tensors; there is room. */
static FvStatus read_entries(FvTensorFile *f, const Shard *s, FvError *err) {
    const char *name;
    json_t *entry;
    size_t first = f->count;
    json_object_foreach(s->header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) {
            FV_TRY(check_metadata(s, entry, err));
            continue;
        }
        f->tensors[f->count].name = name;
        FV_TRY(read_entry(s, entry, &f->tensors[f->count], err));
        f->count++;
    }
    qsort(f->tensors + first, f->count - first, sizeof *f->tensors, by_place);
    const unsigned char *next = s->data;
    for (size_t i = first; i < f->count; i++) {
        if (f->tensors[i].data != next)
            return FV_FAIL(err, FV_DATA, "%s: gap or overlap before tensor %.100s", s->path,
                           f->tensors[i].name);
        next += fv_tensor_bytes(&f->tensors[i]);
    }
    if (next != s->data + s->data_size)
        return FV_FAIL(err, FV_DATA, "%s: bytes behind the last tensor", s->path);
    return FV_OK;
}

/* --- the index of a sharded file ------------------------------------------------------------ */

/* The index is read through a mapping that it does not outlive. */
static FvStatus read_index(FvTensorFile *f, FvError *err) {
    Shard file = {.path = f->path};
    FV_TRY(map_file(&file, "index of a safetensors file", err));
    FvStatus status = FV_DATA;
    if (file.size > MAX_HEADER)
        FV_FAIL(err, FV_DATA, "%s: is no index of a safetensors file (%zu bytes)", f->path,
                file.size);
    else if ((f->index = parse_json(&file, 0, file.size, "index", err)))
        status = FV_OK;
    munmap(file.map, file.size);
    return status;
}

/* The file names in the map, each once, in the order in which they are first named. */
static FvStatus list_shards(FvTensorFile *f, json_t *map, json_t *names, FvError *err) {
    const char *tensor;
    json_t *value;
    json_object_foreach(map, tensor, value) {
        const char *name = json_string_value(value);
        if (!name)
            return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: the file is not given by name",
                           f->path, tensor);
        if (!*name || strchr(name, '/') || strstr(name, ".."))
            return FV_FAIL(err, FV_DATA,
                           "%s: tensor %.100s: \"%.100s\" is no name of a file beside the index",
                           f->path, tensor, name);
        if (json_object_set(names, name, value) != 0)
            return FV_FAIL(err, FV_DEVICE, "out of memory for %s", f->path);
    }
    return FV_OK;
}

/* Takes the shards' names from the map, where they live on. */
static FvStatus name_shards(FvTensorFile *f, json_t *names, FvError *err) {
    const char *slash = strrchr(f->path, '/'), *name;
    int folder = slash ? (int)(slash - f->path) + 1 : 0;
    json_t *value;
    f->shards = calloc(json_object_size(names) + 1, sizeof *f->shards);
    if (!f->shards)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", f->path);
    json_object_foreach(names, name, value) {
        Shard *s = &f->shards[f->shard_count++];
        s->name = json_string_value(value);
        if (asprintf(&s->path, "%.*s%s", folder, f->path, s->name) < 0) {
            s->path = NULL;
            return FV_FAIL(err, FV_DEVICE, "out of memory for %s", f->path);
        }
    }
    return FV_OK;
}

static FvStatus open_index(FvTensorFile *f, FvError *err) {
    FV_TRY(read_index(f, err));
    json_t *map = json_object_get(f->index, "weight_map");
    f->metadata = json_object_get(f->index, "metadata");
    if (!json_is_object(map) || (f->metadata && !json_is_object(f->metadata)))
        return FV_FAIL(err, FV_DATA, "%s: has no object \"%s\"", f->path,
                       json_is_object(map) ? "metadata" : "weight_map");
    json_t *names = json_object();
    FvStatus status = list_shards(f, map, names, err);
    if (status == FV_OK)
        status = name_shards(f, names, err);
    json_decref(names);
    return status;
}

/* Every tensor of the shard must be mapped to it. Then no name can be in two shards. */
static FvStatus check_mapped(const FvTensorFile *f, const Shard *s, size_t first, FvError *err) {
    const json_t *map = json_object_get(f->index, "weight_map");
    for (size_t i = first; i < f->count; i++) {
        const char *name = f->tensors[i].name;
        const char *place = json_string_value(json_object_get(map, name));
        if (!place)
            return FV_FAIL(err, FV_DATA, "%s: tensor %.100s is not in the index %s", s->path, name,
                           f->path);
        if (strcmp(place, s->name) != 0)
            return FV_FAIL(err, FV_DATA, "%s: tensor %.100s belongs in %.100s by the index %s",
                           s->path, name, place, f->path);
    }
    return FV_OK;
}

static FvStatus check_complete(const FvTensorFile *f, FvError *err) {
    const char *name;
    json_t *place;
    json_object_foreach(json_object_get(f->index, "weight_map"), name, place) {
        if (!fv_tensors_find(f, name))
            return FV_FAIL(err, FV_DATA, "%s: tensor %.100s is not in %.100s", f->path, name,
                           json_string_value(place));
    }
    return FV_OK;
}

/* --- the whole ------------------------------------------------------------------------------ */

static FvStatus open_single(FvTensorFile *f, FvError *err) {
    f->shards = calloc(1, sizeof *f->shards);
    if (!f->shards || !(f->shards->path = strdup(f->path)))
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", f->path);
    f->shards->name = f->shards->path;
    f->shard_count = 1;
    return FV_OK;
}

static int by_name(const void *a, const void *b) {
    const FvTensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static void sort_names(FvTensorFile *f) {
    for (size_t i = 0; i < f->count; i++)
        f->by_name[i] = &f->tensors[i];
    qsort(f->by_name, f->count, sizeof *f->by_name, by_name);
}

static FvStatus open_parts(FvTensorFile *f, FvError *err) {
    size_t most = 1;
    FV_TRY(fv_ends_with(f->path, ".index.json") ? open_index(f, err) : open_single(f, err));
    for (size_t i = 0; i < f->shard_count; i++) {
        FV_TRY(open_shard(&f->shards[i], err));
        most += json_object_size(f->shards[i].header);
    }
    f->tensors = calloc(most, sizeof *f->tensors);
    f->by_name = calloc(most, sizeof *f->by_name);
    if (!f->tensors || !f->by_name)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the header of %s", f->path);
    for (size_t i = 0; i < f->shard_count; i++) {
        size_t first = f->count;
        FV_TRY(read_entries(f, &f->shards[i], err));
        if (f->index)
            FV_TRY(check_mapped(f, &f->shards[i], first, err));
    }
    sort_names(f);
    if (!f->index)
        f->metadata = json_object_get(f->shards->header, "__metadata__");
    return f->index ? check_complete(f, err) : FV_OK;
}

FvStatus fv_tensors_open(const char *path, FvTensorFile **out, FvError *err) {
    FvTensorFile *f = calloc(1, sizeof *f);
    if (!f || !(f->path = strdup(path))) {
        free(f);
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", path);
    }
    FvStatus status = open_parts(f, err);
    if (status != FV_OK) {
        fv_tensors_close(f);
        return status;
    }
    *out = f;
    return FV_OK;
}

void fv_tensors_close(FvTensorFile *f) {
    if (!f)
        return;
    for (size_t i = 0; i < f->shard_count; i++) {
        Shard *s = &f->shards[i];
        if (s->map)
            munmap(s->map, s->size); /* fails for no valid mapping */
        json_decref(s->header);
        free(s->path);
    }
    json_decref(f->index);
    free(f->shards);
    free(f->tensors);
    free(f->by_name);
    free(f->path);
    free(f);
}

const char *fv_tensors_path(const FvTensorFile *f) {
    return f->path;
}

size_t fv_tensors_files(const FvTensorFile *f) {
    return f->shard_count + (f->index != NULL);
}

const char *fv_tensors_file(const FvTensorFile *f, size_t index) {
    size_t first = f->index != NULL; /* shard */
    return index < first ? f->path : f->shards[index - first].path;
}

size_t fv_tensors_count(const FvTensorFile *f) {
    return f->count;
}

const FvTensor *fv_tensors_at(const FvTensorFile *f, size_t index) {
    return &f->tensors[index];
}

const FvTensor *fv_tensors_find(const FvTensorFile *f, const char *name) {
    const FvTensor wanted = {.name = name}, *key = &wanted;
    const FvTensor **found = bsearch(&key, f->by_name, f->count, sizeof *f->by_name, by_name);
    return found ? *found : NULL;
}

const char *fv_tensors_metadata(const FvTensorFile *f, const char *key) {
    return json_string_value(json_object_get(f->metadata, key));
}

/* Text never begins so: its first bytes are no length that a header may have. Only a regular file
 * is looked into: what is read of a pipe would be lost to who reads it next. */
static bool begins_like_one(const char *path) {
    unsigned char start[LENGTH_BYTES + 1];
    uint64_t length = 0;
    struct stat info;
    int file =
        stat(path, &info) == 0 && S_ISREG(info.st_mode) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return false;
    bool whole = read(file, start, sizeof start) == (ssize_t)sizeof start;
    close(file);
    if (whole)
        memcpy(&length, start, LENGTH_BYTES);
    return whole && length <= MAX_HEADER && start[LENGTH_BYTES] == '{';
}

bool fv_tensors_recognise(const char *path) {
    return fv_ends_with(path, ".index.json") || fv_ends_with(path, ".safetensors") ||
           begins_like_one(path);
}
