/* What must hold of the two passes and their gradients whatever the weights: independence of
 * padding, batch, threads and future frames; controls, measures and maps. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "model/parts.h"
#include "model_fixture.h"

static FvModelConfig caption_config(void) {
    FvModelConfig c = fixture_config();
    c.captions = true;
    c.clips = 3;
    c.max_text = 3;
    return c;
}

/* Every term of the loss is in it. */
static FvModelConfig full_config(void) {
    FvModelConfig c = fixture_config();
    c.contrastive = 0.3;
    c.entropy_margin = 0.9;
    c.lambda_coarse = 0.7;
    return c;
}

/* --- padding, shards, threads --------------------------------------------------------------- */

static const int32_t text_lengths[] = {3, 0, 2};

/* Copies clip `from` of a batch to clip `to` of another with as many frames, its text cut or padded
 * to the other's rows with ids that must not be read. */
static void copy_clip(const FvModelConfig *c, const FvBatch *src, size_t from, FvBatch *dst,
                      size_t to, int32_t count) {
    size_t pixels = c->frames * c->size * c->size * 3, latents = c->frames * fv_latent_count(c);
    memcpy(dst->pixels + to * pixels, src->pixels + from * pixels, pixels);
    memcpy(dst->latents + to * latents, src->latents + from * latents, latents * sizeof(real));
    dst->token_count[to] = count;
    for (size_t i = 0; i < dst->max_text; i++)
        dst->tokens[to * dst->max_text + i] =
            i < (size_t)count ? src->tokens[from * src->max_text + i] : INT32_MAX;
}

static void same_frames(const Fixture *a, size_t clip_a, const Fixture *b, size_t clip_b) {
    size_t frames = a->c.frames;
    for (size_t t = 0; t < frames; t++) {
        size_t i = clip_a * frames + t, j = clip_b * frames + t;
        for (int p = 0; p < FV_PASSES; p++) {
            CLOSE(a->measures.loss[p][i], b->measures.loss[p][j], 0, "loss of frame", t);
            CLOSE(a->measures.entropy[p][i], b->measures.entropy[p][j], 1, "entropy", t);
        }
        CLOSE(a->measures.cosine[i], b->measures.cosine[j], 1, "cosine", t);
    }
}

static void same_gradients(const Fixture *a, const Fixture *b) {
    const FvParams *table = fv_model_params(a->model);
    double most = 0;
    for (int round = 0; round < 2; round++) /* first the scale of all gradients, then compare */
        for (size_t i = 0; i < table->count; i++) {
            const FvParam *p = &table->list[i];
            if (p->role != FV_TRAINED)
                continue;
            real *ga = fixture_get(a, p, FV_BLOCK_G);
            real *gb = fixture_get(b, fixture_param(b, p->name), FV_BLOCK_G);
            double own = fixture_largest(gb, p->count);
            most = fmax(most, own);
            for (size_t j = 0; round && j < p->count; j++)
                CLOSE(ga[j], gb[j], own + 1e-3 * most, p->name, j);
            free(ga);
            free(gb);
        }
}

static void test_padding_is_invisible(void **state) {
    (void)state;
    FvModelConfig c = caption_config();
    c.entropy_margin = 0.5;
    Fixture all = fixture_create(&c, 1, 5, 0);
    memcpy(all.batch.token_count, text_lengths, sizeof text_lengths);
    fixture_forward_and_back(&all);
    for (size_t b = 0; b < c.clips; b++) {
        FvModelConfig one = c;
        one.clips = 1;
        one.max_text = text_lengths[b] ? (size_t)text_lengths[b] : 1;
        Fixture alone = fixture_create(&one, 1, 5, 0);
        copy_clip(&c, &all.batch, b, &alone.batch, 0, text_lengths[b]);
        fixture_forward(&alone);
        same_frames(&alone, 0, &all, b);
        fixture_destroy(&alone);
    }
    FvModelConfig wide = c;
    wide.max_text = 8;
    Fixture padded = fixture_create(&wide, 1, 5, 0);
    for (size_t b = 0; b < c.clips; b++)
        copy_clip(&c, &all.batch, b, &padded.batch, b, text_lengths[b]);
    fixture_forward_and_back(&padded);
    for (size_t b = 0; b < c.clips; b++)
        same_frames(&padded, b, &all, b);
    same_gradients(&padded, &all);
    fixture_destroy(&padded);
    fixture_destroy(&all);
}

/* The text must matter, or the test above shows nothing. */
static void test_captions_are_read(void **state) {
    (void)state;
    FvModelConfig c = caption_config();
    Fixture f = fixture_create(&c, 1, 5, 0);
    fixture_forward(&f);
    double before = f.measures.loss[FV_COARSE][0];
    f.batch.tokens[c.max_text - 1] = (f.batch.tokens[c.max_text - 1] + 1) % (int32_t)c.lm_vocab;
    fixture_forward(&f);
    REQUIRE(fabs(f.measures.loss[FV_COARSE][0] - before) > 1e-6 * before, "the text is not read");
    fixture_destroy(&f);
}

static void test_tokens_in_use_alone_have_gradients(void **state) {
    (void)state;
    FvModelConfig c = caption_config();
    Fixture f = fixture_create(&c, 1, 5, 0);
    memcpy(f.batch.token_count, text_lengths, sizeof text_lengths);
    fixture_forward_and_back(&f);
    const FvParam *p = fixture_param(&f, "lm.model.embed_tokens.weight");
    real *g = fixture_get(&f, p, FV_BLOCK_G);
    for (size_t v = 0; v < c.lm_vocab; v++) {
        bool used = false;
        for (size_t b = 0; b < c.clips; b++)
            for (int32_t i = 0; i < text_lengths[b]; i++)
                used |= f.batch.tokens[b * c.max_text + (size_t)i] == (int32_t)v;
        REQUIRE((fixture_largest(g + v * c.lm_width, c.lm_width) > 0) == used, "token %zu", v);
    }
    free(g);
    fixture_destroy(&f);
}

static void test_shards_average_exactly(void **state) {
    (void)state;
    for (int deep = 0; deep < 2; deep++) {
        FvModelConfig c = full_config(), half = c;
        c.deep = half.deep = deep;
        half.clips = 1;
        Fixture all = fixture_create(&c, 1, 6, 0);
        Fixture shard[] = {fixture_create(&half, 1, 6, 0), fixture_create(&half, 1, 6, 1)};
        fixture_forward_and_back(&all);
        for (size_t s = 0; s < 2; s++) {
            fixture_forward_and_back(&shard[s]);
            same_frames(&shard[s], 0, &all, s);
        }
        CLOSE((fixture_loss(&shard[0]) + fixture_loss(&shard[1])) / 2, fixture_loss(&all), 0,
              "loss", 0);
        FvParams *mine = fv_model_params(shard[0].model), *other = fv_model_params(shard[1].model);
        for (size_t i = 0; i < mine->trained_memory; i++) /* as an all-reduce would */
            mine->g[i] = (mine->g[i] + other->g[i]) / 2;
        same_gradients(&shard[0], &all);
        fixture_destroy(&shard[0]);
        fixture_destroy(&shard[1]);
        fixture_destroy(&all);
    }
}

/* Large enough that every operation is cut into several tiles. */
static FvModelConfig threaded_config(void) {
    FvModelConfig c = full_config();
    c.frames = 4;
    c.size = 64;
    c.patch = 8;
    c.dino_width = 48;
    c.dino_heads = 4;
    c.dino_mlp = 192;
    c.lm_width = 48;
    c.lm_heads = 4;
    c.lm_mlp = 96;
    c.head_width = 16;
    c.film_width = 128;
    c.hard_attn_k = 8;
    return c;
}

static void test_threads_change_no_bit(void **state) {
    (void)state;
    FvModelConfig c = threaded_config();
    Fixture one = fixture_create(&c, 1, 7, 0);
    fixture_train(&one, 2);
    const FvParams *a = fv_model_params(one.model);
    for (size_t threads = 2; threads <= 3; threads++) {
        Fixture many = fixture_create(&c, threads, 7, 0);
        fixture_train(&many, 2);
        const FvParams *b = fv_model_params(many.model);
        assert_memory_equal(a->w, b->w, a->memory * sizeof(real));
        assert_memory_equal(a->g, b->g, a->trained_memory * sizeof(real));
        assert_memory_equal(one.measures.loss[FV_FINE], many.measures.loss[FV_FINE],
                            c.clips * c.frames * sizeof(double));
        fixture_destroy(&many);
    }
    fixture_destroy(&one);
}

/* --- what depends on what ------------------------------------------------------------------- */

static void losses_of(Fixture *f, double *out) {
    size_t frames = f->c.clips * f->c.frames;
    fixture_forward(f);
    memcpy(out, f->measures.loss[FV_COARSE], frames * sizeof *out);
    memcpy(out + frames, f->measures.loss[FV_FINE], frames * sizeof *out);
}

/* Pixels of frame t reach the losses of later frames of the same clip, and nothing else. */
static void test_frames_reach_later_losses_only(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    enum { FRAMES = 6 };
    double base[2 * FRAMES], now[2 * FRAMES];
    Fixture f = fixture_create(&c, 1, 8, 0);
    size_t pixels = c.size * c.size * 3;
    losses_of(&f, base);
    for (size_t frame = 0; frame < FRAMES; frame++) {
        uint8_t *changed = f.batch.pixels + frame * pixels;
        for (size_t i = 0; i < pixels; i++)
            changed[i] = (uint8_t)~changed[i];
        losses_of(&f, now);
        for (size_t i = 0; i < 2 * FRAMES; i++) {
            bool later = i % FRAMES / c.frames == frame / c.frames && i % FRAMES > frame;
            REQUIRE((now[i] != base[i]) == later, "pixels of frame %zu, loss %zu", frame, i);
        }
        for (size_t i = 0; i < pixels; i++)
            changed[i] = (uint8_t)~changed[i];
    }
    fixture_destroy(&f);
}

/* Latents of frame t are its own target and what the next frame is predicted from. */
static void test_latents_reach_two_losses(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    enum { FRAMES = 6 };
    double base[2 * FRAMES], now[2 * FRAMES];
    Fixture f = fixture_create(&c, 1, 8, 0);
    losses_of(&f, base);
    for (size_t frame = 0; frame < FRAMES; frame++) {
        real *changed = f.batch.latents + frame * fv_latent_count(&c), before = *changed;
        *changed = before + 1;
        losses_of(&f, now);
        *changed = before;
        for (size_t i = 0; i < 2 * FRAMES; i++) {
            size_t at = i % FRAMES;
            bool reached = at == frame || (at == frame + 1 && at % c.frames);
            REQUIRE((now[i] != base[i]) == reached, "latents of frame %zu, loss %zu", frame, i);
        }
    }
    fixture_destroy(&f);
}

/* 24 = 3 patches of 7 and 3 pixels that no patch holds. */
static void test_pixels_beyond_the_grid_are_not_read(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 8, 0);
    double base[12], now[12];
    losses_of(&f, base);
    size_t read = fv_grid(&c) * c.patch;
    for (size_t i = 0; i < c.clips * c.frames * c.size * c.size; i++)
        if (i % c.size >= read || i / c.size % c.size >= read)
            memset(f.batch.pixels + 3 * i, 77, 3);
    losses_of(&f, now);
    assert_memory_equal(base, now, sizeof base);
    fixture_destroy(&f);
}

static void test_without_vision(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    c.vision = false;
    Fixture f = fixture_create(&c, 1, 8, 0);
    double base[12], now[12];
    losses_of(&f, base);
    memset(f.batch.pixels, 0, c.clips * c.frames * c.size * c.size * 3);
    losses_of(&f, now);
    assert_memory_equal(base, now, sizeof base);
    for (size_t i = 0; i < c.clips * c.frames; i++) {
        REQUIRE(isfinite(now[i]), "loss %zu", i);
        REQUIRE(isnan(f.measures.cosine[i]) && isnan(f.measures.entropy[FV_COARSE][i]) &&
                    isnan(f.measures.entropy[FV_FINE][i]),
                "measures of vision must be NaN without it (frame %zu)", i);
    }
    fv_model_fine_other(f.model); /* the controls work, and have nothing to add */
    FvError err = {0};
    assert_int_equal(fv_model_measure(f.model, &f.measures, &err), FV_OK);
    assert_memory_equal(f.measures.loss_other, f.measures.loss[FV_FINE], sizeof now / 2);
    fixture_destroy(&f);
}

/* --- gradients ------------------------------------------------------------------------------ */

static void test_key_biases_have_no_gradient(void **state) {
    (void)state;
    for (size_t i = 0; i < 2 * FIXTURE_EXPERIMENTS; i++) {
        FvModelConfig c = fixture_config();
        fixture_experiment(&c, i / 2);
        c.deep = i % 2;
        if (c.freeze_dino)
            continue;
        Fixture f = fixture_create(&c, 1, 9, 0);
        fixture_forward_and_back(&f);
        for (size_t l = 0; l < c.dino_layers; l++) {
            char name[FV_PARAM_NAME];
            static const char format[] = "dino.encoder.layer.%zu.attention.attention.key.%s";
            snprintf(name, sizeof name, format, l, "bias");
            const FvParam *bias = fixture_param(&f, name);
            snprintf(name, sizeof name, format, l, "weight");
            const FvParam *weight = fixture_param(&f, name);
            real *gb = fixture_get(&f, bias, FV_BLOCK_G), *gw = fixture_get(&f, weight, FV_BLOCK_G);
            REQUIRE(fixture_largest(gb, bias->count) <=
                        FIXTURE_REORDERED * fixture_largest(gw, weight->count),
                    "%s: %g beside the weights' %g", name, fixture_largest(gb, bias->count),
                    fixture_largest(gw, weight->count));
            free(gb);
            free(gw);
        }
        fixture_destroy(&f);
    }
}

/* Freezing changes what is updated, not the gradients of the rest. */
static void test_freezing_leaves_other_gradients(void **state) {
    (void)state;
    for (int i = 0; i < 6; i++) {
        FvModelConfig c = full_config();
        c.deep = i % 2;
        Fixture free_model = fixture_create(&c, 1, 10, 0);
        c.freeze_dino = i / 2 != 1;
        c.freeze_lm = i / 2 != 0;
        Fixture frozen = fixture_create(&c, 1, 10, 0);
        fixture_forward_and_back(&free_model);
        fixture_forward_and_back(&frozen);
        same_gradients(&frozen, &free_model);
        fixture_destroy(&frozen);
        fixture_destroy(&free_model);
    }
}

/* --- controls, measures, maps --------------------------------------------------------------- */

static void run_controls(Fixture *f) {
    FvError err = {0};
    fv_model_fine_other(f->model);
    assert_int_equal(fv_model_measure(f->model, &f->measures, &err), FV_OK);
}

static void test_own_queries_from_an_equal_neighbour(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 12, 0);
    copy_clip(&c, &f.batch, 0, &f.batch, 1, 0);
    fixture_forward(&f);
    fv_model_keep_last(f.model);
    run_controls(&f);
    assert_memory_equal(f.measures.loss_other, f.measures.loss[FV_FINE],
                        c.clips * c.frames * sizeof(double));
    fixture_destroy(&f);
}

/* Frames 1 and 2 are predicted before any chosen query is used; from frame 3 on, it matters. */
static void test_other_queries_from_another_clip(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 12, 0);
    fixture_forward(&f);
    double fine[6], cosine[6];
    memcpy(fine, f.measures.loss[FV_FINE], sizeof fine);
    memcpy(cosine, f.measures.cosine, sizeof cosine);
    fv_model_keep_last(f.model);
    run_controls(&f);
    for (size_t i = 0; i < c.clips * c.frames; i++)
        REQUIRE((f.measures.loss_other[i] != fine[i]) == (i % c.frames >= 2), "frame %zu", i);
    assert_memory_equal(f.measures.loss[FV_FINE], fine, sizeof fine);
    assert_memory_equal(f.measures.cosine, cosine, sizeof cosine);
    fixture_destroy(&f);
}

/* The first clip of a batch uses the queries kept from the batch before. */
static void test_other_queries_across_batches(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture early = fixture_create(&c, 1, 12, 0), late = fixture_create(&c, 1, 12, 2);
    Fixture middle = fixture_create(&c, 1, 12, 1);
    fixture_forward(&early);
    fv_model_keep_last(early.model);
    FvBatch mine = early.batch;
    early.batch = late.batch;
    fixture_forward(&early); /* clips 2 and 3 in the model that has seen 0 and 1 */
    run_controls(&early);
    early.batch = mine;
    fixture_forward(&middle); /* clips 1 and 2 */
    run_controls(&middle);
    for (size_t t = 0; t < c.frames; t++)
        CLOSE(early.measures.loss_other[t], middle.measures.loss_other[c.frames + t], 0,
              "clip 2 with the queries of clip 1, frame", t);
    fixture_destroy(&early);
    fixture_destroy(&late);
    fixture_destroy(&middle);
}

static void test_copy_control(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 12, 0);
    fixture_forward(&f);
    run_controls(&f);
    size_t n = fv_latent_count(&c);
    for (size_t i = 0; i < c.clips * c.frames; i++) {
        const real *x = f.batch.latents + i * n;
        double sum = 0;
        for (size_t j = 0; j < n; j++) {
            double error = (i % c.frames ? (double)x[j] - (double)(x - n)[j] : (double)x[j]);
            sum += error * error;
        }
        CLOSE(f.measures.loss_copy[i], sum / (double)n, 0, "copy of frame", i);
    }
    fixture_destroy(&f);
}

static void test_attention_maps(void **state) {
    (void)state;
    enum { MOST = 6 * 10 };
    for (int i = 0; i < 4; i++) {
        FvModelConfig c = fixture_config();
        c.deep = i % 2;
        c.hard_attn_k = i / 2 ? 4 : 0;
        Fixture f = fixture_create(&c, 1, 13, 0);
        fixture_forward(&f);
        size_t frames = c.clips * c.frames, keys = fv_patches(&c) + 1;
        double map[FV_PASSES][MOST];
        for (int p = 0; p < FV_PASSES; p++) {
            fv_model_attention(f.model, (FvPass)p, map[p]);
            for (size_t t = 0; t < frames; t++) {
                const double *row = map[p] + t * keys;
                size_t kept = 0;
                for (size_t k = 0; k < keys; k++) {
                    REQUIRE(row[k] >= 0, "frame %zu, key %zu: %g", t, k, row[k]);
                    kept += row[k] > 0;
                }
                CLOSE(fixture_mean(row, keys) * (double)keys, 1, 0, "sum of the map", t);
                size_t most = !c.hard_attn_k ? keys : c.deep ? 4 * c.dino_heads : 4;
                REQUIRE(kept <= most && (c.deep || kept == most), "%zu keys kept", kept);
            }
        }
        REQUIRE(memcmp(map[0], map[1], frames * keys * sizeof(double)) != 0, "equal passes");
        fixture_destroy(&f);
    }
}

static void test_hard_attention_keeps_exactly_k(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    c.hard_attn_k = 4;
    Fixture f = fixture_create(&c, 1, 13, 0);
    fixture_forward(&f);
    size_t rows = c.clips * c.frames * c.dino_heads, keys = fv_patches(&c) + 1;
    real *probs = calloc(rows * keys, sizeof *probs);
    assert_non_null(probs);
    for (size_t l = 0; l < c.dino_layers; l++) {
        f.be->ops->download(f.be, probs, f.model->query.pass[FV_FINE].act[l].probs,
                            rows * keys * sizeof *probs);
        for (size_t r = 0; r < rows; r++) {
            size_t kept = 0;
            for (size_t k = 0; k < keys; k++)
                kept += probs[r * keys + k] > 0;
            assert_int_equal(kept, 4);
        }
    }
    free(probs);
    fixture_destroy(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_padding_is_invisible),
        cmocka_unit_test(test_captions_are_read),
        cmocka_unit_test(test_tokens_in_use_alone_have_gradients),
        cmocka_unit_test(test_shards_average_exactly),
        cmocka_unit_test(test_threads_change_no_bit),
        cmocka_unit_test(test_frames_reach_later_losses_only),
        cmocka_unit_test(test_latents_reach_two_losses),
        cmocka_unit_test(test_pixels_beyond_the_grid_are_not_read),
        cmocka_unit_test(test_without_vision),
        cmocka_unit_test(test_key_biases_have_no_gradient),
        cmocka_unit_test(test_freezing_leaves_other_gradients),
        cmocka_unit_test(test_own_queries_from_an_equal_neighbour),
        cmocka_unit_test(test_other_queries_from_another_clip),
        cmocka_unit_test(test_other_queries_across_batches),
        cmocka_unit_test(test_copy_control),
        cmocka_unit_test(test_attention_maps),
        cmocka_unit_test(test_hard_attention_keeps_exactly_k),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
