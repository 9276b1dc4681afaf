/* What must hold of the whole model whatever its weights: independence of padding, batch, threads
 * and future frames; controls, measures and maps; roles, start values, memory and the update. */
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

/* Two orders of the same sums, each of a few hundred terms, through a few dozen operations: 1e-13
 * in double. */
#define REORDERED (512 * FV_EPSILON)

static void close_to(double got, double want, double scale, const char *what, size_t at) {
    REQUIRE(fabs(got - want) <= REORDERED * fmax(fabs(want), scale), "%s %zu: %.17g, expected %.17g",
            what, at, got, want);
}

static double largest(const real *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs((double)x[i]));
    return most;
}

static bool starts_with(const char *text, const char *start) {
    return strncmp(text, start, strlen(start)) == 0;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

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

static void forward_and_back(Fixture *f) {
    fixture_forward(f);
    fv_model_backward(f->model);
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
            close_to(a->measures.loss[p][i], b->measures.loss[p][j], 0, "loss of frame", t);
            close_to(a->measures.entropy[p][i], b->measures.entropy[p][j], 1, "entropy", t);
        }
        close_to(a->measures.cosine[i], b->measures.cosine[j], 1, "cosine", t);
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
            double own = largest(gb, p->count);
            most = fmax(most, own);
            for (size_t j = 0; round && j < p->count; j++)
                close_to(ga[j], gb[j], own + 1e-3 * most, p->name, j);
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
    forward_and_back(&all);
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
    forward_and_back(&padded);
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
    forward_and_back(&f);
    const FvParam *p = fixture_param(&f, "lm.model.embed_tokens.weight");
    real *g = fixture_get(&f, p, FV_BLOCK_G);
    for (size_t v = 0; v < c.lm_vocab; v++) {
        bool used = false;
        for (size_t b = 0; b < c.clips; b++)
            for (int32_t i = 0; i < text_lengths[b]; i++)
                used |= f.batch.tokens[b * c.max_text + (size_t)i] == (int32_t)v;
        REQUIRE((largest(g + v * c.lm_width, c.lm_width) > 0) == used, "token %zu", v);
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
        forward_and_back(&all);
        for (size_t s = 0; s < 2; s++) {
            forward_and_back(&shard[s]);
            same_frames(&shard[s], 0, &all, s);
        }
        close_to((fixture_loss(&shard[0]) + fixture_loss(&shard[1])) / 2, fixture_loss(&all), 0,
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

static FvAdamW study_adamw(size_t step) {
    return (FvAdamW){.lr = 1e-2,
                     .beta1 = 0.9,
                     .beta2 = 0.999,
                     .eps = 1e-8,
                     .weight_decay = 0.5,
                     .clip_norm = 1,
                     .step = step};
}

static void train(Fixture *f, size_t steps) {
    for (size_t step = 1; step <= steps; step++) {
        FvAdamW adamw = study_adamw(step);
        forward_and_back(f);
        fv_model_norm(f->model);
        fv_model_update(f->model, &adamw);
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
    train(&one, 2);
    const FvParams *a = fv_model_params(one.model);
    for (size_t threads = 2; threads <= 3; threads++) {
        Fixture many = fixture_create(&c, threads, 7, 0);
        train(&many, 2);
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
        forward_and_back(&f);
        for (size_t l = 0; l < c.dino_layers; l++) {
            char name[FV_PARAM_NAME];
            static const char format[] = "dino.encoder.layer.%zu.attention.attention.key.%s";
            snprintf(name, sizeof name, format, l, "bias");
            const FvParam *bias = fixture_param(&f, name);
            snprintf(name, sizeof name, format, l, "weight");
            const FvParam *weight = fixture_param(&f, name);
            real *gb = fixture_get(&f, bias, FV_BLOCK_G), *gw = fixture_get(&f, weight, FV_BLOCK_G);
            REQUIRE(largest(gb, bias->count) <= REORDERED * largest(gw, weight->count),
                    "%s: %g beside the weights' %g", name, largest(gb, bias->count),
                    largest(gw, weight->count));
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
        forward_and_back(&free_model);
        forward_and_back(&frozen);
        same_gradients(&frozen, &free_model);
        fixture_destroy(&frozen);
        fixture_destroy(&free_model);
    }
}

/* The rule of SPEC 3 in words of its own. */
static FvRole expected_role(const FvModelConfig *c, const char *name) {
    bool encoder = starts_with(name, "dino."), lm = starts_with(name, "lm.");
    bool embedding = strcmp(name, "lm.model.embed_tokens.weight") == 0;
    if (strcmp(name, "dino.embeddings.mask_token") == 0)
        return FV_UNUSED;
    if (embedding ? !c->captions : strcmp(name, "no_text") == 0 && c->captions)
        return FV_UNUSED;
    if (!c->vision && (encoder || starts_with(name, "q_") || starts_with(name, "query_") ||
                       starts_with(name, "dino_to_lm") || starts_with(name, "lm_to_query")))
        return FV_UNUSED;
    if (c->frames == 1 && starts_with(name, "lm_to_query"))
        return FV_UNUSED;
    return (encoder && c->freeze_dino) || (lm && c->freeze_lm) ? FV_FROZEN : FV_TRAINED;
}

static void test_roles(void **state) {
    (void)state;
    for (unsigned bits = 0; bits < 64; bits++) {
        FvModelConfig c = fixture_config();
        c.deep = bits & 1;
        c.captions = bits & 2;
        c.vision = bits & 4;
        c.freeze_dino = bits & 8;
        c.freeze_lm = bits & 16;
        c.frames = bits & 32 ? 1 : 3;
        Fixture f = fixture_create(&c, 1, 1, 0);
        const FvParams *table = fv_model_params(f.model);
        size_t total = 0, trained = 0;
        for (size_t i = 0; i < table->count; i++) {
            const FvParam *p = &table->list[i];
            REQUIRE(p->role == expected_role(&c, p->name), "%s has role %d (switches %#x)", p->name,
                    (int)p->role, bits);
            REQUIRE((p->weight->g != NULL) == (p->role == FV_TRAINED), "%s: gradient", p->name);
            total += p->count;
            trained += p->role == FV_TRAINED ? p->count : 0;
        }
        assert_int_equal(total, table->total);
        assert_int_equal(trained, table->trained);
        fixture_destroy(&f);
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
        close_to(early.measures.loss_other[t], middle.measures.loss_other[c.frames + t], 0,
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
        close_to(f.measures.loss_copy[i], sum / (double)n, 0, "copy of frame", i);
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
                close_to(fixture_mean(row, keys) * (double)keys, 1, 0, "sum of the map", t);
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

/* --- start values --------------------------------------------------------------------------- */

static void same_seed_same_weights(Fixture *a, Fixture *b) {
    const FvParams *table = fv_model_params(a->model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i], *q = fixture_param(b, p->name);
        real *x = fixture_get(a, p, FV_BLOCK_W), *y = fixture_get(b, q, FV_BLOCK_W);
        assert_int_equal(p->count, q->count);
        assert_memory_equal(x, y, p->count * sizeof(real));
        free(x);
        free(y);
    }
}

static void start(Fixture *f, uint64_t seed) {
    FvError err = {0};
    assert_int_equal(fv_params_init(fv_model_params(f->model), f->be, seed, &err), FV_OK);
}

static void test_start_is_a_function_of_seed_and_name(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture a = fixture_create(&c, 1, 1, 0);
    fixture_experiment(&c, FIXTURE_EXPERIMENTS - 1);
    c.captions = true;
    c.deep = false;
    c.clips = 1;
    Fixture g = fixture_create(&c, 2, 2, 0);
    start(&a, 42);
    start(&g, 42);
    same_seed_same_weights(&a, &g);
    const FvParam *fixed = fixture_param(&a, "q_static");
    real *first = fixture_get(&a, fixed, FV_BLOCK_W);
    real *other = fixture_get(&a, fixture_param(&a, "q_init"), FV_BLOCK_W);
    assert_memory_not_equal(first, other, fixed->count * sizeof(real));
    start(&a, 43);
    real *again = fixture_get(&a, fixed, FV_BLOCK_W);
    assert_memory_not_equal(first, again, fixed->count * sizeof(real));
    free(first);
    free(other);
    free(again);
    fixture_destroy(&a);
    fixture_destroy(&g);
}

typedef struct Start {
    double constant, normal, uniform; /* the value; the deviation; the bound */
} Start;

/* The table of SPEC 3. */
static Start expected_start(const Fixture *f, const FvParam *p) {
    const char *name = p->name;
    bool weight = ends_with(name, ".weight");
    if (starts_with(name, "dino.") || starts_with(name, "lm.")) {
        if (strstr(name, "norm"))
            return (Start){.constant = weight};
        if (strstr(name, "lambda1"))
            return (Start){.constant = 1};
        if (strstr(name, "position") || strstr(name, "cls_token") || weight)
            return (Start){.normal = 0.02};
        return (Start){0};
    }
    if (starts_with(name, "q_"))
        return (Start){.normal = 1};
    if (starts_with(name, "mode_") || strcmp(name, "no_text") == 0)
        return (Start){.normal = 0.14};
    if (strcmp(name, "latent_init") == 0)
        return (Start){0};
    char of[FV_PARAM_NAME]; /* a bias has the bound of its weight */
    snprintf(of, sizeof of, "%.*s.weight", (int)(strrchr(name, '.') - name), name);
    const FvParam *w = fixture_param(f, of);
    return (Start){.uniform = 1 / sqrt((double)(w->count / w->shape[0]))};
}

static void test_start_values(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 1, 0);
    start(&f, 3);
    const FvParams *table = fv_model_params(f.model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        Start want = expected_start(&f, p);
        real *x = fixture_get(&f, p, FV_BLOCK_W);
        double n = (double)p->count, sum = 0, squares = 0, most = largest(x, p->count);
        for (size_t j = 0; j < p->count; j++) {
            sum += x[j];
            squares += (double)x[j] * (double)x[j];
        }
        double deviation = want.normal + want.uniform / sqrt(3.0);
        if (deviation == 0)
            for (size_t j = 0; j < p->count; j++)
                REQUIRE(x[j] == (real)want.constant, "%s[%zu] = %g", p->name, j, (double)x[j]);
        /* five standard errors of the mean and of the mean square (normal: kurtosis 3) */
        REQUIRE(deviation == 0 || fabs(sum / n) <= 5 * deviation / sqrt(n), "%s: mean %g", p->name,
                sum / n);
        REQUIRE(deviation == 0 || fabs(squares / n / (deviation * deviation) - 1) <=
                                      5 * sqrt(2 / n),
                "%s: root mean square %g, not %g", p->name, sqrt(squares / n), deviation);
        REQUIRE(want.uniform == 0 || most <= want.uniform * (1 + FV_EPSILON), "%s: %g beyond %g",
                p->name, most, want.uniform);
        free(x);
    }
    fixture_destroy(&f);
}

/* --- memory --------------------------------------------------------------------------------- */

/* The backend with an alloc that counts: `ops` first, so that be->ops leads back here. */
typedef struct Counting {
    FvOps ops;
    const FvOps *real_ops;
    size_t bytes, calls;
} Counting;

static FvStatus counting_alloc(FvBackend *be, size_t bytes, void **out, FvError *err) {
    Counting *counting = (Counting *)be->ops;
    counting->bytes += bytes;
    counting->calls++;
    return counting->real_ops->alloc(be, bytes, out, err);
}

static void check_memory(const FvModelConfig *c) {
    FvError err = {0};
    FvModelMemory memory;
    size_t parameters, trained;
    FvBackend *be;
    FvModel *model;
    assert_int_equal(fv_model_plan(c, &memory, &parameters, &trained, &err), FV_OK);
    assert_int_equal(fv_cpu_backend_create(1, &be, &err), FV_OK);
    Counting counting = {.ops = *be->ops, .real_ops = be->ops};
    counting.ops.alloc = counting_alloc;
    be->ops = &counting.ops;
    assert_int_equal(fv_model_create(c, be, &model, &err), FV_OK);
    assert_int_equal(counting.bytes,
                     memory.weights + memory.gradients + memory.moments + memory.activations);
    const FvParams *table = fv_model_params(model);
    assert_int_equal(parameters, table->total);
    assert_int_equal(trained, table->trained);
    Fixture f = {.c = *c, .be = be, .model = model, .batch = fixture_batch_create(c)};
    fixture_randomize(&f, 1);
    size_t calls = counting.calls;
    train(&f, 1);
    size_t workspace = fv_cpu_workspace_bytes(be);
    train(&f, 2);
    assert_int_equal(counting.calls, calls);
    assert_int_equal(fv_cpu_workspace_bytes(be), workspace);
    be->ops = counting.real_ops;
    fixture_destroy(&f);
}

static void test_plan_is_what_is_allocated(void **state) {
    (void)state;
    for (size_t i = 0; i < 2 * FIXTURE_EXPERIMENTS; i++) {
        FvModelConfig c = fixture_config();
        fixture_experiment(&c, i / 2);
        c.deep = i % 2;
        check_memory(&c);
    }
    FvModelConfig c = caption_config();
    check_memory(&c);
    c.vision = false;
    check_memory(&c);
    c.frames = 1;
    check_memory(&c);
}

/* --- update --------------------------------------------------------------------------------- */

typedef struct Snapshot { /* every parameter in the file's layout, by its number in the table */
    real **w;
    size_t count;
} Snapshot;

static Snapshot snapshot(const Fixture *f, FvBlock block) {
    const FvParams *table = fv_model_params(f->model);
    Snapshot s = {calloc(table->count, sizeof *s.w), table->count};
    assert_non_null(s.w);
    for (size_t i = 0; i < table->count; i++)
        if (block == FV_BLOCK_W || table->list[i].role == FV_TRAINED)
            s.w[i] = fixture_get(f, &table->list[i], block);
    return s;
}

static void free_snapshot(Snapshot *s) {
    for (size_t i = 0; i < s->count; i++)
        free(s->w[i]);
    free(s->w);
}

/* One element through AdamW as its paper (Loshchilov and Hutter 2019) and PyTorch write it. */
static double adamw_element(const FvAdamW *a, double clip, double w, double g, double *m,
                            double *v) {
    g *= clip;
    *m = a->beta1 * *m + (1 - a->beta1) * g;
    *v = a->beta2 * *v + (1 - a->beta2) * g * g;
    double mean = *m / (1 - pow(a->beta1, (double)a->step));
    double square = *v / (1 - pow(a->beta2, (double)a->step));
    return w * (1 - a->lr * a->weight_decay) - a->lr * mean / (sqrt(square) + a->eps);
}

/* One update compared with adamw_element for everything trained, bit for bit unchanged for the
 * rest. */
static void check_update(Fixture *f, const FvAdamW *adamw) {
    FvError err = {0};
    const FvParams *table = fv_model_params(f->model);
    forward_and_back(f);
    fv_model_norm(f->model);
    assert_int_equal(fv_model_measure(f->model, &f->measures, &err), FV_OK);
    Snapshot w = snapshot(f, FV_BLOCK_W), g = snapshot(f, FV_BLOCK_G), m = snapshot(f, FV_BLOCK_M),
             v = snapshot(f, FV_BLOCK_V);
    double squares = 0;
    for (size_t i = 0; i < table->count; i++)
        for (size_t j = 0; g.w[i] && j < table->list[i].count; j++)
            squares += (double)g.w[i][j] * (double)g.w[i][j];
    close_to(f->measures.norm, sqrt(squares), 0, "norm at step", adamw->step);
    double clip = fmin(1, adamw->clip_norm / (sqrt(squares) + 1e-6));
    fv_model_update(f->model, adamw);
    Snapshot now = snapshot(f, FV_BLOCK_W);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        if (p->role != FV_TRAINED)
            assert_memory_equal(now.w[i], w.w[i], p->count * sizeof(real));
        for (size_t j = 0; p->role == FV_TRAINED && j < p->count; j++) {
            double mean = (double)m.w[i][j], square = (double)v.w[i][j];
            double want =
                adamw_element(adamw, clip, (double)w.w[i][j], (double)g.w[i][j], &mean, &square);
            /* roundings of a step of at most 3 lr, and of the weight itself */
            double limit = 16 * FV_EPSILON * (3 * adamw->lr + fabs(want));
            REQUIRE(fabs((double)now.w[i][j] - want) <= limit, "%s[%zu]: %.9g, expected %.9g",
                    p->name, j, (double)now.w[i][j], want);
        }
    }
    Snapshot *all[] = {&w, &g, &m, &v, &now};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free_snapshot(all[i]);
}

static void test_update(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        FvModelConfig c = fixture_config();
        c.freeze_dino = i & 1;
        c.freeze_lm = i & 2;
        Fixture f = fixture_create(&c, 1, 14, 0);
        for (size_t step = 1; step <= 3; step++) {
            FvAdamW adamw = study_adamw(step);
            adamw.clip_norm = i == 0 ? 1e-2 : i == 1 ? 1e6 : 1;
            check_update(&f, &adamw);
        }
        fixture_destroy(&f);
    }
}

static void test_bad_norm_changes_nothing(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 14, 0);
    train(&f, 1);
    f.batch.latents[3] = (real)NAN;
    Snapshot w = snapshot(&f, FV_BLOCK_W), m = snapshot(&f, FV_BLOCK_M);
    train(&f, 1);
    FvError err = {0};
    assert_int_equal(fv_model_measure(f.model, &f.measures, &err), FV_OK);
    assert_true(isnan(f.measures.norm));
    Snapshot w2 = snapshot(&f, FV_BLOCK_W), m2 = snapshot(&f, FV_BLOCK_M);
    const FvParams *table = fv_model_params(f.model);
    for (size_t i = 0; i < table->count; i++) {
        assert_memory_equal(w.w[i], w2.w[i], table->list[i].count * sizeof(real));
        if (m.w[i])
            assert_memory_equal(m.w[i], m2.w[i], table->list[i].count * sizeof(real));
    }
    free_snapshot(&w);
    free_snapshot(&m);
    free_snapshot(&w2);
    free_snapshot(&m2);
    fixture_destroy(&f);
}

/* --- trouble -------------------------------------------------------------------------------- */

static void expect_bad(Fixture *f, const char *want) {
    char name[128] = "";
    fv_model_first_bad(f->model, name, sizeof name);
    assert_string_equal(name, want);
}

static void poison(Fixture *f, const char *name, size_t at, double value, real *before) {
    const FvParam *p = fixture_param(f, name);
    real *x = fixture_get(f, p, FV_BLOCK_W);
    *before = x[at];
    x[at] = (real)value;
    fixture_set(f, p, x);
    free(x);
}

static void test_first_bad_names_parameters(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 15, 0);
    forward_and_back(&f);
    expect_bad(&f, "");
    const FvParams *table = fv_model_params(f.model);
    for (size_t i = 0; i < table->count; i++) {
        const FvParam *p = &table->list[i];
        char want[128];
        real before;
        size_t at = p->count - 1;
        poison(&f, p->name, at, i % 2 ? NAN : -INFINITY, &before);
        snprintf(want, sizeof want, "parameter %s", p->name);
        expect_bad(&f, p->role == FV_UNUSED ? "" : want);
        poison(&f, p->name, at, before, &before);
    }
    expect_bad(&f, "");
    fixture_destroy(&f);
}

static void test_first_bad_names_data_and_tensors(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"dino.encoder.layer.1.attention.attention.key.weight", "encoder: keys of layer 1"},
        {"query_out.weight", "coarse pass: features z"},
        {"dino_to_lm.weight", "coarse pass: visual tokens"},
        {"head.conv6.weight", "coarse pass: prediction"},
        {"lm_to_query.weight", "fine pass: features z"},
    };
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 15, 0);
    f.batch.latents[5] = (real)INFINITY;
    forward_and_back(&f);
    expect_bad(&f, "data: latents");
    f.batch.latents[5] = 0;
    /* finite weights so large that products overflow, in every row */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const FvParam *p = fixture_param(&f, cases[i][0]);
        real *x = fixture_get(&f, p, FV_BLOCK_W), *huge = fixture_get(&f, p, FV_BLOCK_W);
        for (size_t j = 0; j < p->count; j++)
            huge[j] = (real)(sizeof(real) == sizeof(float) ? 3e38 : 1e308);
        fixture_set(&f, p, huge);
        forward_and_back(&f);
        expect_bad(&f, cases[i][1]);
        fixture_set(&f, p, x);
        free(x);
        free(huge);
    }
    forward_and_back(&f);
    const FvParam *p = fixture_param(&f, "head.film1.bias");
    FvError err = {0};
    real *g = fixture_get(&f, p, FV_BLOCK_G);
    g[0] = (real)NAN;
    FvParams *table = fv_model_params(f.model);
    assert_int_equal(fv_params_set(table, f.be, p, FV_BLOCK_G, g, &err), FV_OK);
    expect_bad(&f, "gradient of head.film1.bias");
    free(g);
    fixture_destroy(&f);
}

static void test_layouts(void **state) {
    (void)state;
    FvModelConfig c = fixture_config();
    Fixture f = fixture_create(&c, 1, 16, 0);
    const FvParams *table = fv_model_params(f.model);
    const FvParam *p = fixture_param(&f, "head.conv2.weight");
    assert_true(p->channels_last);
    size_t out = p->shape[0], in = p->shape[1];
    real *file = fixture_get(&f, p, FV_BLOCK_W);
    for (size_t o = 0; o < out; o++)
        for (size_t i = 0; i < in; i++)
            for (size_t k = 0; k < 9; k++)
                assert_true(file[(o * in + i) * 9 + k] ==
                            table->w[p->offset + (o * 9 + k) * in + i]);
    free(file);
    assert_null(fv_params_find(table, "head.conv7.weight"));
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
        cmocka_unit_test(test_roles),
        cmocka_unit_test(test_own_queries_from_an_equal_neighbour),
        cmocka_unit_test(test_other_queries_from_another_clip),
        cmocka_unit_test(test_other_queries_across_batches),
        cmocka_unit_test(test_copy_control),
        cmocka_unit_test(test_attention_maps),
        cmocka_unit_test(test_hard_attention_keeps_exactly_k),
        cmocka_unit_test(test_start_is_a_function_of_seed_and_name),
        cmocka_unit_test(test_start_values),
        cmocka_unit_test(test_plan_is_what_is_allocated),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_bad_norm_changes_nothing),
        cmocka_unit_test(test_first_bad_names_parameters),
        cmocka_unit_test(test_first_bad_names_data_and_tensors),
        cmocka_unit_test(test_layouts),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
