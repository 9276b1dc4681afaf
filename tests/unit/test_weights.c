/* Start values from files under every name that published checkpoints use, and the refusal of files
 * that hold something else. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/rng.h"
#include "model/model.h"
#include "model/resize.h"
#include "run/files.h"
#include "run/model_folder.h"
#include "run/safetensors.h"
#include "run/weights.h"

/* --- a model ---------------------------------------------------------------------------------- */

enum { GRID = 3, WIDTH = 6 };

typedef struct World {
    char folder[32], path[FV_PATH]; /* path: of the file that a test writes first */
    FvConfig c;
    FvBackend *be;
    FvModel *model;
    FvParams *params;
} World;

static void succeeds(FvStatus status, const FvError *err) {
    if (status != FV_OK)
        fail_msg("status %d: %s", (int)status, err->text);
}

static void set_sizes(FvConfig *c) {
    c->image_size = 8 * GRID, c->patch = 8, c->frames = 2, c->batch = 1;
    c->dino_width = WIDTH, c->dino_heads = 2, c->dino_layers = 2, c->dino_mlp = 2 * WIDTH;
    c->lm_width = 8, c->lm_heads = 2, c->lm_kv_heads = 1, c->lm_layers = 2, c->lm_mlp = 10;
    c->lm_vocab = 11, c->query_width = 5, c->head_width = 3, c->film_width = 4;
    strcpy(c->scale, "small");
    strcpy(c->dino_from, "none");
    strcpy(c->lm_from, "none");
}

static int open_world(void **state) {
    World *w = calloc(1, sizeof *w);
    FvModelConfig model;
    FvError err;
    if (!w)
        return -1;
    *state = w;
    strcpy(w->folder, "/tmp/fovea-test-XXXXXX");
    if (!mkdtemp(w->folder))
        return -1;
    succeeds(fv_path(&err, w->path, sizeof w->path, "%s/a.safetensors", w->folder), &err);
    w->c = *fv_config_defaults();
    set_sizes(&w->c);
    succeeds(fv_config_model(&w->c, 1, 1, &model, &err), &err);
    succeeds(fv_cpu_backend_create(1, &w->be, &err), &err);
    succeeds(fv_model_create(&model, w->be, &w->model, &err), &err);
    w->params = fv_model_params(w->model);
    return 0;
}

static int close_world(void **state) {
    World *w = *state;
    char command[64];
    snprintf(command, sizeof command, "rm -rf '%s'", w->folder);
    fv_model_destroy(w->model);
    fv_backend_destroy(w->be);
    free(w);
    return system(command);
}

static void start(World *w) {
    FvError err;
    succeeds(fv_weights_check(&w->c, w->params, &err), &err);
    succeeds(fv_weights_start(&w->c, w->params, w->be, 4, &err), &err);
}

static void get(World *w, const FvParam *p, real *out) {
    FvError err;
    succeeds(fv_params_get(w->params, w->be, p, FV_BLOCK_W, out, &err), &err);
}

static bool starts_with(const char *text, const char *start) {
    return strncmp(text, start, strlen(start)) == 0;
}

/* --- files ------------------------------------------------------------------------------------ */

enum { MOST = 128, NAME = 128 };

typedef struct File {
    size_t count;
    FvTensor list[MOST];
    char names[MOST][NAME];
    float *data[MOST];
} File;

/* What the tests' files say of element i of a parameter; exact in BF16. */
static float value_of(const char *name, size_t i) {
    return (float)((double)fv_random_below(fv_stream(99, name), i, 255) - 127) / 64;
}

static FvTensor *add(File *f, const char *name, size_t rank, const size_t *shape) {
    assert_true(f->count < MOST);
    FvTensor *t = &f->list[f->count];
    snprintf(f->names[f->count], NAME, "%s", name);
    *t = (FvTensor){.name = f->names[f->count], .type = FV_F32, .rank = rank, .count = 1};
    for (size_t i = 0; i < rank; i++)
        t->count *= t->shape[i] = shape[i];
    t->data = f->data[f->count] = calloc(t->count + 1, sizeof(float));
    assert_non_null(t->data);
    f->count++;
    return t;
}

/* Every parameter that begins with `own`, which `theirs` replaces. */
static File file_of(const World *w, const char *own, const char *theirs) {
    File f = {0};
    for (size_t i = 0; i < w->params->count; i++) {
        const FvParam *p = &w->params->list[i];
        char name[NAME];
        if (!starts_with(p->name, own))
            continue;
        snprintf(name, sizeof name, "%s%s", theirs, p->name + strlen(own));
        add(&f, name, p->rank, p->shape);
        for (size_t k = 0; k < p->count; k++)
            f.data[f.count - 1][k] = value_of(p->name, k);
    }
    return f;
}

static size_t place_of(const File *f, const char *name) {
    for (size_t i = 0; i < f->count; i++)
        if (strcmp(f->names[i], name) == 0)
            return i;
    fail_msg("the test's file has no %s", name);
    return 0;
}

static FvTensor *tensor(File *f, const char *name) {
    return &f->list[place_of(f, name)];
}

/* The last one takes its place. */
static void drop(File *f, const char *name) {
    size_t i = place_of(f, name), last = --f->count;
    free(f->data[i]);
    f->list[i] = f->list[last];
    f->data[i] = f->data[last];
    memcpy(f->names[i], f->names[last], NAME);
    f->list[i].name = f->names[i];
}

static void drop_all(File *f, const char *part) {
    for (size_t i = f->count; i-- > 0;)
        if (strstr(f->names[i], part))
            drop(f, f->names[i]);
}

static void rename_tensor(File *f, size_t i, const char *from, const char *to) {
    char old[NAME];
    memcpy(old, f->names[i], NAME);
    const char *at = strstr(old, from);
    if (at)
        snprintf(f->names[i], NAME, "%.*s%s%s", (int)(at - old), old, to, at + strlen(from));
}

static void release(File *f) {
    for (size_t i = 0; i < f->count; i++)
        free(f->data[i]);
    f->count = 0;
}

static void write_tensors(File *f, const char *path) {
    FvError err;
    for (size_t i = 0; i < f->count; i++)
        f->list[i].name = f->names[i]; /* a File may have been copied */
    succeeds(fv_tensors_write(path, f->list, f->count, NULL, 0, &err), &err);
}

/* Writes and releases. */
static void put(File *f, const char *path) {
    write_tensors(f, path);
    release(f);
}

static void write_text(const char *path, const char *text) {
    FvError err;
    succeeds(fv_file_write(path, &(FvBytes){text, strlen(text)}, 1, &err), &err);
}

/* --- what must have come of it ---------------------------------------------------------------- */

/* Parameters that begin with `from_file` have the file's values, all others their seed's. */
static void check_values(World *w, const char *from_file) {
    FvError err;
    FvModel *other;
    FvModelConfig config;
    succeeds(fv_config_model(&w->c, 1, 1, &config, &err), &err);
    succeeds(fv_model_create(&config, w->be, &other, &err), &err);
    FvParams *drawn = fv_model_params(other);
    succeeds(fv_params_init(drawn, w->be, 4, NULL, &err), &err);
    for (size_t i = 0; i < w->params->count; i++) {
        const FvParam *p = &w->params->list[i];
        real *got = calloc(p->count, sizeof *got), *want = calloc(p->count, sizeof *want);
        assert_true(got && want);
        get(w, p, got);
        succeeds(fv_params_get(drawn, w->be, &drawn->list[i], FV_BLOCK_W, want, &err), &err);
        bool file = starts_with(p->name, from_file);
        for (size_t k = 0; k < p->count; k++) {
            double wanted = file ? (double)value_of(p->name, k) : (double)want[k];
            if (!((double)got[k] == wanted))
                fail_msg("%s[%zu] is %.9g, not %.9g", p->name, k, (double)got[k], wanted);
        }
        free(got);
        free(want);
    }
    fv_model_destroy(other);
}

static void check_one(World *w, const char *name, double (*wanted)(const char *, size_t)) {
    const FvParam *p = fv_params_find(w->params, name);
    assert_non_null(p);
    real *got = calloc(p->count, sizeof *got);
    assert_non_null(got);
    get(w, p, got);
    for (size_t k = 0; k < p->count; k++)
        if (!((double)got[k] == wanted(name, k)))
            fail_msg("%s[%zu] is %.9g, not %.9g", name, k, (double)got[k], wanted(name, k));
    free(got);
}

/* One line that holds every part (to NULL); nothing was started either. */
static void refused(World *w, const char *const *parts) {
    FvError err = {0};
    assert_int_equal(fv_weights_check(&w->c, w->params, &err), FV_DATA);
    for (; *parts; parts++)
        if (!strstr(err.text, *parts))
            fail_msg("\"%s\" is not in: %s", *parts, err.text);
    assert_null(strchr(err.text, '\n'));
    assert_int_equal(fv_weights_start(&w->c, w->params, w->be, 4, &err), FV_DATA);
}
#define REFUSED(w, ...) refused(w, (const char *const[]){__VA_ARGS__, NULL})

static void use(char key[FV_TEXT], const char *path) {
    assert_true(strlen(path) < FV_TEXT);
    strcpy(key, path);
}

/* --- names ------------------------------------------------------------------------------------ */

static void test_without_files_all_is_drawn(void **state) {
    start(*state);
    check_values(*state, "nothing");
}

static void test_hugging_face_names(void **state) {
    World *w = *state;
    static const char *const dino[] = {"", "dinov2.", "dino."};
    static const char *const lm[] = {"lm.", "lm.model.", "lm."};
    static const char *const lm_theirs[] = {
        "", "", "lm."}; /* model.embed..., embed..., lm.model.embed... */
    for (size_t i = 0; i < 3; i++) {
        set_sizes(&w->c);
        File f = file_of(w, "dino.", dino[i]);
        put(&f, w->path);
        use(w->c.dino_from, w->path);
        start(w);
        check_values(w, "dino.");
        set_sizes(&w->c);
        f = file_of(w, lm[i], lm_theirs[i]);
        put(&f, w->path);
        use(w->c.lm_from, w->path);
        start(w);
        check_values(w, "lm.");
    }
}

/* Query, key and value of a layer one after the other, as the original has them. */
static void fuse(File *f, size_t layer, const char *kind) {
    static const char *const parts[] = {"query", "key", "value"};
    char name[NAME], fused[NAME];
    size_t shape[2] = {3 * (size_t)WIDTH, WIDTH}, n = 0;
    snprintf(fused, sizeof fused, "encoder.layer.%zu.attn.qkv.%s", layer, kind);
    FvTensor *t = add(f, fused, strcmp(kind, "bias") == 0 ? 1 : 2, shape);
    float *values = f->data[f->count - 1];
    assert_true(t->data == values);
    for (size_t i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "encoder.layer.%zu.attention.attention.%s.%s", layer, parts[i],
                 kind);
        size_t at = place_of(f, name);
        memcpy(values + n, f->data[at], f->list[at].count * sizeof *values);
        n += f->list[at].count;
        drop(f, name);
    }
}

static File original_file(const World *w, const char *prefix) {
    static const char *const spelt[][2] = {
        {"embeddings.cls_token", "cls_token"},
        {"embeddings.mask_token", "mask_token"},
        {"embeddings.position_embeddings", "pos_embed"},
        {"embeddings.patch_embeddings.projection", "patch_embed.proj"},
        {"attention.output.dense", "attn.proj"},
        {"layer_scale1.lambda1", "ls1.gamma"},
        {"layer_scale2.lambda1", "ls2.gamma"},
        {"layernorm.", "norm."},
        {"encoder.layer.", "blocks."},
    };
    File f = file_of(w, "dino.", "");
    for (size_t l = 0; l < w->c.dino_layers; l++) {
        fuse(&f, l, "weight");
        fuse(&f, l, "bias");
    }
    for (size_t i = 0; i < f.count; i++) {
        char plain[NAME];
        for (size_t k = 0; k < sizeof spelt / sizeof *spelt; k++)
            rename_tensor(&f, i, spelt[k][0], spelt[k][1]);
        memcpy(plain, f.names[i], NAME);
        snprintf(f.names[i], NAME, "%s%.100s", prefix, plain);
    }
    return f;
}

static void test_original_names(void **state) {
    World *w = *state;
    static const char *const prefixes[] = {"", "backbone."};
    for (size_t i = 0; i < 2; i++) {
        File f = original_file(w, prefixes[i]);
        put(&f, w->path);
        use(w->c.dino_from, w->path);
        start(w);
        check_values(w, "dino.");
    }
}

static double one(const char *name, size_t i) {
    (void)name;
    (void)i;
    return 1;
}

static double in_file(const char *name, size_t i) {
    return (double)value_of(name, i);
}

/* What is not there, or only there, in the files of other vision transformers and trainings. */
static void test_a_plain_vit_has_no_layer_scale(void **state) {
    World *w = *state;
    File f = original_file(w, "");
    drop_all(&f, ".gamma");
    drop(&f, "mask_token");
    add(&f, "head.weight", 1, (size_t[]){3});
    put(&f, w->path);
    use(w->c.dino_from, w->path);
    start(w);
    check_one(w, "dino.encoder.layer.0.layer_scale1.lambda1", one);
    check_one(w, "dino.encoder.layer.1.layer_scale2.lambda1", one);
    check_one(w, "dino.encoder.layer.1.attention.attention.value.weight", in_file);
    check_one(w, "dino.layernorm.bias", in_file);
    /* of two scales one alone is no plain transformer */
    f = original_file(w, "");
    drop(&f, "blocks.1.ls2.gamma");
    put(&f, w->path);
    REFUSED(w, w->path, "has no tensor for dino.encoder.layer.1.layer_scale2.lambda1");
}

static void test_heads_are_left_alone(void **state) {
    World *w = *state;
    File f = file_of(w, "lm.", "");
    add(&f, "lm_head.weight", 2, (size_t[]){11, 8});
    add(&f, "model.layers.0.self_attn.rotary_emb.inv_freq", 1, (size_t[]){2});
    put(&f, w->path);
    use(w->c.lm_from, w->path);
    start(w);
    check_values(w, "lm.");
}

/* --- position tables of other grids ----------------------------------------------------------- */

static void set_other_grid(File *f, const char *name, size_t side) {
    drop(f, name);
    FvTensor *t = add(f, name, 3, (size_t[]){1, side * side + 1, WIDTH});
    for (size_t i = 0; i < t->count; i++)
        f->data[f->count - 1][i] = value_of("another grid", i);
}

static void check_resized(World *w, size_t side, double offset) {
    enum { ROWS = GRID * GRID + 1 };
    size_t columns = side * side + 1;
    real *matrix = calloc(ROWS * columns, sizeof *matrix), got[ROWS * WIDTH];
    assert_non_null(matrix);
    fv_resize_matrix(side, GRID, offset, matrix);
    get(w, fv_params_find(w->params, "dino.embeddings.position_embeddings"), got);
    for (size_t i = 0; i < ROWS * WIDTH; i++) {
        double want = 0;
        for (size_t k = 0; k < columns; k++)
            want += (double)matrix[i / WIDTH * columns + k] *
                    (double)value_of("another grid", k * WIDTH + i % WIDTH);
        if (!(fabs((double)got[i] - want) <= 32 * FV_EPSILON))
            fail_msg("position[%zu] is %.9g, not %.9g", i, (double)got[i], want);
    }
    free(matrix);
}

static void test_position_tables_are_resized(void **state) {
    World *w = *state;
    static const size_t sides[] = {1, 2, 5};
    real hf[(GRID * GRID + 1) * WIDTH], meta[(GRID * GRID + 1) * WIDTH];
    const FvParam *p = fv_params_find(w->params, "dino.embeddings.position_embeddings");
    for (size_t i = 0; i < 3; i++) {
        File f = file_of(w, "dino.", "");
        set_other_grid(&f, "embeddings.position_embeddings", sides[i]);
        put(&f, w->path);
        use(w->c.dino_from, w->path);
        start(w);
        check_resized(w, sides[i], 0);
        check_one(w, "dino.embeddings.cls_token", in_file);
        get(w, p, hf);
        strcpy(w->c.pos_interp, "meta");
        start(w);
        check_resized(w, sides[i], 0.1);
        get(w, p, meta);
        assert_true(sides[i] == 1 || memcmp(hf, meta, sizeof hf) != 0);
        strcpy(w->c.pos_interp, "hf");
    }
    /* what fits is taken as it is, whatever the setting */
    File f = file_of(w, "dino.", "");
    put(&f, w->path);
    strcpy(w->c.pos_interp, "meta");
    start(w);
    check_values(w, "dino.");
}

/* --- several sources -------------------------------------------------------------------------- */

static double three(const char *name, size_t i) {
    (void)name;
    (void)i;
    return 3;
}

static void test_later_sources_win(void **state) {
    World *w = *state;
    char own[FV_PATH], lm[FV_PATH];
    FvError err;
    succeeds(fv_path(&err, own, sizeof own, "%s/own.safetensors", w->folder), &err);
    succeeds(fv_path(&err, lm, sizeof lm, "%s/lm.safetensors", w->folder), &err);
    File f = file_of(w, "dino.", "dinov2.");
    put(&f, w->path);
    f = file_of(w, "lm.", "");
    put(&f, lm);
    f = (File){0}; /* a run's own weights: some of the encoder's, the language model's and others */
    const char *const named[] = {"dino.layernorm.weight", "lm.model.norm.weight",
                                 "head.conv1.weight"};
    for (size_t i = 0; i < 3; i++) {
        const FvParam *p = fv_params_find(w->params, named[i]);
        assert_non_null(p);
        FvTensor *t = add(&f, p->name, p->rank, p->shape);
        for (size_t k = 0; k < t->count; k++)
            f.data[i][k] = i < 2 ? 3 : value_of(p->name, k);
    }
    put(&f, own);
    use(w->c.dino_from, w->path);
    use(w->c.lm_from, lm);
    use(w->c.init_from, own);
    start(w);
    check_one(w, named[0], three);
    check_one(w, named[1], three);
    check_one(w, named[2], in_file); /* channels last in memory */
    check_one(w, "dino.layernorm.bias", in_file);
    check_one(w, "lm.model.embed_tokens.weight", in_file);
}

/* A value that needs no more than BF16's 8 bits, 2^-6 the lowest, in a wider or narrower type. */
static void store(FvType type, float value, char *out) {
    uint32_t bits;
    uint16_t half;
    double wide = (double)value;
    memcpy(&bits, &value, sizeof bits);
    if (type == FV_BF16)
        half = (uint16_t)(bits >> 16);
    else /* the exponent's bias is 127 - 15 less, 13 bits of the fraction are zero */
        half = (uint16_t)((bits >> 16 & 0x8000u) |
                          (value == 0 ? 0 : ((bits & 0x7fffffffu) - (112u << 23)) >> 13));
    if (type == FV_F64)
        memcpy(out, &wide, sizeof wide);
    else
        memcpy(out, &half, sizeof half);
}

static void test_every_float_type_is_read(void **state) {
    World *w = *state;
    const FvType types[] = {FV_F64, FV_BF16, FV_F16};
    for (size_t k = 0; k < 3; k++) {
        File f = file_of(w, "dino.", "");
        for (size_t i = 0; i < f.count; i++) {
            char *stored = calloc(f.list[i].count, sizeof(double));
            assert_non_null(stored);
            for (size_t j = 0; j < f.list[i].count; j++)
                store(types[k], f.data[i][j], stored + j * fv_type_size(types[k]));
            free(f.data[i]);
            f.list[i].type = types[k];
            f.list[i].data = f.data[i] = (float *)(void *)stored;
        }
        put(&f, w->path);
        use(w->c.dino_from, w->path);
        start(w);
        check_values(w, "dino.");
    }
}

/* --- files that hold something else ----------------------------------------------------------- */

static void test_what_is_missing_is_named(void **state) {
    World *w = *state;
    File f = file_of(w, "dino.", "");
    drop(&f, "encoder.layer.1.norm2.bias");
    put(&f, w->path);
    use(w->c.dino_from, w->path);
    REFUSED(w, w->path, "has no tensor for dino.encoder.layer.1.norm2.bias");
    f = (File){0};
    add(&f, "foo", 1, (size_t[]){3});
    put(&f, w->path);
    REFUSED(w, w->path, "holds no DINOv2 encoder", "dino.embeddings.cls_token");
    use(w->c.lm_from, w->path);
    strcpy(w->c.dino_from, "none");
    REFUSED(w, w->path, "holds no Llama language model", "embed_tokens");
    strcpy(w->c.lm_from, "none");
    use(w->c.init_from, w->path);
    REFUSED(w, w->path, "holds no parameter of this model");
}

static void test_what_is_too_much_is_named(void **state) {
    World *w = *state;
    const char *const names[] = {"encoder.layer.2.norm1.weight", "embeddings.register_tokens",
                                 "two\nlines"};
    for (size_t i = 0; i < 3; i++) {
        File f = file_of(w, "dino.", "");
        add(&f, names[i], 1, (size_t[]){WIDTH});
        put(&f, w->path);
        use(w->c.dino_from, w->path);
        REFUSED(w, w->path, i < 2 ? names[i] : "two?lines", "is no part of the configured model");
    }
    /* beside a prefix there may be anything */
    File f = file_of(w, "dino.", "dinov2.");
    add(&f, "decoder.weight", 1, (size_t[]){WIDTH});
    put(&f, w->path);
    start(w);
    check_values(w, "dino.");
}

static void test_shapes_and_types_are_checked(void **state) {
    World *w = *state;
    char *keys[] = {w->c.dino_from, w->c.init_from};
    for (size_t i = 0; i < 2; i++) {
        const char *name = i ? "dino.layernorm.bias" : "layernorm.bias";
        set_sizes(&w->c);
        File f = file_of(w, "dino.", i ? "dino." : "");
        use(keys[i], w->path);
        tensor(&f, name)->count = tensor(&f, name)->shape[0] = WIDTH - 1;
        write_tensors(&f, w->path);
        REFUSED(w, w->path, name, "is [5], another shape than the model's [6]");
        tensor(&f, name)->shape[0] = WIDTH / 2, tensor(&f, name)->shape[1] = 2;
        tensor(&f, name)->rank = 2, tensor(&f, name)->count = WIDTH;
        write_tensors(&f, w->path);
        REFUSED(w, w->path, name, "[3, 2]");
        tensor(&f, name)->shape[0] = WIDTH, tensor(&f, name)->rank = 1;
        const FvType types[] = {FV_I32, FV_U8, FV_BOOL, FV_F8_E4M3};
        for (size_t k = 0; k < 4; k++) {
            tensor(&f, name)->type = types[k];
            write_tensors(&f, w->path);
            REFUSED(w, w->path, name, fv_type_name(types[k]), "F64, F32, F16 or BF16");
        }
        release(&f);
    }
}

/* No square grid; a grid that init_from would have to resize. */
static void test_position_tables_must_be_grids(void **state) {
    World *w = *state;
    const char name[] = "embeddings.position_embeddings";
    File f = file_of(w, "dino.", "");
    drop(&f, name);
    add(&f, name, 3, (size_t[]){1, 6, WIDTH});
    put(&f, w->path);
    use(w->c.dino_from, w->path);
    REFUSED(w, w->path, name, "[1, 6, 6]", "[1, 10, 6]");
    strcpy(w->c.dino_from, "none");
    f = file_of(w, "dino.", "dino.");
    set_other_grid(&f, "dino.embeddings.position_embeddings", 2);
    put(&f, w->path);
    use(w->c.init_from, w->path);
    REFUSED(w, w->path, name, "[1, 5, 6]", "[1, 10, 6]");
}

static void test_fused_tensors_must_hold_three(void **state) {
    World *w = *state;
    File f = original_file(w, "");
    tensor(&f, "blocks.0.attn.qkv.bias")->shape[0] = 2 * WIDTH;
    tensor(&f, "blocks.0.attn.qkv.bias")->count = 2 * WIDTH;
    put(&f, w->path);
    use(w->c.dino_from, w->path);
    REFUSED(w, w->path, "blocks.0.attn.qkv.bias", "[12]");
}

/* --- folders ---------------------------------------------------------------------------------- */

static const char dino_config[] =
    "{\"model_type\": \"dinov2\", \"hidden_size\": 6, \"num_hidden_layers\": 2,"
    " \"num_attention_heads\": 2, \"mlp_ratio\": 2, \"image_size\": 24, \"patch_size\": 8}";

static void in_folder(const World *w, const char *name, char path[FV_PATH]) {
    FvError err;
    succeeds(fv_path(&err, path, FV_PATH, "%s/%s", w->folder, name), &err);
}

static void test_folders_hold_weights_and_sizes(void **state) {
    World *w = *state;
    char path[FV_PATH], slash[64];
    use(w->c.dino_from, w->folder);
    REFUSED(w, w->folder, "holds no model.safetensors");
    in_folder(w, "model.safetensors", path);
    File f = file_of(w, "dino.", "");
    put(&f, path);
    start(w); /* without config.json */
    in_folder(w, "config.json", path);
    write_text(path, dino_config);
    start(w);
    check_values(w, "dino.");
    snprintf(slash, sizeof slash, "%s/", w->folder);
    use(w->c.dino_from, slash);
    start(w);
    w->c.dino_heads = 3; /* which no tensor's shape shows */
    REFUSED(w, "dino_heads 3", "config.json", "says 2");
    in_folder(w, "model.safetensors", path);
    use(w->c.dino_from, path); /* config.json stands beside it */
    REFUSED(w, "dino_heads 3", "config.json", "says 2");
    use(w->c.dino_from, "absent");
    REFUSED(w, "absent: no such file or folder, nor models/absent");
}

/* Sizes that no key may have are no preset, and told. */
static void test_absurd_sizes_are_not_taken(void **state) {
    World *w = *state;
    char path[FV_PATH];
    in_folder(w, "model.safetensors", path);
    File f = file_of(w, "dino.", "");
    put(&f, path);
    in_folder(w, "config.json", path);
    write_text(path, "{\"model_type\": \"dinov2\", \"hidden_size\": 6, \"mlp_ratio\": 2,"
                     " \"num_hidden_layers\": 9999999, \"num_attention_heads\": 2,"
                     " \"image_size\": 24, \"patch_size\": 8}");
    use(w->c.dino_from, w->folder);
    w->c.dino_layers = 5;
    fv_folder_preset(&w->c);
    assert_int_equal(w->c.dino_layers, 5);
    w->c.dino_layers = 2;
    REFUSED(w, path, "dino_layers would be 9999999", "1024");
}

static void test_sharded_weights(void **state) {
    World *w = *state;
    char path[FV_PATH], index[8192] = "{\"weight_map\": {";
    for (size_t shard = 0; shard < 2; shard++) {
        File f = file_of(w, "dino.", "");
        const char *const names[] = {"1.safetensors", "2.safetensors"};
        for (size_t i = f.count; i-- > 0;) {
            if (strstr(f.names[i], "layer.1.") ? shard == 0 : shard == 1) {
                drop(&f, f.names[i]);
                continue;
            }
        }
        for (size_t i = 0; i < f.count; i++)
            snprintf(index + strlen(index), sizeof index - strlen(index), "%s\"%s\": \"%s\"",
                     shard || i ? ", " : "", f.names[i], names[shard]);
        in_folder(w, names[shard], path);
        put(&f, path);
    }
    strcat(index, "}}");
    in_folder(w, "model.safetensors.index.json", path);
    write_text(path, index);
    use(w->c.dino_from, w->folder);
    start(w);
    check_values(w, "dino.");
    use(w->c.dino_from, path);
    start(w);
    check_values(w, "dino.");
    char config[FV_PATH];
    in_folder(w, "config.json", config);
    write_text(config, dino_config);
    w->c.dino_mlp = 13;
    REFUSED(w, "dino_mlp 13", "config.json", "says 12");
    w->c.dino_mlp = 12;
    in_folder(w, "2.safetensors", config);
    unlink(config);
    REFUSED(w, "2.safetensors");
}

static size_t left_over;
static void count_left(const char *name) {
    assert_string_equal(name, "more");
    left_over++;
}

/* A written encoder is a folder that dino_from takes. */
static void test_a_written_encoder_starts_another(void **state) {
    World *w = *state;
    FvError err;
    FvDinoSizes sizes = {24, 8, WIDTH, 2, 2, 2 * WIDTH}, read;
    char path[FV_PATH];
    File f = file_of(w, "dino.", "");
    put(&f, w->path);
    use(w->c.dino_from, w->path);
    start(w);
    succeeds(fv_weights_write_dino(w->folder, &sizes, w->params, "dino.", w->be, &err), &err);
    in_folder(w, "config.json", path);
    succeeds(fv_hf_read_dino(path, &read, &err), &err);
    assert_memory_equal(&read, &sizes, sizeof sizes);
    use(w->c.dino_from, w->folder);
    succeeds(fv_weights_start(&w->c, w->params, w->be, 5, &err), &err);
    start(w);
    check_values(w, "dino.");
}

static void test_fit_is_told_for_every_parameter(void **state) {
    World *w = *state;
    FvError err;
    FvFit *fit = calloc(w->params->count, sizeof *fit);
    assert_non_null(fit);
    File f = original_file(w, "");
    add(&f, "more", 1, (size_t[]){1});
    set_other_grid(&f, "pos_embed", 2);
    tensor(&f, "norm.bias")->shape[0] = tensor(&f, "norm.bias")->count = 2;
    drop(&f, "norm.weight");
    put(&f, w->path);
    left_over = 0;
    succeeds(fv_weights_fit(w->path, w->params, fit, count_left, &err), &err);
    assert_int_equal(left_over, 1);
    for (size_t i = 0; i < w->params->count; i++) {
        const char *name = w->params->list[i].name;
        FvFit want = strcmp(name, "dino.layernorm.bias") == 0     ? FV_FIT_SHAPE
                     : strcmp(name, "dino.layernorm.weight") == 0 ? FV_FIT_MISSING
                     : starts_with(name, "dino.")                 ? FV_FIT_FILLED
                                                                  : FV_FIT_MISSING;
        if (fit[i] != want)
            fail_msg("%s: %d, not %d", name, (int)fit[i], (int)want);
    }
    free(fit);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, open_world, close_world)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_without_files_all_is_drawn),
        TEST(test_hugging_face_names),
        TEST(test_original_names),
        TEST(test_a_plain_vit_has_no_layer_scale),
        TEST(test_heads_are_left_alone),
        TEST(test_position_tables_are_resized),
        TEST(test_later_sources_win),
        TEST(test_every_float_type_is_read),
        TEST(test_what_is_missing_is_named),
        TEST(test_what_is_too_much_is_named),
        TEST(test_shapes_and_types_are_checked),
        TEST(test_position_tables_must_be_grids),
        TEST(test_fused_tensors_must_hold_three),
        TEST(test_folders_hold_weights_and_sizes),
        TEST(test_absurd_sizes_are_not_taken),
        TEST(test_sharded_weights),
        TEST(test_a_written_encoder_starts_another),
        TEST(test_fit_is_told_for_every_parameter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
