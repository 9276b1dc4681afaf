/* Clips, targets, order, loader, and what is said about files that do not fit. */
#include <fcntl.h>
#include <hdf5.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "model/config.h"
#include "run/data.h"
#include "run/prepare.h"
#include "run/sha256.h"

enum { T = 8, S = 64, CLIP = T * S * S * 3, BLOCKS = T * 8 * 8 * 4 };

static char folder[256]; /* of this run's files; emptied at the end */

static const char *path_of(const char *name) {
    static char path[4][320];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof *path, "%s/%s", folder, name);
    return path[turn];
}

static FvConfig config_for(const char *data) {
    FvConfig c = {0};
#define SET_size(key, value)                 c.key = value;
#define SET_real(key, value)                 c.key = value;
#define SET_flag(key, value)                 c.key = value;
#define SET_text(key, value)                 snprintf(c.key, sizeof c.key, "%s", value);
#define X(kind, key, value, low, high, help) SET_##kind(key, value)
    FV_CONFIG_KEYS(X)
#undef X
    snprintf(c.data, sizeof c.data, "%s", data);
    c.clips_train = 12;
    c.clips_held_out = 4;
    return c;
}

static void set_text(char *key, const char *value) {
    snprintf(key, FV_TEXT, "%s", value);
}

static FvData *open_data(const FvConfig *c) {
    FvData *data;
    FvError err = {0};
    if (fv_data_open(c, &data, &err) != FV_OK)
        fail_msg("%s", err.text);
    return data;
}

/* --- SHA-256 ---------------------------------------------------------------------------------- */

static void test_sha256(void **state) {
    (void)state;
    char text[FV_SHA256_TEXT];
    FvSha256 sum;
    fv_sha256_start(&sum);
    fv_sha256_text(&sum, text);
    assert_string_equal(text, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    fv_sha256_start(&sum);
    fv_sha256_add(&sum, "abc", 3);
    fv_sha256_text(&sum, text);
    assert_string_equal(text, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    /* a million times "a" (FIPS 180), in pieces that cross the blocks at every offset */
    char piece[1000];
    memset(piece, 'a', sizeof piece);
    fv_sha256_start(&sum);
    for (size_t done = 0, n = 1; done < 1000000; done += n, n = n % 999 + 1) {
        n = n < 1000000 - done ? n : 1000000 - done;
        fv_sha256_add(&sum, piece, n);
    }
    fv_sha256_text(&sum, text);
    assert_string_equal(text, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/* --- procedural clips ------------------------------------------------------------------------- */

static void sum_clips(size_t size, uint32_t clips, char text[FV_SHA256_TEXT]) {
    uint8_t *pixels = malloc(T * size * size * 3);
    assert_non_null(pixels);
    FvSha256 sum;
    fv_sha256_start(&sum);
    for (int split = FV_TRAIN; split <= FV_HELD_OUT; split++)
        for (uint32_t i = 0; i < clips; i++) {
            char caption[FV_CAPTION_TOKENS + 1];
            fv_clip_draw(0, (FvSplit)split, i, T, size, pixels, NULL, caption, sizeof caption);
            fv_sha256_add(&sum, pixels, T * size * size * 3);
            fv_sha256_add(&sum, caption, strlen(caption));
        }
    fv_sha256_text(&sum, text);
    free(pixels);
}

/* The same bytes on every machine: sums recorded once. */
static void test_clips_are_fixed(void **state) {
    (void)state;
    char text[FV_SHA256_TEXT];
    sum_clips(64, 6, text);
    assert_string_equal(text, "f6c892ddd7538f6f56fa31ce6af13524293b6bd22eba9a93ed358c0720d25e82");
    sum_clips(40, 2, text);
    assert_string_equal(text, "4f6e8bbbb26427081ad49e967a400ff929f1db890aa6e24ea67c5eac2c066a69");
}

static int compare_text(const void *a, const void *b) {
    return strcmp(a, b);
}

static void test_clips_differ(void **state) {
    (void)state;
    enum { N = 40, SEEDS = 2, ALL = 2 * N * SEEDS };
    static char sums[ALL][FV_SHA256_TEXT];
    uint8_t *pixels = malloc(CLIP);
    assert_non_null(pixels);
    for (uint32_t i = 0; i < ALL; i++) {
        fv_clip_draw(i % SEEDS, i / SEEDS % 2 ? FV_HELD_OUT : FV_TRAIN, i / SEEDS / 2, T, S, pixels,
                     NULL, NULL, 0);
        FvSha256 sum;
        fv_sha256_start(&sum);
        fv_sha256_add(&sum, pixels, CLIP);
        fv_sha256_text(&sum, sums[i]);
    }
    qsort(sums, ALL, sizeof *sums, compare_text);
    for (int i = 1; i < ALL; i++)
        assert_string_not_equal(sums[i - 1], sums[i]);
    free(pixels);
}

/* A shorter clip is the beginning of a longer one, and masks do not change pixels. */
static void test_clips_prefix(void **state) {
    (void)state;
    uint8_t *longer = malloc(CLIP), *shorter = malloc(CLIP), *masks = malloc(T * S * S);
    FvClipLabels labels = {.masks = masks};
    assert_true(longer && shorter && masks);
    for (uint32_t i = 0; i < 8; i++) {
        fv_clip_draw(3, FV_HELD_OUT, i, T, S, longer, &labels, NULL, 0);
        fv_clip_draw(3, FV_HELD_OUT, i, 3, S, shorter, NULL, NULL, 0);
        assert_memory_equal(longer, shorter, 3 * S * S * 3);
    }
    free(longer);
    free(shorter);
    free(masks);
}

typedef struct Blob { /* pixels of one object in a mask */
    size_t area;
    double x, y; /* centre */
    bool at_edge;
} Blob;

static Blob find_blob(const uint8_t *mask, uint8_t id) {
    Blob b = {0};
    for (size_t y = 0; y < S; y++)
        for (size_t x = 0; x < S; x++)
            if (mask[y * S + x] == id) {
                b.area++;
                b.x += (double)x;
                b.y += (double)y;
                b.at_edge = b.at_edge || x == 0 || y == 0 || x == S - 1 || y == S - 1;
            }
    b.x /= b.area ? (double)b.area : 1;
    b.y /= b.area ? (double)b.area : 1;
    return b;
}

static uint8_t highest(const uint8_t *mask, size_t n) {
    uint8_t most = 0;
    for (size_t i = 0; i < n; i++)
        most = mask[i] > most ? mask[i] : most;
    return most;
}

/* 3 to 5 objects and the beacon. The beacon is the nearest thing: its disc is whole wherever it is
 * inside the frame. Farther objects lose area to nearer ones in some frames: occlusion. */
static void test_masks(void **state) {
    (void)state;
    uint8_t *pixels = malloc(CLIP), *masks = malloc(T * S * S);
    FvClipLabels labels = {.masks = masks};
    assert_true(pixels && masks);
    size_t hidden = 0, whole = 0;
    const double disc = 3.14159265 * (S / 11.0) * (S / 11.0);
    for (uint32_t i = 0; i < 32; i++) {
        fv_clip_draw(0, FV_TRAIN, i, T, S, pixels, &labels, NULL, 0);
        uint8_t beacon = highest(masks, T * S * S);
        assert_in_range(beacon, 4, 6);
        size_t most[8] = {0}, least[8];
        memset(least, 0xff, sizeof least);
        for (size_t t = 0; t < T; t++) {
            Blob b = find_blob(masks + t * S * S, beacon);
            if (!b.at_edge) {
                /* an outline through a pixel may fall to either side: +- half the circumference */
                if (!(fabs((double)b.area - disc) <= 3.14159265 * S / 11.0))
                    fail_msg("clip %u frame %zu: beacon of %zu pixels, not %f", i, t, b.area, disc);
                whole++;
            }
            for (uint8_t id = 1; id < beacon; id++) {
                Blob o = find_blob(masks + t * S * S, id);
                if (o.at_edge)
                    continue;
                most[id] = o.area > most[id] ? o.area : most[id];
                least[id] = o.area < least[id] ? o.area : least[id];
            }
        }
        for (uint8_t id = 1; id < beacon; id++)
            hidden += most[id] && least[id] < most[id] * 2 / 3;
    }
    assert_true(whole > 200); /* of 256 frames */
    assert_true(hidden > 10); /* of some 120 objects */
    free(pixels);
    free(masks);
}

static double mean_luma(const uint8_t *frame, const uint8_t *mask, uint8_t without) {
    double sum = 0, n = 0;
    for (size_t i = 0; i < S * S; i++)
        if (mask[i] != without) {
            sum += 0.299 * frame[3 * i] + 0.587 * frame[3 * i + 1] + 0.114 * frame[3 * i + 2];
            n++;
        }
    return sum / n;
}

/* A white core says that the light goes up in the next frame, a black one that it goes down (the
 * levels differ by factors of 1.45 and more); a grey one that no change is announced. */
static void test_beacon_announces(void **state) {
    (void)state;
    uint8_t *pixels = malloc(CLIP), *masks = malloc(T * S * S);
    FvClipLabels labels = {.masks = masks};
    assert_true(pixels && masks);
    size_t up = 0, down = 0, pans = 0;
    for (uint32_t i = 0; i < 64; i++) {
        fv_clip_draw(1, FV_TRAIN, i, T, S, pixels, &labels, NULL, 0);
        uint8_t id = highest(masks, T * S * S);
        for (size_t t = 0; t + 1 < T; t++) {
            Blob b = find_blob(masks + t * S * S, id);
            if (b.at_edge || !b.area)
                continue;
            const uint8_t *core =
                pixels + ((t * S + (size_t)lround(b.y)) * S + (size_t)lround(b.x)) * 3;
            double now = mean_luma(pixels + t * S * S * 3, masks + t * S * S, id);
            double next = mean_luma(pixels + (t + 1) * S * S * 3, masks + (t + 1) * S * S, id);
            if (core[0] > 250 && core[1] > 250 && core[2] > 250) {
                assert_true(next > now * 1.2);
                up++;
            } else if (core[0] < 5 && core[1] < 5 && core[2] < 5) {
                assert_true(next < now / 1.2);
                down++;
            } else if (core[0] != core[1] || core[1] != core[2]) {
                pans++;
            }
        }
    }
    assert_true(up > 10 && down > 10 && pans > 20);
    free(pixels);
    free(masks);
}

/* "COLOUR SHAPE " of an object; "" when its numbers have no names. */
static void name_object(const uint8_t object[2], char *out, size_t size) {
    const char *colour = fv_clip_colour(object[0]), *shape = fv_clip_shape(object[1]);
    snprintf(out, size, "%s%s%s%s", colour ? colour : "", colour ? " " : "", shape ? shape : "",
             shape ? " " : "");
}

/* The list is as long as the masks' numbers, ends in the beacon and names every body once; the
 * caption names the body nearest to the viewer. */
static void test_objects(void **state) {
    (void)state;
    uint8_t *pixels = malloc(CLIP), *masks = malloc(T * S * S);
    assert_true(pixels && masks);
    for (uint32_t i = 0; i < 64; i++) {
        FvClipLabels labels = {.masks = masks};
        char caption[FV_CAPTION_TOKENS + 1], name[64];
        fv_clip_draw(2, FV_TRAIN, i, T, S, pixels, &labels, caption, sizeof caption);
        uint8_t beacon = highest(masks, T * S * S);
        assert_in_range(beacon, 4, FV_CLIP_OBJECTS);
        unsigned colours = 0;
        for (size_t k = 0; k < FV_CLIP_OBJECTS; k++) {
            name_object(labels.objects[k], name, sizeof name);
            if (k >= beacon) {
                assert_int_equal(labels.objects[k][0], FV_NO_OBJECT);
                assert_int_equal(labels.objects[k][1], FV_NO_OBJECT);
                continue;
            }
            assert_int_equal(strcmp(name, "beacon beacon ") == 0, k + 1 == beacon);
            assert_int_equal(strncmp(caption, name, strlen(name)) == 0, k + 2 == beacon);
            assert_false(colours >> labels.objects[k][0] & 1);
            colours |= 1U << labels.objects[k][0];
        }
    }
    assert_null(fv_clip_colour(FV_NO_OBJECT));
    assert_null(fv_clip_shape(FV_NO_OBJECT));
    free(pixels);
    free(masks);
}

/* Red, green and blue objects look so where the masks say they are, for most of their pixels. */
static void test_masks_find_colours(void **state) {
    (void)state;
    static const char *const primary[3] = {"red", "green", "blue"};
    uint8_t *pixels = malloc(CLIP), *masks = malloc(T * S * S);
    assert_true(pixels && masks);
    size_t right = 0, all = 0;
    for (uint32_t i = 0; i < 32; i++) {
        FvClipLabels labels = {.masks = masks};
        fv_clip_draw(2, FV_TRAIN, i, T, S, pixels, &labels, NULL, 0);
        for (size_t p = 0; p < (size_t)T * S * S; p++) {
            const char *colour =
                masks[p] ? fv_clip_colour(labels.objects[masks[p] - 1][0]) : "background";
            assert_non_null(colour);
            const uint8_t *rgb = pixels + 3 * p;
            for (size_t c = 0; c < 3; c++)
                if (!strcmp(colour, primary[c])) {
                    all++;
                    right += rgb[c] > rgb[(c + 1) % 3] && rgb[c] > rgb[(c + 2) % 3];
                }
        }
    }
    assert_true(all > 1000);
    assert_true(right > all * 95 / 100); /* the others are mixed at outlines */
    free(pixels);
    free(masks);
}

static void test_captions(void **state) {
    (void)state;
    static const char *const shapes[] = {" disc ", " box ", " triangle "};
    static const char *const motions[] = {"moving left", "moving right", "moving up",
                                          "moving down", "circling",     "bouncing"};
    uint8_t pixels[8 * 8 * 3];
    for (uint32_t i = 0; i < 2000; i++) {
        char caption[128];
        fv_clip_draw(0, FV_TRAIN, i, 1, 8, pixels, NULL, caption, sizeof caption);
        assert_true(strlen(caption) <= FV_CAPTION_TOKENS);
        int found = 0;
        for (int s = 0; s < 3; s++)
            for (int m = 0; m < 6; m++) {
                const char *shape = strstr(caption, shapes[s]);
                found += shape && !strcmp(shape + strlen(shapes[s]), motions[m]);
            }
        assert_int_equal(found, 1);
    }
}

/* --- block targets ---------------------------------------------------------------------------- */

static void naive_block(const uint8_t *frame, size_t size, size_t by, size_t bx, double out[4]) {
    double luma[64], y = 0, cb = 0, cr = 0, spread = 0;
    for (size_t i = 0; i < 64; i++) {
        const uint8_t *p = frame + ((by * 8 + i / 8) * size + bx * 8 + i % 8) * 3;
        double r = p[0] / 255.0, g = p[1] / 255.0, b = p[2] / 255.0;
        luma[i] = 0.299 * r + 0.587 * g + 0.114 * b;
        y += luma[i] / 64;
        cb += 0.564 * (b - luma[i]) / 64;
        cr += 0.713 * (r - luma[i]) / 64;
    }
    for (size_t i = 0; i < 64; i++)
        spread += (luma[i] - y) * (luma[i] - y) / 64;
    out[0] = y;
    out[1] = cb;
    out[2] = cr;
    out[3] = sqrt(spread);
}

/* Values lie within +-1: one rounding to `real` is at most half an epsilon; the double sums of 64
 * terms add less than 1e-14. */
static void test_blocks(void **state) {
    (void)state;
    enum { SIZE = 24, FRAMES = 2 };
    uint8_t pixels[FRAMES * SIZE * SIZE * 3];
    real out[FRAMES * 3 * 3 * 4];
    fv_clip_draw(7, FV_TRAIN, 0, FRAMES, SIZE, pixels, NULL, NULL, 0);
    for (size_t i = 0; i < 8 * SIZE * 3; i++) /* extremes: flat white, then black beside white */
        pixels[i] = i < 4 * SIZE * 3 || i % 2 ? 255 : 0;
    fv_blocks(FRAMES, SIZE, pixels, out);
    for (size_t i = 0; i < FRAMES * 9; i++) {
        double want[4];
        naive_block(pixels + i / 9 * SIZE * SIZE * 3, SIZE, i % 9 / 3, i % 3, want);
        for (size_t c = 0; c < 4; c++)
            if (!(fabs((double)out[i * 4 + c] - want[c]) <= FV_EPSILON + 1e-14))
                fail_msg("block %zu channel %zu: %.9g, not %.9g", i, c, (double)out[i * 4 + c],
                         want[c]);
    }
}

/* --- the built-in data set -------------------------------------------------------------------- */

/* Over the training split the targets have mean 0 and deviation 1 (to float rounding of values up
 * to 10, 1e-6, far below the tolerance), and pixels are those that fv_clip_draw draws. */
static void test_procedural(void **state) {
    (void)state;
    FvConfig c = config_for("procedural");
    FvData *data = open_data(&c);
    const FvDataInfo *info = fv_data_info(data);
    assert_int_equal(info->count[FV_TRAIN], 12);
    assert_int_equal(info->count[FV_HELD_OUT], 4);
    assert_int_equal(info->max_tokens, 0);
    assert_string_equal(info->latents, "blocks");
    assert_int_equal(strlen(info->sha256), 64);
    assert_int_equal(info->bytes, fv_data_bytes(&c));
    assert_true(info->bytes >= 16 * CLIP);
    FvBatch batch;
    assert_int_equal(fv_batch_create(2, info, 1, &batch, NULL), FV_OK);
    uint8_t *pixels = malloc(CLIP);
    assert_non_null(pixels);
    double sum[4] = {0}, squares[4] = {0}, n = 12 * BLOCKS / 4;
    for (uint32_t i = 0; i < 12; i++) {
        assert_int_equal(fv_data_read(data, FV_TRAIN, i, &batch, 1, NULL), FV_OK);
        fv_clip_draw(0, FV_TRAIN, i, T, S, pixels, NULL, NULL, 0);
        assert_memory_equal(batch.pixels + CLIP, pixels, CLIP);
        assert_int_equal(batch.clip[1], i);
        assert_int_equal(batch.token_count[1], 0);
        for (size_t k = 0; k < BLOCKS; k++) {
            double v = batch.latents[BLOCKS + k];
            sum[k % 4] += v;
            squares[k % 4] += v * v;
        }
    }
    for (int k = 0; k < 4; k++) {
        assert_true(fabs(sum[k] / n) <= 1e-5);
        assert_true(fabs(squares[k] / n - 1) <= 1e-5);
    }
    assert_int_equal(fv_data_read(data, FV_HELD_OUT, 3, &batch, 0, NULL), FV_OK);
    fv_clip_draw(0, FV_HELD_OUT, 3, T, S, pixels, NULL, NULL, 0);
    assert_memory_equal(batch.pixels, pixels, CLIP);
    assert_int_equal(fv_data_read(data, FV_HELD_OUT, 4, &batch, 0, NULL), FV_DATA);
    free(pixels);
    fv_batch_free(&batch);
    fv_data_close(data);
}

/* Copying the previous frame beats predicting the mean, and is far from perfect: there is something
 * to learn. */
static void test_copying(void **state) {
    (void)state;
    FvConfig c = config_for("procedural");
    c.clips_train = 60;
    FvData *data = open_data(&c);
    FvBatch batch;
    assert_int_equal(fv_batch_create(1, fv_data_info(data), 1, &batch, NULL), FV_OK);
    double loss = 0, n = 0;
    for (uint32_t i = 0; i < 60; i++) {
        assert_int_equal(fv_data_read(data, FV_TRAIN, i, &batch, 0, NULL), FV_OK);
        for (size_t k = BLOCKS / T; k < BLOCKS; k++) {
            double d = (double)batch.latents[k] - (double)batch.latents[k - BLOCKS / T];
            loss += d * d;
            n++;
        }
    }
    if (!(loss / n > 0.1 && loss / n < 0.8))
        fail_msg("copying the previous frame loses %f", loss / n);
    fv_batch_free(&batch);
    fv_data_close(data);
}

static void test_caption_tokens(void **state) {
    (void)state;
    FvConfig c = config_for("procedural");
    set_text(c.text, "captions");
    FvData *data = open_data(&c);
    const FvDataInfo *info = fv_data_info(data);
    assert_int_equal(info->max_tokens, FV_CAPTION_TOKENS);
    FvBatch batch;
    assert_int_equal(fv_batch_create(1, info, 5, &batch, NULL), FV_DATA); /* too short a row */
    assert_int_equal(fv_batch_create(1, info, info->max_tokens, &batch, NULL), FV_OK);
    uint8_t *pixels = malloc(CLIP);
    assert_non_null(pixels);
    for (uint32_t i = 0; i < 4; i++) {
        char caption[64];
        fv_clip_draw(0, FV_HELD_OUT, i, T, S, pixels, NULL, caption, sizeof caption);
        assert_int_equal(fv_data_read(data, FV_HELD_OUT, i, &batch, 0, NULL), FV_OK);
        assert_int_equal(batch.token_count[0], strlen(caption));
        for (size_t k = 0; k < info->max_tokens; k++)
            assert_int_equal(batch.tokens[k], k < strlen(caption) ? caption[k] : 0);
    }
    free(pixels);
    fv_batch_free(&batch);
    fv_data_close(data);
    c.lm_vocab = 100;
    FvError err;
    assert_int_equal(fv_data_open(&c, &data, &err), FV_DATA);
    assert_non_null(strstr(err.text, "lm_vocab"));
}

/* --- order and loader ------------------------------------------------------------------------- */

static void test_order(void **state) {
    (void)state;
    enum { COUNT = 11, BATCH = 4, STEPS = 2 }; /* per epoch: 11 / 4 */
    FvOrder o, again;
    assert_int_equal(fv_order_create(5, COUNT, BATCH, &o, NULL), FV_OK);
    assert_int_equal(fv_order_create(5, COUNT, BATCH, &again, NULL), FV_OK);
    uint32_t all[20][STEPS * BATCH], step[BATCH];
    int differ = 0, left_out[COUNT] = {0};
    for (uint64_t e = 0; e < 20; e++) {
        int seen[COUNT] = {0};
        for (uint64_t s = 0; s < STEPS; s++)
            fv_order_step(&o, e * STEPS + s, all[e] + s * BATCH);
        for (size_t i = 0; i < STEPS * BATCH; i++) {
            assert_in_range(all[e][i], 0, COUNT - 1);
            assert_int_equal(seen[all[e][i]]++, 0); /* without replacement */
        }
        for (size_t i = 0; i < COUNT; i++)
            left_out[i] += !seen[i];
        differ += e > 0 && memcmp(all[e], all[e - 1], sizeof all[e]) != 0;
    }
    assert_true(differ >= 18);
    for (size_t i = 0; i < COUNT; i++) /* the dropped rest changes: 3 of 11 in 20 epochs */
        assert_in_range(left_out[i], 0, 14);
    /* a function of the step alone, also after jumps */
    for (uint64_t s = 40; s-- > 0;) {
        fv_order_step(&again, s * 7 % 40, step);
        assert_memory_equal(step, all[s * 7 % 40 / STEPS] + s * 7 % 40 % STEPS * BATCH,
                            sizeof step);
    }
    fv_order_free(&o);
    fv_order_free(&again);
    assert_int_equal(fv_order_create(6, COUNT, BATCH, &o, NULL), FV_OK);
    fv_order_step(&o, 0, step);
    assert_memory_not_equal(step, all[0], sizeof step); /* another seed, another order */
    fv_order_free(&o);
    FvError err;
    assert_int_equal(fv_order_create(0, 3, 4, &o, &err), FV_DATA);
}

/* Two shards together are the whole step, in order, with the right contents, from any step on. */
static void test_loader(void **state) {
    (void)state;
    enum { BATCH = 4, FIRST = 5 };
    FvConfig c = config_for("procedural");
    FvData *data = open_data(&c);
    FvLoader *shard[2];
    for (size_t i = 0; i < 2; i++)
        assert_int_equal(fv_loader_start(data, 9, BATCH, i, 2, 1, FIRST, &shard[i], NULL), FV_OK);
    FvOrder o;
    FvBatch want;
    assert_int_equal(fv_order_create(9, 12, BATCH, &o, NULL), FV_OK);
    assert_int_equal(fv_batch_create(1, fv_data_info(data), 1, &want, NULL), FV_OK);
    for (uint64_t step = FIRST; step < FIRST + 14; step++) {
        uint32_t clips[BATCH];
        fv_order_step(&o, step, clips);
        for (size_t i = 0; i < 2; i++) {
            const FvBatch *got;
            assert_int_equal(fv_loader_next(shard[i], &got, NULL), FV_OK);
            assert_int_equal(got->clips, 2);
            assert_memory_equal(got->clip, clips + 2 * i, 2 * sizeof *clips);
            for (size_t k = 0; k < 2; k++) {
                assert_int_equal(fv_data_read(data, FV_TRAIN, got->clip[k], &want, 0, NULL), FV_OK);
                assert_memory_equal(got->pixels + k * CLIP, want.pixels, CLIP);
                assert_memory_equal(got->latents + k * BLOCKS, want.latents, BLOCKS * sizeof(real));
            }
        }
    }
    fv_loader_stop(shard[0]);
    fv_loader_stop(shard[1]);
    for (int i = 0; i < 20; i++) { /* at any moment, also before the first batch */
        assert_int_equal(fv_loader_start(data, 9, BATCH, 0, 1, 1, 0, &shard[0], NULL), FV_OK);
        const FvBatch *got;
        for (int k = 0; k < i % 7; k++)
            assert_int_equal(fv_loader_next(shard[0], &got, NULL), FV_OK);
        fv_loader_stop(shard[0]);
    }
    FvError err;
    assert_int_equal(fv_loader_start(data, 9, 4, 0, 3, 1, 0, &shard[0], &err), FV_USAGE);
    assert_int_equal(fv_loader_start(data, 9, 16, 0, 1, 1, 0, &shard[0], &err), FV_DATA);
    fv_loader_stop(NULL);
    fv_batch_free(&want);
    fv_order_free(&o);
    fv_data_close(data);
}

/* --- files ------------------------------------------------------------------------------------ */

static FvStatus prepare(FvError *err, const char *output, const char *size) {
    char path[320], side[16];
    snprintf(path, sizeof path, "%s", output);
    snprintf(side, sizeof side, "%s", size);
    char *argv[] = {(char[]){"prepare"},
                    (char[]){"procedural"},
                    (char[]){"-o"},
                    path,
                    (char[]){"--size"},
                    side,
                    (char[]){"--clips-train=12"},
                    (char[]){"--clips-held-out=4"},
                    NULL};
    return fv_prepare(8, argv, err);
}

/* The built-in clips, written to a file and read from it, are the same study. */
static void test_round_trip(void **state) {
    (void)state;
    FvError err = {0};
    const char *path = path_of("clips.h5");
    if (prepare(&err, path, "64") != FV_OK)
        fail_msg("%s", err.text);
    FvConfig built_in = config_for("procedural"), file = config_for(path);
    set_text(built_in.text, "captions");
    set_text(file.text, "captions");
    FvData *a = open_data(&built_in), *b = open_data(&file);
    const FvDataInfo *info = fv_data_info(b);
    assert_string_equal(info->source, path);
    assert_int_equal(info->max_tokens, FV_CAPTION_TOKENS);
    assert_int_equal(fv_data_bytes(&file), info->bytes);
    assert_int_equal(fv_data_max_tokens(&file), FV_CAPTION_TOKENS);
    char sum[FV_SHA256_TEXT];
    assert_int_equal(fv_sha256_file(path, sum, NULL), FV_OK);
    assert_string_equal(info->sha256, sum);
    FvBatch x, y;
    assert_int_equal(fv_batch_create(1, info, FV_CAPTION_TOKENS, &x, NULL), FV_OK);
    assert_int_equal(fv_batch_create(1, info, FV_CAPTION_TOKENS, &y, NULL), FV_OK);
    for (int split = FV_TRAIN; split <= FV_HELD_OUT; split++) {
        assert_int_equal(info->count[split], fv_data_info(a)->count[split]);
        for (uint32_t i = 0; i < info->count[split]; i++) {
            assert_int_equal(fv_data_read(a, (FvSplit)split, i, &x, 0, NULL), FV_OK);
            assert_int_equal(fv_data_read(b, (FvSplit)split, i, &y, 0, NULL), FV_OK);
            assert_memory_equal(x.pixels, y.pixels, CLIP);
            assert_memory_equal(x.latents, y.latents, BLOCKS * sizeof(real));
            assert_memory_equal(x.tokens, y.tokens, FV_CAPTION_TOKENS * sizeof *x.tokens);
            assert_int_equal(x.token_count[0], y.token_count[0]);
        }
    }
    fv_batch_free(&x);
    fv_batch_free(&y);
    fv_data_close(a);
    fv_data_close(b);
}

typedef struct Recipe { /* of a small file for the tests */
    hsize_t clips, frames, size, channels;
    hid_t pixel_type;
    int split_at, split_value; /* clips below split_at are training, the rest has split_value */
    const char *without;       /* a dataset that is left out */
    hsize_t latents, tokens;   /* clips in /latents, /token_count; 0: none */
    int token, count;          /* value of every token, and of every count */
    bool half;                 /* /latents as 16-bit floats */
} Recipe;

static const Recipe GOOD = {.clips = 4,
                            .frames = T,
                            .size = 16,
                            .channels = 3,
                            .split_at = 3,
                            .split_value = 1,
                            .without = ""};

static hid_t half_type(void) {
    hid_t type = H5Tcopy(H5T_IEEE_F32LE);
    H5Tset_fields(type, 15, 10, 5, 0, 10);
    H5Tset_size(type, 2);
    H5Tset_ebias(type, 15);
    return type;
}

/* chunked datasets take no room until they are written: absent values are 0 */
static void put(hid_t file, const Recipe *r, const char *name, int rank, const hsize_t *shape,
                hid_t stored, hid_t native, const void *data) {
    if (!strcmp(r->without, name))
        return;
    hsize_t chunk[5] = {1};
    for (int i = 1; i < rank; i++)
        chunk[i] = shape[i];
    hid_t space = H5Screate_simple(rank, shape, NULL), list = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(list, rank, chunk);
    H5Pset_deflate(list, 1);
    hid_t dataset = H5Dcreate2(file, name, stored, space, H5P_DEFAULT, list, H5P_DEFAULT);
    assert_true(dataset >= 0);
    if (data)
        assert_true(H5Dwrite(dataset, native, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0);
    H5Pclose(list);
    H5Dclose(dataset);
    H5Sclose(space);
}

static void write_file(const char *path, const Recipe *r) {
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    assert_true(file >= 0);
    hid_t pixel = r->pixel_type ? r->pixel_type : H5T_STD_U8LE;
    hsize_t side = r->size / 8;
    put(file, r, "/frames", 5, (hsize_t[]){r->clips, r->frames, r->size, r->size, r->channels},
        pixel, 0, NULL);
    int *values = calloc(r->clips * 4, sizeof *values);
    assert_non_null(values);
    for (hsize_t i = 0; i < r->clips; i++)
        values[i] = (int)i < r->split_at ? 0 : r->split_value;
    put(file, r, "/split", 1, &r->clips, H5T_STD_I32LE, H5T_NATIVE_INT, values);
    if (r->latents) {
        size_t n = r->latents * r->frames * 4 * side * side;
        float *latents = calloc(n, sizeof *latents);
        assert_non_null(latents);
        for (size_t i = 0; i < n; i++)
            latents[i] = (float)(i % 1024);
        hid_t half = half_type();
        put(file, r, "/latents", 5, (hsize_t[]){r->latents, r->frames, 4, side, side},
            r->half ? half : H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, r->clips > 100 ? NULL : latents);
        H5Tclose(half);
        free(latents);
    }
    if (r->tokens) {
        for (hsize_t i = 0; i < r->clips * 3; i++)
            values[i] = r->token;
        put(file, r, "/tokens", 2, (hsize_t[]){r->clips, 3}, H5T_STD_I32LE, H5T_NATIVE_INT, values);
        for (hsize_t i = 0; i < r->tokens; i++)
            values[i] = r->count;
        put(file, r, "/token_count", 1, &r->tokens, H5T_STD_I32LE, H5T_NATIVE_INT, values);
    }
    free(values);
    assert_true(H5Fclose(file) >= 0);
}

static FvConfig small_config(const char *path) {
    FvConfig c = config_for(path);
    c.image_size = 16;
    return c;
}

/* Opening must fail with one line that holds every one of the words. */
static void expect_refusal(const FvConfig *c, const char *const words[]) {
    FvData *data = NULL;
    FvError err = {0};
    FvStatus status = fv_data_open(c, &data, &err);
    if (status != FV_DATA || data)
        fail_msg("status %d, expected FV_DATA about %s", status, words[0]);
    for (; *words; words++)
        if (!strstr(err.text, *words))
            fail_msg("\"%s\" lacks \"%s\"", err.text, *words);
    assert_null(strchr(err.text, '\n'));
    assert_non_null(strstr(err.text, c->data));
}

#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})

static void refuse(Recipe recipe, const char *latents, const char *text,
                   const char *const words[]) {
    const char *path = path_of("bad.h5");
    write_file(path, &recipe);
    FvConfig c = small_config(path);
    set_text(c.latents, latents);
    set_text(c.text, text);
    expect_refusal(&c, words);
}

static void test_bad_shapes(void **state) {
    (void)state;
    Recipe r = GOOD;
    r.frames = 16, r.size = 24;
    refuse(r, "auto", "none",
           WORDS("/frames is [4, 16, 24, 24, 3]", "needs [clips, 8, 16, 16, 3]",
                 "frames=16 image_size=24"));
    r = GOOD, r.channels = 1;
    refuse(r, "auto", "none", WORDS("/frames is [4, 8, 16, 16, 1]", "prepare the file again"));
    r = GOOD, r.pixel_type = H5T_IEEE_F32LE;
    refuse(r, "auto", "none", WORDS("/frames", "another type", "8-bit"));
    r = GOOD, r.pixel_type = H5T_STD_I8LE;
    refuse(r, "auto", "none", WORDS("/frames", "another type", "unsigned"));
    r = GOOD, r.without = "/frames";
    refuse(r, "auto", "none", WORDS("no dataset /frames"));
    r = GOOD, r.without = "/split";
    refuse(r, "auto", "none", WORDS("no dataset /split"));
    r = GOOD, r.split_value = 7;
    refuse(r, "auto", "none", WORDS("/split[3] is 7", "0 (training)", "1 (held-out)"));
    r = GOOD, r.split_value = 0;
    refuse(r, "auto", "none", WORDS("no held-out clips"));
    r = GOOD, r.split_at = 0;
    refuse(r, "auto", "none", WORDS("no training clips"));
    r = GOOD, r.split_at = 1;
    refuse(r, "auto", "none", WORDS("batch=2", "there are 1"));
    r = GOOD;
    refuse(r, "file", "none", WORDS("no dataset /latents", "latents=blocks"));
    r = GOOD, r.latents = 3;
    refuse(r, "auto", "none", WORDS("/latents is [3, 8, 4, 2, 2]", "[4, 8, 4, 2, 2]"));
    r = GOOD;
    refuse(r, "auto", "captions", WORDS("no dataset /tokens", "text=none"));
    r = GOOD, r.tokens = 3;
    refuse(r, "auto", "captions", WORDS("/token_count is [3]", "[4]"));
    r = GOOD, r.tokens = 4, r.token = 256, r.count = 1;
    refuse(r, "auto", "captions", WORDS("/tokens[0, 0] is 256", "256 tokens", "lm_vocab"));
    r = GOOD, r.tokens = 4, r.token = -1, r.count = 1;
    refuse(r, "auto", "captions", WORDS("/tokens[0, 0] is -1"));
    r = GOOD, r.tokens = 4, r.count = 4;
    refuse(r, "auto", "captions", WORDS("/token_count[0] is 4", "room for 3"));
    /* the same file without the fault is taken */
    r = GOOD, r.tokens = 4, r.token = 255, r.count = 3;
    const char *path = path_of("good.h5");
    write_file(path, &r);
    FvConfig c = small_config(path);
    set_text(c.text, "captions");
    fv_data_close(open_data(&c));
}

static void test_bad_files(void **state) {
    (void)state;
    const char *path = path_of("absent.h5");
    FvConfig c = small_config(path);
    expect_refusal(&c, WORDS("No such file"));
    assert_int_equal(fv_data_bytes(&c), 0);
    path = path_of("text.h5");
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs("these are no clips\n", f) >= 0);
    assert_int_equal(fclose(f), 0);
    c = small_config(path);
    expect_refusal(&c, WORDS("not an HDF5 file"));
    path = path_of("short.h5");
    write_file(path, &GOOD);
    assert_int_equal(truncate(path, 2000), 0);
    c = small_config(path);
    expect_refusal(&c, WORDS("damaged or cut short"));
    c = small_config(folder);
    expect_refusal(&c, WORDS("not an HDF5 file"));
    c = small_config("procedural");
    set_text(c.latents, "file");
    expect_refusal(&c, WORDS("latents=file"));
}

/* [T, 4, h, w] in the file becomes [T, h, w, 4]; 16-bit floats hold the test's integers exactly. */
static void test_file_latents(void **state) {
    (void)state;
    for (int half = 0; half < 2; half++) {
        Recipe r = GOOD;
        r.latents = r.clips;
        r.half = half;
        const char *path = path_of("latents.h5");
        write_file(path, &r);
        FvConfig c = small_config(path);
        FvData *data = open_data(&c);
        assert_string_equal(fv_data_info(data)->latents, "file");
        FvBatch b;
        assert_int_equal(fv_batch_create(1, fv_data_info(data), 1, &b, NULL), FV_OK);
        assert_int_equal(fv_data_read(data, FV_TRAIN, 2, &b, 0, NULL), FV_OK);
        for (size_t t = 0; t < T; t++)
            for (size_t k = 0; k < 4; k++)
                for (size_t i = 0; i < 4; i++)
                    assert_true((double)b.latents[(t * 4 + i) * 4 + k] ==
                                (double)((((2 * T + t) * 4 + k) * 4 + i) % 1024));
        fv_batch_free(&b);
        fv_data_close(data);
        set_text(c.latents, "blocks"); /* black frames: constant channels stay finite */
        data = open_data(&c);
        assert_int_equal(fv_batch_create(1, fv_data_info(data), 1, &b, NULL), FV_OK);
        assert_int_equal(fv_data_read(data, FV_TRAIN, 0, &b, 0, NULL), FV_OK);
        for (size_t i = 0; i < T * 16; i++)
            assert_true(b.latents[i] == 0);
        fv_batch_free(&b);
        fv_data_close(data);
    }
}

/* Overwrites the packed bytes of one clip. */
static void damage_clip(const char *path, hsize_t clip, const Recipe *r) {
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT), frames = H5Dopen2(file, "/frames", 0);
    hsize_t start[5] = {clip}, one[5] = {1, r->frames, r->size, r->size, 3};
    uint8_t *pixels = calloc(r->frames * r->size * r->size, 3);
    assert_true(frames >= 0 && pixels);
    hid_t space = H5Dget_space(frames), memory = H5Screate_simple(5, one, NULL);
    H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, one, NULL);
    assert_true(H5Dwrite(frames, H5T_NATIVE_UINT8, memory, space, H5P_DEFAULT, pixels) >= 0);
    assert_true(H5Fflush(file, H5F_SCOPE_LOCAL) >= 0);
    haddr_t address;
    hsize_t size;
    unsigned mask;
    assert_true(H5Dget_chunk_info_by_coord(frames, start, &mask, &address, &size) >= 0);
    H5Sclose(space);
    H5Sclose(memory);
    H5Dclose(frames);
    H5Fclose(file);
    int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    memset(pixels, 0xff, size);
    assert_int_equal(pwrite(fd, pixels, size, (off_t)address), size);
    close(fd);
    free(pixels);
}

/* More than fits in memory is read clip by clip; one damaged clip is an error that names it, from
 * the call and through the loader, which can be stopped before and after. */
static void test_large_file(void **state) {
    (void)state;
    Recipe r = {.clips = 11000,
                .frames = T,
                .size = S,
                .channels = 3,
                .split_at = 10999,
                .split_value = 1,
                .without = "",
                .latents = 11000};
    const char *path = path_of("large.h5");
    write_file(path, &r);
    damage_clip(path, 7, &r);
    FvConfig c = config_for(path);
    FvData *data = open_data(&c);
    const FvDataInfo *info = fv_data_info(data);
    assert_true(info->bytes < 1000000);
    FvBatch b;
    FvError err;
    assert_int_equal(fv_batch_create(1, info, 1, &b, NULL), FV_OK);
    assert_int_equal(fv_data_read(data, FV_TRAIN, 8, &b, 0, &err), FV_OK);
    assert_int_equal(fv_data_read(data, FV_TRAIN, 7, &b, 0, &err), FV_DATA);
    assert_non_null(strstr(err.text, "clip 7"));
    FvOrder o;
    assert_int_equal(fv_order_create(1, info->count[FV_TRAIN], 1, &o, NULL), FV_OK);
    uint32_t clip = 0;
    uint64_t step = 0;
    for (; fv_order_step(&o, step, &clip), clip != 7; step++)
        ;
    fv_order_free(&o);
    assert_true(step >= 2);
    FvLoader *loader;
    const FvBatch *got;
    assert_int_equal(fv_loader_start(data, 1, 1, 0, 1, 1, step - 2, &loader, NULL), FV_OK);
    assert_int_equal(fv_loader_next(loader, &got, &err), FV_OK);
    assert_int_equal(fv_loader_next(loader, &got, &err), FV_OK);
    for (int i = 0; i < 2; i++) { /* the failure stays */
        assert_int_equal(fv_loader_next(loader, &got, &err), FV_DATA);
        assert_non_null(strstr(err.text, "clip 7"));
    }
    fv_loader_stop(loader);
    fv_batch_free(&b);
    fv_data_close(data);
}

/* What cannot be is refused, and leaves nothing behind. */
static void test_prepare_refuses(void **state) {
    (void)state;
    FvError err;
    assert_int_equal(prepare(&err, path_of("none.h5"), "63"), FV_USAGE);
    assert_non_null(strstr(err.text, "--size=63"));
    assert_int_equal(prepare(&err, path_of("none.h5"), "many"), FV_USAGE);
    assert_int_equal(prepare(&err, path_of("no/such/folder.h5"), "64"), FV_IO);
    assert_int_equal(prepare(&err, folder, "64"), FV_IO);
    assert_int_equal(access(path_of("none.h5"), F_OK), -1);
}

static int make_folder(void **state) {
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/fovea-data-XXXXXX", base && *base ? base : "/tmp");
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    (void)state;
    static const char *const names[] = {"clips.h5", "bad.h5",     "good.h5", "text.h5",
                                        "short.h5", "latents.h5", "large.h5"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (unlink(path_of(names[i])) != 0)
            return -1;
    return rmdir(folder); /* fails when a temporary file was left */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sha256),
        cmocka_unit_test(test_clips_are_fixed),
        cmocka_unit_test(test_clips_differ),
        cmocka_unit_test(test_clips_prefix),
        cmocka_unit_test(test_masks),
        cmocka_unit_test(test_objects),
        cmocka_unit_test(test_masks_find_colours),
        cmocka_unit_test(test_beacon_announces),
        cmocka_unit_test(test_captions),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_procedural),
        cmocka_unit_test(test_copying),
        cmocka_unit_test(test_caption_tokens),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_loader),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_bad_shapes),
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_file_latents),
        cmocka_unit_test(test_large_file),
        cmocka_unit_test(test_prepare_refuses),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
