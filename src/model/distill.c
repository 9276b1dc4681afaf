#include "model/distill.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/encoder.h"
#include "model/resize.h"

enum { HEAD_LAYERS = 3 };

typedef struct HeadWeights {
    FvWeight w[HEAD_LAYERS], b[HEAD_LAYERS], prototypes; /* prototypes count by direction alone */
} HeadWeights;

/* One use of a head over `rows` features, of CLS tokens and then of hidden patches: layers of GELU,
 * a unit vector, its products with the unit prototypes. */
typedef struct Head {
    const HeadWeights *w;
    size_t rows;
    real *features;                                       /* [rows, D] */
    real *in[HEAD_LAYERS], *act[HEAD_LAYERS - 1];         /* before and after GELU */
    real *unit, *norm, *unit_prototypes, *prototype_norm; /* [rows, out], [prototypes, out] */
    real *logits, *probs;                                 /* [rows, prototypes] */
} Head;

/* Row numbers on the backend. */
typedef struct Rows {
    int32_t *cls, *local_cls; /* CLS rows of the large and of the small crops' features */
    int32_t *after_globals;   /* [locals I]: the small crops' rows in the head */
    int32_t *other;           /* [2 I]: the same image in the other large crop */
    int32_t *first, *second;  /* [locals I]: the image in either large crop */
    /* [2 I masked], hidden patches: their rows in the embeddings and in the features; zeros */
    int32_t *patches, *patch_features, *zeros;
} Rows;

struct FvDistill {
    FvDistillConfig c;
    FvBackend *be;
    FvParams params;
    FvEncoderWeights student, teacher;
    HeadWeights student_head, teacher_head;
    size_t student_memory; /* elements: the teacher's weights follow the student's, in its order */
    FvWeight center;
    FvEncoder global, local, taught; /* the student's two uses; the teacher's */
    Head head, teacher_out;
    Rows rows;
    uint8_t *global_pixels, *local_pixels;
    real *resize, *local_pos, *dlocal_pos; /* position table of the local crops = resize * table */
    real *target, *batch_center;
    real *crop_shares, *patch_shares; /* [2 I]: 1 / (2 I); [2 I masked]: 1 over their number */
    real *blank;                      /* [D]: zeros */
    int32_t *host_rows;
    double *loss, *entropy, *norm, *rates; /* [rows], [2 I], [2], [FV_RATES] */
    double student_temperature;            /* of the last forward pass */
    double *host;
    real *dlogits, *dunit, *dprototypes, *da, *db, *dcls; /* scratch */
    void *block_weights, *block_train, *block_acts, *block_operands;
};

static size_t global_count(const FvDistill *d) {
    return fv_mul(FV_GLOBAL_CROPS, d->c.images);
}
static size_t local_count(const FvDistill *d) {
    return fv_mul(d->c.locals, d->c.images);
}
static size_t crop_count(const FvDistill *d) {
    return fv_add(global_count(d), local_count(d));
}
/* hidden patches of all large crops */
static size_t hidden_count(const FvDistill *d) {
    return fv_mul(global_count(d), d->c.masked);
}
/* the student's head: crops, then hidden patches */
static size_t row_count(const FvDistill *d) {
    return fv_add(crop_count(d), hidden_count(d));
}
/* pairs of a student's crop and a teacher's crop of the same image that are not the same crop */
static double pair_count(const FvDistill *d) {
    return (double)(FV_GLOBAL_CROPS * (FV_GLOBAL_CROPS - 1 + d->c.locals));
}

/* --- building ------------------------------------------------------------------------------- */

size_t fv_distill_patches(const FvDistillConfig *c) {
    return (c->size / c->patch) * (c->size / c->patch);
}

static FvStatus check(const FvDistillConfig *c, FvError *err) {
    if (c->images == 0 || c->layers == 0 || c->heads == 0 || c->patch == 0 || c->prototypes < 2 ||
        c->head_width == 0 || c->head_out == 0 || c->mlp == 0)
        return FV_FAIL(err, FV_USAGE,
                       "every size of the encoder and its head must be at least 1, "
                       "prototypes at least 2");
    if (c->width == 0 || c->width % c->heads != 0)
        return FV_FAIL(err, FV_USAGE, "dino_width %zu: must be a multiple of dino_heads %zu",
                       c->width, c->heads);
    if (c->masked > 0 && c->masked >= fv_distill_patches(c))
        return FV_FAIL(err, FV_USAGE,
                       "%zu of %zu patches hidden: some must be seen; lower mask_share", c->masked,
                       fv_distill_patches(c));
    if ((c->locals && c->patch > c->local_size) || c->patch > c->size)
        return FV_FAIL(err, FV_USAGE, "patch %zu: does not fit into crops of %zu and %zu pixels",
                       c->patch, c->size, c->local_size);
    /* rows are counted in 32 bits */
    size_t tokens = fv_mul4(FV_GLOBAL_CROPS + c->locals, c->images, c->size / c->patch + 1,
                            c->size / c->patch + 1);
    if (tokens > INT32_MAX)
        return FV_FAIL(err, FV_USAGE, "%zu images per step are too many: lower batch", c->images);
    return FV_OK;
}

static void declare_head(const FvDistillConfig *c, HeadWeights *h, FvRole role, const char *prefix,
                         FvParams *table) {
    const size_t width[HEAD_LAYERS + 1] = {c->width, c->head_width, c->head_width, c->head_out};
    char name[FV_PARAM_NAME];
    for (size_t i = 0; i < HEAD_LAYERS; i++) {
        snprintf(name, sizeof name, "%shead.mlp%zu.weight", prefix, i + 1);
        fv_params_add(table, &h->w[i], role, FV_INIT_NORMAL, 1 / sqrt((double)width[i]), name,
                      (size_t[]){width[i + 1], width[i], 0}, false);
        snprintf(name, sizeof name, "%shead.mlp%zu.bias", prefix, i + 1);
        fv_params_add(table, &h->b[i], role, FV_INIT_CONSTANT, 0, name, (size_t[]){width[i + 1], 0},
                      false);
    }
    snprintf(name, sizeof name, "%shead.prototypes", prefix);
    fv_params_add(table, &h->prototypes, role, FV_INIT_NORMAL, 1, name,
                  (size_t[]){c->prototypes, c->head_out, 0}, false);
}

static void declare(FvDistill *d) {
    FvParams *table = &d->params;
    fv_encoder_params(&d->student, &d->global.v, FV_TRAINED, d->c.masked > 0, "student.", table);
    declare_head(&d->c, &d->student_head, FV_TRAINED, "student.", table);
    d->student_memory = table->memory;
    fv_encoder_params(&d->teacher, &d->global.v, FV_FROZEN, d->c.masked > 0, "teacher.", table);
    declare_head(&d->c, &d->teacher_head, FV_FROZEN, "teacher.", table);
    fv_params_add(table, &d->center, FV_FROZEN, FV_INIT_CONSTANT, 0, "center",
                  (size_t[]){2, d->c.prototypes, 0}, false);
}

static void carve_head(const FvDistillConfig *c, Head *h, FvArena *arena) {
    h->features = fv_take(arena, fv_mul(h->rows, c->width));
    for (size_t i = 0; i < HEAD_LAYERS; i++) {
        h->in[i] =
            fv_take(arena, fv_mul(h->rows, i + 1 < HEAD_LAYERS ? c->head_width : c->head_out));
        if (i + 1 < HEAD_LAYERS)
            h->act[i] = fv_take(arena, fv_mul(h->rows, c->head_width));
    }
    h->unit = fv_take(arena, fv_mul(h->rows, c->head_out));
    h->norm = fv_take(arena, h->rows);
    h->unit_prototypes = fv_take(arena, fv_mul(c->prototypes, c->head_out));
    h->prototype_norm = fv_take(arena, c->prototypes);
    h->logits = fv_take(arena, fv_mul(h->rows, c->prototypes));
    h->probs = fv_take(arena, fv_mul(h->rows, c->prototypes));
}

static int32_t *take_rows(FvArena *arena, size_t count) {
    return fv_take_bytes(arena, fv_mul(count, sizeof(int32_t)));
}

static void carve(FvDistill *d, FvArena *arena) {
    const FvDistillConfig *c = &d->c;
    size_t globals = global_count(d), locals = local_count(d), rows = row_count(d);
    size_t local_tokens = fv_vit_tokens(&d->local.v);
    d->global_pixels = fv_take_bytes(arena, fv_mul4(globals, c->size, c->size, 3));
    d->local_pixels = fv_take_bytes(arena, fv_mul4(locals, c->local_size, c->local_size, 3));
    d->rows = (Rows){.cls = take_rows(arena, globals),
                     .local_cls = take_rows(arena, locals),
                     .after_globals = take_rows(arena, locals),
                     .other = take_rows(arena, globals),
                     .first = take_rows(arena, locals),
                     .second = take_rows(arena, locals),
                     .patches = take_rows(arena, hidden_count(d)),
                     .patch_features = take_rows(arena, hidden_count(d)),
                     .zeros = take_rows(arena, hidden_count(d))};
    fv_encoder_carve(&d->taught, arena);
    fv_encoder_carve(&d->global, arena);
    if (c->locals)
        fv_encoder_carve(&d->local, arena);
    carve_head(c, &d->teacher_out, arena);
    carve_head(c, &d->head, arena);
    d->resize = fv_take(arena, fv_mul(local_tokens, fv_vit_tokens(&d->global.v)));
    d->local_pos = fv_take(arena, fv_mul(local_tokens, c->width));
    d->dlocal_pos = fv_take(arena, fv_mul(local_tokens, c->width));
    d->target = fv_take(arena, fv_mul(crop_count(d), c->prototypes));
    d->batch_center = fv_take(arena, fv_mul(2, c->prototypes));
    d->crop_shares = fv_take(arena, globals);
    d->patch_shares = fv_take(arena, hidden_count(d));
    d->blank = fv_take(arena, c->width);
    d->loss = fv_take_bytes(arena, fv_mul(rows, sizeof(double)));
    d->entropy = fv_take_bytes(arena, fv_mul(d->teacher_out.rows, sizeof(double)));
    d->norm = fv_take_bytes(arena, 2 * sizeof(double));
    d->rates = fv_take_bytes(arena, FV_RATES * sizeof(double));
    size_t wide = fv_mul(rows, c->head_width), out = fv_mul(rows, c->head_out);
    d->dlogits = fv_take(arena, fv_mul(rows, c->prototypes));
    d->dunit = fv_take(arena, out);
    d->dprototypes = fv_take(arena, fv_mul(c->prototypes, c->head_out));
    d->da = fv_take(arena, wide > out ? wide : out);
    d->db = fv_take(arena, wide > out ? wide : out);
    d->dcls = fv_take(arena, fv_mul(rows, c->width));
}

static void upload_row(FvDistill *d, int32_t *to, size_t i, size_t row) {
    int32_t value = (int32_t)row;
    d->be->ops->upload(d->be, to + i, &value, sizeof value);
}

static FvStatus upload_constants(FvDistill *d, FvError *err) {
    size_t images = d->c.images, globals = global_count(d);
    const real share = 1 / (real)globals, patch_share = share / (real)(d->c.masked + !d->c.masked);
    for (size_t i = 0; i < hidden_count(d); i++)
        d->be->ops->upload(d->be, d->patch_shares + i, &patch_share, sizeof patch_share);
    for (size_t i = 0; i < globals; i++) {
        d->be->ops->upload(d->be, d->crop_shares + i, &share, sizeof share);
        upload_row(d, d->rows.cls, i, i * fv_vit_tokens(&d->global.v));
        upload_row(d, d->rows.other, i, (i + images) % globals);
    }
    for (size_t i = 0; i < local_count(d); i++) {
        upload_row(d, d->rows.local_cls, i, i * fv_vit_tokens(&d->local.v));
        upload_row(d, d->rows.after_globals, i, globals + i);
        upload_row(d, d->rows.first, i, i % images);
        upload_row(d, d->rows.second, i, images + i % images);
    }
    size_t count = fv_mul(fv_vit_tokens(&d->local.v), fv_vit_tokens(&d->global.v));
    real *matrix = calloc(count, sizeof *matrix);
    if (!matrix)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a position table");
    fv_resize_matrix(d->c.size / d->c.patch, d->c.local_size / d->c.patch, 0, matrix);
    d->be->ops->upload(d->be, d->resize, matrix, count * sizeof *matrix);
    free(matrix);
    return FV_OK;
}

static FvEncoder encoder_of(const FvDistill *d, const FvEncoderWeights *w, size_t images,
                            size_t size, bool trained) {
    const FvDistillConfig *c = &d->c;
    return (FvEncoder){.v = {.frames = images,
                             .size = size,
                             .patch = c->patch,
                             .width = c->width,
                             .heads = c->heads,
                             .layers = c->layers,
                             .mlp = c->mlp},
                       .w = w,
                       .trained = trained,
                       .whole = true};
}

static FvStatus build(FvDistill *d, FvError *err) {
    FvBackend *be = d->be;
    d->global = encoder_of(d, &d->student, global_count(d), d->c.size, true);
    d->local = encoder_of(d, &d->student, local_count(d), d->c.local_size, true);
    d->taught = encoder_of(d, &d->teacher, global_count(d), d->c.size, false);
    d->head = (Head){.w = &d->student_head, .rows = row_count(d)};
    d->teacher_out =
        (Head){.w = &d->teacher_head, .rows = fv_add(global_count(d), hidden_count(d))};
    FV_TRY(fv_encoder_weights_create(&d->student, d->c.layers, err));
    FV_TRY(fv_encoder_weights_create(&d->teacher, d->c.layers, err));
    FV_TRY(fv_encoder_create(&d->global, err));
    FV_TRY(fv_encoder_create(&d->local, err));
    FV_TRY(fv_encoder_create(&d->taught, err));
    declare(d);
    d->host = calloc(fv_add(row_count(d), d->teacher_out.rows), sizeof *d->host);
    d->host_rows = calloc(fv_add(hidden_count(d), 1), sizeof *d->host_rows);
    if (d->params.out_of_memory || !d->host || !d->host_rows)
        return FV_FAIL(err, FV_DEVICE, "out of memory for the tables of pretraining");
    FvArena arena = {0};
    carve(d, &arena);
    size_t n = d->params.trained_memory;
    FV_TRY(be->ops->alloc_weights(be, d->params.memory, &d->block_weights, err));
    FV_TRY(be->ops->alloc(be, fv_mul3(3, n, sizeof(real)), &d->block_train, err));
    FV_TRY(be->ops->alloc(be, arena.used, &d->block_acts, err));
    FV_TRY(be->ops->alloc_operands(be, arena.operands_used, &d->block_operands, err));
    real *g = d->block_train;
    fv_params_bind(&d->params, d->block_weights, g, g + n, g + 2 * n);
    arena = (FvArena){
        .base = d->block_acts, .operands = d->block_operands, .operand_bytes = be->operand_bytes};
    carve(d, &arena);
    d->global.pos = d->student.pos;
    d->taught.pos = d->teacher.pos;
    d->local.pos = (FvWeight){d->local_pos, d->dlocal_pos};
    d->global.masked = hidden_count(d);
    d->global.masked_rows = d->rows.patches;
    d->global.masked_zeros = d->rows.zeros;
    d->global.blank = d->blank;
    return upload_constants(d, err);
}

FvStatus fv_distill_create(const FvDistillConfig *config, FvBackend *be, FvDistill **out,
                           FvError *err) {
    FV_TRY(check(config, err));
    FvDistill *d = calloc(1, sizeof *d);
    if (!d)
        return FV_FAIL(err, FV_DEVICE, "out of memory for pretraining");
    d->c = *config;
    d->be = be;
    FvStatus status = build(d, err);
    if (status != FV_OK) {
        fv_distill_destroy(d);
        return status;
    }
    *out = d;
    return FV_OK;
}

void fv_distill_destroy(FvDistill *d) {
    if (!d)
        return;
    void *blocks[] = {d->block_weights, d->block_train, d->block_acts, d->block_operands};
    for (size_t i = 0; i < 4; i++)
        if (blocks[i])
            d->be->ops->release(d->be, blocks[i]);
    fv_encoder_free(&d->global);
    fv_encoder_free(&d->local);
    fv_encoder_free(&d->taught);
    fv_encoder_weights_free(&d->student);
    fv_encoder_weights_free(&d->teacher);
    fv_params_free(&d->params);
    free(d->host);
    free(d->host_rows);
    free(d);
}

FvParams *fv_distill_params(FvDistill *d) {
    return &d->params;
}

FvStatus fv_distill_init(FvDistill *d, uint64_t seed, FvError *err) {
    FV_TRY(fv_params_init(&d->params, d->be, seed, NULL, err));
    d->be->ops->copy(d->be, d->student_memory, d->params.w, d->params.w + d->student_memory);
    d->be->ops->weights_changed(d->be, d->student_memory, d->params.w + d->student_memory);
    return d->be->ops->sync(d->be, err);
}

/* --- forward -------------------------------------------------------------------------------- */

FvStatus fv_distill_load(FvDistill *d, const uint8_t *globals, const uint8_t *locals,
                         const int32_t *masked, FvError *err) {
    const FvOps *ops = d->be->ops;
    size_t hidden = hidden_count(d), patches = fv_distill_patches(&d->c);
    /* behind the CLS row of their own and of every earlier crop */
    for (size_t i = 0; i < hidden; i++)
        d->host_rows[i] = masked[i] + masked[i] / (int32_t)patches + 1;
    ops->upload(d->be, d->rows.patches, masked, hidden * sizeof *masked);
    ops->upload(d->be, d->rows.patch_features, d->host_rows, hidden * sizeof *masked);
    ops->upload(d->be, d->global_pixels, globals, global_count(d) * d->c.size * d->c.size * 3);
    ops->upload(d->be, d->local_pixels, locals,
                local_count(d) * d->c.local_size * d->c.local_size * 3);
    return ops->sync(d->be, err);
}

static void head_forward(FvDistill *d, Head *h) {
    const FvOps *ops = d->be->ops;
    const FvDistillConfig *c = &d->c;
    const HeadWeights *w = h->w;
    size_t n = h->rows, wide = c->head_width, out = c->head_out;
    ops->linear(d->be, n, c->width, wide, h->features, w->w[0].w, w->b[0].w, h->in[0]);
    ops->gelu(d->be, n * wide, h->in[0], h->act[0]);
    ops->linear(d->be, n, wide, wide, h->act[0], w->w[1].w, w->b[1].w, h->in[1]);
    ops->gelu(d->be, n * wide, h->in[1], h->act[1]);
    ops->linear(d->be, n, wide, out, h->act[1], w->w[2].w, w->b[2].w, h->in[2]);
    ops->normalize(d->be, n, out, h->in[2], h->unit, h->norm);
    ops->normalize(d->be, c->prototypes, out, w->prototypes.w, h->unit_prototypes,
                   h->prototype_norm);
    ops->linear(d->be, n, out, c->prototypes, h->unit, h->unit_prototypes, NULL, h->logits);
}

static void teach(FvDistill *d, double temperature) {
    const FvOps *ops = d->be->ops;
    Head *h = &d->teacher_out;
    size_t crops = global_count(d), hidden = hidden_count(d), k = d->c.prototypes;
    size_t w = d->c.width;
    fv_encoder_forward(&d->taught, d->be, d->global_pixels);
    ops->copy_rows(d->be, crops, w, d->taught.features, d->rows.cls, h->features, NULL, false);
    ops->copy_rows(d->be, hidden, w, d->taught.features, d->rows.patch_features,
                   h->features + crops * w, NULL, false);
    head_forward(d, h);
    real *patch_logits = h->logits + crops * k;
    ops->softmax(d->be, crops, k, temperature, h->logits, d->center.w, h->probs);
    ops->softmax(d->be, hidden, k, temperature, patch_logits, d->center.w + k,
                 h->probs + crops * k);
    ops->entropy(d->be, h->rows, 1, k, h->probs, d->entropy);
    /* column means: the gradient of a weight whose input is 1/n in every row */
    ops->zero(d->be, d->batch_center, 2 * k * sizeof(real));
    ops->linear_back(d->be, crops, 1, k, d->crop_shares, NULL, h->logits, NULL, false,
                     d->batch_center, NULL);
    ops->linear_back(d->be, hidden, 1, k, d->patch_shares, NULL, patch_logits, NULL, false,
                     d->batch_center + k, NULL);
}

static void learn(FvDistill *d) {
    const FvOps *ops = d->be->ops;
    Head *h = &d->head;
    size_t w = d->c.width, locals = local_count(d);
    fv_encoder_forward(&d->global, d->be, d->global_pixels);
    ops->copy_rows(d->be, global_count(d), w, d->global.features, d->rows.cls, h->features, NULL,
                   false);
    ops->copy_rows(d->be, hidden_count(d), w, d->global.features, d->rows.patch_features,
                   h->features + crop_count(d) * w, NULL, false);
    if (locals) {
        size_t from = fv_vit_tokens(&d->global.v), to = fv_vit_tokens(&d->local.v);
        /* pos = resize * table: the data gradient of a linear layer with weights `table` */
        ops->linear_back(d->be, to, w, from, NULL, d->student.pos.w, d->resize, d->local_pos, false,
                         NULL, NULL);
        fv_encoder_forward(&d->local, d->be, d->local_pixels);
        ops->copy_rows(d->be, locals, w, d->local.features, d->rows.local_cls, h->features,
                       d->rows.after_globals, false);
    }
    head_forward(d, h);
}

/* The teacher's word for each of the student's crops: for a large crop that of the other one, for a
 * small crop the sum of both. */
static void set_targets(FvDistill *d) {
    const FvOps *ops = d->be->ops;
    size_t k = d->c.prototypes, locals = local_count(d);
    const real *probs = d->teacher_out.probs;
    ops->copy_rows(d->be, global_count(d), k, probs, d->rows.other, d->target, NULL, false);
    ops->copy_rows(d->be, locals, k, probs, d->rows.first, d->target, d->rows.after_globals, false);
    ops->copy_rows(d->be, locals, k, probs, d->rows.second, d->target, d->rows.after_globals, true);
}

void fv_distill_forward(FvDistill *d, double teacher_temperature, double student_temperature) {
    teach(d, teacher_temperature);
    learn(d);
    set_targets(d);
    d->student_temperature = student_temperature;
    const FvOps *ops = d->be->ops;
    size_t k = d->c.prototypes, crops = crop_count(d);
    ops->cross_entropy(d->be, crops, k, student_temperature, d->head.logits, d->target,
                       d->head.probs, d->loss);
    ops->cross_entropy(d->be, hidden_count(d), k, student_temperature, d->head.logits + crops * k,
                       d->teacher_out.probs + global_count(d) * k, d->head.probs + crops * k,
                       d->loss + crops);
}

/* --- backward ------------------------------------------------------------------------------- */

/* dlogits -> dcls */
static void head_backward(FvDistill *d, bool still) {
    const FvOps *ops = d->be->ops;
    const FvDistillConfig *c = &d->c;
    const Head *h = &d->head;
    const HeadWeights *w = h->w;
    size_t n = h->rows, wide = c->head_width, out = c->head_out, k = c->prototypes;
    ops->zero(d->be, d->dprototypes, k * out * sizeof(real));
    ops->linear_back(d->be, n, out, k, h->unit, h->unit_prototypes, d->dlogits, d->dunit, false,
                     still ? NULL : d->dprototypes, NULL);
    ops->normalize_back(d->be, k, out, h->unit_prototypes, h->prototype_norm, d->dprototypes,
                        w->prototypes.g, true);
    ops->normalize_back(d->be, n, out, h->unit, h->norm, d->dunit, d->da, false);
    ops->linear_back(d->be, n, wide, out, h->act[1], w->w[2].w, d->da, d->db, false, w->w[2].g,
                     w->b[2].g);
    ops->gelu_back(d->be, n * wide, h->in[1], d->db, d->db);
    ops->linear_back(d->be, n, wide, wide, h->act[0], w->w[1].w, d->db, d->da, false, w->w[1].g,
                     w->b[1].g);
    ops->gelu_back(d->be, n * wide, h->in[0], d->da, d->da);
    ops->linear_back(d->be, n, c->width, wide, h->features, w->w[0].w, d->da, d->dcls, false,
                     w->w[0].g, w->b[0].g);
}

void fv_distill_backward(FvDistill *d, bool still) {
    const FvOps *ops = d->be->ops;
    size_t w = d->c.width, locals = local_count(d), k = d->c.prototypes, crops = crop_count(d);
    ops->zero(d->be, d->params.g, d->params.trained_memory * sizeof(real));
    ops->cross_entropy_back(d->be, crops, k, d->student_temperature,
                            1 / (pair_count(d) * (double)d->c.images), d->head.probs, d->target,
                            d->dlogits);
    ops->cross_entropy_back(d->be, hidden_count(d), k, d->student_temperature,
                            d->c.patch_weight / (double)(hidden_count(d) + !hidden_count(d)),
                            d->head.probs + crops * k, d->teacher_out.probs + global_count(d) * k,
                            d->dlogits + crops * k);
    head_backward(d, still);
    ops->copy_rows(d->be, hidden_count(d), w, d->dcls + crops * w, NULL, d->global.dfeatures,
                   d->rows.patch_features, false);
    ops->copy_rows(d->be, global_count(d), w, d->dcls, NULL, d->global.dfeatures, d->rows.cls,
                   false);
    fv_encoder_backward(&d->global, d->be);
    if (!locals)
        return;
    size_t from = fv_vit_tokens(&d->global.v), to = fv_vit_tokens(&d->local.v);
    ops->copy_rows(d->be, locals, w, d->dcls, d->rows.after_globals, d->local.dfeatures,
                   d->rows.local_cls, false);
    ops->zero(d->be, d->dlocal_pos, to * w * sizeof(real));
    fv_encoder_backward(&d->local, d->be);
    ops->linear_back(d->be, to, w, from, d->dlocal_pos, NULL, d->resize, NULL, false,
                     d->student.pos.g, NULL);
}

/* --- measures and the teacher --------------------------------------------------------------- */

void fv_distill_norm(FvDistill *d) {
    d->be->ops->norm(d->be, d->params.trained_memory, d->params.g, d->norm);
}

void fv_distill_update(FvDistill *d, const FvAdamW *adamw) {
    double rates[FV_RATES];
    fv_adamw_rates(adamw, rates);
    d->be->ops->upload(d->be, d->rates, rates, sizeof rates);
    fv_params_update(&d->params, d->be, adamw, d->rates, d->norm);
}

FvStatus fv_distill_measure(FvDistill *d, FvDistillMeasures *m, FvError *err) {
    const FvOps *ops = d->be->ops;
    size_t rows = row_count(d), crops = crop_count(d), globals = global_count(d);
    size_t hidden = hidden_count(d);
    ops->download(d->be, d->host, d->loss, rows * sizeof(double));
    ops->download(d->be, d->host + rows, d->entropy, (globals + hidden) * sizeof(double));
    *m = (FvDistillMeasures){0};
    ops->download(d->be, &m->norm, d->norm, sizeof m->norm);
    for (size_t i = 0; i < hidden; i++) {
        m->patch_loss += d->host[crops + i] / (double)hidden;
        m->patch_entropy += d->host[rows + globals + i] / (double)hidden;
    }
    for (size_t i = 0; i < crops; i++)
        m->loss += d->host[i] / (pair_count(d) * (double)d->c.images);
    for (size_t i = 0; i < globals; i++)
        m->teacher_entropy += d->host[rows + i] / (double)globals;
    return ops->sync(d->be, err);
}

real *fv_distill_batch_center(FvDistill *d) {
    return d->batch_center;
}

void fv_distill_follow(FvDistill *d, double momentum, double center_momentum) {
    const FvOps *ops = d->be->ops;
    ops->approach(d->be, d->student_memory, 1 - momentum, d->params.w,
                  d->params.w + d->student_memory);
    ops->weights_changed(d->be, d->student_memory, d->params.w + d->student_memory);
    ops->approach(d->be, 2 * d->c.prototypes, 1 - center_momentum, d->batch_center, d->center.w);
}
