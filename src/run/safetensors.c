#include "run/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/memory.h"
#include "run/files.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are stored little-endian");

enum { LENGTH_BYTES = 8, MAX_HEADER = 100 * 1000 * 1000, CHECKSUM_DIGITS = 16 };

/* The writer's headers start so: the digits stand at a fixed place. */
static const char checksum_start[] = "{\"__metadata__\":{\"checksum\":\"";

static const struct {
    const char *name;
    size_t size;
} types[FV_TYPES] = {
    [FV_F64] = {"F64", 8}, [FV_F32] = {"F32", 4}, [FV_F16] = {"F16", 2}, [FV_BF16] = {"BF16", 2},
    [FV_I64] = {"I64", 8}, [FV_I32] = {"I32", 4}, [FV_U8] = {"U8", 1},
};

size_t fv_type_size(FvType type) {
    return types[type].size;
}

const char *fv_type_name(FvType type) {
    return types[type].name;
}

static size_t tensor_bytes(const FvTensor *t) {
    return fv_mul(t->count, types[t->type].size);
}

/* --- reading -------------------------------------------------------------------------------- */

struct FvTensorFile {
    char *path;
    unsigned char *map; /* the whole file, or NULL */
    size_t size;
    const unsigned char *data; /* behind the header */
    size_t header_size, data_size;
    json_t *header; /* owns names and metadata */
    FvTensor *tensors;
    size_t count;
};

static FvStatus map_file(FvTensorFile *f, FvError *err) {
    int file = open(f->path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) {
        FvStatus status =
            FV_FAIL(err, FV_DATA, "%s: cannot be opened: %s", f->path, strerror(errno));
        if (file >= 0)
            close(file);
        return status;
    }
    FvStatus status = FV_OK;
    if (!S_ISREG(info.st_mode) || info.st_size < LENGTH_BYTES)
        status = FV_FAIL(err, FV_DATA, "%s: is no safetensors file (%s)", f->path,
                         S_ISREG(info.st_mode) ? "too short for a header" : "not a regular file");
    else {
        void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
        if (map == MAP_FAILED)
            status = FV_FAIL(err, FV_DATA, "%s: cannot be mapped: %s", f->path, strerror(errno));
        else {
            f->map = map;
            f->size = (size_t)info.st_size;
        }
    }
    close(file); /* the mapping stays */
    return status;
}

static FvStatus parse_header(FvTensorFile *f, FvError *err) {
    uint64_t length;
    memcpy(&length, f->map, LENGTH_BYTES);
    if (length > MAX_HEADER)
        return FV_FAIL(err, FV_DATA, "%s: is no safetensors file (header of %" PRIu64 " bytes)",
                       f->path, length);
    if (length > f->size - LENGTH_BYTES)
        return FV_FAIL(err, FV_DATA, "%s: is cut: a header of %" PRIu64 " bytes in %zu", f->path,
                       length, f->size);
    const char *text = (const char *)f->map + LENGTH_BYTES;
    f->header_size = (size_t)length;
    f->data = f->map + LENGTH_BYTES + length;
    f->data_size = f->size - LENGTH_BYTES - f->header_size;
    if (length == 0 || text[0] != '{')
        return FV_FAIL(err, FV_DATA, "%s: is no safetensors file (header starts without '{')",
                       f->path);
    json_error_t why;
    f->header = json_loadb(text, f->header_size, JSON_REJECT_DUPLICATES, &why);
    if (!f->header && json_error_code(&why) == json_error_duplicate_key)
        return FV_FAIL(err, FV_DATA, "%s: header names something twice (byte %d)", f->path,
                       why.position);
    if (!f->header)
        return FV_FAIL(err, FV_DATA, "%s: header is not valid JSON (byte %d)", f->path,
                       why.position);
    return FV_OK;
}

static FvStatus check_metadata(const FvTensorFile *f, json_t *meta, FvError *err) {
    const char *key;
    json_t *value;
    if (!json_is_object(meta))
        return FV_FAIL(err, FV_DATA, "%s: __metadata__ is not an object", f->path);
    json_object_foreach(meta, key, value) {
        if (!json_is_string(value))
            return FV_FAIL(err, FV_DATA, "%s: metadata %.100s is not a string", f->path, key);
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

static FvStatus read_type(const FvTensorFile *f, const json_t *value, FvTensor *t, FvError *err) {
    const char *name = json_string_value(value);
    if (!name)
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s has no dtype", f->path, t->name);
    for (int i = 0; i < FV_TYPES; i++) {
        if (strcmp(name, types[i].name) == 0) {
            t->type = (FvType)i;
            return FV_OK;
        }
    }
    return FV_FAIL(err, FV_DATA,
                   "%s: tensor %.100s has dtype %.20s; F64, F32, F16, BF16, I64, I32 and U8 are "
                   "read",
                   f->path, t->name, name);
}

static FvStatus read_shape(const FvTensorFile *f, const json_t *shape, FvTensor *t, FvError *err) {
    if (!json_is_array(shape) || json_array_size(shape) > FV_MAX_RANK)
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: shape is not a list of up to %d sizes",
                       f->path, t->name, FV_MAX_RANK);
    t->rank = json_array_size(shape);
    t->count = 1;
    bool empty = false;
    for (size_t i = 0; i < t->rank; i++) {
        if (!read_size(json_array_get(shape, i), &t->shape[i]))
            return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: shape holds something that is no size",
                           f->path, t->name);
        empty = empty || t->shape[i] == 0;
        t->count = fv_mul(t->count, t->shape[i]); /* a saturated product matches no range */
    }
    if (empty)
        t->count = 0;
    return FV_OK;
}

static FvStatus read_entry(const FvTensorFile *f, const json_t *entry, FvTensor *t, FvError *err) {
    size_t begin, end;
    if (!json_is_object(entry))
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s is not described by an object", f->path,
                       t->name);
    FV_TRY(read_type(f, json_object_get(entry, "dtype"), t, err));
    FV_TRY(read_shape(f, json_object_get(entry, "shape"), t, err));
    const json_t *range = json_object_get(entry, "data_offsets");
    if (!json_is_array(range) || json_array_size(range) != 2 ||
        !read_size(json_array_get(range, 0), &begin) || !read_size(json_array_get(range, 1), &end))
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: data_offsets are not two sizes", f->path,
                       t->name);
    if (begin > end || end > f->data_size)
        return FV_FAIL(err, FV_DATA,
                       "%s: is cut or damaged: tensor %.100s at bytes %zu to %zu of %zu", f->path,
                       t->name, begin, end, f->data_size);
    if (end - begin != tensor_bytes(t))
        return FV_FAIL(err, FV_DATA, "%s: tensor %.100s: shape and data_offsets disagree", f->path,
                       t->name);
    t->data = f->data + begin;
    return FV_OK;
}

static int by_place(const void *a, const void *b) {
    const FvTensor *x = a, *y = b;
    const unsigned char *p = x->data, *q = y->data;
    if (p != q)
        return p < q ? -1 : 1;
    size_t m = tensor_bytes(x), n = tensor_bytes(y); /* empty tensors before the one they touch */
    return (m > n) - (m < n);
}

static FvStatus read_entries(FvTensorFile *f, FvError *err) {
    const char *name;
    json_t *entry;
    f->tensors = calloc(json_object_size(f->header) + 1, sizeof *f->tensors);
    if (!f->tensors)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the header of %s", f->path);
    json_object_foreach(f->header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) {
            FV_TRY(check_metadata(f, entry, err));
            continue;
        }
        f->tensors[f->count].name = name;
        FV_TRY(read_entry(f, entry, &f->tensors[f->count], err));
        f->count++;
    }
    qsort(f->tensors, f->count, sizeof *f->tensors, by_place);
    const unsigned char *next = f->data;
    for (size_t i = 0; i < f->count; i++) {
        if (f->tensors[i].data != next)
            return FV_FAIL(err, FV_DATA, "%s: gap or overlap before tensor %.100s", f->path,
                           f->tensors[i].name);
        next += tensor_bytes(&f->tensors[i]);
    }
    if (next != f->data + f->data_size)
        return FV_FAIL(err, FV_DATA, "%s: bytes behind the last tensor", f->path);
    return FV_OK;
}

static FvStatus open_parts(FvTensorFile *f, FvError *err) {
    FV_TRY(map_file(f, err));
    FV_TRY(parse_header(f, err));
    return read_entries(f, err);
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
    if (f->map)
        munmap(f->map, f->size); /* fails for no valid mapping */
    json_decref(f->header);
    free(f->tensors);
    free(f->path);
    free(f);
}

const char *fv_tensors_path(const FvTensorFile *f) {
    return f->path;
}

size_t fv_tensors_count(const FvTensorFile *f) {
    return f->count;
}

const FvTensor *fv_tensors_at(const FvTensorFile *f, size_t index) {
    return &f->tensors[index];
}

const FvTensor *fv_tensors_find(const FvTensorFile *f, const char *name) {
    for (size_t i = 0; i < f->count; i++)
        if (strcmp(f->tensors[i].name, name) == 0)
            return &f->tensors[i];
    return NULL;
}

const char *fv_tensors_metadata(const FvTensorFile *f, const char *key) {
    return json_string_value(json_object_get(json_object_get(f->header, "__metadata__"), key));
}

/* --- elements ------------------------------------------------------------------------------- */

static double from_half(uint16_t h) {
    int exponent = h >> 10 & 31;
    double sign = h & 0x8000 ? -1 : 1, fraction = h & 1023;
    if (exponent == 31)
        return fraction != 0 ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, -24);
    return sign * ldexp(1024 + fraction, exponent - 25);
}

static double from_bfloat(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* memcpy because files may place elements at any byte. */
static double element(FvType type, const unsigned char *at) {
    union {
        double f64;
        float f32;
        uint16_t bits16;
        int64_t i64;
        int32_t i32;
        uint8_t u8;
    } value;
    memcpy(&value, at, types[type].size);
    switch (type) {
    case FV_F64:
        return value.f64;
    case FV_F32:
        return (double)value.f32;
    case FV_F16:
        return from_half(value.bits16);
    case FV_BF16:
        return from_bfloat(value.bits16);
    case FV_I64:
        return (double)value.i64;
    case FV_I32:
        return value.i32;
    case FV_U8:
    case FV_TYPES:
        break;
    }
    return value.u8;
}

void fv_tensor_read(const FvTensor *t, size_t first, size_t count, double *out) {
    size_t size = types[t->type].size;
    for (size_t i = 0; i < count; i++)
        out[i] = element(t->type, (const unsigned char *)t->data + (first + i) * size);
}

/* --- writing -------------------------------------------------------------------------------- */

/* What is being written: tensors in file order, and the header before them, its length included. */
typedef struct Writing {
    const char *path;
    const FvTensor **order;
    size_t count;
    char *header;
    size_t header_size;
} Writing;

/* Stable, by falling element size: every offset is then a multiple of its element's size. */
static void order_tensors(Writing *w, const FvTensor *tensors) {
    size_t next = 0;
    for (size_t size = 8; size > 0; size /= 2)
        for (size_t i = 0; i < w->count; i++)
            if (types[tensors[i].type].size == size)
                w->order[next++] = &tensors[i];
}

static json_t *format_metadata(const FvMeta *meta, size_t count) {
    json_t *out = json_object();
    int bad = json_object_set_new(out, "checksum", json_string("0000000000000000"));
    for (size_t i = 0; i < count && !bad; i++) {
        char *value = strdup(meta[i].value);
        if (value)
            fv_utf8_clean(value);
        bad = !value || json_object_get(out, meta[i].key) ||
              json_object_set_new(out, meta[i].key, json_string(value));
        free(value);
    }
    if (bad) {
        json_decref(out);
        return NULL;
    }
    return out;
}

static json_t *format_entry(const FvTensor *t, size_t begin) {
    json_t *shape = json_array();
    int bad = 0;
    for (size_t i = 0; i < t->rank; i++)
        bad |= json_array_append_new(shape, json_integer((json_int_t)t->shape[i]));
    json_t *out =
        json_pack("{s:s, s:o, s:[I,I]}", "dtype", types[t->type].name, "shape", shape,
                  "data_offsets", (json_int_t)begin, (json_int_t)(begin + tensor_bytes(t)));
    if (bad) {
        json_decref(out);
        return NULL;
    }
    return out;
}

/* NULL when memory is out, a name comes twice or is not UTF-8. */
static char *format_json(const Writing *w, const FvMeta *meta, size_t meta_count) {
    json_t *root = json_object();
    int bad = json_object_set_new(root, "__metadata__", format_metadata(meta, meta_count));
    size_t begin = 0;
    for (size_t i = 0; i < w->count && !bad; i++) {
        const FvTensor *t = w->order[i];
        bad = json_object_get(root, t->name) ||
              json_object_set_new(root, t->name, format_entry(t, begin));
        begin += tensor_bytes(t);
    }
    char *text = bad ? NULL : json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return text;
}

static FvStatus format_header(Writing *w, const FvMeta *meta, size_t meta_count, FvError *err) {
    char *text = format_json(w, meta, meta_count);
    if (!text)
        return FV_FAIL(err, FV_IO, "%s: header cannot be made (a name twice, or no memory)",
                       w->path);
    size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    w->header_size = LENGTH_BYTES + padded;
    w->header = malloc(w->header_size);
    if (w->header) {
        uint64_t stored = padded;
        memcpy(w->header, &stored, LENGTH_BYTES);
        memset(w->header + LENGTH_BYTES, ' ', padded);
        memcpy(w->header + LENGTH_BYTES, text, length);
    }
    free(text);
    if (!w->header)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the header of %s", w->path);
    return FV_OK;
}

static FvStatus format_digest(const FvBytes *parts, size_t count, const char *path,
                              char out[CHECKSUM_DIGITS + 1], FvError *err) {
    XXH3_state_t *state = XXH3_createState();
    bool good = state && XXH3_64bits_reset(state) == XXH_OK;
    for (size_t i = 0; i < count && good; i++)
        good =
            parts[i].size == 0 || XXH3_64bits_update(state, parts[i].data, parts[i].size) == XXH_OK;
    if (good)
        snprintf(out, CHECKSUM_DIGITS + 1, "%016" PRIx64, (uint64_t)XXH3_64bits_digest(state));
    XXH3_freeState(state);
    if (!good)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the checksum of %s", path);
    return FV_OK;
}

static FvStatus write_parts(Writing *w, FvBytes *parts, FvError *err) {
    char digits[CHECKSUM_DIGITS + 1];
    for (size_t i = 0; i < w->count; i++)
        parts[1 + i] = (FvBytes){w->order[i]->data, tensor_bytes(w->order[i])};
    parts[0] = (FvBytes){w->header + LENGTH_BYTES, w->header_size - LENGTH_BYTES};
    FV_TRY(format_digest(parts, w->count + 1, w->path, digits, err));
    memcpy(w->header + LENGTH_BYTES + strlen(checksum_start), digits, CHECKSUM_DIGITS);
    parts[0] = (FvBytes){w->header, w->header_size};
    return fv_file_write(w->path, parts, w->count + 1, err);
}

FvStatus fv_tensors_write(const char *path, const FvTensor *tensors, size_t count,
                          const FvMeta *meta, size_t meta_count, FvError *err) {
    Writing w = {.path = path, .count = count};
    FvBytes *parts = calloc(count + 1, sizeof *parts);
    w.order = calloc(count + 1, sizeof *w.order);
    FvStatus status = FV_OK;
    if (!parts || !w.order)
        status = FV_FAIL(err, FV_DEVICE, "out of memory for %zu tensors of %s", count, path);
    if (status == FV_OK) {
        order_tensors(&w, tensors);
        status = format_header(&w, meta, meta_count, err);
    }
    if (status == FV_OK)
        status = write_parts(&w, parts, err);
    free(w.header);
    free(w.order);
    free(parts);
    return status;
}

FvStatus fv_tensors_verify(const FvTensorFile *f, FvError *err) {
    const char *stored = fv_tensors_metadata(f, "checksum");
    size_t at = strlen(checksum_start);
    char digits[CHECKSUM_DIGITS + 1] = "";
    if (!stored)
        return FV_OK;
    char *header = malloc(f->header_size);
    if (!header)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the header of %s", f->path);
    memcpy(header, f->map + LENGTH_BYTES, f->header_size);
    FvStatus status = FV_OK;
    if (f->header_size > at + CHECKSUM_DIGITS && memcmp(header, checksum_start, at) == 0) {
        memset(header + at, '0', CHECKSUM_DIGITS);
        FvBytes parts[] = {{header, f->header_size}, {f->data, f->data_size}};
        status = format_digest(parts, 2, f->path, digits, err);
    }
    free(header);
    FV_TRY(status);
    if (strcmp(digits, stored) != 0)
        return FV_FAIL(err, FV_DATA, "%s: is damaged: checksum %s where the contents give %s",
                       f->path, stored, digits[0] ? digits : "none");
    return FV_OK;
}
