#include "run/model_folder.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "run/files.h"
#include "run/hf_config.h"

/* --- where weights are ---------------------------------------------------------------------- */

static bool is_none(const char *from) {
    return strcmp(from, "none") == 0;
}

static bool readable(const char *path) {
    return access(path, R_OK) == 0;
}

/* `from` itself, or models/`from` here or beside the program. */
static bool find_model(const char *from, char out[FV_TEXT]) {
    char inside[FV_TEXT], beside[FV_PATH];
    snprintf(out, FV_TEXT, "%s", from);
    if (readable(out))
        return true;
    if ((size_t)snprintf(inside, sizeof inside, "models/%s", from) >= sizeof inside)
        return false;
    fv_beside_program(inside, beside);
    snprintf(out, FV_TEXT, "%.*s", FV_TEXT - 1, beside);
    return strlen(beside) < FV_TEXT && readable(out);
}

FvStatus fv_folder_find(const char *from, char weights[FV_TEXT], char config[FV_TEXT],
                        FvError *err) {
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json"};
    char place[FV_TEXT];
    struct stat info;
    config[0] = '\0';
    if (!find_model(from, place))
        return FV_FAIL(
            err, FV_DATA,
            "%s: no such file or folder, nor models/%s (docs/weights.md tells how to get "
            "weights)",
            from, from);
    bool folder = stat(place, &info) == 0 && S_ISDIR(info.st_mode);
    size_t length = strlen(place);
    for (int i = 0; !folder && i < 2; i++)
        if (strcmp(fv_file_name(place), names[i]) == 0) /* config.json stands beside these */
            length -= strlen(names[i]);
    if (folder || length < strlen(place)) {
        const char *slash = folder && place[length - 1] != '/' ? "/" : "";
        if (length + 32 > FV_TEXT)
            return FV_FAIL(err, FV_DATA, "%.100s...: path is too long", place);
        snprintf(config, FV_TEXT, "%.*s%sconfig.json", (int)length, place, slash);
        if (!readable(config))
            config[0] = '\0';
    }
    for (int i = 0; folder && i < 2; i++) {
        snprintf(weights, FV_TEXT, "%.*s/%s", (int)length, place, names[i]);
        if (readable(weights))
            return FV_OK;
    }
    if (folder)
        return FV_FAIL(err, FV_DATA, "%s: holds no model.safetensors and no index of one", place);
    snprintf(weights, FV_TEXT, "%s", place);
    return FV_OK;
}

/* --- config.json ---------------------------------------------------------------------------- */

/* A size that config.json gives, and the key that must agree. */
typedef struct Size {
    const char *key;
    size_t given;
    size_t *asked;
} Size;

enum { DINO_SIZES = 5, LM_SIZES = 6 };

static void list_dino(const FvDinoSizes *s, FvConfig *c, Size out[DINO_SIZES]) {
    const Size sizes[DINO_SIZES] = {{"patch", s->patch, &c->patch},
                                    {"dino_width", s->width, &c->dino_width},
                                    {"dino_heads", s->heads, &c->dino_heads},
                                    {"dino_layers", s->layers, &c->dino_layers},
                                    {"dino_mlp", s->mlp, &c->dino_mlp}};
    memcpy(out, sizes, sizeof sizes);
}

static void list_lm(const FvLlamaSizes *s, FvConfig *c, Size out[LM_SIZES]) {
    const Size sizes[LM_SIZES] = {
        {"lm_width", s->width, &c->lm_width}, {"lm_layers", s->layers, &c->lm_layers},
        {"lm_heads", s->heads, &c->lm_heads}, {"lm_kv_heads", s->kv_heads, &c->lm_kv_heads},
        {"lm_mlp", s->mlp, &c->lm_mlp},       {"lm_vocab", s->vocab, &c->lm_vocab}};
    memcpy(out, sizes, sizeof sizes);
}

static bool has_config(const char *from, char config[FV_TEXT]) {
    char weights[FV_TEXT];
    FvError ignored;
    return !is_none(from) && strcmp(from, "auto") != 0 &&
           fv_folder_find(from, weights, config, &ignored) == FV_OK && config[0];
}

/* The keys' own ranges hold for what they are set to from here. */
static FvStatus check_ranges(const char *config, const Size *sizes, size_t count, FvError *err) {
    for (size_t i = 0; i < count; i++) {
        const FvKey *key = fv_config_find(sizes[i].key);
        if ((double)sizes[i].given < key->low || (double)sizes[i].given > key->high)
            return FV_FAIL(err, FV_DATA, "%s: %s would be %zu, allowed are %.10g to %.10g", config,
                           key->name, sizes[i].given, key->low, key->high);
    }
    return FV_OK;
}

static void set_sizes(const char *config, const Size *sizes, size_t count) {
    FvError ignored;
    if (check_ranges(config, sizes, count, &ignored) != FV_OK)
        return;
    for (size_t i = 0; i < count; i++)
        *sizes[i].asked = sizes[i].given;
}

void fv_folder_preset(FvConfig *c) {
    char config[FV_TEXT];
    FvError ignored; /* what is wrong is told by fv_weights_check */
    FvDinoSizes dino;
    FvLlamaSizes lm;
    Size sizes[LM_SIZES];
    if (has_config(c->dino_from, config) && fv_hf_read_dino(config, &dino, &ignored) == FV_OK) {
        list_dino(&dino, c, sizes);
        set_sizes(config, sizes, DINO_SIZES);
    }
    if (has_config(c->lm_from, config) && fv_hf_read_llama(config, &lm, &ignored) == FV_OK) {
        list_lm(&lm, c, sizes);
        set_sizes(config, sizes, LM_SIZES);
        c->lm_rope_theta = lm.rope_theta;
        c->lm_rms_eps = lm.rms_eps;
    }
}

static FvStatus compare(const char *config, const Size *sizes, size_t count, FvError *err) {
    FV_TRY(check_ranges(config, sizes, count, err));
    for (size_t i = 0; i < count; i++)
        if (*sizes[i].asked != sizes[i].given)
            return FV_FAIL(err, FV_DATA, "%s %zu: %s says %zu; leave the key out to take its sizes",
                           sizes[i].key, *sizes[i].asked, config, sizes[i].given);
    return FV_OK;
}

FvStatus fv_folder_check_dino(const char *config, const FvConfig *asked, FvError *err) {
    FvConfig c = *asked;
    FvDinoSizes given;
    Size sizes[DINO_SIZES];
    FV_TRY(fv_hf_read_dino(config, &given, err));
    list_dino(&given, &c, sizes);
    return compare(config, sizes, DINO_SIZES, err);
}

FvStatus fv_folder_check_lm(const char *config, const FvConfig *asked, FvError *err) {
    FvConfig c = *asked;
    FvLlamaSizes given;
    Size sizes[LM_SIZES];
    FV_TRY(fv_hf_read_llama(config, &given, err));
    list_lm(&given, &c, sizes);
    FV_TRY(compare(config, sizes, LM_SIZES, err));
    if (c.lm_rope_theta != given.rope_theta)
        return FV_FAIL(err, FV_DATA, "lm_rope_theta %g: %s says %g", c.lm_rope_theta, config,
                       given.rope_theta);
    if (c.lm_rms_eps != given.rms_eps)
        return FV_FAIL(err, FV_DATA, "lm_rms_eps %g: %s says %g", c.lm_rms_eps, config,
                       given.rms_eps);
    return FV_OK;
}

static const char seed_dino[] = "dinov2-small", seed_lm[] = "SmolLM2-135M";

bool fv_folder_has_seed(void) {
    char weights[FV_TEXT], config[FV_TEXT];
    FvError ignored;
    return fv_folder_find(seed_dino, weights, config, &ignored) == FV_OK &&
           fv_folder_find(seed_lm, weights, config, &ignored) == FV_OK;
}

void fv_folder_choose(FvConfig *c) {
    bool seed = strcmp(c->scale, "seed") == 0;
    char config[FV_TEXT];
    FvError ignored;
    if (strcmp(c->dino_from, "auto") == 0) {
        const char *name = seed ? seed_dino : "dino-nano";
        bool fits = has_config(name, config) && fv_folder_check_dino(config, c, &ignored) == FV_OK;
        snprintf(c->dino_from, sizeof c->dino_from, "%s", fits ? name : "none");
    }
    if (strcmp(c->lm_from, "auto") == 0) {
        bool fits =
            seed && has_config(seed_lm, config) && fv_folder_check_lm(config, c, &ignored) == FV_OK;
        snprintf(c->lm_from, sizeof c->lm_from, "%s", fits ? seed_lm : "none");
    }
}
