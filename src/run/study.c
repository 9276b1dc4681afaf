#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "run/config.h"
#include "run/model_folder.h"

enum {
    STUDY_BYTES = 1 << 18, /* longest study file */
    BRACKETS = 8000,       /* in it: libyaml's time grows with the square of their nesting */
    MOST = 1000,           /* experiments, and seeds */
    PLACE = FV_TEXT + 32   /* bytes for "file:line" or "command line: argument" */
};

/* key=value or NAME.key=value of the command line. */
typedef struct Override {
    const char *argument, *value;
    char experiment[FV_NAME]; /* "" for all */
    char key[FV_NAME];
} Override;

/* A study while it is read: the nodes of its four top-level keys (NULL when absent). */
typedef struct Reader {
    const char *path;
    yaml_document_t doc;
    yaml_node_t *study, *base, *experiments, *seeds;
    Override *overrides;
    size_t override_count;
} Reader;

/* --- nodes ---------------------------------------------------------------------------------- */

static yaml_node_t *node_at(Reader *r, int index) {
    return yaml_document_get_node(&r->doc, index);
}

/* The text of a scalar; NULL for lists, mappings and text with a zero byte in it. */
static const char *scalar(const yaml_node_t *node) {
    if (!node || node->type != YAML_SCALAR_NODE)
        return NULL;
    const char *text = (const char *)node->data.scalar.value;
    return strlen(text) == node->data.scalar.length ? text : NULL;
}

/* `base:` or `A_baseline:` with nothing behind it */
static bool is_null(const yaml_node_t *node) {
    const char *text = scalar(node);
    return text && node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE &&
           (!*text || strcmp(text, "~") == 0 || strcmp(text, "null") == 0);
}

static const char *place(const Reader *r, const yaml_node_t *node, char out[PLACE]) {
    snprintf(out, PLACE, "%s:%zu", r->path, node->start_mark.line + 1);
    return out;
}

static const char *override_place(const Override *o, char out[PLACE]) {
    char shown[128];
    snprintf(out, PLACE, "command line: %s", fv_shown(o->argument, shown, sizeof shown));
    return out;
}

/* The pairs of a mapping, none of an empty value; what else stands there is refused. */
static FvStatus pairs_of(const Reader *r, const yaml_node_t *node, const char *what,
                         yaml_node_pair_t **pairs, size_t *count, FvError *err) {
    char where[PLACE];
    *pairs = NULL;
    *count = 0;
    if (!node || is_null(node))
        return FV_OK;
    if (node->type != YAML_MAPPING_NODE)
        return FV_FAIL(err, FV_USAGE, "%s: %s: lines of \"key: value\" are needed here",
                       place(r, node, where), what);
    *pairs = node->data.mapping.pairs.start;
    *count = (size_t)(node->data.mapping.pairs.top - node->data.mapping.pairs.start);
    return FV_OK;
}

/* --- names ---------------------------------------------------------------------------------- */

/* Names become folders and HDF5 groups; "." or "-" in front would hide them or look like an
 * option. */
static bool valid_name(const char *name) {
    size_t n = strlen(name);
    for (const char *c = name; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("._-", *c))
            return false;
    return n > 0 && n < FV_NAME && name[0] != '.' && name[0] != '-';
}

static FvStatus refuse_name(const char *where, const char *what, const char *name, FvError *err) {
    char shown[FV_NAME + 16];
    return FV_FAIL(err, FV_USAGE,
                   "%s: %s \"%s\": a name has 1 to 63 letters, digits, \".\", \"_\" or \"-\", and "
                   "does not begin with \".\" or \"-\"",
                   where, what, fv_shown(name, shown, sizeof shown));
}

static FvStatus refuse_key(const char *where, const char *key, bool command_line, FvError *err) {
    FvNearest nearest = {key, NULL, 0};
    char shown[FV_NAME + 16];
    for (const FvKey *k = fv_config_keys(); k->name; k++)
        fv_nearest_offer(&nearest, k->name);
    if (command_line) {
        fv_nearest_offer(&nearest, "seeds");
        fv_nearest_offer(&nearest, "study");
    }
    fv_shown(key, shown, sizeof shown);
    if (!nearest.name)
        return FV_FAIL(err, FV_USAGE, "%s: key \"%s\" is not known; fovea --help lists the keys",
                       where, shown);
    return FV_FAIL(err, FV_USAGE, "%s: key \"%s\" is not known; did you mean \"%s\"?", where, shown,
                   nearest.name);
}

/* --- the file ------------------------------------------------------------------------------- */

static size_t count_brackets(const char *text, size_t size) {
    size_t count = 0;
    for (size_t i = 0; i < size; i++)
        count += text[i] == '[' || text[i] == '{';
    return count;
}

static FvStatus read_text(const char *path, char **text, size_t *size, FvError *err) {
    FILE *file = fopen(path, "rb");
    *text = NULL;
    if (!file)
        return FV_FAIL(err, FV_USAGE, "%s: cannot be opened: %s", path, strerror(errno));
    char *bytes = malloc(STUDY_BYTES + 1);
    errno = 0;
    *size = bytes ? fread(bytes, 1, STUDY_BYTES + 1, file) : 0;
    bool failed = ferror(file) != 0;
    int reason = errno;
    fclose(file); /* was only read: nothing to lose */
    FvStatus status = FV_OK;
    if (!bytes)
        status = FV_FAIL(err, FV_DEVICE, "out of memory for %s", path);
    else if (failed)
        status = FV_FAIL(err, FV_USAGE, "%s: cannot be read: %s", path, strerror(reason));
    else if (*size > STUDY_BYTES)
        status = FV_FAIL(err, FV_USAGE, "%s: longer than 256 KiB: this is no study", path);
    else if (memchr(bytes, 0, *size))
        status = FV_FAIL(err, FV_USAGE, "%s: holds zero bytes: this is no UTF-8 text", path);
    else if (count_brackets(bytes, *size) > BRACKETS)
        status = FV_FAIL(err, FV_USAGE, "%s: holds more than %d opening brackets: this is no study",
                         path, BRACKETS);
    if (status != FV_OK) {
        free(bytes);
        return status;
    }
    bytes[*size] = '\0';
    *text = bytes;
    return FV_OK;
}

static FvStatus yaml_failed(const Reader *r, const yaml_parser_t *p, const char *text,
                            FvError *err) {
    size_t line = p->problem_mark.line, begin = 0;
    if (p->error == YAML_MEMORY_ERROR)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", r->path);
    if (p->error == YAML_READER_ERROR) { /* knows an offset only */
        line = 0;
        for (size_t i = 0; i < p->problem_offset && text[i]; i++)
            line += text[i] == '\n';
    }
    for (size_t i = 0; i < line && text[begin]; begin++)
        i += text[begin] == '\n';
    bool tab = memchr(text + begin, '\t', strcspn(text + begin, "\n")) != NULL;
    return FV_FAIL(err, FV_USAGE, "%s:%zu: not valid YAML: %s%s%s%s", r->path, line + 1,
                   p->problem ? p->problem : "cannot be parsed", p->context ? " " : "",
                   p->context ? p->context : "",
                   tab ? " (there is a tab: indent with spaces)" : "");
}

/* Leaves r->doc to be deleted on FV_OK only. */
static FvStatus load_document(Reader *r, const char *text, size_t size, FvError *err) {
    yaml_parser_t parser;
    yaml_document_t second;
    if (!yaml_parser_initialize(&parser))
        return FV_FAIL(err, FV_DEVICE, "out of memory for %s", r->path);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, size);
    FvStatus status = FV_OK;
    if (!yaml_parser_load(&parser, &r->doc)) {
        status = yaml_failed(r, &parser, text, err);
    } else if (!yaml_document_get_root_node(&r->doc)) {
        status = FV_FAIL(err, FV_USAGE, "%s: is empty; a study needs \"experiments:\"", r->path);
        yaml_document_delete(&r->doc);
    } else if (!yaml_parser_load(&parser, &second)) {
        status = yaml_failed(r, &parser, text, err);
        yaml_document_delete(&r->doc);
    } else {
        yaml_node_t *more = yaml_document_get_root_node(&second);
        if (more) {
            status = FV_FAIL(err, FV_USAGE, "%s:%zu: a second document begins: one study per file",
                             r->path, more->start_mark.line + 1);
            yaml_document_delete(&r->doc);
        }
        yaml_document_delete(&second);
    }
    yaml_parser_delete(&parser);
    return status;
}

static FvStatus refuse_part(const char *where, const char *name, FvError *err) {
    FvNearest nearest = {name, NULL, 0};
    const char *const parts[] = {"study", "base", "experiments", "seeds"};
    char shown[FV_NAME + 16];
    if (fv_config_find(name))
        return FV_FAIL(err, FV_USAGE, "%s: key \"%s\" belongs under \"base:\" or an experiment",
                       where, name);
    for (size_t i = 0; i < 4; i++)
        fv_nearest_offer(&nearest, parts[i]);
    fv_shown(name, shown, sizeof shown);
    if (nearest.name)
        return FV_FAIL(err, FV_USAGE, "%s: \"%s\" is not known; did you mean \"%s\"?", where, shown,
                       nearest.name);
    return FV_FAIL(err, FV_USAGE,
                   "%s: \"%s\" is not known; a study has study, base, experiments and seeds", where,
                   shown);
}

/* Finds the four parts of a study. */
static FvStatus find_parts(Reader *r, FvError *err) {
    char where[PLACE];
    yaml_node_pair_t *pairs;
    size_t count;
    FV_TRY(pairs_of(r, node_at(r, 1), "a study", &pairs, &count, err)); /* node 1 is the root */
    for (size_t i = 0; i < count; i++) {
        yaml_node_t *key = node_at(r, pairs[i].key), **part;
        const char *name = scalar(key);
        place(r, key, where);
        if (!name)
            return FV_FAIL(err, FV_USAGE, "%s: a key must be a single word", where);
        if (strcmp(name, "study") == 0)
            part = &r->study;
        else if (strcmp(name, "base") == 0)
            part = &r->base;
        else if (strcmp(name, "experiments") == 0)
            part = &r->experiments;
        else if (strcmp(name, "seeds") == 0)
            part = &r->seeds;
        else
            return refuse_part(where, name, err);
        if (*part)
            return FV_FAIL(err, FV_USAGE, "%s: \"%s\" is given twice", where, name);
        *part = node_at(r, pairs[i].value);
    }
    return FV_OK;
}

/* --- the command line ----------------------------------------------------------------------- */

/* Splits at the first "=", and what is before it at its last ".": experiment names hold dots. */
static FvStatus split_override(const char *argument, Override *o, FvError *err) {
    char where[PLACE];
    *o = (Override){.argument = argument};
    override_place(o, where);
    const char *equals = strchr(argument, '=');
    if (!equals)
        return FV_FAIL(err, FV_USAGE, "%s: key=value or NAME.key=value is needed", where);
    const char *dot = memrchr(argument, '.', (size_t)(equals - argument));
    const char *key = dot ? dot + 1 : argument;
    size_t name_length = dot ? (size_t)(dot - argument) : 0, key_length = (size_t)(equals - key);
    if (name_length >= FV_NAME || key_length >= FV_NAME || key_length == 0 || dot == argument)
        return FV_FAIL(err, FV_USAGE, "%s: key=value or NAME.key=value is needed", where);
    memcpy(o->experiment, argument, name_length);
    memcpy(o->key, key, key_length);
    o->value = equals + 1;
    return FV_OK;
}

static bool for_study(const Override *o) {
    return !*o->experiment && (strcmp(o->key, "seeds") == 0 || strcmp(o->key, "study") == 0);
}

static const FvExperiment *find_experiment(const FvStudy *study, const char *name) {
    for (size_t e = 0; e < study->experiment_count; e++)
        if (strcmp(study->experiments[e].name, name) == 0)
            return &study->experiments[e];
    return NULL;
}

static FvStatus refuse_experiment(const FvStudy *study, const Override *o, FvError *err) {
    char where[PLACE], shown[FV_NAME + 16];
    FvNearest nearest = {o->experiment, NULL, 0};
    for (size_t e = 0; e < study->experiment_count; e++)
        fv_nearest_offer(&nearest, study->experiments[e].name);
    return FV_FAIL(err, FV_USAGE, "%s: the study has no experiment \"%s\"%s%s%s",
                   override_place(o, where), fv_shown(o->experiment, shown, sizeof shown),
                   nearest.name ? "; did you mean \"" : "", nearest.name ? nearest.name : "",
                   nearest.name ? "\"?" : "");
}

static FvStatus split_overrides(Reader *r, const char *const *arguments, const FvStudy *study,
                                FvError *err) {
    char where[PLACE];
    for (size_t i = 0; i < r->override_count; i++) {
        Override *o = &r->overrides[i];
        FV_TRY(split_override(arguments[i], o, err));
        if (*o->experiment && !find_experiment(study, o->experiment))
            return refuse_experiment(study, o, err);
        if (!for_study(o) && !fv_config_find(o->key))
            return refuse_key(override_place(o, where), o->key, !*o->experiment, err);
    }
    return FV_OK;
}

/* --- experiments ---------------------------------------------------------------------------- */

/* Sets the keys of a mapping, `base` or one experiment's own. */
static FvStatus apply_mapping(Reader *r, const yaml_node_t *node, const char *what,
                              FvConfig *config, FvError *err) {
    char where[PLACE], shown[FV_NAME + 16];
    bool given[FV_KEY_COUNT] = {false};
    yaml_node_pair_t *pairs;
    size_t count;
    FV_TRY(pairs_of(r, node, what, &pairs, &count, err));
    for (size_t i = 0; i < count; i++) {
        const yaml_node_t *name = node_at(r, pairs[i].key);
        const char *text = scalar(name), *value = scalar(node_at(r, pairs[i].value));
        place(r, name, where);
        if (!text)
            return FV_FAIL(err, FV_USAGE, "%s: a key must be a single word", where);
        const FvKey *key = fv_config_find(text);
        if (!key)
            return refuse_key(where, text, false, err);
        if (given[key - fv_config_keys()])
            return FV_FAIL(err, FV_USAGE, "%s: key \"%s\" is given twice in %s", where, text, what);
        given[key - fv_config_keys()] = true;
        if (!value)
            return FV_FAIL(err, FV_USAGE, "%s: %s: a single value is needed", where,
                           fv_shown(text, shown, sizeof shown));
        FV_TRY(fv_config_set(config, key, value, where, err));
    }
    return FV_OK;
}

static FvStatus apply_overrides(const Reader *r, const char *experiment, FvConfig *config,
                                FvError *err) {
    char where[PLACE];
    for (size_t i = 0; i < r->override_count; i++) {
        const Override *o = &r->overrides[i];
        if (strcmp(o->experiment, experiment) == 0 && !for_study(o))
            FV_TRY(fv_config_set(config, fv_config_find(o->key), o->value, override_place(o, where),
                                 err));
    }
    return FV_OK;
}

static FvStatus apply_layers(Reader *r, const FvExperiment *e, const yaml_node_t *own,
                             FvConfig *config, FvError *err) {
    FV_TRY(apply_mapping(r, r->base, "base", config, err));
    FV_TRY(apply_overrides(r, "", config, err));
    FV_TRY(apply_mapping(r, own, e->name, config, err));
    return apply_overrides(r, e->name, config, err);
}

/* Applies everything twice: first to learn the scale and the models to start from, then over the
 * sizes of that scale and of those models. */
static FvStatus resolve(Reader *r, const yaml_node_t *own, const char *auto_scale, FvExperiment *e,
                        FvError *err) {
    FvConfig *config = &e->config;
    FvConfig asked = *fv_config_defaults();
    FvError inner;
    FV_TRY(apply_layers(r, e, own, &asked, err));
    if (strcmp(asked.scale, "auto") == 0)
        snprintf(asked.scale, sizeof asked.scale, "%s", auto_scale);
    *config = *fv_config_defaults();
    memcpy(config->scale, asked.scale, sizeof asked.scale);
    memcpy(config->dino_from, asked.dino_from, sizeof asked.dino_from);
    memcpy(config->lm_from, asked.lm_from, sizeof asked.lm_from);
    fv_config_preset(config);
    fv_folder_preset(config);
    FV_TRY(apply_layers(r, e, own, config, err));
    memcpy(config->scale, asked.scale, sizeof asked.scale);
    fv_folder_choose(config);
    if (fv_config_check(config, &inner) != FV_OK)
        return FV_FAIL(err, FV_USAGE, "%s: experiment %s: %s", r->path, e->name, inner.text);
    return FV_OK;
}

static FvStatus read_names(Reader *r, FvStudy *study, yaml_node_pair_t **pairs, FvError *err) {
    char where[PLACE];
    size_t count;
    FV_TRY(pairs_of(r, r->experiments, "experiments", pairs, &count, err));
    if (count == 0)
        return FV_FAIL(err, FV_USAGE,
                       "%s: names no experiment; add \"experiments:\" with at least "
                       "one name below it",
                       r->path);
    if (count > MOST)
        return FV_FAIL(err, FV_USAGE, "%s: more than %d experiments", r->path, MOST);
    study->experiments = calloc(count, sizeof *study->experiments);
    if (!study->experiments)
        return FV_FAIL(err, FV_DEVICE, "out of memory for %zu experiments", count);
    for (size_t i = 0; i < count; i++) {
        const yaml_node_t *node = node_at(r, (*pairs)[i].key);
        const char *name = scalar(node);
        place(r, node, where);
        if (!name || !valid_name(name))
            return refuse_name(where, "experiment", name ? name : "", err);
        if (find_experiment(study, name))
            return FV_FAIL(err, FV_USAGE, "%s: experiment \"%s\" is given twice", where, name);
        snprintf(study->experiments[i].name, FV_NAME, "%s", name);
        study->experiment_count++;
    }
    return FV_OK;
}

/* --- seeds and name ------------------------------------------------------------------------- */

/* Adds one seed; study->seeds has room for it. Readers of results.h5 know signed integers only. */
static FvStatus add_seed(FvStudy *study, const char *text, const char *where, FvError *err) {
    char shown[64], *end = NULL;
    errno = 0;
    unsigned long long seed = text && isdigit((unsigned char)*text) ? strtoull(text, &end, 10) : 0;
    if (!end || *end || errno || seed > INT64_MAX)
        return FV_FAIL(err, FV_USAGE,
                       "%s: seeds: \"%s\" is not a seed; whole numbers from 0 to %lld are", where,
                       fv_shown(text ? text : "", shown, sizeof shown), (long long)INT64_MAX);
    for (size_t i = 0; i < study->seed_count; i++)
        if (study->seeds[i] == seed)
            return FV_FAIL(err, FV_USAGE, "%s: seed %llu is given twice", where, seed);
    study->seeds[study->seed_count++] = seed;
    return FV_OK;
}

static FvStatus make_room(FvStudy *study, size_t count, const char *where, FvError *err) {
    if (count == 0 || count > MOST)
        return FV_FAIL(err, FV_USAGE, "%s: seeds: a list of 1 to %d seeds is needed", where, MOST);
    study->seeds = calloc(count, sizeof *study->seeds);
    return study->seeds ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for %zu seeds", count);
}

static FvStatus read_seeds(Reader *r, FvStudy *study, FvError *err) {
    char where[PLACE];
    if (!r->seeds) {
        FV_TRY(make_room(study, 1, r->path, err));
        return add_seed(study, "0", r->path, err);
    }
    if (r->seeds->type != YAML_SEQUENCE_NODE)
        return FV_FAIL(err, FV_USAGE, "%s: seeds: a list such as [0, 1, 2] is needed",
                       place(r, r->seeds, where));
    yaml_node_item_t *items = r->seeds->data.sequence.items.start;
    size_t count = (size_t)(r->seeds->data.sequence.items.top - items);
    FV_TRY(make_room(study, count, place(r, r->seeds, where), err));
    for (size_t i = 0; i < count; i++) {
        const yaml_node_t *item = node_at(r, items[i]);
        FV_TRY(add_seed(study, scalar(item), place(r, item, where), err));
    }
    return FV_OK;
}

/* seeds=0,1,2 */
static FvStatus override_seeds(const Override *o, FvStudy *study, FvError *err) {
    char where[PLACE];
    size_t count = 1;
    for (const char *c = o->value; *c; c++)
        count += *c == ',';
    free(study->seeds);
    study->seeds = NULL;
    study->seed_count = 0;
    FV_TRY(make_room(study, count, override_place(o, where), err));
    char *list = strdup(o->value), *rest = list;
    FvStatus status = list ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for the command line");
    while (status == FV_OK && rest)
        status = add_seed(study, strsep(&rest, ","), where, err);
    free(list);
    return status;
}

static FvStatus set_name(FvStudy *study, const char *name, const char *where, FvError *err) {
    if (!name || !valid_name(name))
        return refuse_name(where, "study", name ? name : "", err);
    snprintf(study->name, sizeof study->name, "%s", name);
    return FV_OK;
}

/* The file's name without folder and .yaml */
static FvStatus name_after_file(const Reader *r, FvStudy *study, FvError *err) {
    const char *slash = strrchr(r->path, '/'), *file = slash ? slash + 1 : r->path;
    char name[FV_TEXT];
    snprintf(name, sizeof name, "%s", file);
    char *dot = strrchr(name, '.');
    if (dot && (strcmp(dot, ".yaml") == 0 || strcmp(dot, ".yml") == 0))
        *dot = '\0';
    if (!valid_name(name))
        return FV_FAIL(err, FV_USAGE,
                       "%s: the file's name cannot name the study; add a line \"study: NAME\"",
                       r->path);
    return set_name(study, name, r->path, err);
}

static FvStatus name_study(const Reader *r, FvStudy *study, FvError *err) {
    char where[PLACE];
    const Override *named = NULL;
    for (size_t i = 0; i < r->override_count; i++)
        if (for_study(&r->overrides[i]) && strcmp(r->overrides[i].key, "study") == 0)
            named = &r->overrides[i];
    if (r->study)
        FV_TRY(set_name(study, scalar(r->study), place(r, r->study, where), err));
    if (named)
        return set_name(study, named->value, override_place(named, where), err);
    return r->study ? FV_OK : name_after_file(r, study, err);
}

/* --- loading -------------------------------------------------------------------------------- */

static FvStatus read_study(Reader *r, const char *const *arguments, const char *auto_scale,
                           FvStudy *study, FvError *err) {
    yaml_node_pair_t *pairs;
    FV_TRY(find_parts(r, err));
    FV_TRY(read_names(r, study, &pairs, err));
    FV_TRY(split_overrides(r, arguments, study, err));
    FV_TRY(name_study(r, study, err));
    for (size_t e = 0; e < study->experiment_count; e++)
        FV_TRY(resolve(r, node_at(r, pairs[e].value), auto_scale, &study->experiments[e], err));
    FV_TRY(read_seeds(r, study, err));
    for (size_t i = 0; i < r->override_count; i++)
        if (for_study(&r->overrides[i]) && strcmp(r->overrides[i].key, "seeds") == 0)
            FV_TRY(override_seeds(&r->overrides[i], study, err));
    return FV_OK;
}

FvStatus fv_study_load(const char *path, const char *const *overrides, size_t override_count,
                       const char *auto_scale, FvStudy *out, FvError *err) {
    Reader r = {.path = path, .override_count = override_count};
    size_t size;
    *out = (FvStudy){0};
    if (strlen(path) >= sizeof out->path)
        return FV_FAIL(err, FV_USAGE, "the study's path is longer than %d bytes", FV_TEXT - 1);
    snprintf(out->path, sizeof out->path, "%s", path);
    FV_TRY(read_text(path, &out->source, &size, err));
    FvStatus status = load_document(&r, out->source, size, err);
    if (status == FV_OK) {
        r.overrides = calloc(override_count + 1, sizeof *r.overrides);
        status = r.overrides ? read_study(&r, overrides, auto_scale, out, err)
                             : FV_FAIL(err, FV_DEVICE, "out of memory for the command line");
        yaml_document_delete(&r.doc);
    }
    free(r.overrides);
    if (status != FV_OK)
        fv_study_free(out);
    return status;
}

void fv_study_free(FvStudy *study) {
    free(study->source);
    free(study->experiments);
    free(study->seeds);
    *study = (FvStudy){0};
}
