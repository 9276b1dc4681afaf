#include "run/config.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/memory.h"
#include "run/files.h"

/* --- the table ------------------------------------------------------------------------------ */

static const FvKey keys[] = {
#define X(kind, key, value, low, high, help) FV_KEY_ROW_##kind(FvConfig, key, low, high, help)
    FV_CONFIG_KEYS(X)
#undef X
        {NULL, NULL, FV_KEY_size, 0, 0, 0, NULL}};

static const FvConfig defaults = {
#define X(kind, key, value, low, high, help) .key = value,
    FV_CONFIG_KEYS(X)
#undef X
};

/* What `scale: seed` sets; `small` is the table itself. */
static const struct {
    const char *key, *value;
} seed_preset[] = {
    {"steps", "1500"},        {"batch", "2"},         {"frames", "8"},       {"image_size", "224"},
    {"patch", "14"},          {"lr", "3e-5"},         {"dino_width", "384"}, {"dino_heads", "6"},
    {"dino_layers", "12"},    {"dino_mlp", "1536"},   {"lm_width", "576"},   {"lm_layers", "30"},
    {"lm_heads", "9"},        {"lm_kv_heads", "3"},   {"lm_mlp", "1536"},    {"lm_vocab", "49152"},
    {"lm_rope_theta", "1e5"}, {"query_width", "128"}, {"head_width", "64"}};

enum { SEED_PRESET_COUNT = sizeof seed_preset / sizeof *seed_preset };

static const FvKeys study_keys = {keys, &defaults};

const FvKey *fv_keys_find(const FvKeys *table, const char *name) {
    for (const FvKey *key = table->list; key->name; key++)
        if (strcmp(key->name, name) == 0)
            return key;
    return NULL;
}

const FvKey *fv_config_keys(void) {
    return keys;
}

const FvKey *fv_config_find(const char *name) {
    return fv_keys_find(&study_keys, name);
}

bool fv_key_changes_results(const FvKey *key) {
    static const char *const others[] = {"checkpoint_steps", "checkpoint_seconds", "graph", "comm",
                                         "watchdog"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(key->name, others[i]) == 0)
            return false;
    return true;
}

const FvConfig *fv_config_defaults(void) {
    return &defaults;
}

/* --- text for messages ---------------------------------------------------------------------- */

const char *fv_shown(const char *text, char *out, size_t size) {
    size_t n = strnlen(text, size);
    bool cut = n >= size;
    if (cut)
        for (n = size - 4; n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80;)
            n--;
    for (size_t i = 0; i < n; i++)
        out[i] = iscntrl((unsigned char)text[i]) ? '?' : text[i];
    memcpy(out + n, cut ? "..." : "", cut ? 4 : 1);
    fv_utf8_clean(out);
    return out;
}

bool fv_printable(const char *text) {
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c < 0x20 || *c == 0x7F)
            return false;
        if (c[0] == 0xC2 && c[1] < 0xA0) /* U+0080 .. U+009F */
            return false;
        if (c[0] == 0xE2 && c[1] == 0x80 && (c[2] == 0xA8 || c[2] == 0xA9)) /* line separators */
            return false;
        if (c[0] == 0xEF && ((c[1] == 0xBB && c[2] == 0xBF) || /* byte order mark */
                             (c[1] == 0xBF && c[2] >= 0xBE)))  /* U+FFFE, U+FFFF */
            return false;
    }
    char *clean = strdup(text);
    if (!clean)
        return false;
    fv_utf8_clean(clean);
    bool same = strcmp(clean, text) == 0;
    free(clean);
    return same;
}

enum { LONGEST_NAME = 64 };

/* Levenshtein distance without regard to case; both names are at most LONGEST_NAME long. */
static size_t edit_distance(const char *a, const char *b) {
    size_t row[LONGEST_NAME + 1], n = strlen(b);
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            size_t changed =
                diagonal + (tolower((unsigned char)a[i]) != tolower((unsigned char)b[j]));
            diagonal = row[j + 1];
            size_t best = (row[j] < row[j + 1] ? row[j] : row[j + 1]) + 1;
            row[j + 1] = changed < best ? changed : best;
        }
    }
    return row[n];
}

void fv_nearest_offer(FvNearest *nearest, const char *name) {
    size_t wanted = strlen(nearest->wanted), length = strlen(name);
    if (wanted > LONGEST_NAME || length > LONGEST_NAME)
        return;
    size_t distance = edit_distance(nearest->wanted, name), most = 1 + wanted / 3;
    /* "temp" for temperature and "batch_size" for batch are one thought away */
    bool part = (wanted >= 4 && strcasestr(name, nearest->wanted)) ||
                (length >= 4 && strcasestr(nearest->wanted, name));
    if (part && distance > 2)
        distance = 2;
    if (distance <= most && (!nearest->name || distance < nearest->distance)) {
        nearest->name = name;
        nearest->distance = distance;
    }
}

/* --- one value ------------------------------------------------------------------------------ */

static const char *format_real(double value, char *out, size_t size) {
    snprintf(out, size, "%.15g", value);
    if (strtod(out, NULL) != value)
        snprintf(out, size, "%.17g", value);
    return out;
}

/* How a flag is written: vision is a thing switched off, the others are statements. */
static const char *flag_word(const FvKey *key, bool value) {
    if (key->offset == offsetof(FvConfig, vision))
        return value ? "on" : "off";
    return value ? "true" : "false";
}

void fv_config_format(const void *config, const FvKey *key, char *out, size_t size) {
    const void *field = (const char *)config + key->offset;
    switch (key->kind) {
    case FV_KEY_size:
        snprintf(out, size, "%zu", *(const size_t *)field);
        break;
    case FV_KEY_real:
        format_real(*(const double *)field, out, size);
        break;
    case FV_KEY_flag:
        snprintf(out, size, "%s", flag_word(key, *(const bool *)field));
        break;
    case FV_KEY_text:
        snprintf(out, size, "%s", (const char *)field);
        break;
    }
}

enum { ALLOWED = 72, LIMIT = 32 }; /* bytes for what a key allows, and for one end of a range */

/* 1e+06 rather than 1000000, where the key takes exponents. */
static const char *format_limit(const FvKey *key, double value, char out[LIMIT]) {
    snprintf(out, LIMIT, "%g", value);
    return key->kind == FV_KEY_real && strtod(out, NULL) == value ? out
                                                                  : format_real(value, out, LIMIT);
}

static const char *allowed(const FvKey *key, char out[ALLOWED]) {
    char low[LIMIT], high[LIMIT];
    if (key->kind == FV_KEY_flag)
        snprintf(out, ALLOWED, "%s|%s", flag_word(key, true), flag_word(key, false));
    else if (key->kind == FV_KEY_text)
        snprintf(out, ALLOWED, "%s", *key->choices ? key->choices : "text");
    else
        snprintf(out, ALLOWED, "%s to %s", format_limit(key, key->low, low),
                 format_limit(key, key->high, high));
    return out;
}

static FvStatus refuse(const FvKeys *table, const FvKey *key, const char *text, const char *where,
                       const char *why, FvError *err) {
    char range[ALLOWED], shown[64], value[FV_TEXT];
    fv_config_format(table->defaults, key, value, sizeof value);
    return FV_FAIL(err, FV_USAGE, "%s: %s: \"%s\" %s; allowed: %s, default %s", where, key->name,
                   fv_shown(text, shown, sizeof shown), why, allowed(key, range),
                   *value ? value : "\"\"");
}

/* Digits only; what does not fit becomes SIZE_MAX, above every range. */
static bool parse_size(const char *text, size_t *out) {
    size_t value = 0;
    const char *c = text;
    for (; isdigit((unsigned char)*c); c++)
        value = fv_add(fv_mul(value, 10), (size_t)(*c - '0'));
    *out = value;
    return c != text && *c == '\0';
}

/* Decimal or exponent notation; strtod alone would also take nan, inf, hexadecimals and blanks. */
static bool parse_real(const char *text, double *out) {
    size_t whole, fraction = 0;
    const char *c = text + (*text == '-' || *text == '+');
    whole = strspn(c, "0123456789");
    c += whole;
    if (*c == '.') {
        fraction = strspn(++c, "0123456789");
        c += fraction;
    }
    if (whole + fraction == 0)
        return false;
    if (*c == 'e' || *c == 'E') {
        c += c[1] == '-' || c[1] == '+' ? 2 : 1;
        size_t exponent = strspn(c, "0123456789");
        if (exponent == 0)
            return false;
        c += exponent;
    }
    *out = strtod(text, NULL) + 0.0; /* -0 becomes 0 */
    return *c == '\0';
}

static bool parse_flag(const char *text, bool *out) {
    static const char *const yes[] = {"true", "on", "yes"}, *const no[] = {"false", "off", "no"};
    for (size_t i = 0; i < 3; i++) {
        *out = strcasecmp(text, yes[i]) == 0;
        if (*out || strcasecmp(text, no[i]) == 0)
            return true;
    }
    return false;
}

static bool is_choice(const char *choices, const char *text) {
    size_t n = strlen(text);
    if (n == 0 || strchr(text, '|'))
        return false;
    for (const char *c = choices; c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        if (strncmp(c, text, n) == 0 && (c[n] == '|' || c[n] == '\0'))
            return true;
    return false;
}

static FvStatus set_text(const FvKeys *table, void *field, const FvKey *key, const char *text,
                         const char *where, FvError *err) {
    if (*key->choices && !is_choice(key->choices, text))
        return refuse(table, key, text, where, "is none of the choices", err);
    if (strlen(text) >= FV_TEXT)
        return refuse(table, key, text, where, "is longer than 511 bytes", err);
    if (!fv_printable(text))
        return refuse(table, key, text, where, "is not UTF-8 text on one line", err);
    memcpy(field, text, strlen(text) + 1);
    return FV_OK;
}

FvStatus fv_keys_set(const FvKeys *table, void *values, const FvKey *key, const char *text,
                     const char *where, FvError *err) {
    void *field = (char *)values + key->offset;
    double value = 0;
    switch (key->kind) {
    case FV_KEY_size:
        if (!parse_size(text, field))
            return refuse(table, key, text, where, "is not a whole number", err);
        value = (double)*(size_t *)field;
        break;
    case FV_KEY_real:
        if (!parse_real(text, field))
            return refuse(table, key, text, where, "is not a number", err);
        value = *(double *)field;
        break;
    case FV_KEY_flag:
        return parse_flag(text, field) ? FV_OK
                                       : refuse(table, key, text, where, "is no switch", err);
    case FV_KEY_text:
        return set_text(table, field, key, text, where, err);
    }
    if (!(value >= key->low && value <= key->high))
        return refuse(table, key, text, where, "is out of range", err);
    return FV_OK;
}

FvStatus fv_config_set(FvConfig *config, const FvKey *key, const char *text, const char *where,
                       FvError *err) {
    return fv_keys_set(&study_keys, config, key, text, where, err);
}

void fv_config_preset(FvConfig *config) {
    if (strcmp(config->scale, "seed") != 0)
        return;
    for (size_t i = 0; i < SEED_PRESET_COUNT; i++) /* the unit test sets each of them */
        (void)fv_config_set(config, fv_config_find(seed_preset[i].key), seed_preset[i].value,
                            "preset", NULL);
}

/* --- a whole configuration ------------------------------------------------------------------ */

/* k of a 16 x 16 grid as the same share of `patches`, rounded, and never 0 by rounding. */
static size_t scaled_k(size_t k, size_t patches) {
    size_t scaled = (k * patches + 128) / 256;
    return k > 0 && scaled == 0 ? 1 : scaled;
}

FvStatus fv_config_model(const FvConfig *c, size_t ranks, size_t max_text, FvModelConfig *out,
                         FvError *err) {
    if (ranks == 0 || c->batch % ranks != 0)
        return FV_FAIL(err, FV_USAGE, "batch %zu: cannot be shared equally by %zu ranks", c->batch,
                       ranks);
    *out = (FvModelConfig){.clips = c->batch / ranks,
                           .frames = c->frames,
                           .size = c->image_size,
                           .max_text = max_text,
                           .patch = c->patch,
                           .dino_width = c->dino_width,
                           .dino_heads = c->dino_heads,
                           .dino_layers = c->dino_layers,
                           .dino_mlp = c->dino_mlp,
                           .lm_width = c->lm_width,
                           .lm_layers = c->lm_layers,
                           .lm_heads = c->lm_heads,
                           .lm_kv_heads = c->lm_kv_heads,
                           .lm_mlp = c->lm_mlp,
                           .lm_vocab = c->lm_vocab,
                           .lm_rope_theta = c->lm_rope_theta,
                           .lm_rms_eps = c->lm_rms_eps,
                           .query_width = c->query_width,
                           .head_width = c->head_width,
                           .film_width = c->film_width,
                           .deep = strcmp(c->query_mode, "deep") == 0,
                           .captions = strcmp(c->text, "captions") == 0,
                           .vision = c->vision,
                           .freeze_dino = c->freeze_dino,
                           .freeze_lm = c->freeze_lm,
                           .temperature = c->temperature,
                           .contrastive = c->contrastive,
                           .entropy_margin = c->entropy_margin,
                           .lambda_coarse = c->lambda_coarse,
                           .skip_tail = c->skip_tail,
                           .share_text = c->share_text,
                           .share_convolutions = c->share_convolutions,
                           .cache_encoder = c->cache_encoder};
    FV_TRY(fv_model_config_check(out, err));
    out->hard_attn_k = scaled_k(c->hard_attn_k, fv_patches(out));
    return FV_OK;
}

FvStatus fv_config_check(const FvConfig *c, FvError *err) {
    FvModelConfig model;
    bool procedural = strcmp(c->data, "procedural") == 0;
    FV_TRY(fv_config_model(c, 1, 1, &model, err));
    if (c->warmup_steps > c->steps)
        return FV_FAIL(err, FV_USAGE, "warmup_steps %zu: must not be more than steps %zu",
                       c->warmup_steps, c->steps);
    if (!*c->data)
        return FV_FAIL(err, FV_USAGE, "data is empty: \"procedural\" or the path of a clips.h5");
    if (!*c->dino_from || !*c->lm_from)
        return FV_FAIL(err, FV_USAGE, "%s is empty: a file, a folder, none or auto is needed",
                       *c->dino_from ? "lm_from" : "dino_from");
    if (procedural && c->clips_train < c->batch)
        return FV_FAIL(err, FV_USAGE, "clips_train %zu: must not be less than batch %zu",
                       c->clips_train, c->batch);
    if (procedural && strcmp(c->latents, "file") == 0)
        return FV_FAIL(err, FV_USAGE,
                       "latents file: procedural data has none; use blocks, or set "
                       "data to a clips.h5 that holds /latents");
    return FV_OK;
}

/* --- help ----------------------------------------------------------------------------------- */

/* A heading stands before the key that begins its group. */
static const struct {
    const char *key, *heading;
} groups[] = {{"scale", "what is run"},
              {"data", "data"},
              {"temperature", "interventions"},
              {"skip_tail", "savings: the same numbers but for rounding"},
              {"lr", "optimizer"},
              {"eval_every", "what is kept"},
              {"dino_from", "start values"},
              {"patch", "sizes of the model"}};

enum { HELP_COLUMNS = 100 };

/* Prints text word by word from column `at`, further lines indented to `indent`. Returns the
 * column reached. */
static size_t print_wrapped(const char *text, size_t at, size_t indent) {
    while (*text) {
        size_t n = strcspn(text, " ");
        if (at > indent && at + 1 + n > HELP_COLUMNS) {
            printf("\n%*s", (int)indent, "");
            at = indent;
        } else if (at > indent) {
            putchar(' ');
            at++;
        }
        printf("%.*s", (int)n, text);
        at += n;
        text += n + (text[n] == ' ');
    }
    return at;
}

void fv_keys_print_help(const FvKeys *table) {
    char value[FV_TEXT], range[ALLOWED];
    for (const FvKey *key = table->list; key->name; key++) {
        for (size_t i = 0; table == &study_keys && i < sizeof groups / sizeof *groups; i++)
            if (strcmp(groups[i].key, key->name) == 0)
                printf("%s\n", groups[i].heading);
        fv_config_format(table->defaults, key, value, sizeof value);
        int column = printf("  %-18s  %-10s  %-16s  ", key->name, *value ? value : "\"\"",
                            allowed(key, range));
        print_wrapped(key->help, (size_t)column, (size_t)column);
        putchar('\n');
    }
}

void fv_config_print_help(void) {
    char pair[64];
    fv_keys_print_help(&study_keys);
    printf("scale: seed\n  ");
    size_t at = 2;
    for (size_t i = 0; i < SEED_PRESET_COUNT; i++) {
        snprintf(pair, sizeof pair, "%s=%s", seed_preset[i].key, seed_preset[i].value);
        at = print_wrapped(pair, at, 2);
    }
    printf(
        "\n  the defaults above are those of scale: small; keys that are given win over both\n"
        "of a study\n"
        "  seeds=0,1,2 and study=NAME; NAME.key=value sets a key of the experiment NAME alone\n");
}
