/* Writing, and the checksum that the writer adds. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "run/fence.h"
#include "run/files.h"
#include "run/safetensors_parts.h"

enum { CHECKSUM_DIGITS = 16 };

/* The writer's headers start so: the digits stand at a fixed place. */
static const char checksum_start[] = "{\"__metadata__\":{\"checksum\":\"";

/* What is being written: tensors in file order, and the header before them, its length included. */
typedef struct Writing {
    const struct FvFence *fence;
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
            if (fv_type_size(tensors[i].type) == size)
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
        json_pack("{s:s, s:o, s:[I,I]}", "dtype", fv_type_name(t->type), "shape", shape,
                  "data_offsets", (json_int_t)begin, (json_int_t)(begin + fv_tensor_bytes(t)));
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
        begin += fv_tensor_bytes(t);
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
        parts[1 + i] = (FvBytes){w->order[i]->data, fv_tensor_bytes(w->order[i])};
    parts[0] = (FvBytes){w->header + LENGTH_BYTES, w->header_size - LENGTH_BYTES};
    FV_TRY(format_digest(parts, w->count + 1, w->path, digits, err));
    memcpy(w->header + LENGTH_BYTES + strlen(checksum_start), digits, CHECKSUM_DIGITS);
    parts[0] = (FvBytes){w->header, w->header_size};
    return fv_file_replace(w->path, parts, w->count + 1, w->fence, err);
}

FvStatus fv_tensors_replace(const char *path, const FvTensor *tensors, size_t count,
                            const FvMeta *meta, size_t meta_count, const struct FvFence *fence,
                            FvError *err) {
    Writing w = {.path = path, .fence = fence, .count = count};
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

static FvStatus verify_shard(const Shard *s, FvError *err) {
    const char *stored =
        json_string_value(json_object_get(json_object_get(s->header, "__metadata__"), "checksum"));
    size_t at = strlen(checksum_start);
    char digits[CHECKSUM_DIGITS + 1] = "";
    if (!stored)
        return FV_OK;
    char *header = malloc(s->header_size);
    if (!header)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the header of %s", s->path);
    memcpy(header, s->map + LENGTH_BYTES, s->header_size);
    FvStatus status = FV_OK;
    if (s->header_size > at + CHECKSUM_DIGITS && memcmp(header, checksum_start, at) == 0) {
        memset(header + at, '0', CHECKSUM_DIGITS);
        FvBytes parts[] = {{header, s->header_size}, {s->data, s->data_size}};
        status = format_digest(parts, 2, s->path, digits, err);
    }
    free(header);
    FV_TRY(status);
    if (strcmp(digits, stored) != 0)
        return FV_FAIL(err, FV_DATA, "%s: is damaged: checksum %.20s where the contents give %s",
                       s->path, stored, digits[0] ? digits : "none");
    return FV_OK;
}

FvStatus fv_tensors_verify(const FvTensorFile *f, FvError *err) {
    for (size_t i = 0; i < f->shard_count; i++)
        FV_TRY(verify_shard(&f->shards[i], err));
    return FV_OK;
}

FvStatus fv_tensors_write(const char *path, const FvTensor *tensors, size_t count,
                          const FvMeta *meta, size_t meta_count, FvError *err) {
    return fv_tensors_replace(path, tensors, count, meta, meta_count, NULL, err);
}
