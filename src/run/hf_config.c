#include "run/hf_config.h"

#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "run/files.h"

enum { MOST_BYTES = 1 << 20, MOST_SIZE = 10000000 };

typedef struct Reader {
    const char *path;
    json_t *root;
} Reader;

static FvStatus open_config(const char *path, const char *type, Reader *r, FvError *err) {
    char *text;
    size_t size;
    json_error_t why;
    FvError inner;
    *r = (Reader){.path = path};
    if (fv_file_read(path, &text, &size, &inner) != FV_OK)
        return FV_FAIL(err, FV_DATA, "%s", inner.text);
    if (size <= MOST_BYTES)
        r->root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &why);
    free(text);
    if (size > MOST_BYTES)
        return FV_FAIL(err, FV_DATA, "%s: longer than 1 MiB: is no config.json", path);
    if (!r->root)
        return FV_FAIL(err, FV_DATA, "%s:%d: not valid JSON: %.80s", path, why.line, why.text);
    const char *there = json_string_value(json_object_get(r->root, "model_type"));
    if (there && strcmp(there, type) == 0)
        return FV_OK;
    FvStatus status =
        FV_FAIL(err, FV_DATA, "%s: model_type is %.40s%s, fovea reads %s here", path,
                there ? there : "missing",
                there && strstr(there, "registers") ? " (register tokens)" : "", type);
    json_decref(r->root);
    return status;
}

static FvStatus read_size(const Reader *r, const char *key, size_t *out, FvError *err) {
    const json_t *value = json_object_get(r->root, key);
    double number = json_number_value(value);
    if (!json_is_number(value) || !(number >= 1 && number <= MOST_SIZE) || number != floor(number))
        return FV_FAIL(err, FV_DATA, "%s: %s must be a whole number from 1 to %d", r->path, key,
                       MOST_SIZE);
    *out = (size_t)number;
    return FV_OK;
}

static FvStatus read_number(const Reader *r, const json_t *value, const char *key, double least,
                            double most, double *out, FvError *err) {
    if (value && !json_is_number(value))
        return FV_FAIL(err, FV_DATA, "%s: %s must be a number", r->path, key);
    if (value)
        *out = json_number_value(value);
    if (!(*out >= least && *out <= most))
        return FV_FAIL(err, FV_DATA, "%s: %s %g is out of range", r->path, key, *out);
    return FV_OK;
}

/* A key that, where it is given, must have the one value that fovea computes. */
static FvStatus expect(const Reader *r, const char *key, json_t *only, FvError *err) {
    const json_t *value = json_object_get(r->root, key);
    bool same = !value || json_equal(value, only) ||
                (json_is_number(value) && json_is_number(only) &&
                 json_number_value(value) == json_number_value(only));
    char *wanted = json_dumps(only, JSON_ENCODE_ANY | JSON_COMPACT);
    FvStatus status = FV_OK;
    if (!same)
        status = FV_FAIL(err, FV_DATA, "%s: %s must be %s: fovea has no other variant", r->path,
                         key, wanted ? wanted : "another");
    free(wanted);
    json_decref(only);
    return status;
}

static FvStatus read_dino(const Reader *r, FvDinoSizes *s, FvError *err) {
    size_t ratio;
    FV_TRY(read_size(r, "hidden_size", &s->width, err));
    FV_TRY(read_size(r, "num_hidden_layers", &s->layers, err));
    FV_TRY(read_size(r, "num_attention_heads", &s->heads, err));
    FV_TRY(read_size(r, "mlp_ratio", &ratio, err));
    FV_TRY(read_size(r, "image_size", &s->image_size, err));
    FV_TRY(read_size(r, "patch_size", &s->patch, err));
    FV_TRY(expect(r, "use_swiglu_ffn", json_false(), err));
    FV_TRY(expect(r, "qkv_bias", json_true(), err));
    FV_TRY(expect(r, "num_channels", json_integer(3), err));
    FV_TRY(expect(r, "hidden_act", json_string("gelu"), err));
    FV_TRY(expect(r, "layer_norm_eps", json_real(1e-6), err));
    s->mlp = fv_mul(ratio, s->width);
    if (s->width % s->heads != 0)
        return FV_FAIL(err, FV_DATA,
                       "%s: hidden_size %zu is no multiple of num_attention_heads %zu", r->path,
                       s->width, s->heads);
    return FV_OK;
}

/* Newer files keep the base in rope_parameters, older ones beside a rope_scaling of null. */
static FvStatus read_rope(const Reader *r, FvLlamaSizes *s, FvError *err) {
    const json_t *nested = json_object_get(r->root, "rope_parameters");
    const json_t *scaling = json_object_get(r->root, "rope_scaling");
    const char *type = json_string_value(json_object_get(nested, "rope_type"));
    if (scaling && !json_is_null(scaling)) {
        type = json_string_value(json_object_get(scaling, "rope_type"));
        if (!type)
            type = "of an unknown kind";
    }
    if (type && strcmp(type, "default") != 0)
        return FV_FAIL(err, FV_DATA, "%s: rotary embedding is scaled (%.40s): fovea has none",
                       r->path, type);
    const json_t *theta = json_object_get(nested, "rope_theta");
    s->rope_theta = 10000;
    return read_number(r, theta ? theta : json_object_get(r->root, "rope_theta"), "rope_theta", 1,
                       1e12, &s->rope_theta, err);
}

static FvStatus read_llama(const Reader *r, FvLlamaSizes *s, FvError *err) {
    const json_t *kv = json_object_get(r->root, "num_key_value_heads");
    FV_TRY(read_size(r, "hidden_size", &s->width, err));
    FV_TRY(read_size(r, "num_hidden_layers", &s->layers, err));
    FV_TRY(read_size(r, "num_attention_heads", &s->heads, err));
    FV_TRY(read_size(r, "intermediate_size", &s->mlp, err));
    FV_TRY(read_size(r, "vocab_size", &s->vocab, err));
    s->kv_heads = s->heads;
    if (kv && !json_is_null(kv))
        FV_TRY(read_size(r, "num_key_value_heads", &s->kv_heads, err));
    s->rms_eps = 1e-6; /* transformers' default */
    FV_TRY(read_number(r, json_object_get(r->root, "rms_norm_eps"), "rms_norm_eps", 0, 1,
                       &s->rms_eps, err));
    FV_TRY(read_rope(r, s, err));
    FV_TRY(expect(r, "hidden_act", json_string("silu"), err));
    FV_TRY(expect(r, "attention_bias", json_false(), err));
    FV_TRY(expect(r, "mlp_bias", json_false(), err));
    FV_TRY(expect(r, "rope_interleaved", json_false(), err));
    if (s->width % s->heads != 0 || s->heads % s->kv_heads != 0)
        return FV_FAIL(err, FV_DATA,
                       "%s: hidden_size %zu, num_attention_heads %zu and "
                       "num_key_value_heads %zu do not divide each other",
                       r->path, s->width, s->heads, s->kv_heads);
    const json_t *head = json_object_get(r->root, "head_dim");
    if (head && !json_is_null(head))
        FV_TRY(expect(r, "head_dim", json_integer((json_int_t)(s->width / s->heads)), err));
    return FV_OK;
}

FvStatus fv_hf_read_dino(const char *path, FvDinoSizes *out, FvError *err) {
    Reader r;
    FV_TRY(open_config(path, "dinov2", &r, err));
    FvStatus status = read_dino(&r, out, err);
    json_decref(r.root);
    return status;
}

FvStatus fv_hf_read_llama(const char *path, FvLlamaSizes *out, FvError *err) {
    Reader r;
    FV_TRY(open_config(path, "llama", &r, err));
    FvStatus status = read_llama(&r, out, err);
    json_decref(r.root);
    return status;
}

FvStatus fv_hf_write_dino(const char *path, const FvDinoSizes *s, FvError *err) {
    json_t *root = json_pack(
        "{s:[s], s:s, s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:b, s:b, s:I, s:I, s:I, s:I, s:I, s:I, "
        "s:I}",
        "architectures", "Dinov2Model", "model_type", "dinov2", "hidden_act", "gelu",
        "attention_probs_dropout_prob", 0.0, "drop_path_rate", 0.0, "hidden_dropout_prob", 0.0,
        "initializer_range", 0.02, "layer_norm_eps", 1e-6, "layerscale_value", 1.0, "qkv_bias", 1,
        "use_swiglu_ffn", 0, "hidden_size", (json_int_t)s->width, "num_hidden_layers",
        (json_int_t)s->layers, "num_attention_heads", (json_int_t)s->heads, "mlp_ratio",
        (json_int_t)(s->mlp / s->width), "image_size", (json_int_t)s->image_size, "patch_size",
        (json_int_t)s->patch, "num_channels", (json_int_t)3);
    char *text = root ? json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) : NULL;
    json_decref(root);
    if (!text)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", path);
    FvStatus status = fv_file_write(path, (FvBytes[]){{text, strlen(text)}, {"\n", 1}}, 2, err);
    free(text);
    return status;
}
