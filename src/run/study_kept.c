/* The resolved study as text, and its comparison with the one kept in OUT. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run/config.h"

/* --- writing -------------------------------------------------------------------------------- */

static bool same_value(const FvConfig *a, const FvConfig *b, const FvKey *key) {
    char left[FV_TEXT], right[FV_TEXT];
    fv_config_format(a, key, left, sizeof left);
    fv_config_format(b, key, right, sizeof right);
    return strcmp(left, right) == 0;
}

/* Marks the keys whose value all experiments share: these stand in the base. */
static void find_shared(const FvStudy *study, bool shared[FV_KEY_COUNT]) {
    const FvKey *keys = fv_config_keys();
    for (size_t k = 0; k < FV_KEY_COUNT; k++) {
        shared[k] = true;
        for (size_t e = 1; shared[k] && e < study->experiment_count; e++)
            shared[k] =
                same_value(&study->experiments[0].config, &study->experiments[e].config, &keys[k]);
    }
}

/* Plain where that reads as a word everywhere, else between double quotes. Text and names hold no
 * control characters: fv_config_set and the reader of names refuse them. */
static void write_text(FILE *out, const char *text) {
    bool plain = isalpha((unsigned char)*text) != 0;
    for (const char *c = text; *c; c++)
        plain = plain && (isalnum((unsigned char)*c) || strchr("._-/", *c));
    if (plain) {
        fputs(text, out);
        return;
    }
    fputc('"', out);
    for (const char *c = text; *c; c++) {
        if (*c == '"' || *c == '\\')
            fputc('\\', out);
        fputc(*c, out);
    }
    fputc('"', out);
}

static void write_key(FILE *out, const char *indent, const FvConfig *config, const FvKey *key) {
    char value[FV_TEXT];
    fv_config_format(config, key, value, sizeof value);
    fprintf(out, "%s%s: ", indent, key->name);
    if (key->kind == FV_KEY_text)
        write_text(out, value);
    else
        fputs(value, out);
    fputc('\n', out);
}

static void write_experiment(FILE *out, const FvExperiment *e, const bool shared[FV_KEY_COUNT]) {
    bool empty = true;
    fputs("  ", out);
    write_text(out, e->name);
    for (size_t k = 0; k < FV_KEY_COUNT; k++)
        if (!shared[k]) {
            fputs(empty ? ":\n" : "", out);
            write_key(out, "    ", &e->config, &fv_config_keys()[k]);
            empty = false;
        }
    fputs(empty ? ": {}\n" : "", out);
}

char *fv_study_format(const FvStudy *study) {
    char *text = NULL;
    size_t size = 0;
    bool shared[FV_KEY_COUNT];
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    fputs("study: ", out);
    write_text(out, study->name);
    fputs("\nbase:\n", out);
    find_shared(study, shared);
    for (size_t k = 0; k < FV_KEY_COUNT; k++)
        if (shared[k])
            write_key(out, "  ", &study->experiments[0].config, &fv_config_keys()[k]);
    fputs("experiments:\n", out);
    for (size_t e = 0; e < study->experiment_count; e++)
        write_experiment(out, &study->experiments[e], shared);
    fputs("seeds: [", out);
    for (size_t i = 0; i < study->seed_count; i++)
        fprintf(out, "%s%llu", i ? ", " : "", (unsigned long long)study->seeds[i]);
    fputs("]\n", out);
    bool failed = ferror(out) != 0;
    if (fclose(out) != 0 || failed) {
        free(text);
        return NULL;
    }
    return text;
}

/* --- comparing ------------------------------------------------------------------------------ */

#define WAYS_OUT "use --fresh to start over, or another --out"

enum { NAMED = 3, DIFFERENCE = 256 }; /* keys named in a message, bytes for each */

static const FvExperiment *find(const FvStudy *study, const char *name) {
    for (size_t e = 0; e < study->experiment_count; e++)
        if (strcmp(study->experiments[e].name, name) == 0)
            return &study->experiments[e];
    return NULL;
}

static bool has_seed(const FvStudy *study, uint64_t seed) {
    for (size_t i = 0; i < study->seed_count; i++)
        if (study->seeds[i] == seed)
            return true;
    return false;
}

/* A run that leaves out what OUT already holds would drop it from the results. */
static FvStatus check_kept_asked(const char *path, const FvStudy *kept, const FvStudy *asked,
                                 FvError *err) {
    for (size_t e = 0; e < kept->experiment_count; e++)
        if (!find(asked, kept->experiments[e].name))
            return FV_FAIL(err, FV_USAGE,
                           "%s has the experiment %s, which is missing now: keep it (--only "
                           "chooses what is run), " WAYS_OUT,
                           path, kept->experiments[e].name);
    for (size_t i = 0; i < kept->seed_count; i++)
        if (!has_seed(asked, kept->seeds[i]))
            return FV_FAIL(err, FV_USAGE,
                           "%s has seed %llu, which is missing now: keep it, " WAYS_OUT, path,
                           (unsigned long long)kept->seeds[i]);
    return FV_OK;
}

/* Adds "lr 0.0003 (A_baseline), now 0.001" for the first experiment that differs in the key. */
static bool describe(const FvStudy *kept, const FvStudy *asked, const FvKey *key, char *out,
                     size_t size) {
    char old[FV_TEXT], new[FV_TEXT], old_shown[40], new_shown[40];
    for (size_t e = 0; e < kept->experiment_count; e++) {
        const FvExperiment *before = &kept->experiments[e], *now = find(asked, before->name);
        if (!now || same_value(&before->config, &now->config, key))
            continue;
        fv_config_format(&before->config, key, old, sizeof old);
        fv_config_format(&now->config, key, new, sizeof new);
        snprintf(out, size, "%s %s (%s), now %s", key->name,
                 *old ? fv_shown(old, old_shown, sizeof old_shown) : "\"\"", before->name,
                 *new ? fv_shown(new, new_shown, sizeof new_shown) : "\"\"");
        return true;
    }
    return false;
}

static FvStatus check_same_values(const char *path, const FvStudy *kept, const FvStudy *asked,
                                  FvError *err) {
    char text[NAMED * (DIFFERENCE + 2)] = "", one[DIFFERENCE], more[32] = "";
    size_t count = 0;
    for (const FvKey *key = fv_config_keys(); key->name; key++) {
        if (!fv_key_changes_results(key) || !describe(kept, asked, key, one, sizeof one))
            continue;
        size_t used = strlen(text);
        if (count++ < NAMED)
            snprintf(text + used, sizeof text - used, "%s%s", used ? "; " : "", one);
    }
    if (count > NAMED)
        snprintf(more, sizeof more, "; %zu more", count - NAMED);
    return count == 0 ? FV_OK
                      : FV_FAIL(err, FV_USAGE, "%s was run with %s%s: " WAYS_OUT, path, text, more);
}

FvStatus fv_study_same(const char *kept_path, const FvStudy *asked, FvError *err) {
    FvStudy kept;
    FvError inner;
    FvStatus status = fv_study_load(kept_path, NULL, 0, "small", &kept, &inner);
    if (status != FV_OK) /* damaged, or of a version with other keys */
        return FV_FAIL(err, status, "%s: " WAYS_OUT, inner.text);
    status = check_kept_asked(kept_path, &kept, asked, err);
    if (status == FV_OK)
        status = check_same_values(kept_path, &kept, asked, err);
    fv_study_free(&kept);
    return status;
}
