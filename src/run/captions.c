#include "run/captions.h"

#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/memory.h"
#include "run/files.h"

/* --- reading ---------------------------------------------------------------------------------- */

static FvStatus add(FvCaptions *c, size_t line, const char *name, const char *text, FvError *err) {
    if (!*name || !*text)
        return FV_FAIL(err, FV_DATA, "%s:%zu: the %s is empty: leave the line out", c->path, line,
                       *name ? "caption" : "name");
    if (c->count == c->capacity) {
        size_t capacity = c->capacity ? 2 * c->capacity : 64;
        FvCaption *grown = realloc(c->items, fv_mul(capacity, sizeof *grown));
        if (!grown)
            return FV_FAIL(err, FV_DEVICE, "%s: out of memory for %zu captions", c->path, capacity);
        c->items = grown;
        c->capacity = capacity;
    }
    FvCaption *item = &c->items[c->count++];
    *item = (FvCaption){.name = strdup(name), .text = strdup(text), .line = line};
    if (!item->name || !item->text)
        return FV_FAIL(err, FV_DEVICE, "%s: out of memory for %zu captions", c->path, c->count);
    return FV_OK;
}

static FvStatus read_tsv(FvCaptions *c, size_t line, char *text, FvError *err) {
    char *tab = strchr(text, '\t');
    if (!tab || strchr(tab + 1, '\t'))
        return FV_FAIL(err, FV_DATA, "%s:%zu: %s, needed is: name, tab, caption", c->path, line,
                       tab ? "more than one tab" : "no tab");
    *tab = '\0';
    return add(c, line, text, tab + 1, err);
}

static const char *member(const json_t *object, const char *name, const char *other) {
    const json_t *value = json_object_get(object, name);
    return json_string_value(value ? value : json_object_get(object, other));
}

static FvStatus read_json(FvCaptions *c, size_t line, const char *text, FvError *err) {
    json_error_t why;
    json_t *object = json_loads(text, JSON_REJECT_DUPLICATES, &why);
    if (!object)
        return FV_FAIL(err, FV_DATA, "%s:%zu: no JSON: %s", c->path, line, why.text);
    const char *name = member(object, "video", "file");
    const char *caption = member(object, "caption", "text");
    FvStatus status;
    if (!name || !caption)
        status = FV_FAIL(err, FV_DATA,
                         "%s:%zu: no string \"%s\", needed is: "
                         "{\"video\": NAME, \"caption\": TEXT}",
                         c->path, line, name ? "caption" : "video");
    else
        status = add(c, line, name, caption, err);
    json_decref(object);
    return status;
}

static FvStatus read_lines(FvCaptions *c, char *text, FvError *err) {
    static const char mark[] = "\xef\xbb\xbf"; /* of byte order, which some editors write */
    if (!strncmp(text, mark, strlen(mark)))
        text += strlen(mark);
    bool json = text[strspn(text, " \t\r\n")] == '{';
    size_t number = 1;
    for (char *line = text, *end; *line; line = end, number++) {
        end = line + strcspn(line, "\n");
        char *last = end > line && end[-1] == '\r' ? end - 1 : end;
        end += *end == '\n';
        *last = '\0';
        if (line[strspn(line, " \t")] == '\0')
            continue;
        if (!fv_utf8_valid(line))
            return FV_FAIL(err, FV_DATA, "%s:%zu: not UTF-8: convert the file", c->path, number);
        FV_TRY(json ? read_json(c, number, line, err) : read_tsv(c, number, line, err));
    }
    if (c->count == 0)
        return FV_FAIL(err, FV_DATA, "%s: holds no captions", c->path);
    return FV_OK;
}

static int by_name(const void *a, const void *b) {
    const FvCaption *x = a, *y = b;
    int order = strcmp(x->name, y->name);
    return order ? order : (x->line > y->line) - (x->line < y->line);
}

static FvStatus sort(FvCaptions *c, FvError *err) {
    qsort(c->items, c->count, sizeof *c->items, by_name);
    for (size_t i = 1; i < c->count; i++)
        if (!strcmp(c->items[i - 1].name, c->items[i].name))
            return FV_FAIL(err, FV_DATA, "%s:%zu: %.200s has a caption already, in line %zu",
                           c->path, c->items[i].line, c->items[i].name, c->items[i - 1].line);
    return FV_OK;
}

FvStatus fv_captions_read(const char *path, FvCaptions *out, FvError *err) {
    *out = (FvCaptions){.path = path};
    char *text = NULL;
    size_t size = 0;
    FvError why = {0};
    if (fv_file_read(path, &text, &size, &why) != FV_OK)
        return FV_FAIL(err, FV_DATA, "%s", why.text);
    FvStatus status;
    if (strlen(text) < size)
        status = FV_FAIL(err, FV_DATA, "%s: holds a zero byte: no text file", path);
    else
        status = read_lines(out, text, err);
    free(text);
    FV_TRY(status);
    return sort(out, err);
}

const FvCaption *fv_captions_find(FvCaptions *c, const char *name) {
    size_t low = 0, high = c->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(name, c->items[middle].name);
        if (order == 0) {
            c->items[middle].used = true;
            return &c->items[middle];
        }
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

void fv_captions_free(FvCaptions *c) {
    for (size_t i = 0; i < c->count; i++) {
        free(c->items[i].name);
        free(c->items[i].text);
        free(c->items[i].tokens);
    }
    free(c->items);
    *c = (FvCaptions){0};
}

/* --- tokens ----------------------------------------------------------------------------------- */

static FvStatus make_room(FvCaption *item, size_t count, FvError *err) {
    item->token_count = count;
    item->tokens = calloc(count ? count : 1, sizeof *item->tokens);
    return item->tokens ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory for captions");
}

static FvStatus take_bytes(FvCaptions *c, FvError *err) {
    c->vocabulary = FV_BYTE_TOKENS;
    for (size_t i = 0; i < c->count; i++) {
        FvCaption *item = &c->items[i];
        FV_TRY(make_room(item, strlen(item->text), err));
        for (size_t k = 0; k < item->token_count; k++)
            item->tokens[k] = (unsigned char)item->text[k];
    }
    return FV_OK;
}

/* The child's three streams are files without names: nobody waits for anybody, however much is
 * written. */
enum { IN, OUT, LOG, STREAMS };

static FvStatus spawn(const char *python, char *const argv[], FILE *const stream[STREAMS],
                      pid_t *child, FvError *err) {
    extern char **environ;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    sigemptyset(&none);
    if (posix_spawn_file_actions_init(&actions) != 0)
        return FV_FAIL(err, FV_DEVICE, "out of memory for a process");
    if (posix_spawnattr_init(&attributes) != 0) {
        posix_spawn_file_actions_destroy(&actions);
        return FV_FAIL(err, FV_DEVICE, "out of memory for a process");
    }
    int failed = 0;
    for (int i = 0; i < STREAMS && !failed; i++)
        failed = posix_spawn_file_actions_adddup2(&actions, fileno(stream[i]), i);
    if (!failed) /* Ctrl-C ends the child, too */
        failed = posix_spawnattr_setsigmask(&attributes, &none);
    if (!failed)
        failed = posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
    if (!failed)
        failed = posix_spawnp(child, python, &actions, &attributes, argv, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    if (failed)
        return FV_FAIL(err, FV_DATA,
                       "--tokenizer needs Python with the package tokenizers: %s cannot be "
                       "started: %s: install it, or set PYTHON",
                       python, strerror(failed));
    return FV_OK;
}

/* Exit status of the child, as waitpid gives it; a signal that waits for this process ends it. */
static int wait_for(pid_t child) {
    const struct timespec pause = {.tv_nsec = 20000000};
    for (;;) {
        int status = 0;
        pid_t ended = waitpid(child, &status, WNOHANG);
        if (ended == child)
            return status;
        if (ended < 0 && errno != EINTR)
            return -1;
        sigset_t pending;
        if (sigpending(&pending) == 0 &&
            (sigismember(&pending, SIGINT) == 1 || sigismember(&pending, SIGTERM) == 1 ||
             sigismember(&pending, SIGHUP) == 1))
            kill(child, SIGTERM);
        nanosleep(&pause, NULL);
    }
}

/* What the script had to say: its last line, or where that is long, how it begins. */
static FvStatus fail_script(FILE *log, int status, FvError *err) {
    char last[400] = "", *line = NULL;
    size_t room = 0;
    rewind(log);
    while (getline(&line, &room, log) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (*line)
            snprintf(last, sizeof last, "%s", line);
    }
    free(line);
    fv_utf8_clean(last);
    if (*last)
        return FV_FAIL(err, FV_DATA, "%s", last);
    return FV_FAIL(err, FV_DATA, "the tokenizer's process ended with status %d", status);
}

/* PYTHON, or else the virtual environment that scripts/configure fills, or else the PATH's. */
static const char *interpreter(char environment[FV_PATH]) {
    const char *asked = getenv("PYTHON");
    if (asked && *asked)
        return asked;
    fv_program_file("build/venv/bin/python", environment);
    return access(environment, X_OK) == 0 ? environment : "python3";
}

static FvStatus run_script(const char *tokenizer, FILE *const stream[STREAMS], FvError *err) {
    char script[FV_PATH], environment[FV_PATH];
    const char *python = interpreter(environment);
    fv_program_file("scripts/tokenize_captions.py", script);
    char *const argv[] = {(char *)python, script, (char *)tokenizer, NULL};
    pid_t child;
    FV_TRY(spawn(python, argv, stream, &child, err));
    int status = wait_for(child);
    return status == 0 ? FV_OK : fail_script(stream[LOG], status, err);
}

static bool write_texts(const FvCaptions *c, FILE *to) {
    bool ok = true;
    for (size_t i = 0; i < c->count && ok; i++) {
        json_t *text = json_string(c->items[i].text);
        ok = text && json_dumpf(text, to, JSON_ENCODE_ANY) == 0 && fputc('\n', to) != EOF;
        json_decref(text);
    }
    return ok && fflush(to) == 0 && fseek(to, 0, SEEK_SET) == 0;
}

static bool is_id(const json_t *value, size_t limit) {
    return json_is_integer(value) && json_integer_value(value) >= 0 &&
           (uint64_t)json_integer_value(value) < limit;
}

/* {"vocabulary": N}, then one list of ids per caption. */
static FvStatus read_ids(FvCaptions *c, FILE *from, FvError *err) {
    static const char bad[] = "scripts/tokenize_captions.py wrote something else than ids";
    json_t *head = json_loadf(from, JSON_DISABLE_EOF_CHECK, NULL);
    const json_t *size = json_object_get(head, "vocabulary");
    bool ok = is_id(size, INT32_MAX);
    c->vocabulary = ok ? (size_t)json_integer_value(size) : 0;
    json_decref(head);
    for (size_t i = 0; i < c->count && ok; i++) {
        FvCaption *item = &c->items[i];
        json_t *ids = json_loadf(from, JSON_DISABLE_EOF_CHECK, NULL);
        ok = json_is_array(ids);
        FvStatus status = ok ? make_room(item, json_array_size(ids), err) : FV_OK;
        for (size_t k = 0; status == FV_OK && ok && k < item->token_count; k++) {
            const json_t *id = json_array_get(ids, k);
            ok = is_id(id, c->vocabulary);
            item->tokens[k] = ok ? (int32_t)json_integer_value(id) : 0;
        }
        json_decref(ids);
        FV_TRY(status);
    }
    return ok ? FV_OK : FV_FAIL(err, FV_DATA, "%s", bad);
}

/* The texts, to be read, and two empty files. What is open when it fails is the caller's, too. */
static FvStatus open_streams(const FvCaptions *c, FILE *stream[STREAMS], FvError *err) {
    bool good = true;
    for (int i = 0; i < STREAMS && good; i++)
        good = (stream[i] = tmpfile()) != NULL;
    if (!good || !write_texts(c, stream[IN]))
        return FV_FAIL(err, FV_IO, "temporary files for the tokenizer cannot be written: %s",
                       strerror(errno));
    return FV_OK;
}

static FvStatus take_ids(FvCaptions *c, const char *tokenizer, FvError *err) {
    FILE *stream[STREAMS] = {NULL};
    FV_TRY(fv_sha256_file(tokenizer, c->tokenizer_sha256, err));
    FvStatus status = open_streams(c, stream, err);
    if (status == FV_OK)
        status = run_script(tokenizer, stream, err);
    if (status == FV_OK) {
        rewind(stream[OUT]);
        status = read_ids(c, stream[OUT], err);
    }
    for (int i = 0; i < STREAMS; i++)
        if (stream[i])
            fclose(stream[i]); /* nothing in it is needed any more */
    return status;
}

FvStatus fv_captions_tokenize(FvCaptions *c, const char *tokenizer, size_t max_tokens,
                              FvError *err) {
    FV_TRY(tokenizer ? take_ids(c, tokenizer, err) : take_bytes(c, err));
    const FvCaption *first = NULL; /* in the file */
    for (size_t i = 0; i < c->count; i++)
        if (c->items[i].token_count > max_tokens && (!first || c->items[i].line < first->line))
            first = &c->items[i];
    if (first)
        return FV_FAIL(err, FV_DATA,
                       "%s:%zu: the caption has %zu tokens, --max-tokens is %zu: shorten it or "
                       "raise that",
                       c->path, first->line, first->token_count, max_tokens);
    return FV_OK;
}
