#include "run/pretrain_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/memory.h"
#include "run/files.h"

static const FvPretrainConfig defaults = {
#define X(kind, key, value, low, high, help) .key = value,
    FV_PRETRAIN_KEYS(X)
#undef X
};

static const FvKey key_list[] = {
#define X(kind, key, value, low, high, help)                                                       \
    FV_KEY_ROW_##kind(FvPretrainConfig, key, low, high, help)
    FV_PRETRAIN_KEYS(X)
#undef X
        {NULL, NULL, FV_KEY_size, 0, 0, 0, NULL}};

static const FvKeys keys = {key_list, &defaults};

void fv_pretrain_print_help(void) {
    puts("usage: fovea pretrain procedural|CLIPS.h5 [key=value ...] [--out DIR] [--threads N]\n"
         "       [--device auto|cuda|cpu] [--fresh]\n\n"
         "Trains an encoder on single frames without labels (DINO: a student learns to say of one\n"
         "crop what its slow average says of another) and writes DIR/config.json and\n"
         "DIR/model.safetensors, a DINOv2 folder for dino_from. DIR: runs/pretrain. The same\n"
         "command again goes on. Under mpirun the ranks share each step's images.\n\nkeys:");
    fv_keys_print_help(&keys);
}

/* --- what is asked for ---------------------------------------------------------------------- */

static FvStatus check(const FvOptions *o, const FvPretrainConfig *c, size_t ranks, FvError *err) {
    if (!o->study)
        return FV_FAIL(err, FV_USAGE,
                       "pretrain: name the data: procedural or a clips.h5; fovea "
                       "pretrain --help");
    if (strcmp(o->study, "procedural") != 0 && access(o->study, R_OK) != 0)
        return FV_FAIL(err, FV_DATA,
                       "%s: %s: name a file made by `fovea prepare`, or procedural for drawn clips",
                       o->study, strerror(errno));
    if (strcmp(o->device, "cuda") == 0)
        return FV_FAIL(err, FV_DEVICE, "pretrain computes on the processor; use --device cpu");
    if (o->only || o->list || o->dry_run || o->jobs_per_rank > 1 || o->ranks_per_experiment > 1)
        return FV_FAIL(err, FV_USAGE,
                       "pretrain takes --out, --threads, --device and --fresh; all "
                       "ranks share the one job");
    if (c->batch % ranks != 0)
        return FV_FAIL(err, FV_USAGE, "pretrain: batch %zu cannot be shared equally by %zu ranks",
                       c->batch, ranks);
    if (c->locals && !(c->local_area < c->crop_area))
        return FV_FAIL(err, FV_USAGE, "pretrain: local_area %g must be below crop_area %g",
                       c->local_area, c->crop_area);
    if (c->dino_mlp % c->dino_width != 0)
        return FV_FAIL(err, FV_USAGE,
                       "pretrain: dino_mlp %zu must be a multiple of dino_width %zu "
                       "(config.json holds their ratio)",
                       c->dino_mlp, c->dino_width);
    return FV_OK;
}

FvStatus fv_pretrain_read(const FvOptions *o, size_t ranks, FvPretrainConfig *c, FvError *err) {
    *c = defaults;
    for (size_t i = 0; i < o->override_count; i++) {
        const char *argument = o->overrides[i], *equals = strchr(argument, '=');
        char name[FV_NAME];
        snprintf(name, sizeof name, "%.*s", (int)(equals - argument), argument);
        const FvKey *key = fv_keys_find(&keys, name);
        FvNearest nearest = {name, NULL, 0};
        for (const FvKey *k = key_list; k->name; k++)
            fv_nearest_offer(&nearest, k->name);
        if (!key)
            return FV_FAIL(err, FV_USAGE, "pretrain: key \"%s\" is not known%s%s%s", name,
                           nearest.name ? "; did you mean \"" : "",
                           nearest.name ? nearest.name : "; fovea pretrain --help lists the keys",
                           nearest.name ? "\"?" : "");
        FV_TRY(fv_keys_set(&keys, c, key, equals + 1, "pretrain", err));
    }
    return check(o, c, ranks, err);
}

char *fv_pretrain_describe(const FvPretrainConfig *c, const char *data) {
    size_t count = sizeof key_list / sizeof *key_list, room = fv_mul(count + 2, FV_TEXT + FV_NAME);
    char *text = calloc(room, 1), value[FV_TEXT];
    if (!text)
        return NULL;
    size_t used = (size_t)snprintf(text, room, "data: %s\n", data);
    for (const FvKey *k = key_list; k->name; k++) {
        if (strncmp(k->name, "checkpoint_", 11) == 0)
            continue;
        fv_config_format(c, k, value, sizeof value);
        used += (size_t)snprintf(text + used, room - used, "%s: %s\n", k->name, value);
    }
    return text;
}

FvStatus fv_pretrain_same(const char *path, const char *text, FvError *err) {
    char *kept;
    size_t size;
    FV_TRY(fv_file_read(path, &kept, &size, err));
    FvStatus status = FV_OK;
    const char *a = kept, *b = text;
    while (status == FV_OK && (*a || *b)) {
        size_t m = strcspn(a, "\n"), n = strcspn(b, "\n");
        if (m != n || strncmp(a, b, n) != 0)
            status = FV_FAIL(err, FV_USAGE,
                             "%s was begun with \"%.*s\", now \"%.*s\": use the same settings, "
                             "another --out, or --fresh to start over",
                             path, (int)(m > 100 ? 100 : m), a, (int)(n > 100 ? 100 : n), b);
        a += m + (a[m] == '\n');
        b += n + (b[n] == '\n');
    }
    free(kept);
    return status;
}
