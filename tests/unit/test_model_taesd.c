/* TAESD's encoder against tests/golden/taesd.safetensors, which tests/reference/taesd.py wrote with
 * PyTorch in double. The weights are drawn here and there by the same integer hash. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/taesd.h"
#include "run/safetensors.h"
#include "tested_backend.h"

/* Bits 8 .. 31 of a hash of (stream, index), between -1 and 1. */
static double unit(uint32_t stream, uint32_t index) {
    uint32_t h = index * 2654435761u + stream * 40503u + 1;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    h *= 3266489917u;
    h ^= h >> 16;
    return ((double)(h >> 8) - 8388608) / 8388608;
}

static void draw_weights(FvTaesd *net, FvBackend *be) {
    FvParams *params = fv_taesd_params(net);
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        double bound = p->rank == 1 ? 1 / 8.0 : p->shape[1] == 3 ? 1 / 2.0 : 3 / 32.0;
        real *values = calloc(p->count, sizeof *values);
        assert_non_null(values);
        for (size_t j = 0; j < p->count; j++)
            values[j] = (real)(unit((uint32_t)i, (uint32_t)j) * bound);
        assert_int_equal(fv_params_set(params, be, p, FV_BLOCK_W, values, NULL), FV_OK);
        free(values);
    }
}

typedef struct Case {
    FvTensorFile *golden;
    const FvTensor *pixels, *latents;
    FvBackend *be;
    FvTaesd *net;
    real *out; /* [latents->count] */
} Case;

static Case start(size_t size, size_t threads) {
    Case c = {0};
    char name[32];
    FvStatus status = fv_tensors_open("tests/golden/taesd.safetensors", &c.golden, NULL);
    assert_int_equal(status, FV_OK); /* else: run from the repository's root */
    snprintf(name, sizeof name, "pixels_%zu", size);
    c.pixels = fv_tensors_find(c.golden, name);
    snprintf(name, sizeof name, "latents_%zu", size);
    c.latents = fv_tensors_find(c.golden, name);
    assert_true(c.pixels && c.latents);
    assert_int_equal(tested_backend_create(threads, &c.be, NULL), FV_OK);
    assert_int_equal(fv_taesd_create(c.be, size, &c.net, NULL), FV_OK);
    draw_weights(c.net, c.be);
    c.out = calloc(c.latents->count, sizeof *c.out);
    assert_non_null(c.out);
    return c;
}

static void stop(Case *c) {
    fv_taesd_destroy(c->net);
    fv_backend_destroy(c->be);
    fv_tensors_close(c->golden);
    free(c->out);
}

/* Relative error allowed: each of the 31 convolutions on the longest path adds 577 terms, and
 * passes an error on about as large as it came; roundings of a sum of n terms amount to
 * sqrt(n) eps of its size. */
static const double limit = 31 * 24 * FV_EPSILON;

static void latents_are_those_of_the_reference(void **state) {
    (void)state;
    const size_t sizes[] = {24, 40};
    for (size_t k = 0; k < 2; k++) {
        Case c = start(sizes[k], 2);
        double *want = calloc(c.latents->count, sizeof *want), largest = 0;
        assert_non_null(want);
        fv_tensor_read(c.latents, 0, c.latents->count, want);
        for (size_t i = 0; i < c.latents->count; i++)
            largest = fmax(largest, fabs(want[i]));
        assert_int_equal(fv_taesd_encode(c.net, c.pixels->shape[0], c.pixels->data, c.out, NULL),
                         FV_OK);
        for (size_t i = 0; i < c.latents->count; i++)
            if (!(fabs((double)c.out[i] - want[i]) <= limit * largest))
                fail_msg("size %zu: latent %zu is %.17g, not %.17g", sizes[k], i, (double)c.out[i],
                         want[i]);
        free(want);
        stop(&c);
    }
}

static void threads_do_not_change_a_bit(void **state) {
    (void)state;
    Case one = start(40, 1), three = start(40, 3);
    size_t frames = one.pixels->shape[0];
    assert_int_equal(fv_taesd_encode(one.net, frames, one.pixels->data, one.out, NULL), FV_OK);
    assert_int_equal(fv_taesd_encode(three.net, frames, three.pixels->data, three.out, NULL),
                     FV_OK);
    assert_memory_equal(one.out, three.out, one.latents->count * sizeof *one.out);
    stop(&one);
    stop(&three);
}

/* More than are in memory at a time: the 24 x 24 frames again and again. */
static void many_frames_are_encoded_as_few_are(void **state) {
    (void)state;
    enum { MANY = 37 };
    Case c = start(24, 2);
    size_t frame = 24 * 24 * 3, latents = c.latents->count / 2;
    uint8_t *pixels = malloc(MANY * frame);
    real *out = calloc(MANY * latents, sizeof *out);
    assert_true(pixels && out);
    for (size_t f = 0; f < MANY; f++)
        memcpy(pixels + f * frame, (const uint8_t *)c.pixels->data + f % 2 * frame, frame);
    assert_int_equal(fv_taesd_encode(c.net, 2, c.pixels->data, c.out, NULL), FV_OK);
    assert_int_equal(fv_taesd_encode(c.net, MANY, pixels, out, NULL), FV_OK);
    for (size_t i = 0; i < MANY * latents; i++) /* the reference's latents are below 5 */
        if (!(fabs((double)out[i] - (double)c.out[i % (2 * latents)]) <= 5 * limit))
            fail_msg("latent %zu is %.9g, not %.9g", i, (double)out[i],
                     (double)c.out[i % (2 * latents)]);
    free(pixels);
    free(out);
    stop(&c);
}

static void sizes_that_are_no_multiple_of_8_are_refused(void **state) {
    (void)state;
    FvBackend *be;
    FvTaesd *net;
    FvError err = {0};
    assert_int_equal(tested_backend_create(1, &be, NULL), FV_OK);
    assert_int_equal(fv_taesd_create(be, 20, &net, &err), FV_DATA);
    assert_non_null(strstr(err.text, "multiple of 8"));
    assert_int_equal(fv_taesd_create(be, 0, &net, &err), FV_DATA);
    assert_int_equal(fv_taesd_create(be, (size_t)1 << 60, &net, &err), FV_DEVICE);
    fv_backend_destroy(be);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(latents_are_those_of_the_reference),
        cmocka_unit_test(threads_do_not_change_a_bit),
        cmocka_unit_test(many_frames_are_encoded_as_few_are),
        cmocka_unit_test(sizes_that_are_no_multiple_of_8_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
