/* Self-distillation: the loss against its definition, its gradient against finite differences
 * (double build), and who moves when. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "model/distill.h"
#include "model_fixture.h"
#include "tested_backend.h"

/* --- a small teacher and student -------------------------------------------------------------- */

typedef struct Pair {
    FvDistillConfig c;
    FvBackend *be;
    FvDistill *d;
    FvParams *params;
    uint8_t *globals, *locals;
    int32_t *masked;
    FvDistillMeasures m;
} Pair;

static const double taught_at = 0.3, learnt_at = 0.5; /* temperatures */

static FvDistillConfig small(void) {
    return (FvDistillConfig){.masked = 3,
                             .patch_weight = 0.7,
                             .images = 2,
                             .size = 12,
                             .local_size = 8,
                             .locals = 2,
                             .patch = 4,
                             .width = 6,
                             .heads = 2,
                             .layers = 2,
                             .mlp = 7,
                             .head_width = 5,
                             .head_out = 4,
                             .prototypes = 9};
}

static void succeeds(FvStatus status, const FvError *err) {
    REQUIRE(status == FV_OK, "status %d: %s", (int)status, err->text);
}

static const FvParam *find(const Pair *p, const char *name) {
    const FvParam *found = fv_params_find(p->params, name);
    REQUIRE(found != NULL, "no parameter %s", name);
    return found;
}

static real *get(const Pair *p, const FvParam *param, FvBlock block) {
    FvError err;
    real *values = calloc(param->count, sizeof *values);
    REQUIRE(values != NULL, "out of memory");
    succeeds(fv_params_get(p->params, p->be, param, block, values, &err), &err);
    return values;
}

static void set(Pair *p, const FvParam *param, const real *values) {
    FvError err;
    succeeds(fv_params_set(p->params, p->be, param, FV_BLOCK_W, values, &err), &err);
}

/* Every parameter by its name and element (element % period with a period): no bias 0, no gain 1,
 * attention far from uniform, teacher and student apart. */
static void randomize(Pair *p, const FvParam *param, size_t period) {
    real *values = calloc(param->count, sizeof *values);
    REQUIRE(values != NULL, "out of memory");
    size_t fan_in = param->rank > 1 ? param->count / param->shape[0] : 1;
    bool gain = strstr(param->name, "norm") && strstr(param->name, ".weight");
    double mean = gain || strstr(param->name, "lambda1") ? 0.8 : 0;
    double deviation = param->rank > 1 && fan_in < param->count ? 1.5 / sqrt((double)fan_in) : 0.3;
    for (size_t i = 0; i < param->count; i++)
        values[i] = (real)(mean + deviation * fv_normal(fv_stream(7, param->name),
                                                        period ? i % period : i));
    set(p, param, values);
    free(values);
}

static void fill_bytes(uint64_t key, size_t n, uint8_t *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = (uint8_t)fv_random_below(key, i, 256);
}

static size_t crop_bytes(size_t size) {
    return size * size * 3;
}

static void load(Pair *p) {
    FvError err;
    succeeds(fv_distill_load(p->d, p->globals, p->locals, p->masked, &err), &err);
}

static Pair open_pair(const FvDistillConfig *c, size_t threads) {
    Pair p = {.c = *c};
    FvError err;
    size_t globals = 2 * c->images, patches = fv_distill_patches(c);
    succeeds(tested_backend_create(threads, &p.be, &err), &err);
    succeeds(fv_distill_create(c, p.be, &p.d, &err), &err);
    p.params = fv_distill_params(p.d);
    succeeds(fv_distill_init(p.d, 1, &err), &err);
    for (size_t i = 0; i < p.params->count; i++)
        randomize(&p, &p.params->list[i], 0);
    p.globals = malloc(globals * crop_bytes(c->size));
    p.locals = malloc(c->locals * c->images * crop_bytes(c->local_size) + 1);
    p.masked = calloc(globals * c->masked + 1, sizeof *p.masked);
    REQUIRE(p.globals && p.locals && p.masked, "out of memory");
    fill_bytes(11, globals * crop_bytes(c->size), p.globals);
    fill_bytes(12, c->locals * c->images * crop_bytes(c->local_size), p.locals);
    for (size_t i = 0; i < globals * c->masked; i++) /* others in each crop */
        p.masked[i] = (int32_t)(i / c->masked * patches + (2 * i + i / c->masked) % patches);
    load(&p);
    return p;
}

static void close_pair(Pair *p) {
    fv_distill_destroy(p->d);
    fv_backend_destroy(p->be);
    free(p->globals);
    free(p->locals);
    free(p->masked);
}

static void measure(Pair *p) {
    FvError err;
    succeeds(fv_distill_measure(p->d, &p->m, &err), &err);
}

static void forward(Pair *p) {
    fv_distill_forward(p->d, taught_at, learnt_at);
    measure(p);
}

/* What fv_distill_backward differentiates. */
static double total_loss(Pair *p) {
    forward(p);
    return p->m.loss + p->c.patch_weight * p->m.patch_loss;
}

static void gradient(Pair *p, bool still) {
    forward(p);
    fv_distill_backward(p->d, still);
    fv_distill_norm(p->d);
    measure(p);
}

static bool starts_with(const char *text, const char *start) {
    return strncmp(text, start, strlen(start)) == 0;
}

static double length_of(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* --- the gradient ----------------------------------------------------------------------------- */

/* A key bias moves all scores of a softmax alike: no effect but rounding. */
static void test_every_student_tensor_has_a_gradient(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    gradient(&p, false);
    double scale = p.m.norm / sqrt((double)p.params->trained);
    size_t tensors = 0;
    for (size_t i = 0; i < p.params->count; i++) {
        const FvParam *param = &p.params->list[i];
        REQUIRE((param->role == FV_TRAINED) == starts_with(param->name, "student."), "%s: role",
                param->name);
        if (param->role != FV_TRAINED)
            continue;
        real *g = get(&p, param, FV_BLOCK_G);
        double length = length_of(g, param->count);
        if (strstr(param->name, "key.bias"))
            REQUIRE(length <= 1e3 * FV_EPSILON * scale, "%s: gradient %g", param->name, length);
        else
            REQUIRE(length > 1e-4 * scale && isfinite(length), "%s: gradient %g beside %g",
                    param->name, length, scale);
        free(g);
        tensors++;
    }
    assert_int_equal(tensors, 7 + 18 * c.layers + 7);
    close_pair(&p);
}

#ifdef FV_DOUBLE

static double loss_at(Pair *p, const FvParam *param, const real *w, const real *direction,
                      double step, real *scratch) {
    for (size_t i = 0; i < param->count; i++)
        scratch[i] = w[i] + step * direction[i];
    set(p, param, scratch);
    return total_loss(p);
}

/* The slope of the fourth order; its error is bounded by the distance to that of the second order
 * and by 64 roundings of the loss over the step. */
static void compare_slope(Pair *p, const FvParam *param, const real *direction, double scale) {
    const double h = 1e-4;
    real *w = get(p, param, FV_BLOCK_W), *scratch = calloc(param->count, sizeof *scratch);
    real *g = get(p, param, FV_BLOCK_G);
    REQUIRE(scratch != NULL, "out of memory");
    double low2 = loss_at(p, param, w, direction, -2 * h, scratch);
    double low = loss_at(p, param, w, direction, -h, scratch);
    double high = loss_at(p, param, w, direction, h, scratch);
    double high2 = loss_at(p, param, w, direction, 2 * h, scratch), want = 0;
    for (size_t i = 0; i < param->count; i++)
        want += g[i] * direction[i];
    double second = (high - low) / (2 * h), slope = (8 * (high - low) - (high2 - low2)) / (12 * h);
    double error = fabs(slope - second) + 64 * FV_EPSILON * fabs(high) / h;
    REQUIRE(fabs(slope - want) <= error, "%s: the gradient says %.12g, the loss %.12g within %.2g",
            param->name, want, slope, error);
    REQUIRE(error <= 1e-3 * fmax(fabs(want), scale), "%s: %.12g is uncertain by %.2g", param->name,
            slope, error);
    set(p, param, w);
    free(w);
    free(g);
    free(scratch);
}

/* A random direction, which moves every element, and some single ones. */
static void check_tensor(Pair *p, const FvParam *param, double scale) {
    real *direction = calloc(param->count, sizeof *direction);
    uint64_t key = fv_stream(3, param->name);
    REQUIRE(direction != NULL, "out of memory");
    for (size_t i = 0; i < param->count; i++)
        direction[i] = fv_normal(key, i) / sqrt((double)param->count);
    compare_slope(p, param, direction, scale);
    memset(direction, 0, param->count * sizeof *direction);
    for (size_t i = 0; i < 8; i++) {
        size_t at = (size_t)fv_random_below(key ^ 1, i, param->count);
        direction[at] = 1;
        compare_slope(p, param, direction, scale);
        direction[at] = 0;
    }
    free(direction);
}

static void check_all(const FvDistillConfig *c) {
    Pair p = open_pair(c, 1);
    gradient(&p, false);
    double scale = p.m.norm / sqrt((double)p.params->trained);
    for (size_t i = 0; i < p.params->count; i++)
        if (p.params->list[i].role == FV_TRAINED)
            check_tensor(&p, &p.params->list[i], scale);
    close_pair(&p);
}

static void test_finite_differences(void **state) {
    (void)state;
    FvDistillConfig c = small();
    check_all(&c);
}

/* Plain DINO, and large crops alone: the position table then has one user. */
static void test_finite_differences_of_less(void **state) {
    (void)state;
    FvDistillConfig c = small();
    c.masked = 0;
    check_all(&c);
    c = small();
    c.locals = 0;
    check_all(&c);
}

#endif

static void test_still_prototypes_get_no_gradient(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair moving = open_pair(&c, 1), still = open_pair(&c, 1);
    gradient(&moving, false);
    gradient(&still, true);
    for (size_t i = 0; i < still.params->count; i++) {
        const FvParam *param = &still.params->list[i];
        if (param->role != FV_TRAINED)
            continue;
        real *a = get(&moving, param, FV_BLOCK_G), *b = get(&still, param, FV_BLOCK_G);
        if (strstr(param->name, "prototypes"))
            REQUIRE(length_of(b, param->count) == 0 && length_of(a, param->count) > 0,
                    "gradients %g and %g", length_of(a, param->count), length_of(b, param->count));
        else
            REQUIRE(memcmp(a, b, param->count * sizeof *a) == 0, "%s: another gradient",
                    param->name);
        free(a);
        free(b);
    }
    close_pair(&moving);
    close_pair(&still);
}

static void test_threads_do_not_change_the_gradient(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair one = open_pair(&c, 1), two = open_pair(&c, 2);
    gradient(&one, false);
    gradient(&two, false);
    assert_true(one.m.loss == two.m.loss && one.m.norm == two.m.norm);
    assert_memory_equal(one.params->g, two.params->g, one.params->trained_memory * sizeof(real));
    close_pair(&one);
    close_pair(&two);
}

/* --- the loss --------------------------------------------------------------------------------- */

/* Prototypes that all point the same way: every student's distribution is uniform, and the
 * cross-entropy against any other is log K. */
static void test_uniform_students_lose_log_k(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    randomize(&p, find(&p, "student.head.prototypes"), c.head_out);
    forward(&p);
    double want = log((double)c.prototypes), tolerance = 64 * FV_EPSILON;
    REQUIRE(fabs(p.m.loss - want) <= tolerance, "loss %.17g", p.m.loss);
    REQUIRE(fabs(p.m.patch_loss - want) <= tolerance, "patch loss %.17g", p.m.patch_loss);
    REQUIRE(p.m.teacher_entropy < want - 1e-3, "entropy %.17g", p.m.teacher_entropy);
    randomize(&p, find(&p, "teacher.head.prototypes"), c.head_out);
    real *zero = calloc(2 * c.prototypes, sizeof *zero);
    set(&p, find(&p, "center"), zero);
    free(zero);
    forward(&p);
    REQUIRE(fabs(p.m.teacher_entropy - want) <= tolerance, "entropy %.17g", p.m.teacher_entropy);
    REQUIRE(fabs(p.m.patch_entropy - want) <= tolerance, "entropy %.17g", p.m.patch_entropy);
    close_pair(&p);
}

/* Makes the head's unit vector that of its last bias whatever it sees. logits [prototypes]: their
 * cosines with it. */
static void blind_head(Pair *p, const char *who, double *logits) {
    char name[FV_PARAM_NAME];
    snprintf(name, sizeof name, "%s.head.mlp3.weight", who);
    const FvParam *last = find(p, name);
    real *zero = calloc(last->count, sizeof *zero);
    set(p, last, zero);
    free(zero);
    snprintf(name, sizeof name, "%s.head.mlp3.bias", who);
    real *bias = get(p, find(p, name), FV_BLOCK_W);
    snprintf(name, sizeof name, "%s.head.prototypes", who);
    real *prototypes = get(p, find(p, name), FV_BLOCK_W);
    for (size_t k = 0; k < p->c.prototypes; k++) {
        const real *row = prototypes + k * p->c.head_out;
        double sum = 0;
        for (size_t i = 0; i < p->c.head_out; i++)
            sum += (double)row[i] * (double)bias[i];
        logits[k] = sum / length_of(row, p->c.head_out) / length_of(bias, p->c.head_out);
    }
    free(bias);
    free(prototypes);
}

static void softmax(size_t n, const double *logits, const real *centre, double temperature,
                    double *p) {
    double sum = 0;
    for (size_t k = 0; k < n; k++)
        sum += p[k] = exp((logits[k] - (centre ? (double)centre[k] : 0)) / temperature);
    for (size_t k = 0; k < n; k++)
        p[k] /= sum;
}

/* Every crop and patch has the same logits: one distribution of the teacher for crops, one for
 * patches (each with its centre), one of the student. */
static void test_distributions_follow_their_definition(void **state) {
    (void)state;
    enum { K = 9 };
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    double teacher[K], student[K], q[K], t[K], loss[2] = {0}, entropy[2] = {0};
    blind_head(&p, "teacher", teacher);
    blind_head(&p, "student", student);
    real *centre = get(&p, find(&p, "center"), FV_BLOCK_W);
    forward(&p);
    softmax(K, student, NULL, learnt_at, q);
    for (size_t i = 0; i < 2; i++) {
        softmax(K, teacher, centre + i * K, taught_at, t);
        for (size_t k = 0; k < K; k++) {
            loss[i] -= t[k] * log(q[k]);
            entropy[i] -= t[k] * log(t[k]);
        }
    }
    const double got[] = {p.m.loss, p.m.patch_loss, p.m.teacher_entropy, p.m.patch_entropy};
    const double want[] = {loss[0], loss[1], entropy[0], entropy[1]};
    for (size_t i = 0; i < 4; i++)
        CLOSE(got[i], want[i], 1, "measure", i);
    /* the batch's centre is the mean of equal rows, and the centre goes a share towards it */
    fv_distill_follow(p.d, 0.75, 0.75);
    real *moved = get(&p, find(&p, "center"), FV_BLOCK_W);
    for (size_t i = 0; i < 2 * K; i++) {
        CLOSE((double)fv_distill_batch_center(p.d)[i], teacher[i % K], 1, "batch centre", i);
        CLOSE((double)moved[i], (double)centre[i] + 0.25 * (teacher[i % K] - (double)centre[i]), 1,
              "centre", i);
    }
    free(centre);
    free(moved);
    close_pair(&p);
}

/* The loss of one image, of crops of one size picked by number; locals by number too. */
static double loss_of(const uint8_t *crops, const size_t large[2], size_t locals,
                      const size_t *chosen) {
    FvDistillConfig c = small();
    c.images = 1, c.masked = 0, c.local_size = c.size, c.locals = locals;
    Pair p = open_pair(&c, 1);
    size_t bytes = crop_bytes(c.size);
    for (size_t i = 0; i < 2; i++)
        memcpy(p.globals + i * bytes, crops + large[i] * bytes, bytes);
    for (size_t i = 0; i < locals; i++)
        memcpy(p.locals + i * bytes, crops + chosen[i] * bytes, bytes);
    load(&p);
    forward(&p);
    double loss = p.m.loss;
    close_pair(&p);
    return loss;
}

/* Cross-entropy of the student at crop b against the teacher at crop a: of four pairs (a, a) two
 * are large crops of the same content, two are of the small crop. */
static double cross_entropy(const uint8_t *crops, size_t a, size_t b) {
    const size_t large[] = {a, a};
    return 2 * loss_of(crops, large, 1, &b) - loss_of(crops, large, 0, NULL);
}

/* Two images of crops 0 1 | 2 3 4 and 5 6 | 7 8 9: the mean over the images of the mean over all
 * pairs of a large crop and another crop of the same image. */
static void test_all_pairs_of_an_image_count_alike(void **state) {
    (void)state;
    enum { IMAGES = 2, OF_ONE = 5, LOCALS = OF_ONE - 2 };
    FvDistillConfig c = small();
    c.masked = 0, c.local_size = c.size, c.locals = LOCALS;
    size_t bytes = crop_bytes(c.size);
    uint8_t *crops = malloc(IMAGES * OF_ONE * bytes);
    REQUIRE(crops != NULL, "out of memory");
    fill_bytes(77, IMAGES * OF_ONE * bytes, crops);
    Pair p = open_pair(&c, 1);
    double want = 0;
    for (size_t i = 0; i < IMAGES; i++)
        for (size_t b = 0; b < OF_ONE; b++) {
            uint8_t *place = b < 2 ? p.globals + (b * IMAGES + i) * bytes
                                   : p.locals + ((b - 2) * IMAGES + i) * bytes;
            memcpy(place, crops + (i * OF_ONE + b) * bytes, bytes);
            for (size_t a = 0; a < 2; a++)
                if (a != b)
                    want += cross_entropy(crops, i * OF_ONE + a, i * OF_ONE + b) /
                            (IMAGES * 2 * (OF_ONE - 1));
        }
    load(&p);
    forward(&p);
    CLOSE(p.m.loss, want, 1, "loss", 0);
    /* the same without small crops, which cross_entropy leans on */
    const size_t large[] = {3, 8};
    CLOSE(loss_of(crops, large, 0, NULL),
          (cross_entropy(crops, 3, 8) + cross_entropy(crops, 8, 3)) / 2, 1, "loss", 1);
    free(crops);
    close_pair(&p);
}

static void test_without_masks_there_is_no_patch_loss(void **state) {
    (void)state;
    FvDistillConfig c = small();
    c.masked = 0;
    Pair p = open_pair(&c, 1);
    gradient(&p, false);
    assert_true(p.m.patch_loss == 0 && p.m.patch_entropy == 0);
    assert_true(p.m.loss > 0 && isfinite(p.m.norm) && p.m.norm > 0);
    assert_int_equal(find(&p, "student.embeddings.mask_token")->role, FV_UNUSED);
    close_pair(&p);
}

static bool hides(const Pair *p, size_t crop, size_t patch) {
    size_t patches = fv_distill_patches(&p->c);
    for (size_t i = 0; i < p->c.masked; i++)
        if ((size_t)p->masked[crop * p->c.masked + i] == crop * patches + patch)
            return true;
    return false;
}

/* New pixels for a patch of a large crop. */
static void repaint(Pair *p, size_t crop, size_t patch, uint64_t key) {
    size_t grid = p->c.size / p->c.patch;
    size_t row = patch / grid * p->c.patch, column = patch % grid * p->c.patch;
    uint8_t *pixels = p->globals + crop * crop_bytes(p->c.size);
    for (size_t y = row; y < row + p->c.patch; y++)
        fill_bytes(key + y, 3 * p->c.patch, pixels + 3 * (y * p->c.size + column));
    load(p);
}

/* Where attention adds nothing a patch's feature is made of its own pixels and place: the teacher's
 * distributions follow the hidden patches' pixels, the student's their places in the table, and
 * neither those of other patches. */
static void test_hidden_patches_are_predicted(void **state) {
    (void)state;
    FvDistillConfig c = small();
    c.locals = 0;
    Pair p = open_pair(&c, 1);
    size_t patches = fv_distill_patches(&c), crops = 2 * c.images;
    for (size_t i = 0; i < p.params->count; i++)
        if (strstr(p.params->list[i].name, "layer_scale1"))
            set(&p, &p.params->list[i], (const real[16]){0});
    forward(&p);
    for (size_t i = 0; i < crops * patches; i++) {
        double before = p.m.patch_entropy;
        repaint(&p, i / patches, i % patches, 100 + i);
        forward(&p);
        double moved = fabs(p.m.patch_entropy - before);
        bool hidden = hides(&p, i / patches, i % patches);
        REQUIRE(hidden ? moved > 1e-5 : moved <= 16 * FV_EPSILON,
                "crop %zu, patch %zu, hidden %d: the entropy moves by %g", i / patches, i % patches,
                hidden, moved);
    }
    const FvParam *table = find(&p, "student.embeddings.position_embeddings");
    real *place = get(&p, table, FV_BLOCK_W);
    for (size_t n = 0; n < patches; n++) {
        double before = p.m.patch_loss;
        bool hidden = false;
        for (size_t crop = 0; crop < crops; crop++)
            hidden = hidden || hides(&p, crop, n);
        place[(1 + n) * c.width] += 1;
        set(&p, table, place);
        forward(&p);
        double moved = fabs(p.m.patch_loss - before);
        REQUIRE(hidden ? moved > 1e-5 : moved <= 64 * FV_EPSILON,
                "place %zu, hidden %d: the loss moves by %g", n, hidden, moved);
    }
    free(place);
    close_pair(&p);
}

/* A teacher without preferences, so that pixels count through the student alone. */
static void test_the_student_does_not_see_hidden_patches(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    randomize(&p, find(&p, "teacher.head.prototypes"), c.head_out);
    double before = total_loss(&p);
    for (size_t hidden = 2;
         hidden-- > 0;) { /* first a patch that is hidden, then one that is not */
        size_t patch = 0;
        while (hides(&p, 0, patch) != (hidden == 1))
            patch++;
        repaint(&p, 0, patch, 1);
        double after = total_loss(&p);
        double moved = fabs(after - before); /* the teacher's rounding, or 16 pixels' effect */
        REQUIRE(hidden ? moved <= 16 * FV_EPSILON * before : moved > 1e-4, "loss %.17g after %.17g",
                after, before);
    }
    close_pair(&p);
}

/* --- who moves -------------------------------------------------------------------------------- */

static void test_the_teacher_starts_as_the_student(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    FvError err;
    succeeds(fv_distill_init(p.d, 5, &err), &err);
    for (size_t i = 0; i < p.params->count; i++) {
        const FvParam *own = &p.params->list[i];
        if (!starts_with(own->name, "student."))
            continue;
        char name[FV_PARAM_NAME];
        snprintf(name, sizeof name, "teacher.%s", own->name + strlen("student."));
        real *a = get(&p, own, FV_BLOCK_W), *b = get(&p, find(&p, name), FV_BLOCK_W);
        REQUIRE(memcmp(a, b, own->count * sizeof *a) == 0, "%s differs", name);
        free(a);
        free(b);
    }
    close_pair(&p);
}

/* y + share * (x - y), the product rounded or not: a compiler's choice. */
static bool is_approached(real got, real y, real x, real share) {
#ifdef FV_DOUBLE
    real fused = fma(share, x - y, y);
#else
    real fused = fmaf(share, x - y, y);
#endif
    volatile real product = share * (x - y);
    return got == fused || got == y + product;
}

static void test_the_teacher_follows_and_nothing_else_moves_it(void **state) {
    (void)state;
    const double momentum = 0.996;
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    size_t n = p.params->memory;
    size_t half = find(&p, "teacher.embeddings.cls_token")->offset; /* the student's lies before */
    real *before = malloc(n * sizeof *before), *after = malloc(n * sizeof *after);
    REQUIRE(before && after, "out of memory");
    memcpy(before, p.params->w, n * sizeof *before);
    gradient(&p, false);
    fv_distill_update(p.d, &(FvAdamW){0.01, 0.9, 0.999, 1e-8, 0.1, 3, 1});
    memcpy(after, p.params->w, n * sizeof *after);
    assert_memory_equal(after + half, before + half, (n - half) * sizeof *after);
    assert_memory_not_equal(after, before, half * sizeof *after);
    fv_distill_follow(p.d, momentum, 1);
    assert_memory_equal(p.params->w, after, half * sizeof *after);
    for (size_t i = 0; i < half; i++)
        REQUIRE(
            is_approached(p.params->w[half + i], before[half + i], after[i], (real)(1 - momentum)),
            "element %zu: %.17g from %.17g towards %.17g", i, (double)p.params->w[half + i],
            (double)before[half + i], (double)after[i]);
    /* momentum 1 is no move, of the centre neither */
    assert_memory_equal(p.params->w + 2 * half, before + 2 * half, (n - 2 * half) * sizeof *after);
    memcpy(after, p.params->w, n * sizeof *after);
    fv_distill_follow(p.d, 1, 1);
    assert_memory_equal(p.params->w, after, n * sizeof *after);
    free(before);
    free(after);
    close_pair(&p);
}

/* A few steps on one batch lower the loss: gradient and update have the right sign. */
static void test_steps_lower_the_loss(void **state) {
    (void)state;
    FvDistillConfig c = small();
    Pair p = open_pair(&c, 1);
    double before = total_loss(&p);
    for (size_t step = 1; step <= 10; step++) {
        gradient(&p, false);
        fv_distill_update(p.d, &(FvAdamW){0.01, 0.9, 0.999, 1e-8, 0, 1e9, step});
    }
    double after = total_loss(&p);
    REQUIRE(after < before - 0.05, "loss %g, then %g", before, after);
    close_pair(&p);
}

/* --- sizes ------------------------------------------------------------------------------------ */

static void no_images(FvDistillConfig *c) {
    c->images = 0;
}
static void odd_heads(FvDistillConfig *c) {
    c->heads = 4;
}
static void all_hidden(FvDistillConfig *c) {
    c->masked = 9;
}
static void large_patch(FvDistillConfig *c) {
    c->patch = 9;
    c->masked = 0;
}
static void one_prototype(FvDistillConfig *c) {
    c->prototypes = 1;
}

static void test_impossible_sizes_are_refused(void **state) {
    (void)state;
    static const struct {
        void (*change)(FvDistillConfig *);
        const char *told;
    } cases[] = {{no_images, "at least 1"},
                 {odd_heads, "dino_width 6: must be a multiple of dino_heads 4"},
                 {all_hidden, "9 of 9 patches hidden"},
                 {large_patch, "patch 9: does not fit into crops of 12 and 8 pixels"},
                 {one_prototype, "prototypes at least 2"}};
    FvBackend *be;
    FvError err;
    succeeds(tested_backend_create(1, &be, &err), &err);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        FvDistillConfig c = small();
        FvDistill *d;
        cases[i].change(&c);
        assert_int_equal(fv_distill_create(&c, be, &d, &err), FV_USAGE);
        REQUIRE(strstr(err.text, cases[i].told) != NULL, "%s", err.text);
    }
    fv_backend_destroy(be);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_student_tensor_has_a_gradient),
#ifdef FV_DOUBLE
        cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_finite_differences_of_less),
#endif
        cmocka_unit_test(test_still_prototypes_get_no_gradient),
        cmocka_unit_test(test_threads_do_not_change_the_gradient),
        cmocka_unit_test(test_uniform_students_lose_log_k),
        cmocka_unit_test(test_distributions_follow_their_definition),
        cmocka_unit_test(test_all_pairs_of_an_image_count_alike),
        cmocka_unit_test(test_without_masks_there_is_no_patch_loss),
        cmocka_unit_test(test_hidden_patches_are_predicted),
        cmocka_unit_test(test_the_student_does_not_see_hidden_patches),
        cmocka_unit_test(test_the_teacher_starts_as_the_student),
        cmocka_unit_test(test_the_teacher_follows_and_nothing_else_moves_it),
        cmocka_unit_test(test_steps_lower_the_loss),
        cmocka_unit_test(test_impossible_sizes_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
