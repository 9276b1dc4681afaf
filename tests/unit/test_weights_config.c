/* config.json of Hugging Face folders: sizes, the refusal of what fovea does not compute, and what
 * `auto` makes of the folders in models/. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "run/files.h"
#include "run/hf_config.h"
#include "run/model_folder.h"

typedef struct World {
    char folder[32], path[64]; /* path: of a config.json */
} World;

static int open_world(void **state) {
    World *w = calloc(1, sizeof *w);
    if (!w)
        return -1;
    *state = w;
    strcpy(w->folder, "/tmp/fovea-test-XXXXXX");
    if (!mkdtemp(w->folder))
        return -1;
    snprintf(w->path, sizeof w->path, "%s/config.json", w->folder);
    return 0;
}

static int close_world(void **state) {
    World *w = *state;
    char command[64];
    snprintf(command, sizeof command, "rm -rf '%s'", w->folder);
    free(w);
    return system(command);
}

static void succeeds(FvStatus status, const FvError *err) {
    if (status != FV_OK)
        fail_msg("status %d: %s", (int)status, err->text);
}

static void write_text(const char *path, const char *text) {
    FvError err;
    succeeds(fv_file_write(path, &(FvBytes){text, strlen(text)}, 1, &err), &err);
}

/* As published with facebook/dinov2-small and HuggingFaceTB/SmolLM2-135M. */
static const char dinov2_small[] =
    "{\"architectures\": [\"Dinov2Model\"], \"attention_probs_dropout_prob\": 0.0,"
    " \"drop_path_rate\": 0.0, \"hidden_act\": \"gelu\", \"hidden_dropout_prob\": 0.0,"
    " \"hidden_size\": 384, \"image_size\": 518, \"initializer_range\": 0.02,"
    " \"layer_norm_eps\": 1e-06, \"layerscale_value\": 1.0, \"mlp_ratio\": 4,"
    " \"model_type\": \"dinov2\", \"num_attention_heads\": 6, \"num_channels\": 3,"
    " \"num_hidden_layers\": 12, \"patch_size\": 14, \"qkv_bias\": true,"
    " \"torch_dtype\": \"float32\", \"use_swiglu_ffn\": false}";
static const char smollm2[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false,"
    " \"attention_dropout\": 0.0, \"bos_token_id\": 0, \"hidden_act\": \"silu\","
    " \"hidden_size\": 576, \"intermediate_size\": 1536, \"max_position_embeddings\": 8192,"
    " \"model_type\": \"llama\", \"num_attention_heads\": 9, \"num_hidden_layers\": 30,"
    " \"num_key_value_heads\": 3, \"rms_norm_eps\": 1e-05, \"rope_interleaved\": false,"
    " \"rope_scaling\": null, \"rope_theta\": 100000, \"tie_word_embeddings\": true,"
    " \"torch_dtype\": \"bfloat16\", \"vocab_size\": 49152}";

/* Writes the text with its first `from` replaced. */
static void write_changed(const char *path, const char *text, const char *from, const char *to) {
    char changed[2048];
    const char *at = strstr(text, from);
    assert_non_null(at);
    snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    write_text(path, changed);
}

static void test_config_of_dinov2(void **state) {
    World *w = *state;
    FvError err;
    FvDinoSizes s;
    write_text(w->path, dinov2_small);
    succeeds(fv_hf_read_dino(w->path, &s, &err), &err);
    assert_int_equal(s.width, 384);
    assert_int_equal(s.layers, 12);
    assert_int_equal(s.heads, 6);
    assert_int_equal(s.mlp, 1536);
    assert_int_equal(s.image_size, 518);
    assert_int_equal(s.patch, 14);
}

static void assert_smollm2(const World *w) {
    FvError err;
    FvLlamaSizes s;
    succeeds(fv_hf_read_llama(w->path, &s, &err), &err);
    assert_int_equal(s.width, 576);
    assert_int_equal(s.layers, 30);
    assert_int_equal(s.heads, 9);
    assert_int_equal(s.kv_heads, 3);
    assert_int_equal(s.mlp, 1536);
    assert_int_equal(s.vocab, 49152);
    assert_true(s.rope_theta == 100000 && s.rms_eps == 1e-5);
}

static void test_config_of_llama(void **state) {
    World *w = *state;
    FvError err;
    FvLlamaSizes s;
    write_text(w->path, smollm2);
    assert_smollm2(w);
    write_changed(w->path, smollm2, "\"rope_scaling\": null, \"rope_theta\": 100000",
                  "\"rope_parameters\": {\"rope_theta\": 100000.0, \"rope_type\": \"default\"}");
    assert_smollm2(w);
    write_changed(w->path, smollm2, "\"vocab_size\"", "\"head_dim\": 64, \"vocab_size\"");
    assert_smollm2(w);
    write_changed(w->path, smollm2, "\"num_key_value_heads\": 3", "\"num_key_value_heads\": null");
    succeeds(fv_hf_read_llama(w->path, &s, &err), &err);
    assert_int_equal(s.kv_heads, 9);
    /* transformers' defaults */
    write_text(w->path,
               "{\"model_type\": \"llama\", \"hidden_size\": 8, \"num_hidden_layers\": 1,"
               " \"num_attention_heads\": 2, \"intermediate_size\": 3, \"vocab_size\": 5}");
    succeeds(fv_hf_read_llama(w->path, &s, &err), &err);
    assert_true(s.kv_heads == 2 && s.rope_theta == 10000 && s.rms_eps == 1e-6);
}

typedef struct Change {
    const char *from, *to, *told;
} Change;

static const Change dino_changes[] = {
    {"\"dinov2\"", "\"dinov2_with_registers\"", "register tokens"},
    {"\"model_type\": \"dinov2\",", "", "model_type is missing"},
    {"\"dinov2\"", "\"a\\nb\"", "model_type is a?b"},
    {"\"hidden_size\": 384", "\"hidden_size\": 385", "hidden_size 385 is no multiple"},
    {"\"hidden_size\": 384", "\"hidden_size\": 384.5", "hidden_size must be a whole number"},
    {"\"hidden_size\": 384", "\"hidden_size\": \"384\"", "hidden_size must be a whole number"},
    {"\"hidden_size\": 384", "\"hidden_size\": 1e300", "hidden_size must be a whole number"},
    {"\"hidden_size\": 384,", "", "hidden_size must be a whole number"},
    {"\"num_hidden_layers\": 12", "\"num_hidden_layers\": 0", "num_hidden_layers must be"},
    {"\"num_attention_heads\": 6", "\"num_attention_heads\": -6", "num_attention_heads must be"},
    {"\"mlp_ratio\": 4", "\"mlp_ratio\": null", "mlp_ratio must be"},
    {"\"patch_size\": 14", "\"patch_size\": []", "patch_size must be"},
    {"\"image_size\": 518", "\"image_size\": {}", "image_size must be"},
    {"\"use_swiglu_ffn\": false", "\"use_swiglu_ffn\": true", "use_swiglu_ffn must be false"},
    {"\"qkv_bias\": true", "\"qkv_bias\": false", "qkv_bias must be true"},
    {"\"num_channels\": 3", "\"num_channels\": 1", "num_channels must be 3"},
    {"\"gelu\"", "\"silu\"", "hidden_act must be \"gelu\""},
    {"1e-06", "1e-05", "layer_norm_eps must be"},
    {"}", "", "not valid JSON"},
    {"\"qkv_bias\": true", "\"qkv_bias\": true, \"qkv_bias\": true", "not valid JSON"},
};

static const Change llama_changes[] = {
    {"\"llama\"", "\"qwen2\"", "model_type is qwen2, fovea reads llama"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8}",
     "rotary embedding is scaled (llama3)"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", "is scaled"},
    {"\"rope_scaling\": null", "\"rope_parameters\": {\"rope_type\": \"yarn\"}", "scaled (yarn)"},
    {"\"rope_theta\": 100000", "\"rope_theta\": \"x\"", "rope_theta must be a number"},
    {"\"rope_theta\": 100000", "\"rope_theta\": 0", "rope_theta 0 is out of range"},
    {"1e-05", "-1", "rms_norm_eps -1 is out of range"},
    {"1e-05", "2", "rms_norm_eps 2 is out of range"},
    {"\"silu\"", "\"gelu\"", "hidden_act must be \"silu\""},
    {"\"attention_bias\": false", "\"attention_bias\": true", "attention_bias must be false"},
    {"\"vocab_size\"", "\"mlp_bias\": true, \"vocab_size\"", "mlp_bias must be false"},
    {"\"rope_interleaved\": false", "\"rope_interleaved\": true", "rope_interleaved must be false"},
    {"\"vocab_size\"", "\"head_dim\": 32, \"vocab_size\"", "head_dim must be 64"},
    {"\"num_key_value_heads\": 3", "\"num_key_value_heads\": 2", "do not divide each other"},
    {"\"num_key_value_heads\": 3", "\"num_key_value_heads\": 0", "num_key_value_heads must be"},
    {"\"hidden_size\": 576", "\"hidden_size\": 575", "do not divide each other"},
    {"\"vocab_size\": 49152", "\"vocab_size\": true", "vocab_size must be"},
};

static void check_change(const World *w, FvStatus status, const FvError *err, const Change *c) {
    if (status != FV_DATA || !strstr(err->text, c->told) || !strstr(err->text, w->path) ||
        strchr(err->text, '\n'))
        fail_msg("%s: status %d: %s", c->to, (int)status, status == FV_OK ? "" : err->text);
}

static void test_configs_of_other_models_are_refused(void **state) {
    World *w = *state;
    FvDinoSizes dino;
    FvLlamaSizes llama;
    FvError err;
    for (size_t i = 0; i < sizeof dino_changes / sizeof *dino_changes; i++) {
        const Change *c = &dino_changes[i];
        write_changed(w->path, dinov2_small, c->from, c->to);
        check_change(w, fv_hf_read_dino(w->path, &dino, &err), &err, c);
    }
    for (size_t i = 0; i < sizeof llama_changes / sizeof *llama_changes; i++) {
        const Change *c = &llama_changes[i];
        write_changed(w->path, smollm2, c->from, c->to);
        check_change(w, fv_hf_read_llama(w->path, &llama, &err), &err, c);
    }
    unlink(w->path);
    assert_int_equal(fv_hf_read_dino(w->path, &dino, &err), FV_DATA);
}

/* --- what `auto` becomes ---------------------------------------------------------------------- */

static const char dino_nano[] =
    "{\"model_type\": \"dinov2\", \"hidden_size\": 64, \"num_hidden_layers\": 4,"
    " \"num_attention_heads\": 4, \"mlp_ratio\": 4, \"image_size\": 64, \"patch_size\": 8}";

static void make_model(const World *w, const char *name, const char *config) {
    char path[FV_PATH];
    FvError err;
    succeeds(fv_path(&err, path, sizeof path, "%s/models/%s", w->folder, name), &err);
    succeeds(fv_make_folder(path, &err), &err);
    succeeds(fv_path(&err, path, sizeof path, "%s/models/%s/model.safetensors", w->folder, name),
             &err);
    write_text(path, "");
    succeeds(fv_path(&err, path, sizeof path, "%s/models/%s/config.json", w->folder, name), &err);
    write_text(path, config);
}

static void chosen(const FvConfig *asked, const char *scale, const char *dino, const char *lm) {
    FvConfig c = *asked;
    strcpy(c.scale, scale);
    strcpy(c.dino_from, "auto");
    strcpy(c.lm_from, "auto");
    if (strcmp(scale, "seed") == 0) {
        c.patch = 14, c.dino_width = 384, c.dino_heads = 6, c.dino_layers = 12, c.dino_mlp = 1536;
        c.lm_width = 576, c.lm_heads = 9, c.lm_kv_heads = 3, c.lm_layers = 30, c.lm_mlp = 1536;
        c.lm_vocab = 49152, c.lm_rope_theta = 100000, c.lm_rms_eps = 1e-5;
    }
    fv_folder_choose(&c);
    assert_string_equal(c.dino_from, dino);
    assert_string_equal(c.lm_from, lm);
}

static void test_auto_takes_what_models_has(void **state) {
    const World *w = *state;
    FvConfig small = *fv_config_defaults();
    char *here = getcwd(NULL, 0);
    assert_non_null(here);
    assert_int_equal(chdir(w->folder), 0);
    chosen(&small, "small", "none", "none");
    chosen(&small, "seed", "none", "none");
    make_model(w, "dino-nano", dino_nano);
    make_model(w, "dinov2-small", dinov2_small);
    chosen(&small, "small", "dino-nano", "none");
    chosen(&small, "seed", "dinov2-small", "none");
    make_model(w, "SmolLM2-135M", smollm2);
    chosen(&small, "small", "dino-nano", "none");
    chosen(&small, "seed", "dinov2-small", "SmolLM2-135M");
    /* other sizes, a damaged file, no weights: as if it were not there */
    small.dino_layers = 3;
    chosen(&small, "small", "none", "none");
    small.dino_layers = 4;
    make_model(w, "dino-nano", "{");
    chosen(&small, "small", "none", "none");
    assert_int_equal(unlink("models/SmolLM2-135M/model.safetensors"), 0);
    chosen(&small, "seed", "dinov2-small", "none");
    /* what is asked for stays; sizes come from its config.json */
    FvConfig c = small;
    strcpy(c.dino_from, "dinov2-small");
    fv_folder_choose(&c);
    assert_string_equal(c.dino_from, "dinov2-small");
    fv_folder_preset(&c);
    assert_true(c.patch == 14 && c.dino_width == 384 && c.dino_heads == 6);
    assert_true(c.dino_layers == 12 && c.dino_mlp == 1536 && c.lm_width == small.lm_width);
    assert_int_equal(chdir(here), 0);
    free(here);
}

static void in_folder(const World *w, const char *name, char path[FV_PATH]) {
    FvError err;
    succeeds(fv_path(&err, path, FV_PATH, "%s/%s", w->folder, name), &err);
    write_text(path, "{}");
}

static void test_only_model_safetensors_has_a_config(void **state) {
    const World *w = *state;
    FvError err;
    char path[FV_PATH], weights[FV_TEXT], config[FV_TEXT];
    in_folder(w, "config.json", path);
    in_folder(w, "my-config.json", path);
    in_folder(w, "model.safetensors", path);
    succeeds(fv_folder_find(path, weights, config, &err), &err);
    assert_string_equal(weights, path);
    assert_string_equal(config, w->path);
    in_folder(w, "my-model.safetensors", path);
    succeeds(fv_folder_find(path, weights, config, &err), &err);
    assert_string_equal(weights, path);
    assert_string_equal(config, "");
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, open_world, close_world)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_config_of_dinov2),
        TEST(test_config_of_llama),
        TEST(test_configs_of_other_models_are_refused),
        TEST(test_auto_takes_what_models_has),
        TEST(test_only_model_safetensors_has_a_config),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
