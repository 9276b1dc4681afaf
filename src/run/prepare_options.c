#include "run/prepare_options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run/data.h"

void fv_prepare_print_help(void) {
    puts("usage: fovea prepare VIDEO|FOLDER... -o clips.h5 [options]\n"
         "       fovea prepare procedural    -o clips.h5 [options]\n"
         "\n"
         "Cuts videos into clips for a study (data=clips.h5); folders are searched through.\n"
         "With `procedural`, writes the built-in clips with their captions.\n"
         "\n"
         "  -o, --output FILE           the file to write; appears when it is complete\n"
         "      --frames N              frames per clip (8)\n"
         "      --stride N              takes every Nth frame of the video (2)\n"
         "      --size N                pixels per side, a multiple of 8 (64)\n"
         "      --crop center|none      the centred square, or all of it squeezed (center)\n"
         "      --held-out SHARE        share of the videos kept for evaluation (0.1)\n"
         "      --max-clips-per-video N the first N clips of each video (all)\n"
         "      --captions FILE         lines NAME TAB CAPTION, or JSON lines with video and "
         "caption\n"
         "      --tokenizer FILE        a tokenizer.json; without it tokens are bytes\n"
         "      --max-tokens N          room for a caption (64)\n"
         "      --seed N                chooses the held-out videos; procedural: data_seed (0)\n"
         "      --clips-train N         procedural: training clips (813)\n"
         "      --clips-held-out N      procedural: held-out clips (64)\n"
         "      --masks                 procedural: which object covers each pixel, too\n"
         "      --help                  this text");
}

static FvStatus parse_count(const char *name, const char *text, uint64_t low, uint64_t high,
                            uint64_t *out, FvError *err) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (end == text || *end || *text == '-' || errno || v < low || v > high)
        return FV_FAIL(err, FV_USAGE, "prepare: --%s=%s: needs a whole number from %llu to %llu",
                       name, text, (unsigned long long)low, (unsigned long long)high);
    *out = v;
    return FV_OK;
}

static FvStatus parse_size(const char *name, const char *text, size_t low, size_t high, size_t *out,
                           FvError *err) {
    uint64_t v = 0;
    FV_TRY(parse_count(name, text, low, high, &v, err));
    *out = (size_t)v;
    return FV_OK;
}

static FvStatus parse_share(const char *text, double *out, FvError *err) {
    char *end;
    *out = strtod(text, &end);
    if (end == text || *end || !(*out >= 0 && *out < 1))
        return FV_FAIL(err, FV_USAGE, "prepare: --held-out=%s: needs a share from 0 to below 1",
                       text);
    return FV_OK;
}

enum {
    FRAMES = 256,
    STRIDE,
    SIZE,
    CROP,
    HELD_OUT,
    MOST,
    SEED,
    CLIPS_TRAIN,
    CLIPS_HELD_OUT,
    MASKS,
    CAPTIONS,
    TOKENIZER,
    MAX_TOKENS,
    HELP
};

static FvStatus take_option(int key, FvPrepareOptions *o, FvError *err) {
    switch (key) {
    case 'o':
        o->output = optarg;
        return FV_OK;
    case FRAMES:
        return parse_size("frames", optarg, 1, 4096, &o->frames, err);
    case STRIDE:
        return parse_size("stride", optarg, 1, 100000, &o->stride, err);
    case SIZE:
        FV_TRY(parse_size("size", optarg, 8, 4096, &o->size, err));
        if (o->size % 8)
            return FV_FAIL(err, FV_USAGE, "prepare: --size=%s: needs a multiple of 8", optarg);
        return FV_OK;
    case CROP:
        o->center = !strcmp(optarg, "center");
        if (!o->center && strcmp(optarg, "none") != 0)
            return FV_FAIL(err, FV_USAGE, "prepare: --crop=%s: needs center or none", optarg);
        return FV_OK;
    case HELD_OUT:
        return parse_share(optarg, &o->held_out, err);
    case MOST:
        return parse_size("max-clips-per-video", optarg, 1, UINT32_MAX, &o->most, err);
    case SEED:
        return parse_count("seed", optarg, 0, UINT32_MAX, &o->seed, err);
    case CLIPS_TRAIN:
        return parse_size("clips-train", optarg, 1, 10000000, &o->clips[FV_TRAIN], err);
    case CLIPS_HELD_OUT:
        return parse_size("clips-held-out", optarg, 1, 10000000, &o->clips[FV_HELD_OUT], err);
    case CAPTIONS:
        o->captions = optarg;
        return FV_OK;
    case TOKENIZER:
        o->tokenizer = optarg;
        return FV_OK;
    case MAX_TOKENS:
        return parse_size("max-tokens", optarg, 1, 4096, &o->max_tokens, err);
    case MASKS:
        o->masks = true;
        return FV_OK;
    case HELP:
        o->help = true;
        return FV_OK;
    default:
        return FV_FAIL(err, FV_USAGE,
                       "prepare: option %s is not known or lacks its value: see "
                       "fovea prepare --help",
                       optarg);
    }
}

/* What has to be there, and what does not go together. */
static FvStatus check(FvPrepareOptions *o, FvError *err) {
    if (o->input_count == 0)
        return FV_FAIL(err, FV_USAGE,
                       "prepare: name videos or folders, or `procedural`: see fovea "
                       "prepare --help");
    if (!o->output || !*o->output)
        return FV_FAIL(err, FV_USAGE, "prepare: name the file to write with -o clips.h5");
    o->procedural = o->input_count == 1 && !strcmp(o->inputs[0], "procedural");
    if (o->masks && !o->procedural)
        return FV_FAIL(err, FV_USAGE, "prepare: --masks: only `procedural` clips have masks");
    if (o->captions && o->procedural)
        return FV_FAIL(err, FV_USAGE, "prepare: --captions: `procedural` clips have their own");
    if (!o->captions && (o->tokenizer || o->max_tokens))
        return FV_FAIL(err, FV_USAGE, "prepare: %s needs --captions FILE",
                       o->tokenizer ? "--tokenizer" : "--max-tokens");
    if (o->captions && !o->max_tokens)
        o->max_tokens = 64;
    return FV_OK;
}

FvStatus fv_prepare_parse(int argc, char **argv, FvPrepareOptions *o, FvError *err) {
    static const struct option table[] = {
        {"output", required_argument, NULL, 'o'},
        {"frames", required_argument, NULL, FRAMES},
        {"stride", required_argument, NULL, STRIDE},
        {"size", required_argument, NULL, SIZE},
        {"crop", required_argument, NULL, CROP},
        {"held-out", required_argument, NULL, HELD_OUT},
        {"max-clips-per-video", required_argument, NULL, MOST},
        {"seed", required_argument, NULL, SEED},
        {"clips-train", required_argument, NULL, CLIPS_TRAIN},
        {"clips-held-out", required_argument, NULL, CLIPS_HELD_OUT},
        {"captions", required_argument, NULL, CAPTIONS},
        {"tokenizer", required_argument, NULL, TOKENIZER},
        {"max-tokens", required_argument, NULL, MAX_TOKENS},
        {"masks", no_argument, NULL, MASKS},
        {"help", no_argument, NULL, HELP},
        {NULL, 0, NULL, 0}};
    *o = (FvPrepareOptions){
        .frames = 8, .stride = 2, .size = 64, .held_out = 0.1, .center = true, .clips = {813, 64}};
    optind = 0; /* a fresh scan */
    opterr = 0;
    for (int key; (key = getopt_long(argc, argv, "o:", table, NULL)) != -1;) {
        if (key == '?')
            optarg = argv[optind - 1];
        FV_TRY(take_option(key, o, err));
    }
    o->inputs = argv + optind;
    o->input_count = (size_t)(argc - optind);
    if (o->help)
        return FV_OK;
    return check(o, err);
}
