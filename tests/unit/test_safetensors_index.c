/* Sharded safetensors: an index opens its shards as one file, and is refused where the two do not
 * agree. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "run/files.h"
#include "run/safetensors.h"

static const float values[] = {1, 2, 3, 4};
static const FvTensor a = {"a", FV_F32, 1, {2}, values, 2},
                      b = {"b", FV_F32, 1, {1}, values + 2, 1},
                      c = {"c", FV_F32, 0, {0}, values + 3, 1};

static void join(char out[FV_PATH], const char *folder, const char *name) {
    assert_int_equal(fv_path(NULL, out, FV_PATH, "%s/%s", folder, name), FV_OK);
}

static void assert_ok(FvStatus status, const FvError *err) {
    if (status != FV_OK)
        fail_msg("%s", err->text);
}

static void write_shard(const char *folder, const char *name, const FvTensor *tensors,
                        size_t count) {
    char path[FV_PATH];
    FvError err;
    join(path, folder, name);
    assert_ok(fv_tensors_write(path, tensors, count, NULL, 0, &err), &err);
}

/* A folder with the shards one (c, a) and two (b). */
static int make_shards(void **state) {
    char *folder = strdup("/tmp/fovea-test-XXXXXX");
    if (!folder || !mkdtemp(folder))
        return -1;
    *state = folder;
    write_shard(folder, "one.safetensors", (FvTensor[]){c, a}, 2);
    write_shard(folder, "two.safetensors", &b, 1);
    return 0;
}

static int remove_folder(void **state) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", (char *)*state);
    free(*state);
    return system(command);
}

static FvStatus open_index(const char *folder, const char *text, FvTensorFile **file,
                           FvError *err) {
    char path[FV_PATH];
    join(path, folder, "model.safetensors.index.json");
    assert_ok(fv_file_write(path, &(FvBytes){text, strlen(text)}, 1, err), err);
    return fv_tensors_open(path, file, err);
}

#define MAP(entries) "{\"weight_map\":{" entries "}}"
#define A            "\"a\":\"one.safetensors\""
#define B            "\"b\":\"two.safetensors\""
#define C            "\"c\":\"one.safetensors\""

static void test_shards_are_one_file(void **state) {
    static const char *const names[] = {"c", "a", "b"}; /* shard after shard, by place */
    FvTensorFile *file;
    FvError err;
    real got[2];
    FvStatus status = open_index(*state,
                                 "{\"metadata\":{\"total_size\":16,\"by\":\"hand\"},"
                                 "\"weight_map\":{" A "," B "," C "}}",
                                 &file, &err);
    assert_ok(status, &err);
    assert_int_equal(fv_tensors_count(file), 3);
    for (size_t i = 0; i < 3; i++) {
        assert_string_equal(fv_tensors_at(file, i)->name, names[i]);
        assert_ptr_equal(fv_tensors_find(file, names[i]), fv_tensors_at(file, i));
    }
    fv_tensor_read_real(fv_tensors_find(file, "a"), 0, 2, got);
    assert_true(got[0] == 1 && got[1] == 2);
    fv_tensor_read_real(fv_tensors_find(file, "b"), 0, 1, got);
    assert_true(got[0] == 3);
    assert_null(fv_tensors_find(file, "d"));
    assert_string_equal(fv_tensors_metadata(file, "by"), "hand");
    assert_null(fv_tensors_metadata(file, "total_size")); /* a number */
    assert_null(fv_tensors_metadata(file, "checksum"));
    assert_ok(fv_tensors_verify(file, &err), &err);
    fv_tensors_close(file);
}

static void test_verifies_every_shard(void **state) {
    char path[FV_PATH], *bytes;
    size_t size;
    FvTensorFile *file;
    FvError err;
    join(path, *state, "two.safetensors");
    assert_ok(fv_file_read(path, &bytes, &size, &err), &err);
    bytes[size - 1] ^= 1;
    assert_ok(fv_file_write(path, &(FvBytes){bytes, size}, 1, &err), &err);
    free(bytes);
    assert_ok(open_index(*state, MAP(A "," B "," C), &file, &err), &err);
    assert_int_equal(fv_tensors_verify(file, &err), FV_DATA);
    assert_non_null(strstr(err.text, path));
    fv_tensors_close(file);
}

static void test_empty_map(void **state) {
    FvTensorFile *file;
    FvError err;
    assert_ok(open_index(*state, MAP(""), &file, &err), &err);
    assert_int_equal(fv_tensors_count(file), 0);
    assert_null(fv_tensors_find(file, "a"));
    fv_tensors_close(file);
}

static void test_refused_indexes(void **state) {
    static const struct {
        const char *text, *why;
    } cases[] = {
        {"", "too short"},
        {"{\"weight_map\":", "not valid JSON"},
        {"{\"weight_map\":{" A "," A "}}", "twice"},
        {"[\"weight_map\"]", "no object \"weight_map\""},
        {"{\"weights\":{}}", "no object \"weight_map\""},
        {"{\"weight_map\":[]}", "no object \"weight_map\""},
        {"{\"metadata\":1,\"weight_map\":{}}", "no object \"metadata\""},
        {MAP("\"a\":1"), "not given by name"},
        {MAP("\"a\":\"\""), "no name of a file"},
        {MAP("\"a\":\"./one.safetensors\""), "no name of a file"},
        {MAP("\"a\":\"/etc/passwd\""), "no name of a file"},
        {MAP("\"a\":\"..\""), "no name of a file"},
        {MAP("\"a\":\".\""), "not a regular file"},
        {MAP(A "," C "," B ",\"d\":\"three.safetensors\""), "three.safetensors: cannot be opened"},
        {MAP(A "," B "," C ",\"d\":\"two.safetensors\""), "tensor d is not in two.safetensors"},
        {MAP(A "," B), "one.safetensors: tensor c is not in the index"},
        {MAP(A "," B ",\"c\":\"two.safetensors\""), "tensor c belongs in two.safetensors"},
        {MAP(A "," B "," C ",\"x\":\"model.safetensors.index.json\""), "is no safetensors file"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        FvTensorFile *file;
        FvError err;
        FvStatus status = open_index(*state, cases[i].text, &file, &err);
        if (status != FV_DATA || !strstr(err.text, cases[i].why) || strchr(err.text, '\n'))
            fail_msg("%s: status %d, %s", cases[i].text, (int)status, err.text);
    }
}

static void test_same_tensor_in_two_shards(void **state) {
    FvTensorFile *file;
    FvError err;
    write_shard(*state, "two.safetensors", (FvTensor[]){a, b}, 2);
    assert_int_equal(open_index(*state, MAP(A "," B "," C), &file, &err), FV_DATA);
    assert_non_null(strstr(err.text, "two.safetensors: tensor a belongs in one.safetensors"));
}

static void test_damaged_shard_is_named(void **state) {
    char path[FV_PATH];
    FvTensorFile *file;
    FvError err;
    join(path, *state, "two.safetensors");
    assert_ok(fv_file_write(path, &(FvBytes){"\2\0\0\0\0\0\0\0{]", 10}, 1, &err), &err);
    assert_int_equal(open_index(*state, MAP(A "," B "," C), &file, &err), FV_DATA);
    assert_non_null(strstr(err.text, path));
}

static void test_recognises(void **state) {
    char path[FV_PATH];
    FvError err;
    join(path, *state, "one.safetensors");
    assert_true(fv_tensors_recognise(path));
    assert_true(fv_tensors_recognise("absent.safetensors"));
    assert_true(fv_tensors_recognise("absent.safetensors.index.json"));
    assert_false(fv_tensors_recognise("absent.yaml"));
    assert_false(fv_tensors_recognise(*state));
    join(path, *state, "model");
    assert_ok(fv_file_write(path, &(FvBytes){"\2\0\0\0\0\0\0\0{}", 10}, 1, &err), &err);
    assert_true(fv_tensors_recognise(path));
    assert_ok(fv_file_write(path, &(FvBytes){"{\"study\": {}}", 13}, 1, &err), &err);
    assert_false(fv_tensors_recognise(path));
}

#define SHARDS_TEST(f) cmocka_unit_test_setup_teardown(f, make_shards, remove_folder)

int main(void) {
    const struct CMUnitTest tests[] = {
        SHARDS_TEST(test_shards_are_one_file),
        SHARDS_TEST(test_verifies_every_shard),
        SHARDS_TEST(test_empty_map),
        SHARDS_TEST(test_refused_indexes),
        SHARDS_TEST(test_same_tensor_in_two_shards),
        SHARDS_TEST(test_damaged_shard_is_named),
        SHARDS_TEST(test_recognises),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
