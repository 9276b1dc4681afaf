/* Random views of a frame for self-distillation. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "run/crops.h"

enum { SIZE = 12, OUT = 8, KEYS = 300, FRAME = SIZE * SIZE * 3, CROP = OUT * OUT * 3 };

static const FvCropRecipe plain = {.area_low = 0.3, .area_high = 1};

/* Random bytes low .. high. */
static void fill(uint8_t *frame, uint8_t low, uint8_t high) {
    for (size_t i = 0; i < FRAME; i++)
        frame[i] = (uint8_t)(low + fv_random_below(5, i, high - low + 1u));
}

/* Columns get lighter to the right, rows from top to bottom in another channel. */
static void fill_ramp(uint8_t *frame) {
    for (size_t i = 0; i < (size_t)SIZE * SIZE; i++) {
        frame[3 * i] = (uint8_t)(20 * (i % SIZE));
        frame[3 * i + 1] = (uint8_t)(20 * (i / SIZE));
        frame[3 * i + 2] = 100;
    }
}

static int sum_of_row(const uint8_t *crop, size_t size, size_t channel) {
    int sum = 0;
    for (size_t x = 0; x < size; x++)
        sum += crop[3 * x + channel];
    return sum;
}

static void test_the_key_decides(void **state) {
    (void)state;
    const FvCropRecipe all = {0.3, 1, 0.4, 0.2, 0.5};
    uint8_t frame[FRAME], again[FRAME], first[CROP], second[CROP];
    size_t same = 0;
    fill(frame, 0, 255);
    memcpy(again, frame, sizeof frame);
    for (uint64_t key = 0; key < KEYS; key++) {
        memset(first, 1, sizeof first);
        memset(second, 2, sizeof second);
        fv_crop(frame, SIZE, &all, key, OUT, first);
        fv_crop(again, SIZE, &all, key, OUT, second);
        assert_memory_equal(first, second, CROP);
        fv_crop(frame, SIZE, &all, key + KEYS, OUT, second);
        same += memcmp(first, second, CROP) == 0;
    }
    assert_int_equal(same, 0);
    assert_memory_equal(frame, again, FRAME); /* the frame itself stays */
}

/* Bilinear samples lie between the values that they are made of; blurring and greying too. */
static void test_values_stay_within_the_frame(void **state) {
    (void)state;
    const FvCropRecipe recipes[] = {plain, {0.01, 0.3, 0, 0, 0}, {0.1, 1, 0, 0.5, 0.5}};
    uint8_t frame[FRAME], out[CROP];
    fill(frame, 60, 190);
    for (size_t r = 0; r < 3; r++)
        for (uint64_t key = 0; key < KEYS; key++) {
            fv_crop(frame, SIZE, &recipes[r], key, OUT, out);
            for (size_t i = 0; i < CROP; i++)
                assert_in_range(out[i], 60, 190);
        }
}

/* One colour stays that colour, wherever the window lies and whatever is blurred. */
static void test_a_uniform_frame_stays_uniform(void **state) {
    (void)state;
    const FvCropRecipe blurred = {0.01, 1, 0, 0, 0.5};
    uint8_t frame[FRAME], out[CROP];
    for (size_t i = 0; i < FRAME; i++)
        frame[i] = (uint8_t)(40 + 90 * (i % 3));
    for (uint64_t key = 0; key < KEYS; key++) {
        fv_crop(frame, SIZE, &blurred, key, OUT, out);
        for (size_t i = 0; i < CROP; i++)
            assert_int_equal(out[i], 40 + 90 * (i % 3));
    }
}

/* Sides have a ratio from 3/4 to 4/3 of an area of the whole frame, cut to the frame: one of them
 * is the frame's, the other at least sqrt(3/4) of it. Along the whole side a crop of the frame's
 * size repeats the frame's pixels. */
static void test_area_one_covers_the_frame(void **state) {
    (void)state;
    const FvCropRecipe whole = {.area_low = 1, .area_high = 1};
    uint8_t frame[FRAME], out[FRAME];
    size_t wide = 0, tall = 0;
    fill_ramp(frame);
    for (uint64_t key = 0; key < KEYS; key++) {
        fv_crop(frame, SIZE, &whole, key, SIZE, out);
        bool mirrored = out[0] > out[3 * (SIZE - 1)], columns = true, rows = true;
        for (size_t i = 0; i < SIZE; i++) {
            columns = columns && out[3 * i] == 20 * (mirrored ? SIZE - 1 - i : i);
            rows = rows && out[3 * SIZE * i + 1] == 20 * i;
        }
        assert_true(columns || rows);
        wide += columns;
        tall += rows;
        int across = abs(out[0] - out[3 * (SIZE - 1)]);
        int down = out[3 * SIZE * (SIZE - 1) + 1] - out[1];
        /* between the centres of the outermost pixels: 11/12 of the side, 20 per frame pixel, each
         * end rounded, and clamped at the border by half a pixel at most */
        assert_true(across >= 20 * 11 * sqrt(0.75) - 3 && down >= 20 * 11 * sqrt(0.75) - 3);
    }
    assert_true(wide > KEYS / 4 && tall > KEYS / 4);
}

/* The span of a crop of the ramp shows the window's sides: their product is the area asked for. */
static void test_the_area_is_the_recipe_s(void **state) {
    (void)state;
    uint8_t frame[FRAME], out[CROP];
    fill_ramp(frame);
    for (uint64_t key = 0; key < KEYS; key++) {
        const FvCropRecipe quarter = {.area_low = 0.25, .area_high = 0.25};
        fv_crop(frame, SIZE, &quarter, key, OUT, out);
        /* pixels two from the border: clamping does not reach them */
        double across = abs(out[3 * 2] - out[3 * (OUT - 3)]) / 20.0 * OUT / (OUT - 5);
        double down =
            (out[3 * OUT * (OUT - 3) + 1] - out[3 * OUT * 2 + 1]) / 20.0 * OUT / (OUT - 5);
        double ratio = across / down, area = across * down / (SIZE * SIZE);
        /* each end rounded to a 20th of a pixel: 1/40 * 2 * 8/3 = 0.14 of at least 5.2 pixels */
        assert_true(fabs(area - 0.25) < 0.25 * 0.06);
        assert_true(ratio > 0.75 * 0.94 && ratio < 4.0 / 3 * 1.06);
    }
}

static void test_half_are_mirrored(void **state) {
    (void)state;
    uint8_t frame[FRAME], out[CROP];
    size_t mirrored = 0;
    fill_ramp(frame);
    for (uint64_t key = 0; key < KEYS; key++) {
        fv_crop(frame, SIZE, &plain, key, OUT, out);
        mirrored += out[0] > out[3 * (OUT - 1)];
        assert_true(sum_of_row(out, OUT, 1) <= sum_of_row(out + 3 * OUT * (OUT - 1), OUT, 1));
    }
    /* 300 fair coins: 150 +- 8.7; six deviations */
    assert_in_range(mirrored, 98, 202);
}

static void test_grey_crops_have_equal_channels(void **state) {
    (void)state;
    const FvCropRecipe recipes[] = {{0.3, 1, 0, 1, 0}, {0.3, 1, 0.4, 1, 0.5}};
    uint8_t frame[FRAME], out[CROP];
    fill(frame, 0, 255);
    for (size_t r = 0; r < 2; r++)
        for (uint64_t key = 0; key < KEYS; key++) {
            fv_crop(frame, SIZE, &recipes[r], key, OUT, out);
            for (size_t i = 0; i < CROP; i += 3) /* sums of the same terms, each rounded once */
                assert_true(out[i] == out[i + 1] && out[i] == out[i + 2]);
        }
}

/* Without windows and mirrors a grey frame shows what jitter does to brightness: the mean moves by
 * the share asked for at most. */
static void test_jitter_is_bounded(void **state) {
    (void)state;
    const FvCropRecipe jittered = {0.5, 1, 0.4, 0, 0};
    uint8_t frame[FRAME], out[CROP], low = 255, high = 0;
    memset(frame, 100, sizeof frame);
    for (uint64_t key = 0; key < KEYS; key++) {
        fv_crop(frame, SIZE, &jittered, key, OUT, out);
        for (size_t i = 0; i < CROP; i++) {
            assert_in_range(out[i], 60 - 1, 140 + 1);
            assert_true(abs(out[i] - out[i % 3]) <= 0); /* still one colour */
        }
        low = out[0] < low ? out[0] : low;
        high = out[0] > high ? out[0] : high;
    }
    assert_true(low < 70 && high > 130); /* and is used */
}

static void test_blur_brings_neighbours_closer(void **state) {
    (void)state;
    const FvCropRecipe sharp = {0.3, 1, 0, 0, 0}, blurred = {0.3, 1, 0, 0, 1};
    uint8_t frame[FRAME], a[CROP], b[CROP];
    fill(frame, 0, 255);
    for (uint64_t key = 0; key < KEYS; key++) {
        int rough = 0, smooth = 0;
        fv_crop(frame, SIZE, &sharp, key, OUT, a);
        fv_crop(frame, SIZE, &blurred, key, OUT, b);
        for (size_t i = 3; i < CROP; i++)
            if (i % (3 * OUT) >= 3) {
                rough += abs(a[i] - a[i - 3]);
                smooth += abs(b[i] - b[i - 3]);
            }
        assert_true(smooth < rough);
    }
}

/* The largest and the smallest: nothing is read or written outside. */
static void test_sizes_from_one_pixel_on(void **state) {
    (void)state;
    const FvCropRecipe all = {0.001, 1, 0.4, 0.2, 0.5};
    for (size_t size = 1; size < 20; size += 6)
        for (size_t out_size = 1; out_size < 40; out_size += 19) {
            uint8_t *frame = calloc(size * size, 3), *out = calloc(out_size * out_size, 3);
            assert_true(frame && out);
            for (uint64_t key = 0; key < 20; key++)
                fv_crop(frame, size, &all, key, out_size, out);
            for (size_t i = 0; i < 3 * out_size * out_size; i++)
                assert_int_equal(out[i], 0);
            free(frame);
            free(out);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_key_decides),
        cmocka_unit_test(test_values_stay_within_the_frame),
        cmocka_unit_test(test_a_uniform_frame_stays_uniform),
        cmocka_unit_test(test_area_one_covers_the_frame),
        cmocka_unit_test(test_the_area_is_the_recipe_s),
        cmocka_unit_test(test_half_are_mirrored),
        cmocka_unit_test(test_grey_crops_have_equal_channels),
        cmocka_unit_test(test_jitter_is_bounded),
        cmocka_unit_test(test_blur_brings_neighbours_closer),
        cmocka_unit_test(test_sizes_from_one_pixel_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
