/* Captions of videos: the two formats, the tokens of bytes, and what is refused. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

#include "run/captions.h"
#include "run/files.h"

static char path[64];

static int make_file(void **state) {
    (void)state;
    snprintf(path, sizeof path, "/tmp/fovea-captions-XXXXXX");
    int file = mkstemp(path);
    return file < 0 ? -1 : close(file);
}

static int remove_file(void **state) {
    (void)state;
    return unlink(path);
}

static FvStatus read_text(const char *text, size_t size, FvCaptions *out, FvError *err) {
    const FvBytes part = {text, size};
    assert_int_equal(fv_file_write(path, &part, 1, NULL), FV_OK);
    return fv_captions_read(path, out, err);
}

static void check_read(const char *text) {
    static const char *const want[][2] = {
        {"a.mp4", "a red ball"}, {"b c.mp4", "gr\xc3\xbcn"}, {"sub/a.mp4", "x  y "}};
    FvCaptions c;
    FvError err = {0};
    if (read_text(text, strlen(text), &c, &err) != FV_OK)
        fail_msg("%s", err.text);
    assert_int_equal(c.count, 3);
    for (size_t i = 0; i < 3; i++) {
        assert_false(c.items[i].used);
        const FvCaption *found = fv_captions_find(&c, want[i][0]);
        assert_ptr_equal(found, &c.items[i]);
        assert_string_equal(found->text, want[i][1]);
        assert_true(found->used);
    }
    assert_null(fv_captions_find(&c, "a.mp"));
    assert_null(fv_captions_find(&c, "a.mp4 "));
    assert_null(fv_captions_find(&c, "z.mp4"));
    fv_captions_free(&c);
}

/* In any order, with empty lines, a byte order mark and the line ends of other systems. */
static void test_formats(void **state) {
    (void)state;
    check_read("sub/a.mp4\tx  y \na.mp4\ta red ball\nb c.mp4\tgr\xc3\xbcn\n");
    check_read("\xef\xbb\xbf"
               "a.mp4\ta red ball\r\n\r\n\nsub/a.mp4\tx  y \r\nb c.mp4\tgr\xc3\xbcn");
    check_read("\n{\"video\": \"b c.mp4\", \"caption\": \"gr\\u00fcn\"}\r\n"
               "{\"file\": \"sub/a.mp4\", \"text\": \"x  y \", \"n\": [1]}\n\n"
               "{\"text\": \"a red ball\", \"video\": \"a.mp4\"}");
}

static void refuse(const char *text, size_t size, const char *part) {
    FvCaptions c;
    FvError err = {0};
    assert_int_equal(read_text(text, size, &c, &err), FV_DATA);
    assert_ptr_equal(strstr(err.text, path), err.text);
    if (!strstr(err.text, part) || strchr(err.text, '\n'))
        fail_msg("no \"%s\" in: %s", part, err.text);
    fv_captions_free(&c);
}

/* File and line are named; the line is that of the file, empty lines counted. */
static void test_refuses(void **state) {
    (void)state;
#define REFUSE(text, part) refuse(text, sizeof(text) - 1, part)
    REFUSE("", "no captions");
    REFUSE("\n \n", "no captions");
    REFUSE("\xef\xbb\xbf", "no captions");
    REFUSE("a.mp4\tone\n\nb.mp4 two\n", ":3: no tab");
    REFUSE("a.mp4\tone\ttwo\n", ":1: more than one tab");
    REFUSE("a.mp4\tone\n\tno name\n", ":2: the name is empty");
    REFUSE("a.mp4\t\n", ":1: the caption is empty");
    REFUSE("a\t1\nb\t2\n\na\t3\n", ":4: a has a caption already, in line 1");
    REFUSE("a\tone\nb\ttw\xc3\n", ":2: not UTF-8");
    REFUSE("a\tone\nb\t\xed\xa0\x80\n", ":2: not UTF-8");
    REFUSE("a\to\0ne\n", "zero byte");
    REFUSE("{\"video\": \"a\", \"text\": \"x\"}\nb\ty\n", ":2: no JSON: ");
    REFUSE("{\"video\": \"a\", \"text\": \"x\"} {}\n", ":1: no JSON: ");
    REFUSE("{\"video\": \"a\", \"text\": \"\\u0000\"}\n", ":1: no JSON: ");
    REFUSE("{\"video\": \"a\", \"video\": \"b\", \"text\": \"x\"}\n", ":1: no JSON: ");
    REFUSE("{\"video\": 1, \"text\": \"x\"}\n", ":1: no string \"video\"");
    REFUSE("{\"video\": \"a\", \"title\": \"x\"}\n", ":1: no string \"caption\"");
    REFUSE("{\"video\": \"a\", \"text\": \"x\"}\n[1]\n", ":2: no string \"video\"");
#undef REFUSE
    FvCaptions c;
    FvError err = {0};
    assert_int_equal(fv_captions_read("/no/such/captions.tsv", &c, &err), FV_DATA);
    assert_non_null(strstr(err.text, "/no/such/captions.tsv"));
    fv_captions_free(&c);
}

static void test_bytes(void **state) {
    (void)state;
    static const char text[] = "z\ta b\na\tgr\xc3\xbcn\n";
    static const int32_t want[] = {'g', 'r', 0xc3, 0xbc, 'n'};
    FvCaptions c;
    FvError err = {0};
    assert_int_equal(read_text(text, strlen(text), &c, NULL), FV_OK);
    assert_int_equal(fv_captions_tokenize(&c, NULL, 5, NULL), FV_OK);
    assert_int_equal(c.vocabulary, FV_BYTE_TOKENS);
    assert_string_equal(c.tokenizer_sha256, "");
    const FvCaption *found = fv_captions_find(&c, "a");
    assert_non_null(found);
    assert_int_equal(found->token_count, 5);
    assert_memory_equal(found->tokens, want, sizeof want);
    fv_captions_free(&c);
    /* too long: the first such line of the file, not of the sorted list */
    assert_int_equal(read_text(text, strlen(text), &c, NULL), FV_OK);
    assert_int_equal(fv_captions_tokenize(&c, NULL, 2, &err), FV_DATA);
    assert_non_null(strstr(err.text, ":1: the caption has 3 tokens, --max-tokens is 2"));
    fv_captions_free(&c);
}

/* One file can be open at a time: the tokenizer is read, its three streams are too many. */
static void test_tells_why_there_are_no_temporary_files(void **state) {
    (void)state;
    static const char text[] = "a\tx\n";
    FvCaptions c;
    FvError err = {0};
    struct rlimit limit;
    assert_int_equal(read_text(text, strlen(text), &c, NULL), FV_OK);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    int next = dup(STDERR_FILENO);
    assert_true(next >= 0);
    close(next);
    struct rlimit one = {(rlim_t)next + 1, limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &one), 0);
    errno = 0;
    FvStatus status = fv_captions_tokenize(&c, path, 5, &err);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    assert_int_equal(status, FV_IO);
    assert_non_null(strstr(err.text, "temporary files"));
    assert_non_null(strstr(err.text, strerror(EMFILE)));
    fv_captions_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formats), cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_tells_why_there_are_no_temporary_files)};
    return cmocka_run_group_tests(tests, make_file, remove_file);
}
