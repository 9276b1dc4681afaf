#include "run/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/model.h"
#include "model/resize.h"
#include "run/files.h"
#include "run/model_folder.h"
#include "run/safetensors.h"

enum { PIECE = 1 << 16 /* elements converted at once */, MOST_GRID = 4096 };

/* --- names ---------------------------------------------------------------------------------- */

/* How a file names the parameters that begin with `own`: `theirs` and the rest of the name, which
 * the original DINOv2 repository (and timm) spell in their own way. */
typedef struct Naming {
    const char *own, *theirs;
    bool original;
} Naming;

static const Naming dino_namings[] = {
    {"dino.", "", false}, {"dino.", "dinov2.", false},  {"dino.", "dino.", false},
    {"dino.", "", true},  {"dino.", "backbone.", true},
};
static const Naming lm_namings[] = {
    {"lm.", "", false}, {"lm.", "lm.", false}, {"lm.model.", "", false}};
static const Naming own_naming = {"", "", false};

/* Parameters by which a naming is recognised. */
static const char dino_anchor[] = "dino.embeddings.cls_token";
static const char lm_anchor[] = "lm.model.embed_tokens.weight";

static const char list_them[] = "fovea info STUDY lists them"; /* advice about shapes */

typedef struct Spelling {
    const char *name, *original;
    int part; /* of the original's fused tensor: 0 query, 1 key, 2 value; -1 whole */
} Spelling;

static const Spelling outer[] = {
    {"embeddings.cls_token", "cls_token", -1},
    {"embeddings.mask_token", "mask_token", -1},
    {"embeddings.position_embeddings", "pos_embed", -1},
    {"embeddings.patch_embeddings.projection.", "patch_embed.proj.", -1},
    {"layernorm.", "norm.", -1},
};
static const Spelling inner[] = {
    {"attention.attention.query.", "attn.qkv.", 0},
    {"attention.attention.key.", "attn.qkv.", 1},
    {"attention.attention.value.", "attn.qkv.", 2},
    {"attention.output.dense.", "attn.proj.", -1},
    {"layer_scale1.lambda1", "ls1.gamma", -1},
    {"layer_scale2.lambda1", "ls2.gamma", -1},
    {"norm1.", "norm1.", -1},
    {"norm2.", "norm2.", -1},
    {"mlp.", "mlp.", -1},
};

static bool respell(const Spelling *table, size_t count, const char *before, const char *name,
                    char *out, int *part) {
    for (size_t i = 0; i < count; i++) {
        size_t n = strlen(table[i].name);
        if (strncmp(name, table[i].name, n) != 0)
            continue;
        snprintf(out, FV_PARAM_NAME, "%s%s%s", before, table[i].original, name + n);
        *part = table[i].part;
        return true;
    }
    return false;
}

/* The original's name of a Hugging Face name. */
static bool original_name(const char *name, char *out, int *part) {
    char before[32];
    size_t layer;
    int used = 0;
    if (sscanf(name, "encoder.layer.%zu.%n", &layer, &used) != 1 || used == 0)
        return respell(outer, sizeof outer / sizeof *outer, "", name, out, part);
    snprintf(before, sizeof before, "blocks.%zu.", layer);
    return respell(inner, sizeof inner / sizeof *inner, before, name + used, out, part);
}

/* --- a file as a source --------------------------------------------------------------------- */

typedef struct Source {
    FvTensorFile *file;
    const Naming *naming;
    const FvTensor **used; /* [used_count] tensors that a parameter takes */
    size_t used_count;
} Source;

/* The tensor that holds a parameter, NULL when there is none; *first is its first element. */
static const FvTensor *find_tensor(const FvTensorFile *file, const Naming *n, const FvParam *p,
                                   size_t *first) {
    char name[2 * FV_PARAM_NAME], respelt[FV_PARAM_NAME];
    size_t own = strlen(n->own);
    int part = -1;
    if (strncmp(p->name, n->own, own) != 0)
        return NULL;
    const char *rest = p->name + own;
    if (n->original) {
        if (!original_name(rest, respelt, &part))
            return NULL;
        rest = respelt;
    }
    snprintf(name, sizeof name, "%s%s", n->theirs, rest);
    *first = part > 0 ? (size_t)part * p->count : 0;
    return fv_tensors_find(file, name);
}

static const Naming *recognise(const FvTensorFile *file, const Naming *namings, size_t count,
                               const char *anchor) {
    FvParam p = {.count = 1};
    size_t first;
    snprintf(p.name, sizeof p.name, "%s", anchor);
    for (size_t i = 0; i < count; i++)
        if (find_tensor(file, &namings[i], &p, &first))
            return &namings[i];
    return NULL;
}

static const Naming *recognise_dino(const FvTensorFile *file) {
    return recognise(file, dino_namings, sizeof dino_namings / sizeof *dino_namings, dino_anchor);
}
static const Naming *recognise_lm(const FvTensorFile *file) {
    return recognise(file, lm_namings, sizeof lm_namings / sizeof *lm_namings, lm_anchor);
}

static void close_source(Source *s) {
    fv_tensors_close(s->file);
    free(s->used);
    *s = (Source){0};
}

static FvStatus open_source(const char *path, const FvParams *params, Source *s, FvError *err) {
    *s = (Source){.naming = &own_naming};
    FV_TRY(fv_tensors_open(path, &s->file, err));
    s->used = calloc(params->count + 1, sizeof *s->used);
    if (s->used)
        return FV_OK;
    close_source(s);
    return FV_FAIL(err, FV_DEVICE, "out of memory for %s", path);
}

/* --- one parameter -------------------------------------------------------------------------- */

static bool is_position(const FvParam *p) {
    return fv_ends_with(p->name, "embeddings.position_embeddings");
}

/* Side of the grid of a position table of tokens [1, 1 + side^2, width]; 0 when it is none. */
static size_t grid_side(size_t rank, const size_t *shape, size_t width) {
    if (rank != 3 || shape[0] != 1 || shape[2] != width || shape[1] < 2)
        return 0;
    size_t side = (size_t)lround(sqrt((double)(shape[1] - 1)));
    return side <= MOST_GRID && side * side == shape[1] - 1 ? side : 0;
}

/* Fused tensors hold query, key and value one after the other. */
static bool shape_fits(const FvTensor *t, const FvParam *p, bool resizable) {
    if (resizable && is_position(p))
        return grid_side(t->rank, t->shape, p->shape[2]) > 0;
    if (t->rank != p->rank)
        return false;
    bool fused = strstr(t->name, "attn.qkv.") != NULL;
    for (size_t i = 0; i < p->rank; i++)
        if (t->shape[i] != p->shape[i] * (fused && i == 0 ? 3 : 1))
            return false;
    return true;
}

static const char *shape_text(size_t rank, const size_t *shape, char out[128]) {
    size_t used = (size_t)snprintf(out, 128, "[");
    for (size_t i = 0; i < rank && used < 128; i++)
        used += (size_t)snprintf(out + used, 128 - used, "%s%zu", i ? ", " : "", shape[i]);
    if (used < 128)
        snprintf(out + used, 128 - used, "]");
    return out;
}

FvStatus fv_weights_check_tensor(const FvTensorFile *file, const FvTensor *t, const FvParam *p,
                                 bool resizable, const char *advice, FvError *err) {
    char there[128], needed[128];
    if (t->type != FV_F32 && t->type != FV_BF16 && t->type != FV_F16 && t->type != FV_F64)
        return FV_FAIL(err, FV_DATA, "%s: %.100s is of type %s, weights are F64, F32, F16 or BF16",
                       fv_tensors_path(file), t->name, fv_type_name(t->type));
    if (!shape_fits(t, p, resizable))
        return FV_FAIL(err, FV_DATA, "%s: %.100s is %s, another shape than the model's %s: %s",
                       fv_tensors_path(file), t->name, shape_text(t->rank, t->shape, there),
                       shape_text(p->rank, p->shape, needed), advice);
    return FV_OK;
}

/* Converts straight into the parameter's memory, a piece at a time. */
static FvStatus set_pieces(const FvTensor *t, size_t first, const FvParam *p, FvParams *params,
                           FvBackend *be, FvError *err) {
    real *piece = malloc(PIECE * sizeof *piece);
    if (!piece)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", p->name);
    for (size_t i = 0; i < p->count; i += PIECE) {
        size_t n = p->count - i < PIECE ? p->count - i : PIECE;
        fv_tensor_read_real(t, first + i, n, piece);
        be->ops->upload(be, params->w + p->offset + i, piece, n * sizeof *piece);
    }
    be->ops->weights_changed(be, p->count, params->w + p->offset);
    free(piece);
    return FV_OK;
}

FvStatus fv_weights_set(const FvTensor *t, const FvParam *p, FvParams *params, FvBackend *be,
                        FvError *err) {
    real *values = malloc(fv_mul(p->count, sizeof *values));
    if (!values)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", p->name);
    fv_tensor_read_real(t, 0, p->count, values);
    FvStatus status = fv_params_set(params, be, p, FV_BLOCK_W, values, err);
    free(values);
    return status;
}

/* out [rows, width] = matrix [rows, columns] table [columns, width]; most of a row is zero. */
static void multiply(size_t rows, size_t columns, size_t width, const real *matrix,
                     const real *table, real *out) {
    memset(out, 0, rows * width * sizeof *out);
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < columns; k++) {
            real share = matrix[r * columns + k];
            for (size_t i = 0; share != 0 && i < width; i++)
                out[r * width + i] += share * table[k * width + i];
        }
}

static FvStatus set_position(const FvTensor *t, const FvParam *p, double offset, FvParams *params,
                             FvBackend *be, FvError *err) {
    size_t width = p->shape[2], rows = p->shape[1], columns = t->shape[1];
    size_t from = grid_side(t->rank, t->shape, width), to = grid_side(p->rank, p->shape, width);
    real *matrix = malloc(fv_mul3(rows, columns, sizeof *matrix));
    real *table = malloc(fv_mul(t->count, sizeof *table));
    real *values = malloc(fv_mul(p->count, sizeof *values));
    FvStatus status = FV_OK;
    if (matrix && table && values) {
        fv_tensor_read_real(t, 0, t->count, table);
        fv_resize_matrix(from, to, offset, matrix);
        multiply(rows, columns, width, matrix, table, values);
        status = fv_params_set(params, be, p, FV_BLOCK_W, values, err);
    } else {
        status = FV_FAIL(err, FV_DEVICE, "out of memory for %s", p->name);
    }
    free(matrix);
    free(table);
    free(values);
    return status;
}

/* --- a whole model -------------------------------------------------------------------------- */

static bool is_optional(const FvParam *p) {
    return fv_ends_with(p->name, "mask_token");
}

static bool is_layer_scale(const FvParam *p) {
    return strstr(p->name, ".layer_scale") != NULL;
}

/* A plain ViT has no LayerScale: the start value 1 is what it computes. */
static bool is_plain_vit(const Source *s, const FvParams *params) {
    size_t first;
    for (size_t i = 0; i < params->count; i++)
        if (is_layer_scale(&params->list[i]) &&
            find_tensor(s->file, s->naming, &params->list[i], &first))
            return false;
    return true;
}

/* Tensors of published checkpoints that fovea's model has no use for. */
static bool is_harmless(const char *name) {
    static const char *const parts[] = {"lm_head.", "rotary_emb.", "classifier.", "pooler.",
                                        "mask_token"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (strstr(name, parts[i]))
            return true;
    return strncmp(name, "head.", 5) == 0;
}

static bool is_used(const Source *s, const FvTensor *t) {
    for (size_t i = 0; i < s->used_count; i++)
        if (s->used[i] == t)
            return true;
    return false;
}

/* Everything that the file holds beside what was used belongs to a larger or another model. */
static FvStatus check_left(const Source *s, FvError *err) {
    size_t prefix = strlen(s->naming->theirs);
    for (size_t i = 0; i < fv_tensors_count(s->file); i++) {
        const FvTensor *t = fv_tensors_at(s->file, i);
        if (strncmp(t->name, s->naming->theirs, prefix) == 0 && !is_used(s, t) &&
            !is_harmless(t->name + prefix))
            return FV_FAIL(err, FV_DATA,
                           "%s: %.100s is no part of the configured model: more layers, register "
                           "tokens or another architecture?",
                           fv_tensors_path(s->file), t->name);
    }
    return FV_OK;
}

/* Every parameter that begins with `own` has its tensor, and no tensor is left. */
static FvStatus check_model(Source *s, const char *own, const FvParams *params, FvError *err) {
    bool plain = is_plain_vit(s, params);
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        size_t first;
        if (strncmp(p->name, own, strlen(own)) != 0)
            continue;
        const FvTensor *t = find_tensor(s->file, s->naming, p, &first);
        if (!t && !is_optional(p) && !(plain && is_layer_scale(p)))
            return FV_FAIL(err, FV_DATA, "%s: has no tensor for %s", fv_tensors_path(s->file),
                           p->name);
        if (!t)
            continue;
        FV_TRY(fv_weights_check_tensor(s->file, t, p, true, list_them, err));
        s->used[s->used_count++] = t;
    }
    return check_left(s, err);
}

static FvStatus open_model(const char *from, bool dino, const FvConfig *c, const FvParams *params,
                           Source *s, FvError *err) {
    char weights[FV_TEXT], config[FV_TEXT];
    FV_TRY(fv_folder_find(from, weights, config, err));
    if (config[0])
        FV_TRY(dino ? fv_folder_check_dino(config, c, err) : fv_folder_check_lm(config, c, err));
    FV_TRY(open_source(weights, params, s, err));
    s->naming = dino ? recognise_dino(s->file) : recognise_lm(s->file);
    FvStatus status = FV_OK;
    if (!s->naming)
        status = FV_FAIL(err, FV_DATA, "%s: holds no %s (no tensor for %s)", weights,
                         dino ? "DINOv2 encoder" : "Llama language model",
                         dino ? dino_anchor : lm_anchor);
    if (status == FV_OK)
        status = check_model(s, dino ? "dino." : "lm.", params, err);
    if (status != FV_OK)
        close_source(s);
    return status;
}

/* init_from: any parameters, by their own names and exact shapes; one at least. */
static FvStatus open_own(const char *path, const FvParams *params, Source *s, FvError *err) {
    FV_TRY(open_source(path, params, s, err));
    FvStatus status = FV_OK;
    for (size_t i = 0; status == FV_OK && i < params->count; i++) {
        const FvTensor *t = fv_tensors_find(s->file, params->list[i].name);
        if (!t)
            continue;
        s->used[s->used_count++] = t;
        status = fv_weights_check_tensor(s->file, t, &params->list[i], false, list_them, err);
    }
    if (status == FV_OK && s->used_count == 0)
        status = FV_FAIL(err, FV_DATA, "%s: holds no parameter of this model (fovea info STUDY %s)",
                         path, path);
    if (status != FV_OK)
        close_source(s);
    return status;
}

typedef enum Which { LM, DINO, OWN, SOURCES } Which;

/* s->file stays NULL where the configuration names no such source. */
static FvStatus open_which(Which which, const FvConfig *c, const FvParams *params, Source *s,
                           FvError *err) {
    *s = (Source){0};
    if (which == OWN)
        return c->init_from[0] ? open_own(c->init_from, params, s, err) : FV_OK;
    const char *from = which == DINO ? c->dino_from : c->lm_from;
    return strcmp(from, "none") == 0 ? FV_OK : open_model(from, which == DINO, c, params, s, err);
}

FvStatus fv_weights_check(const FvConfig *c, const FvParams *params, FvError *err) {
    for (Which which = LM; which < SOURCES; which++) {
        Source s;
        FV_TRY(open_which(which, c, params, &s, err));
        close_source(&s);
    }
    return FV_OK;
}

FvStatus fv_weights_check_model(const FvConfig *c, const FvModelConfig *model, FvError *err) {
    FvParams params;
    FV_TRY(fv_model_declare(model, &params, err));
    FvStatus status = fv_weights_check(c, &params, err);
    fv_params_free(&params);
    return status;
}

static FvStatus take(const Source *s, Which which, const FvConfig *c, FvParams *params,
                     FvBackend *be, bool *set, FvError *err) {
    double offset = strcmp(c->pos_interp, "meta") == 0 ? 0.1 : 0;
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        size_t first = 0;
        const FvTensor *t = find_tensor(s->file, s->naming, p, &first);
        if (!t)
            continue;
        if (p->channels_last)
            FV_TRY(fv_weights_set(t, p, params, be, err));
        else if (which == DINO && is_position(p) && t->shape[1] != p->shape[1])
            FV_TRY(set_position(t, p, offset, params, be, err));
        else
            FV_TRY(set_pieces(t, first, p, params, be, err));
        set[i] = true;
    }
    return FV_OK;
}

FvStatus fv_weights_start(const FvConfig *c, FvParams *params, FvBackend *be, uint64_t seed,
                          FvError *err) {
    bool *set = calloc(params->count + 1, sizeof *set);
    FvStatus status = set ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for start values");
    for (Which which = LM; status == FV_OK && which < SOURCES; which++) {
        Source s;
        status = open_which(which, c, params, &s, err);
        if (status == FV_OK && s.file)
            status = take(&s, which, c, params, be, set, err);
        close_source(&s);
    }
    if (status == FV_OK)
        status = fv_params_init(params, be, seed, set, err);
    free(set);
    return status;
}

/* --- for info ------------------------------------------------------------------------------- */

FvStatus fv_weights_fit(const char *from, const FvParams *params, FvFit *fit,
                        void (*left)(const char *name), FvError *err) {
    char weights[FV_TEXT], config[FV_TEXT];
    Source s;
    FV_TRY(fv_folder_find(from, weights, config, err));
    FV_TRY(open_source(weights, params, &s, err));
    const Naming *namings[] = {&own_naming, recognise_lm(s.file), recognise_dino(s.file)};
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        const FvTensor *t = NULL;
        size_t first, n = 0;
        for (; !t && n < 3; n++)
            t = namings[n] ? find_tensor(s.file, namings[n], p, &first) : NULL;
        bool resizable = t && namings[n - 1] != &own_naming;
        fit[i] = !t ? FV_FIT_MISSING : shape_fits(t, p, resizable) ? FV_FIT_FILLED : FV_FIT_SHAPE;
        if (t)
            s.used[s.used_count++] = t;
    }
    for (size_t i = 0; i < fv_tensors_count(s.file); i++)
        if (!is_used(&s, fv_tensors_at(s.file, i)))
            left(fv_tensors_at(s.file, i)->name);
    close_source(&s);
    return FV_OK;
}

/* --- writing -------------------------------------------------------------------------------- */

static FvStatus gather(const FvParams *params, const char *prefix, FvBackend *be, FvTensor *tensors,
                       real *values, size_t *count, FvError *err) {
    size_t own = strlen(prefix);
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        if (strncmp(p->name, prefix, own) != 0 || strncmp(p->name + own, "head.", 5) == 0)
            continue;
        FvTensor *t = &tensors[(*count)++];
        *t = (FvTensor){.name = p->name + own,
                        .type = sizeof(real) == sizeof(float) ? FV_F32 : FV_F64,
                        .rank = p->rank,
                        .data = values,
                        .count = p->count};
        memcpy(t->shape, p->shape, sizeof p->shape);
        FV_TRY(fv_params_get(params, be, p, FV_BLOCK_W, values, err));
        values += p->count;
    }
    return FV_OK;
}

FvStatus fv_weights_write_dino(const char *folder, const FvDinoSizes *sizes, const FvParams *params,
                               const char *prefix, FvBackend *be, FvError *err) {
    char path[FV_PATH];
    size_t count = 0;
    FvTensor *tensors = calloc(params->count + 1, sizeof *tensors);
    size_t total = 0;
    for (size_t i = 0; i < params->count; i++)
        if (strncmp(params->list[i].name, prefix, strlen(prefix)) == 0)
            total = fv_add(total, params->list[i].count);
    real *values = malloc(fv_mul(total, sizeof *values));
    FvStatus status = tensors && values ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory");
    if (status == FV_OK)
        status = gather(params, prefix, be, tensors, values, &count, err);
    /* the larger first: where it finds no room, both files stay as they were */
    if (status == FV_OK)
        status = fv_path(err, path, sizeof path, "%s/model.safetensors", folder);
    if (status == FV_OK)
        status = fv_tensors_write(path, tensors, count, &(FvMeta){"format", "pt"}, 1, err);
    if (status == FV_OK)
        status = fv_path(err, path, sizeof path, "%s/config.json", folder);
    if (status == FV_OK)
        status = fv_hf_write_dino(path, sizes, err);
    free(tensors);
    free(values);
    return status;
}
