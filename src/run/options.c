#include "run/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* X(field, flag text, argument shown or NULL, kind, help) */
#define OPTIONS(X)                                                                                 \
    X(out, "out", "DIR", text, "where results go; default runs/STUDY")                             \
    X(only, "only", "NAME[,NAME]", text, "run these experiments of the study")                     \
    X(device, "device", "auto|cuda|cpu", text, "where to compute; default auto")                   \
    X(ranks_per_experiment, "ranks-per-experiment", "R", count,                                    \
      "ranks that share one experiment's batch; default 1")                                        \
    X(jobs_per_rank, "jobs-per-rank", "J", count,                                                  \
      "jobs that a rank group runs at once; default 1")                                            \
    X(threads, "threads", "N", count, "threads per rank; default its share of the cores")          \
    X(stage, "stage", "DIR", text,                                                                 \
      "a disk of the host's own: the data file is copied there once and read from there")          \
    X(fresh, "fresh", NULL, flag, "start over: remove what an earlier run left in DIR")            \
    X(list, "list", NULL, flag, "list the study's jobs, and stop")                                 \
    X(dry_run, "dry-run", NULL, flag,                                                              \
      "print jobs, groups, parameters, memory, disk and time, and stop")                           \
    X(help, "help", NULL, flag, "this text, with every configuration key")                         \
    X(version, "version", NULL, flag, "versions of program and libraries")

typedef enum Kind { text, count, flag } Kind;

static const struct {
    const char *name, *argument, *help;
    Kind kind;
    size_t offset;
} table[] = {
#define X(field, name, argument, kind, help)                                                       \
    {name, argument, help, kind, offsetof(FvOptions, field)},
    OPTIONS(X)
#undef X
};

enum { OPTION_COUNT = sizeof table / sizeof *table };

void fv_options_print_help(void) {
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        char left[64];
        snprintf(left, sizeof left, "--%s%s%s", table[i].name, table[i].argument ? " " : "",
                 table[i].argument ? table[i].argument : "");
        printf("  %-28s %s\n", left, table[i].help);
    }
}

static FvStatus set(FvOptions *o, size_t i, const char *value, FvError *err) {
    char *field = (char *)o + table[i].offset;
    if (table[i].kind == flag) {
        *(bool *)field = true;
    } else if (table[i].kind == text) {
        *(const char **)field = value;
    } else {
        char *end;
        errno = 0;
        unsigned long long n = strtoull(value, &end, 10);
        if (errno || *end || end == value || value[0] == '-' || n < 1 || n > 1000000)
            return FV_FAIL(err, FV_USAGE, "--%s %s: a whole number from 1 to 1000000 is needed",
                           table[i].name, value);
        *(size_t *)field = (size_t)n;
    }
    return FV_OK;
}

static FvStatus take_argument(FvOptions *o, const char *argument, FvError *err) {
    if (strchr(argument, '=')) {
        o->overrides[o->override_count++] = argument;
        return FV_OK;
    }
    if (o->study)
        return FV_FAIL(err, FV_USAGE, "%s: one study at a time (%s is the first); fovea --help",
                       argument, o->study);
    o->study = argument;
    return FV_OK;
}

static FvStatus check(const FvOptions *o, FvError *err) {
    const char *d = o->device;
    if (strcmp(d, "auto") != 0 && strcmp(d, "cpu") != 0 && strcmp(d, "cuda") != 0)
        return FV_FAIL(err, FV_USAGE, "--device %s: auto, cuda or cpu", d);
    return FV_OK;
}

FvStatus fv_options_parse(int argc, char **argv, FvOptions *o, FvError *err) {
    struct option longs[OPTION_COUNT + 1];
    memset(longs, 0, sizeof longs);
    for (size_t i = 0; i < OPTION_COUNT; i++)
        longs[i] = (struct option){table[i].name,
                                   table[i].argument ? required_argument : no_argument, NULL, 0};
    *o = (FvOptions){.device = "auto", .ranks_per_experiment = 1, .jobs_per_rank = 1};
    o->overrides = calloc((size_t)argc + 1, sizeof *o->overrides);
    if (!o->overrides)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    opterr = 0;
    optind = 1;
    for (int index = 0, code; (code = getopt_long(argc, argv, ":", longs, &index)) != -1;) {
        if (code == ':')
            return FV_FAIL(err, FV_USAGE, "%s: needs a value; fovea --help", argv[optind - 1]);
        if (code != 0)
            return FV_FAIL(err, FV_USAGE, "%s: no such option; fovea --help", argv[optind - 1]);
        FV_TRY(set(o, (size_t)index, optarg, err));
    }
    for (int i = optind; i < argc; i++)
        FV_TRY(take_argument(o, argv[i], err));
    return o->help || o->version ? FV_OK : check(o, err);
}

void fv_options_free(FvOptions *o) {
    free(o->overrides);
    *o = (FvOptions){0};
}
