/* Encoder and language model against transformers' Dinov2Model and LlamaModel: every hidden state
 * of tiny random models (tests/reference/make_parity_golden.py wrote the files), read as a user's
 * folder is: config.json and model.safetensors. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "model/resize.h"
#include "parity.h"
#include "run/files.h"
#include "run/safetensors.h"

#define GOLDEN "tests/golden/parity_"

/* The files are single precision, and transformers resizes position tables in it: an error of 6e-8
 * in a coordinate of up to 10 moves the four weights by about 1e-6 in all. Sums of some hundred
 * terms in single precision stay within the second bound with room. */
static const double tolerance = sizeof(real) == 8 ? 2e-6 : 2e-5;

static bool is_weight(const char *name) {
    static const char *const others[] = {"pixels", "hidden.", "last_hidden_state", "inputs_embeds",
                                         "position."};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strncmp(name, others[i], strlen(others[i])) == 0)
            return false;
    return true;
}

/* A folder as from a hub, of a golden file's weights and config. */
static void make_folder(const FvTensorFile *file, char *folder) {
    char path[FV_PATH];
    FvError err;
    const char *config = fv_tensors_metadata(file, "config");
    FvTensor *weights = calloc(fv_tensors_count(file) + 1, sizeof *weights);
    size_t count = 0;
    assert_non_null(config);
    assert_non_null(weights);
    assert_non_null(mkdtemp(folder));
    for (size_t i = 0; i < fv_tensors_count(file); i++)
        if (is_weight(fv_tensors_at(file, i)->name))
            weights[count++] = *fv_tensors_at(file, i);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    assert_int_equal(fv_tensors_write(path, weights, count, NULL, 0, &err), FV_OK);
    snprintf(path, sizeof path, "%s/config.json", folder);
    assert_int_equal(fv_file_write(path, &(FvBytes){config, strlen(config)}, 1, &err), FV_OK);
    free(weights);
}

static void remove_folder(const char *folder) {
    static const char *const files[] = {"model.safetensors", "config.json"};
    char path[FV_PATH];
    for (size_t i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        assert_int_equal(unlink(path), 0);
    }
    assert_int_equal(rmdir(folder), 0);
}

/* The largest difference as a share of the largest value. */
static void compare(const char *what, const FvTensor *want, const real *got, size_t count) {
    double largest = 0, difference = 0;
    assert_non_null(want);
    assert_int_equal(want->count, count);
    for (size_t i = 0; i < count; i++) {
        double w, d;
        fv_tensor_read(want, i, 1, &w);
        d = fabs((double)got[i] - w);
        largest = fmax(largest, fabs(w));
        difference = d <= difference ? difference : d; /* NaN stays */
    }
    if (!(difference <= tolerance * largest))
        fail_msg("%s: off by %.3g of %.3g", what, difference, largest);
}

static void check_states(const char *name, const FvTensorFile *file, const Parity *p) {
    char tensor[64], what[128];
    for (size_t l = 0; l <= p->layers; l++) {
        snprintf(tensor, sizeof tensor, "hidden.%zu", l);
        snprintf(what, sizeof what, "%s %s", name, tensor);
        compare(what, fv_tensors_find(file, tensor), p->states + l * p->count, p->count);
    }
    compare(name, fv_tensors_find(file, "last_hidden_state"), p->final, p->count);
}

typedef FvStatus Run(const char *folder, const char *input, Parity *out, FvError *err);

static void check_file(const char *name, Run *run) {
    char path[128], folder[] = "/tmp/fovea-parity-XXXXXX";
    FvTensorFile *file;
    FvError err;
    Parity p;
    snprintf(path, sizeof path, GOLDEN "%s.safetensors", name);
    assert_int_equal(fv_tensors_open(path, &file, &err), FV_OK);
    make_folder(file, folder);
    if (run(folder, path, &p, &err) != FV_OK)
        fail_msg("%s: %s", name, err.text);
    check_states(name, file, &p);
    parity_free(&p);
    remove_folder(folder);
    fv_tensors_close(file);
}

static void encoder_equals_transformers_on_the_tables_own_grid(void **state) {
    (void)state;
    check_file("dinov2_35", parity_dinov2);
}

static void encoder_equals_transformers_on_a_larger_grid(void **state) {
    (void)state;
    check_file("dinov2_49", parity_dinov2);
}

static void encoder_equals_transformers_with_pixels_beyond_the_last_patch(void **state) {
    (void)state;
    check_file("dinov2_52", parity_dinov2);
}

static void encoder_equals_transformers_with_the_original_names(void **state) {
    (void)state;
    check_file("dinov2_original", parity_dinov2);
}

static void language_model_equals_transformers(void **state) {
    (void)state;
    check_file("llama_a", parity_llama);
    check_file("llama_b", parity_llama);
    check_file("llama_c", parity_llama);
}

/* offset: 0 as transformers, 0.1 as the original. */
static void check_positions(const FvTensorFile *file, const char *style, double offset, size_t to) {
    enum { FROM = 5, WIDTH = 24 };
    char name[64];
    const FvTensor *table = fv_tensors_find(file, "embeddings.position_embeddings");
    assert_non_null(table);
    assert_int_equal(table->count, (FROM * FROM + 1) * WIDTH);
    size_t rows = to * to + 1, columns = FROM * FROM + 1;
    real *matrix = calloc(rows * columns, sizeof *matrix);
    real *values = calloc(table->count, sizeof *values);
    real *got = calloc(rows * WIDTH, sizeof *got);
    assert_true(matrix && values && got);
    fv_tensor_read_real(table, 0, table->count, values);
    fv_resize_matrix(FROM, to, offset, matrix);
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < columns; k++)
            for (size_t i = 0; i < WIDTH; i++)
                got[r * WIDTH + i] += matrix[r * columns + k] * values[k * WIDTH + i];
    snprintf(name, sizeof name, "position.%s.%zu", style, to);
    compare(name, fv_tensors_find(file, name), got, rows * WIDTH);
    free(matrix);
    free(values);
    free(got);
}

static void position_tables_are_resized_as_either_implementation_does(void **state) {
    static const size_t grids[] = {3, 4, 7, 10};
    FvTensorFile *file;
    FvError err;
    (void)state;
    assert_int_equal(fv_tensors_open(GOLDEN "dinov2_positions.safetensors", &file, &err), FV_OK);
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++) {
        check_positions(file, "hf", 0, grids[i]);
        check_positions(file, "meta", 0.1, grids[i]);
    }
    fv_tensors_close(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(encoder_equals_transformers_on_the_tables_own_grid),
        cmocka_unit_test(encoder_equals_transformers_on_a_larger_grid),
        cmocka_unit_test(encoder_equals_transformers_with_pixels_beyond_the_last_patch),
        cmocka_unit_test(encoder_equals_transformers_with_the_original_names),
        cmocka_unit_test(language_model_equals_transformers),
        cmocka_unit_test(position_tables_are_resized_as_either_implementation_does),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
