/* Keys, values, studies, overrides, the text of a resolved study and its comparison; the shipped
 * configs; damaged files. Run in the repository's root. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/rng.h"
#include "run/config.h"
#include "run/device.h"

static char folder[] = "/tmp/fovea-test-config-XXXXXX";
static char study_path[sizeof folder + 16], other_path[sizeof folder + 16];

static int make_folder(void **state) {
    (void)state;
    if (!mkdtemp(folder))
        return -1;
    snprintf(study_path, sizeof study_path, "%s/x.yaml", folder);
    snprintf(other_path, sizeof other_path, "%s/study.yaml", folder);
    return 0;
}

static int remove_folder(void **state) {
    (void)state;
    unlink(study_path);
    unlink(other_path);
    return rmdir(folder);
}

static void write_bytes(const char *path, const void *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

/* A study that must load; the arguments end with NULL. */
static FvStudy loaded(const char *text, const char *const *overrides) {
    FvStudy study;
    FvError err = {0};
    size_t count = 0;
    while (overrides && overrides[count])
        count++;
    write_bytes(study_path, text, strlen(text));
    if (fv_study_load(study_path, overrides, count, "small", &study, &err) != FV_OK)
        fail_msg("%s", err.text);
    return study;
}

#define ARGUMENTS(...)    ((const char *const[]){__VA_ARGS__, NULL})
#define LOADED(text, ...) loaded(text, ARGUMENTS(__VA_ARGS__))

static const FvConfig *config_of(const FvStudy *study, const char *name) {
    for (size_t e = 0; e < study->experiment_count; e++)
        if (strcmp(study->experiments[e].name, name) == 0)
            return &study->experiments[e].config;
    fail_msg("no experiment %s", name);
    return NULL;
}

/* A study that must be refused, with every part (to NULL) in the message. */
static void refused(const char *text, const char *const *overrides, const char *const *parts) {
    FvStudy study;
    FvError err = {0};
    size_t count = 0;
    while (overrides && overrides[count])
        count++;
    write_bytes(study_path, text, strlen(text));
    if (fv_study_load(study_path, overrides, count, "small", &study, &err) != FV_USAGE)
        fail_msg("not refused: %s", text);
    assert_int_equal(err.status, FV_USAGE);
    assert_null(study.experiments);
    assert_null(strchr(err.text, '\n'));
    for (; *parts; parts++)
        if (!strstr(err.text, *parts))
            fail_msg("\"%s\" is not in: %s", *parts, err.text);
}

#define REFUSED(text, ...) refused(text, NULL, ARGUMENTS(__VA_ARGS__))
#define REFUSED_LINE(argument, ...)                                                                \
    refused("experiments:\n  A_baseline: {}\n  B_temp_0.1: {temperature: 0.1}\n",                  \
            ARGUMENTS(argument), ARGUMENTS("command line: " argument, __VA_ARGS__))

/* --- the table ------------------------------------------------------------------------------ */

static void test_keys(void **state) {
    (void)state;
    const FvKey *keys = fv_config_keys();
    size_t count = 0;
    for (const FvKey *key = keys; key->name; key++, count++) {
        FvConfig config = *fv_config_defaults();
        char text[FV_TEXT], again[FV_TEXT];
        FvError err = {0};
        assert_ptr_equal(fv_config_find(key->name), key);
        assert_true(key->help && *key->help);
        assert_true((key->kind == FV_KEY_text) == (key->choices != NULL));
        fv_config_format(&config, key, text, sizeof text);
        if (fv_config_set(&config, key, text, "here", &err) != FV_OK) /* a default is allowed */
            fail_msg("%s", err.text);
        fv_config_format(&config, key, again, sizeof again);
        assert_string_equal(text, again);
    }
    assert_int_equal(count, FV_KEY_COUNT);
    assert_null(fv_config_find("temprature"));
    assert_null(fv_config_find(""));
}

static bool sets(const char *name, const char *text) {
    FvConfig config = *fv_config_defaults();
    return fv_config_set(&config, fv_config_find(name), text, "here", NULL) == FV_OK;
}

/* auto follows the device; the processor refuses bf16. */
static void test_precision(void **state) {
    (void)state;
    const FvDevice gpu = {.gpu = true}, processor = {.threads = 1};
    FvError err = {0};
    bool bf16 = false;
    assert_int_equal(fv_device_precision(&gpu, "auto", &bf16, &err), FV_OK);
    assert_true(bf16);
    assert_int_equal(fv_device_precision(&gpu, "fp32", &bf16, &err), FV_OK);
    assert_false(bf16);
    assert_int_equal(fv_device_precision(&gpu, "bf16", &bf16, &err), FV_OK);
    assert_true(bf16);
    assert_int_equal(fv_device_precision(&processor, "auto", &bf16, &err), FV_OK);
    assert_false(bf16);
    assert_int_equal(fv_device_precision(&processor, "fp32", &bf16, &err), FV_OK);
    assert_false(bf16);
    assert_int_equal(fv_device_precision(&processor, "bf16", &bf16, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "use precision=fp32 or auto"));
}

static void test_values(void **state) {
    (void)state;
    const char *const sizes[] = {"1", "0012", "100000000"};
    const char *const no_sizes[] = {"",
                                    "-1",
                                    "+1",
                                    "1.0",
                                    "1e3",
                                    "1_000",
                                    "0x10",
                                    " 1",
                                    "1 ",
                                    "ten",
                                    "0",
                                    "100000001",
                                    "18446744073709551617",
                                    "99999999999999999999999999"};
    const char *const reals[] = {"1", "0.5", ".5", "5.", "1e3", "1E-3", "+2", "1.5e+2"};
    const char *const no_reals[] = {"",     "nan", "inf", "-inf", "0x1p3", "1e", "e3",
                                    ".",    "1e+", "1,5", "1 ",   " 1",    "1f", "1e999",
                                    "1e-9", "-1",  "--1", "0",    "1e6.5"};
    const char *const on[] = {"true", "on", "yes", "True", "YES"};
    const char *const off[] = {"false", "off", "no", "False"};
    const char *const no_flags[] = {"", "1", "0", "t", "y", "offf", "true "};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        assert_true(sets("steps", sizes[i]));
    for (size_t i = 0; i < sizeof no_sizes / sizeof *no_sizes; i++)
        if (sets("steps", no_sizes[i]))
            fail_msg("steps took \"%s\"", no_sizes[i]);
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        if (!sets("temperature", reals[i]))
            fail_msg("temperature did not take \"%s\"", reals[i]);
    for (size_t i = 0; i < sizeof no_reals / sizeof *no_reals; i++)
        if (sets("temperature", no_reals[i]))
            fail_msg("temperature took \"%s\"", no_reals[i]);
    FvConfig config = *fv_config_defaults();
    const FvKey *vision = fv_config_find("vision");
    for (size_t i = 0; i < sizeof on / sizeof *on; i++) {
        config.vision = false;
        assert_int_equal(fv_config_set(&config, vision, on[i], "here", NULL), FV_OK);
        assert_true(config.vision);
    }
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        config.vision = true;
        assert_int_equal(fv_config_set(&config, vision, off[i], "here", NULL), FV_OK);
        assert_false(config.vision);
    }
    for (size_t i = 0; i < sizeof no_flags / sizeof *no_flags; i++)
        assert_false(sets("vision", no_flags[i]));
}

static void test_texts(void **state) {
    (void)state;
    char longest[FV_TEXT + 1];
    memset(longest, 'a', sizeof longest);
    longest[FV_TEXT] = '\0';
    assert_false(sets("data", longest));
    longest[FV_TEXT - 1] = '\0';
    assert_true(sets("data", longest));
    assert_true(sets("schedule", "cosine"));
    const char *const no_schedules[] = {"", "cos", "cosine ", "constant|cosine", "|"};
    for (size_t i = 0; i < sizeof no_schedules / sizeof *no_schedules; i++)
        assert_false(sets("schedule", no_schedules[i]));
    assert_true(sets("data", "/d\xc3\xa4ten/a b\\c\"d\".h5"));
    const char *const unprintable[] = {
        "a\nb",     "a\tb",         "\x7f",         "\xff",         "\xc3",        "\xc0\x80",
        "\xc2\x85", "\xe2\x80\xa8", "\xef\xbb\xbf", "\xed\xa0\x80", "\xef\xbf\xbe"};
    for (size_t i = 0; i < sizeof unprintable / sizeof *unprintable; i++)
        assert_false(sets("data", unprintable[i]));
}

static void test_format(void **state) {
    (void)state;
    FvConfig config = *fv_config_defaults();
    char text[FV_TEXT];
    const FvKey *lr = fv_config_find("lr");
    const double values[] = {3e-4, 0.1, 1, 1e-5, 0.1 + 0.2, 1.0 / 3, 999.99999999999989, 0};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        config.lr = values[i];
        fv_config_format(&config, lr, text, sizeof text);
        config.lr = -1;
        assert_int_equal(fv_config_set(&config, lr, text, "here", NULL), FV_OK);
        assert_true(config.lr == values[i]);
    }
    config.lr = 3e-4;
    fv_config_format(&config, lr, text, sizeof text);
    assert_string_equal(text, "0.0003");
    assert_int_equal(fv_config_set(&config, fv_config_find("contrastive"), "-0", "here", NULL),
                     FV_OK);
    fv_config_format(&config, fv_config_find("contrastive"), text, sizeof text);
    assert_string_equal(text, "0");
    fv_config_format(&config, fv_config_find("vision"), text, sizeof text);
    assert_string_equal(text, "on");
    fv_config_format(&config, fv_config_find("freeze_dino"), text, sizeof text);
    assert_string_equal(text, "false");
}

static void assert_same_config(const FvConfig *a, const FvConfig *b) {
    char left[FV_TEXT], right[FV_TEXT];
    for (const FvKey *key = fv_config_keys(); key->name; key++) {
        fv_config_format(a, key, left, sizeof left);
        fv_config_format(b, key, right, sizeof right);
        if (strcmp(left, right) != 0)
            fail_msg("%s: %s, not %s", key->name, left, right);
    }
}

/* SPEC 2, the row "seed". */
static void test_presets(void **state) {
    (void)state;
    FvConfig c = *fv_config_defaults();
    FvModelConfig model;
    fv_config_preset(&c); /* auto and small are the table */
    assert_same_config(&c, fv_config_defaults());
    snprintf(c.scale, sizeof c.scale, "seed");
    fv_config_preset(&c);
    assert_int_equal(c.dino_width, 384);
    assert_int_equal(c.dino_heads, 6);
    assert_int_equal(c.dino_layers, 12);
    assert_int_equal(c.dino_mlp, 1536);
    assert_int_equal(c.lm_width, 576);
    assert_int_equal(c.lm_layers, 30);
    assert_int_equal(c.lm_heads, 9);
    assert_int_equal(c.lm_kv_heads, 3);
    assert_int_equal(c.lm_mlp, 1536);
    assert_int_equal(c.lm_vocab, 49152);
    assert_true(c.lm_rope_theta == 100000);
    assert_int_equal(c.query_width, 128);
    assert_int_equal(c.head_width, 64);
    assert_int_equal(c.image_size, 224);
    assert_int_equal(c.patch, 14);
    assert_int_equal(c.frames, 8);
    assert_int_equal(c.batch, 2);
    assert_int_equal(c.steps, 1500);
    assert_true(c.lr == 3e-5);
    assert_int_equal(fv_config_model(&c, 2, 5, &model, NULL), FV_OK);
    assert_int_equal(fv_patches(&model), 256);
    assert_int_equal(model.clips, 1);
    assert_int_equal(model.max_text, 5);
}

/* k keeps its share of the patches: 32 of 256 is 8 of 64, and never rounds to "off". */
static void test_hard_attention(void **state) {
    (void)state;
    static const struct {
        size_t size, patch, k, effective;
    } cases[] = {{224, 14, 32, 32}, {64, 8, 32, 8}, {64, 8, 0, 0},    {64, 8, 1, 1},
                 {16, 8, 32, 1},    {64, 8, 6, 2},  {64, 8, 300, 75}, {128, 4, 32, 128}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        FvConfig c = *fv_config_defaults();
        FvModelConfig model;
        c.image_size = cases[i].size;
        c.patch = cases[i].patch;
        c.hard_attn_k = cases[i].k;
        assert_int_equal(fv_config_model(&c, 1, 1, &model, NULL), FV_OK);
        assert_int_equal(model.hard_attn_k, cases[i].effective);
    }
}

/* --- a study -------------------------------------------------------------------------------- */

static void test_study(void **state) {
    (void)state;
    FvStudy s = loaded("study: mine\n"
                       "base: &same\n  lr: 0.5\n  steps: 7\n"
                       "experiments:\n  second:\n  B_temp_0.1:\n    temperature: 0.1\n"
                       "    lr: 0.25\n  first: *same\n"
                       "seeds: [3, 1]\n",
                       NULL);
    assert_string_equal(s.name, "mine");
    assert_string_equal(s.path, study_path);
    assert_non_null(strstr(s.source, "study: mine\n"));
    assert_int_equal(s.experiment_count, 3); /* in the file's order */
    assert_string_equal(s.experiments[0].name, "second");
    assert_string_equal(s.experiments[1].name, "B_temp_0.1");
    assert_string_equal(s.experiments[2].name, "first");
    assert_int_equal(s.seed_count, 2);
    assert_int_equal(s.seeds[0], 3);
    assert_int_equal(s.seeds[1], 1);
    assert_true(s.experiments[0].config.lr == 0.5);
    assert_true(s.experiments[1].config.lr == 0.25);
    assert_true(s.experiments[1].config.temperature == 0.1);
    assert_true(s.experiments[2].config.temperature == 1);
    assert_int_equal(s.experiments[1].config.steps, 7);
    assert_string_equal(s.experiments[0].config.scale, "small");
    fv_study_free(&s);
    assert_null(s.experiments);
    s = loaded("experiments: {A: {}}", NULL); /* named after x.yaml, seed 0 */
    assert_string_equal(s.name, "x");
    assert_int_equal(s.seed_count, 1);
    assert_int_equal(s.seeds[0], 0);
    fv_study_free(&s);
}

static void test_overrides(void **state) {
    (void)state;
    const char *text = "base: {lr: 0.5, steps: 7}\n"
                       "experiments: {A: {}, B_temp_0.1: {temperature: 0.1}}\n"
                       "seeds: [0]\nstudy: old\n";
    FvStudy s = LOADED(text, "steps=9", "temperature=2", "B_temp_0.1.lr=0.25", "lr=1", "lr=2",
                       "seeds=4,0,2", "study=new", "data=a=b.c=d");
    const FvConfig *a = config_of(&s, "A"), *b = config_of(&s, "B_temp_0.1");
    assert_int_equal(a->steps, 9);
    assert_true(a->temperature == 2);
    assert_true(b->temperature == 0.1); /* the experiment's own key wins over key=value */
    assert_true(a->lr == 2);            /* the later of two */
    assert_true(b->lr == 0.25);         /* NAME.key=value wins over all, whatever the order */
    assert_string_equal(a->data, "a=b.c=d");
    assert_string_equal(s.name, "new");
    assert_int_equal(s.seed_count, 3);
    assert_int_equal(s.seeds[0], 4);
    assert_int_equal(s.seeds[2], 2);
    fv_study_free(&s);
    s = LOADED(text, "B_temp_0.1.temperature=0.2");
    assert_true(config_of(&s, "B_temp_0.1")->temperature == 0.2);
    fv_study_free(&s);
}

/* Keys that are given win over a scale's preset, whichever line comes first. */
static void test_scale(void **state) {
    (void)state;
    const char *text = "base: {lr: 0.5, scale: seed}\n"
                       "experiments: {A: {}, B: {scale: small, patch: 4}, C: {scale: auto}}\n";
    FvStudy s = loaded(text, NULL), t;
    assert_true(config_of(&s, "A")->lr == 0.5);
    assert_int_equal(config_of(&s, "A")->dino_width, 384);
    assert_string_equal(config_of(&s, "A")->scale, "seed");
    assert_int_equal(config_of(&s, "B")->dino_width, 64);
    assert_int_equal(config_of(&s, "B")->patch, 4);
    assert_string_equal(config_of(&s, "C")->scale, "small");
    fv_study_free(&s);
    assert_int_equal(fv_study_load(study_path, NULL, 0, "seed", &t, NULL), FV_OK);
    assert_string_equal(config_of(&t, "C")->scale, "seed");
    assert_int_equal(config_of(&t, "C")->lm_layers, 30);
    fv_study_free(&t);
    s = LOADED(text, "scale=small", "C.scale=seed", "dino_width=192");
    assert_int_equal(config_of(&s, "A")->dino_width, 192);
    assert_int_equal(config_of(&s, "A")->patch, 8);
    assert_int_equal(config_of(&s, "C")->dino_width, 192);
    assert_int_equal(config_of(&s, "C")->patch, 14);
    fv_study_free(&s);
}

/* --- refusals ------------------------------------------------------------------------------- */

static void test_refused_keys(void **state) {
    (void)state;
    char line[64];
    snprintf(line, sizeof line, "%s:3: ", study_path);
    REFUSED("base:\n  lr: 1\n  temprature: 0.1\nexperiments: {A: {}}\n", line,
            "key \"temprature\" is not known; did you mean \"temperature\"?");
    REFUSED("base:\n  lr: 1\n  temperature: hot\nexperiments: {A: {}}\n", line,
            "temperature: \"hot\" is not a number; allowed: 1e-06 to 1e+06, default 1");
    REFUSED("experiments:\n  A:\n    batch_size: 4\n", line, "did you mean \"batch\"?");
    REFUSED("experiments:\n  A:\n    qqqqqqqqqq: 4\n", line, "fovea --help");
    REFUSED("experiments:\n  A:\n    lr: {a: b}\n", line, "lr: a single value is needed");
    REFUSED("experiments:\n  A:\n    lr: 0.1\n    lr: 0.2\n", ":4: ", "\"lr\" is given twice in A");
    REFUSED("base: &b {lr: 1}\nexperiments:\n  A:\n    <<: *b\n", ":4: ", "\"<<\" is not known");
    REFUSED("experiments:\n  A:\n    [a, b]: 1\n", line, "single word");
    REFUSED("experiments:\n  A:\n    \"l\\0r\": 1\n", line, "single word");
    REFUSED("experiments:\n  A:\n    data: \"a\\0b\"\n", line, "single value");
    REFUSED("experiments:\n  A:\n    steps: 0\n", line, "out of range; allowed: 1 to 100000000");
    REFUSED("experiments:\n  A:\n    steps: 99999999999999999999999\n", line, "out of range");
    REFUSED("experiments:\n  A:\n    schedule: linear\n", line, "constant|cosine");
    REFUSED("experiments:\n  A:\n    vision: maybe\n", line, "on|off, default on");
    REFUSED("experiments:\n  A:\n    scale: huge\n", line, "auto|small|seed");
    REFUSED("experiments:\n  A:\n    lr: \"1\\e[2J\\n\"\n", line, "\"1?[2J?\" is not a number");
}

static void test_refused_studies(void **state) {
    (void)state;
    REFUSED("", study_path, "is empty");
    REFUSED("# only a comment\n", "is empty");
    REFUSED("hello\n", ":1: ", "key: value");
    REFUSED("base: {lr: 1}\n", "names no experiment");
    REFUSED("experiments: {}\n", "names no experiment");
    REFUSED("experiments: [A, B]\n", ":1: experiments: ");
    REFUSED("experiments:\n  A: 3\n", ":2: A: ");
    REFUSED("base: 3\nexperiments: {A: {}}\n", ":1: base: ");
    REFUSED("experiments: {A: {}}\nlr: 3\n", ":2: ", "belongs under \"base:\"");
    REFUSED("experiments: {A: {}}\nseed: [3]\n", ":2: ", "did you mean \"seeds\"?");
    REFUSED("experiments: {A: {}}\nzzzzzzzz: [3]\n", ":2: ", "study, base, experiments and seeds");
    REFUSED("experiments: {A: {}}\nexperiments: {B: {}}\n", ":2: ", "given twice");
    REFUSED("experiments:\n  A: {}\n  A: {}\n", ":3: ", "\"A\" is given twice");
    REFUSED("experiments:\n  a/b: {}\n", ":2: experiment \"a/b\"");
    REFUSED("experiments:\n  ..: {}\n", ":2: experiment \"..\"");
    REFUSED("experiments:\n  -x: {}\n", ":2: experiment \"-x\"");
    REFUSED("experiments:\n  \"\": {}\n", ":2: experiment \"\"");
    REFUSED("experiments:\n  "
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa: {}\n",
            ":2: experiment \"aaaa");
    REFUSED("study: a/b\nexperiments: {A: {}}\n", ":1: study \"a/b\"");
    REFUSED("study: [a]\nexperiments: {A: {}}\n", ":1: study");
    REFUSED("experiments: {A: {}}\nseeds: 3\n", ":2: seeds: ");
    REFUSED("experiments: {A: {}}\nseeds: []\n", ":2: seeds: ");
    REFUSED("experiments: {A: {}}\nseeds: [1, -2]\n", ":2: seeds: \"-2\"");
    REFUSED("experiments: {A: {}}\nseeds: [1, [2]]\n", ":2: seeds: ");
    REFUSED("experiments: {A: {}}\nseeds:\n- 1\n- 2\n- 1\n", ":5: seed 1 is given twice");
    REFUSED("experiments: {A: {}}\nseeds: [9223372036854775808]\n", "9223372036854775807 are");
    REFUSED("experiments: {A: {}}\n---\nexperiments: {B: {}}\n", ":3: ", "second document");
    REFUSED("experiments:\n\tA: {}\n", ":2: not valid YAML", "indent with spaces");
    REFUSED("experiments: {A: {}\n", "not valid YAML");
    REFUSED("experiments: {A: *nowhere}\n", ":1: not valid YAML");
    REFUSED("experiments:\n  A: {}\n  \xff: {}\n", ":3: not valid YAML", "UTF-8");
}

static void test_refused_overrides(void **state) {
    (void)state;
    REFUSED_LINE("temprature=1", "did you mean \"temperature\"?");
    REFUSED_LINE("seed=1", "did you mean \"seeds\"?");
    REFUSED_LINE("temperature=hot", "temperature: \"hot\" is not a number; allowed: 1e-06 to");
    REFUSED_LINE("B_tmp_0.1.temperature=1", "no experiment \"B_tmp_0.1\"",
                 "did you mean \"B_temp_0.1\"?");
    REFUSED_LINE("B_temp_0.1=1", "no experiment \"B_temp_0\"");
    REFUSED_LINE("B_temp_0.1.seeds=1", "key \"seeds\" is not known");
    REFUSED_LINE("=1", "key=value");
    REFUSED_LINE(".lr=1", "key=value");
    REFUSED_LINE("A_baseline.=1", "key=value");
    REFUSED_LINE("lr", "key=value");
    REFUSED_LINE("lr=", "lr: \"\" is not a number");
    REFUSED_LINE("seeds=", "seeds: \"\"");
    REFUSED_LINE("seeds=1,,2", "seeds: \"\"");
    REFUSED_LINE("seeds=1,2,1", "seed 1 is given twice");
    REFUSED_LINE("seeds=0000000000000000000000000000000000000x", "is not a seed");
    REFUSED_LINE("study=a b", "study \"a b\"");
    refused("experiments: {A: {}}", ARGUMENTS("data=\xff"),
            ARGUMENTS("command line: data=?: data: \"?\" is not UTF-8"));
}

/* Values that are allowed each alone, but not together. */
static void test_refused_together(void **state) {
    (void)state;
#define TOGETHER(keys, ...)                                                                        \
    REFUSED("experiments:\n  ok: {}\n  B: {" keys "}\n", "x.yaml: experiment B: ", __VA_ARGS__)
    TOGETHER("vision: off, contrastive: -0.1", "vision off", "contrastive -0.1");
    TOGETHER("vision: off, entropy_margin: 0.5", "vision off", "entropy_margin 0.5");
    TOGETHER("image_size: 60", "image_size 60", "multiple of 8");
    TOGETHER("image_size: 16, patch: 17", "patch 17", "image_size 16");
    TOGETHER("dino_heads: 5", "dino_width 64", "dino_heads 5");
    TOGETHER("lm_heads: 5", "lm_width 64", "lm_heads 5");
    TOGETHER("lm_width: 12", "lm_width 12", "width 3", "even");
    TOGETHER("lm_kv_heads: 3", "lm_heads 4", "lm_kv_heads 3");
    TOGETHER("warmup_steps: 11, steps: 10", "warmup_steps 11", "steps 10");
    TOGETHER("clips_train: 3, batch: 4", "clips_train 3", "batch 4");
    TOGETHER("latents: file", "latents file", "procedural");
    TOGETHER("data: \"\"", "data is empty");
#undef TOGETHER
    FvConfig c = *fv_config_defaults();
    FvModelConfig model;
    FvError err = {0};
    assert_int_equal(fv_config_model(&c, 3, 1, &model, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "batch 2"));
    assert_int_equal(fv_config_model(&c, 0, 1, &model, &err), FV_USAGE);
}

static void test_model_check(void **state) {
    (void)state;
    FvModelConfig good, bad;
    assert_int_equal(fv_config_model(fv_config_defaults(), 1, 1, &good, NULL), FV_OK);
#define BAD(field, number)                                                                         \
    bad = good;                                                                                    \
    bad.field = number;                                                                            \
    assert_int_equal(fv_model_config_check(&bad, NULL), FV_USAGE);
    BAD(clips, 0)
    BAD(frames, 0)
    BAD(max_text, 0)
    BAD(dino_layers, 0)
    BAD(dino_heads, 0)
    BAD(lm_kv_heads, 0)
    BAD(patch, 0)
    BAD(film_width, 0)
    BAD(temperature, 0)
    BAD(temperature, NAN)
    BAD(contrastive, INFINITY)
    BAD(entropy_margin, -1)
    BAD(lambda_coarse, NAN)
    BAD(lm_rope_theta, 0)
    BAD(lm_rms_eps, -1)
#undef BAD
}

static void test_files(void **state) {
    (void)state;
    FvStudy study;
    FvError err = {0};
    char path[600], *large = calloc(1, 1 << 18);
    assert_int_equal(fv_study_load("no/such.yaml", NULL, 0, "small", &study, &err), FV_USAGE);
    assert_string_equal(err.text, "no/such.yaml: cannot be opened: No such file or directory");
    assert_int_equal(fv_study_load(folder, NULL, 0, "small", &study, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "Is a directory"));
    assert_int_equal(fv_study_load("/dev/zero", NULL, 0, "small", &study, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "longer than 256 KiB"));
    memset(path, 'a', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    assert_int_equal(fv_study_load(path, NULL, 0, "small", &study, &err), FV_USAGE);
    assert_non_null(large);
    write_bytes(study_path, large, 100);
    assert_int_equal(fv_study_load(study_path, NULL, 0, "small", &study, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "zero bytes"));
    /* nesting is refused before it costs time */
    memset(large, '[', 1 << 18);
    write_bytes(study_path, large, 1 << 18);
    assert_int_equal(fv_study_load(study_path, NULL, 0, "small", &study, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "brackets"));
    free(large);
    snprintf(path, sizeof path, "%s/a b.yaml", folder);
    write_bytes(path, "experiments: {A: {}}", 20);
    assert_int_equal(fv_study_load(path, NULL, 0, "small", &study, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "study: NAME"));
    assert_int_equal(fv_study_load(path, ARGUMENTS("study=a"), 1, "small", &study, &err), FV_OK);
    fv_study_free(&study);
    unlink(path);
}

/* --- a resolved study as text --------------------------------------------------------------- */

static void assert_same_studies(const FvStudy *a, const FvStudy *b) {
    assert_string_equal(a->name, b->name);
    assert_int_equal(a->experiment_count, b->experiment_count);
    assert_int_equal(a->seed_count, b->seed_count);
    assert_memory_equal(a->seeds, b->seeds, a->seed_count * sizeof *a->seeds);
    for (size_t e = 0; e < a->experiment_count; e++) {
        assert_string_equal(a->experiments[e].name, b->experiments[e].name);
        assert_same_config(&a->experiments[e].config, &b->experiments[e].config);
    }
}

/* Writes the study's text and reads it back, with the other scale as the automatic one. */
static void assert_round_trip(const FvStudy *study) {
    FvStudy again;
    FvError err = {0};
    char *text = fv_study_format(study), *second;
    assert_non_null(text);
    write_bytes(other_path, text, strlen(text));
    if (fv_study_load(other_path, NULL, 0, "seed", &again, &err) != FV_OK)
        fail_msg("%s\n%s", err.text, text);
    assert_same_studies(study, &again);
    second = fv_study_format(&again);
    assert_string_equal(text, second);
    free(text);
    free(second);
    fv_study_free(&again);
}

static void test_round_trip(void **state) {
    (void)state;
    FvStudy s =
        LOADED("base: {lr: 0.1, scale: auto}\nseeds: [3, 18, 0]\n"
               "experiments: {A: {}, B_temp_0.1: {temperature: 0.30000000000000004},\n"
               "  S: {scale: seed, init_from: \"a: 'b' \\\\ \\\" #c\"}, 123: {vision: off},\n"
               "  no: {data: ' \xc3\xa4 '}, _: {contrastive: -1e-3}}\n",
               "steps=77", "A.lr=0.7");
    assert_round_trip(&s);
    char *text = fv_study_format(&s);
    assert_non_null(strstr(text, "study: x\nbase:\n  steps: 77\n"));
    assert_non_null(strstr(text, "experiments:\n  A:\n    scale: small\n"));
    assert_non_null(strstr(text, "    vision: off\n"));
    assert_non_null(strstr(text, "seeds: [3, 18, 0]\n"));
    free(text);
    fv_study_free(&s);
    s = loaded("experiments: {A: {}}", NULL);
    assert_round_trip(&s);
    fv_study_free(&s);
}

/* The message of comparing the study `asked` with `kept`, "" when they are the same. */
static const char *difference(const char *kept, const char *asked, const char *const *overrides) {
    static FvError err;
    FvStudy before = loaded(kept, NULL);
    char *text = fv_study_format(&before);
    assert_non_null(text);
    write_bytes(other_path, text, strlen(text));
    free(text);
    fv_study_free(&before);
    FvStudy now = loaded(asked, overrides);
    err.text[0] = '\0';
    FvStatus status = fv_study_same(other_path, &now, &err);
    fv_study_free(&now);
    assert_int_equal(status, *err.text ? FV_USAGE : FV_OK);
    return err.text;
}

#define DIFFERENCE(kept, asked, ...) difference(kept, asked, ARGUMENTS(__VA_ARGS__))

static void test_same(void **state) {
    (void)state;
    const char *kept = "experiments: {A_baseline: {}, B: {lr: 1}}\nseeds: [0, 1]\n";
    char expected[512];
    assert_string_equal(DIFFERENCE(kept, kept, "study=x"), "");
    assert_string_equal(DIFFERENCE(kept, kept, "checkpoint_steps=3", "checkpoint_seconds=1"), "");
    assert_string_equal(DIFFERENCE(kept, kept, "seeds=2,1,0", "study=other"), "");
    assert_string_equal(difference(kept,
                                   "experiments: {N: {lr: 2}, B: {lr: 1.0}, A_baseline: {}}\n"
                                   "seeds: [0, 1]\n",
                                   NULL),
                        "");
    snprintf(expected, sizeof expected,
             "%s was run with lr 0.0003 (A_baseline), now 0.001: use --fresh to start over, or "
             "another --out",
             other_path);
    assert_string_equal(DIFFERENCE(kept, kept, "lr=0.001"), expected);
    snprintf(expected, sizeof expected,
             "%s was run with steps 1500 (A_baseline), now 9; batch 2 (A_baseline), now 4; "
             "init_from \"\" (B), now a.safetensors; 1 more: use --fresh",
             other_path);
    const char *many =
        DIFFERENCE(kept, kept, "steps=9", "batch=4", "B.init_from=a.safetensors", "query_width=16");
    if (strncmp(many, expected, strlen(expected)) != 0)
        fail_msg("%s", many);
    assert_non_null(strstr(DIFFERENCE(kept, kept, "seeds=0"), "has seed 1, which is missing now"));
    assert_non_null(strstr(difference(kept, "experiments: {A_baseline: {}}\nseeds: [0, 1]", NULL),
                           "has the experiment B, which is missing now"));
    FvStudy now = loaded(kept, NULL);
    FvError err = {0};
    write_bytes(other_path, "experiments: {A: {old_key: 1}}", 30);
    assert_int_equal(fv_study_same(other_path, &now, &err), FV_USAGE);
    assert_non_null(strstr(err.text, "study.yaml:1: key \"old_key\" is not known"));
    assert_non_null(strstr(err.text, "use --fresh"));
    fv_study_free(&now);
}

/* --- what is shipped ------------------------------------------------------------------------ */

static FvStudy shipped(const char *path, const char *scale) {
    FvStudy study;
    FvError err = {0};
    if (fv_study_load(path, NULL, 0, scale, &study, &err) != FV_OK)
        fail_msg("%s", err.text);
    return study;
}

/* SPEC 4, the table. */
static void assert_seven(const FvStudy *s) {
    static const struct {
        const char *name;
        double temperature, contrastive;
        bool freeze_dino;
        size_t hard_attn_k;
        double entropy_margin;
    } rows[] = {{"A_baseline", 1, 0, false, 0, 0},         {"B_temp_0.1", 0.1, 0, false, 0, 0},
                {"C_contrastive", 1, 0.1, false, 0, 0},    {"D_freeze_dino", 1, 0, true, 0, 0},
                {"E_hard_attn_32", 1, 0, false, 32, 0},    {"F_entropy_reg", 1, 0, false, 0, 0.5},
                {"G_combined_best", 0.1, 0.1, true, 32, 0}};
    assert_int_equal(s->experiment_count, 7);
    for (size_t e = 0; e < 7; e++) {
        const FvConfig *c = &s->experiments[e].config;
        assert_string_equal(s->experiments[e].name, rows[e].name);
        assert_true(c->temperature == rows[e].temperature);
        assert_true(c->contrastive == rows[e].contrastive);
        assert_true(c->freeze_dino == rows[e].freeze_dino);
        assert_int_equal(c->hard_attn_k, rows[e].hard_attn_k);
        assert_true(c->entropy_margin == rows[e].entropy_margin);
        assert_true(c->vision && c->lambda_coarse == 1 && !c->freeze_lm);
        assert_string_equal(c->query_mode, "deep");
    }
    assert_int_equal(s->seed_count, 1);
    assert_int_equal(s->seeds[0], 0);
}

static void test_shipped(void **state) {
    (void)state;
    FvStudy s = shipped("configs/ablations.yaml", "small");
    assert_string_equal(s.name, "ablations");
    assert_seven(&s);
    FvConfig base = s.experiments[0].config;
    assert_int_equal(base.steps, 1500);
    assert_true(base.lr == 3e-4);
    assert_round_trip(&s);
    fv_study_free(&s);
    s = shipped("configs/ablations.yaml", "seed");
    assert_true(s.experiments[0].config.lr == 3e-5);
    assert_int_equal(s.experiments[0].config.image_size, 224);
    assert_round_trip(&s);
    fv_study_free(&s);
    s = shipped("configs/recommended.yaml", "small");
    assert_int_equal(s.experiment_count, 2);
    assert_true(config_of(&s, "D_freeze_dino")->freeze_dino);
    assert_int_equal(config_of(&s, "D_freeze_dino")->steps, 10000);
    assert_true(config_of(&s, "H_freeze_temp_0.1")->freeze_dino);
    assert_true(config_of(&s, "H_freeze_temp_0.1")->temperature == 0.1);
    assert_true(config_of(&s, "H_freeze_temp_0.1")->contrastive == 0);
    assert_int_equal(config_of(&s, "H_freeze_temp_0.1")->steps, 10000);
    fv_study_free(&s);
    s = shipped("configs/controls.yaml", "small");
    assert_same_config(config_of(&s, "A_baseline"), &base);
    assert_false(config_of(&s, "vision_off")->vision);
    base.vision = false; /* the only difference */
    assert_same_config(config_of(&s, "vision_off"), &base);
    fv_study_free(&s);
    s = shipped("configs/tiny.yaml", "seed");
    assert_string_equal(s.name, "tiny");
    assert_seven(&s);
    assert_string_equal(s.experiments[0].config.scale, "small");
    assert_round_trip(&s);
    fv_study_free(&s);
}

/* Every key with its help, in lines of at most 100 columns. */
static void test_help(void **state) {
    (void)state;
    char *text = NULL;
    size_t size = 0;
    FILE *terminal = stdout, *memory = open_memstream(&text, &size);
    assert_non_null(memory);
    stdout = memory; /* glibc's is a variable */
    fv_config_print_help();
    stdout = terminal;
    assert_int_equal(fclose(memory), 0);
    for (const FvKey *key = fv_config_keys(); key->name; key++) {
        char line[64];
        snprintf(line, sizeof line, "\n  %s ", key->name);
        if (!strstr(text, line))
            fail_msg("%s is not in the help", key->name);
    }
    for (const char *line = text; *line; line += strcspn(line, "\n") + 1)
        if (strcspn(line, "\n") > 100)
            fail_msg("longer than 100 columns: %.*s", (int)strcspn(line, "\n"), line);
    assert_non_null(strstr(text, "\noptimizer\n  lr                  0.0003      0 to 1000"));
    assert_non_null(strstr(text, "dino_width=384"));
    free(text);
}

static void test_shown(void **state) {
    (void)state;
    char out[8];
    assert_string_equal(fv_shown("abcdefg", out, sizeof out), "abcdefg");
    assert_string_equal(fv_shown("abcdefgh", out, sizeof out), "abcd...");
    assert_string_equal(fv_shown("abc\xc3\xa4xyz", out, sizeof out), "abc...");
    assert_string_equal(fv_shown("a\nb\x1b\xff", out, sizeof out), "a?b??");
    assert_string_equal(fv_shown("", out, sizeof out), "");
}

/* --- damaged files -------------------------------------------------------------------------- */

static const char fodder[] =
    "study: s\nbase: &b\n  lr: 0.1\n  scale: auto # x\n  data: \"a\\x41\"\n"
    "experiments:\n  A: {}\n  B_0.1: {temperature: 1e-1, vision: off}\n"
    "  C: *b\nseeds: [0, 1]\n";

/* Changes, removes, repeats and inserts a few bytes; sometimes all of them. */
static size_t damage(uint64_t key, uint64_t *next, char *bytes, size_t room) {
    static const char likely[] = ":{}[]&*#\"'\n\t -?!|>%@`,0.\\\xff\xc3~";
    size_t size = sizeof fodder - 1, edits = fv_random_below(key, (*next)++, 6);
    memcpy(bytes, fodder, size);
    if (fv_random_below(key, (*next)++, 8) == 0) {
        size = fv_random_below(key, (*next)++, room);
        for (size_t i = 0; i < size; i++)
            bytes[i] = (char)fv_random(key, (*next)++);
    }
    for (; edits > 0 && size > 0; edits--) {
        size_t at = fv_random_below(key, (*next)++, size);
        size_t length = fv_random_below(key, (*next)++, size - at) % 16 + 1;
        switch (fv_random_below(key, (*next)++, 4)) {
        case 0:
            bytes[at] = (char)fv_random(key, (*next)++);
            break;
        case 1:
            bytes[at] = likely[fv_random_below(key, (*next)++, sizeof likely - 1)];
            break;
        case 2:
            length = length < size - at ? length : size - at;
            memmove(bytes + at, bytes + at + length, size - at - length);
            size -= length;
            break;
        case 3:
            length = length < size - at ? length : size - at;
            if (size + length <= room) {
                memmove(bytes + at + length, bytes + at, size - at);
                size += length;
            }
            break;
        }
    }
    return size;
}

/* Whatever a file holds: a study that survives its own text, or a refusal with a message. */
static void test_damaged(void **state) {
    (void)state;
    const uint64_t key = fv_stream(0, "test_config");
    const clock_t end = clock() + 3 * CLOCKS_PER_SEC / 2;
    uint64_t next = 0;
    size_t good = 0, bad = 0;
    char bytes[512];
    for (size_t i = 0; i < 4000 && clock() < end; i++) {
        FvStudy study;
        FvError err = {0};
        size_t size = damage(key, &next, bytes, sizeof bytes);
        write_bytes(study_path, bytes, size);
        FvStatus status = fv_study_load(study_path, NULL, 0, "small", &study, &err);
        if (status == FV_OK) {
            assert_round_trip(&study);
            fv_study_free(&study);
            good++;
        } else {
            assert_int_equal(status, FV_USAGE);
            assert_non_null(strstr(err.text, study_path));
            assert_null(study.source);
            bad++;
        }
    }
    assert_true(good > 10 && bad > 10); /* the damage reaches both outcomes */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_precision),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_format),
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_hard_attention),
        cmocka_unit_test(test_study),
        cmocka_unit_test(test_overrides),
        cmocka_unit_test(test_scale),
        cmocka_unit_test(test_refused_keys),
        cmocka_unit_test(test_refused_studies),
        cmocka_unit_test(test_refused_overrides),
        cmocka_unit_test(test_refused_together),
        cmocka_unit_test(test_model_check),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_same),
        cmocka_unit_test(test_shipped),
        cmocka_unit_test(test_help),
        cmocka_unit_test(test_shown),
        cmocka_unit_test(test_damaged),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
