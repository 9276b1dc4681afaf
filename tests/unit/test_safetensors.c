/* Safetensors: what is written reads back, and nothing that stands in a file can crash the reader.
 */
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/rng.h"
#include "run/files.h"
#include "run/safetensors.h"

static int make_folder(void **state) {
    char *folder = strdup("/tmp/fovea-test-XXXXXX");
    if (!folder || !mkdtemp(folder))
        return -1;
    *state = folder;
    return 0;
}

static int remove_folder(void **state) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", (char *)*state);
    free(*state);
    return system(command);
}

static void join(char out[FV_PATH], const char *folder, const char *name) {
    assert_int_equal(fv_path(NULL, out, FV_PATH, "%s/%s", folder, name), FV_OK);
}

static void assert_ok(FvStatus status, const FvError *err) {
    if (status != FV_OK)
        fail_msg("%s", err->text);
}

/* --- what is written reads back ------------------------------------------------------------- */

static const double f64[] = {1.0, -0.0, 1e-300, INFINITY, NAN, 0.1};
static const float f32[] = {1.5f, -2.25f, 3e38f};
static const uint16_t f16[] = {0x3c00, 0xc100, 0x0001, 0x7bff, 0x7c00, 0xfc00, 0x7e00, 0x8000};
static const uint16_t bf16[] = {0x3f80, 0xc020, 0x7f80};
static const int64_t i64[] = {-(INT64_C(1) << 53), 7};
static const int32_t i32[] = {INT32_MIN, INT32_MAX};
static const uint8_t u8[] = {0, 255, 1};

static const FvTensor tensors[] = {
    {"bytes", FV_U8, 1, {3}, u8, 3},      {"half", FV_F16, 2, {2, 4}, f16, 8},
    {"brain", FV_BF16, 1, {3}, bf16, 3},  {"\"quoted\" \xc3\xa9", FV_F32, 1, {3}, f32, 3},
    {"empty", FV_F64, 2, {4, 0}, f64, 0}, {"double", FV_F64, 3, {1, 2, 3}, f64, 6},
    {"scalar", FV_F32, 0, {0}, f32, 1},   {"long", FV_I64, 1, {2}, i64, 2},
    {"int", FV_I32, 1, {2}, i32, 2},
};
enum { TENSORS = sizeof tensors / sizeof *tensors };

static const FvMeta metadata[] = {{"step", "12"}, {"text", "two\nlines \xff \xc3\xa9"}};

static FvTensorFile *write_and_open(const char *path) {
    FvTensorFile *file;
    FvError err;
    assert_ok(fv_tensors_write(path, tensors, TENSORS, metadata, 2, &err), &err);
    assert_ok(fv_tensors_open(path, &file, &err), &err);
    return file;
}

static void test_round_trip(void **state) {
    char path[FV_PATH];
    FvError err;
    join(path, *state, "a.safetensors");
    FvTensorFile *file = write_and_open(path);
    assert_ok(fv_tensors_verify(file, &err), &err);
    assert_int_equal(fv_tensors_count(file), TENSORS);
    for (size_t i = 0; i < TENSORS; i++) {
        const FvTensor *t = fv_tensors_find(file, tensors[i].name);
        assert_non_null(t);
        assert_int_equal(t->type, tensors[i].type);
        assert_int_equal(t->rank, tensors[i].rank);
        assert_int_equal(t->count, tensors[i].count);
        assert_memory_equal(t->shape, tensors[i].shape, t->rank * sizeof *t->shape);
        assert_memory_equal(t->data, tensors[i].data, t->count * fv_type_size(t->type));
        assert_int_equal((uintptr_t)t->data % fv_type_size(t->type), 0); /* offsets are aligned */
    }
    assert_null(fv_tensors_find(file, "absent"));
    assert_string_equal(fv_tensors_metadata(file, "step"), "12");
    assert_string_equal(fv_tensors_metadata(file, "text"), "two\nlines ? \xc3\xa9");
    assert_null(fv_tensors_metadata(file, "absent"));
    fv_tensors_close(file);
}

static void assert_values(const FvTensorFile *file, const char *name, size_t first, size_t count,
                          const double *expected) {
    double values[8];
    fv_tensor_read(fv_tensors_find(file, name), first, count, values);
    for (size_t i = 0; i < count; i++)
        if (!(values[i] == expected[i] || (isnan(values[i]) && isnan(expected[i]))) ||
            signbit(values[i]) != signbit(expected[i]))
            fail_msg("%s[%zu]: %g is not %g", name, first + i, values[i], expected[i]);
}

/* Every type as double; the expected numbers follow from the formats' definitions. */
static void test_values(void **state) {
    char path[FV_PATH];
    join(path, *state, "a.safetensors");
    FvTensorFile *file = write_and_open(path);
    assert_values(file, "double", 0, 6, f64);
    assert_values(file, "double", 2, 2, f64 + 2);
    assert_values(file, tensors[3].name, 0, 3, (double[]){1.5, -2.25, 3e38f});
    assert_values(file, "half", 0, 8,
                  (double[]){1, -2.5, 0x1p-24, 65504, INFINITY, -INFINITY, NAN, -0.0});
    assert_values(file, "brain", 0, 3, (double[]){1, -2.5, INFINITY});
    assert_values(file, "long", 0, 2, (double[]){-0x1p53, 7});
    assert_values(file, "int", 0, 2, (double[]){-0x1p31, 0x1p31 - 1});
    assert_values(file, "bytes", 0, 3, (double[]){0, 255, 1});
    assert_values(file, "empty", 0, 0, NULL);
    fv_tensors_close(file);
}

/* Every half and every bfloat, at an odd address, against the formats' definition: sign, exponent
 * of bias 15 or 127, fraction; all are exact as float. */
static void test_small_floats(void **state) {
    static unsigned char bytes[2 * 65536 + 1];
    static real out[65536 + 1];
    (void)state;
    for (size_t i = 0; i < 65536; i++) {
        uint16_t value = (uint16_t)i;
        memcpy(bytes + 1 + 2 * i, &value, 2);
    }
    for (int brain = 0; brain < 2; brain++) {
        const FvTensor t = {"x", brain ? FV_BF16 : FV_F16, 1, {65536}, bytes + 1, 65536};
        int digits = brain ? 7 : 10, bias = brain ? 127 : 15, top = brain ? 255 : 31;
        out[65536] = 7;
        fv_tensor_read_real(&t, 0, 1, out);
        fv_tensor_read_real(&t, 1, 65535, out + 1);
        assert_true(out[65536] == 7);
        for (int i = 0; i < 65536; i++) {
            int exponent = i >> digits & top, fraction = i & ((1 << digits) - 1);
            double value = exponent == top ? (fraction ? NAN : INFINITY)
                           : exponent ? ldexp(fraction + (1 << digits), exponent - bias - digits)
                                      : ldexp(fraction, 1 - bias - digits);
            double got = (double)out[i], same;
            fv_tensor_read(&t, (size_t)i, 1, &same);
            if (!(fabs(got) == value || (isnan(got) && isnan(value))) ||
                !signbit(got) != !(i & 0x8000) || memcmp(&got, &same, sizeof got) != 0)
                fail_msg("%s %04x: %g, %g is not %g", brain ? "BF16" : "F16", i, got, same, value);
        }
    }
}

/* The other types as `real`: what fv_tensor_read gives, rounded. */
static void test_real_values(void **state) {
    char path[FV_PATH];
    join(path, *state, "a.safetensors");
    FvTensorFile *file = write_and_open(path);
    for (size_t i = 0; i < TENSORS; i++) {
        const FvTensor *t = fv_tensors_at(file, i);
        double values[8];
        real got[9];
        for (size_t first = 0; first <= t->count; first++) {
            fv_tensor_read(t, first, t->count - first, values);
            got[t->count - first] = 7;
            fv_tensor_read_real(t, first, t->count - first, got);
            assert_true(got[t->count - first] == 7);
            for (size_t n = 0; first + n < t->count; n++)
                if (got[n] != (real)values[n] && !(isnan(got[n]) && isnan(values[n])))
                    fail_msg("%s[%zu]: %g is not %g", t->name, first + n, (double)got[n],
                             values[n]);
        }
    }
    fv_tensors_close(file);
}

/* Types without a reader: the file can be used, their elements are refused by name. */
static void test_other_types(void **state) {
    static const char *const names[] = {"BOOL",    "I8",          "I16",         "U16",
                                        "U32",     "U64",         "F8_E4M3",     "F8_E5M2",
                                        "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"};
    static const size_t sizes[] = {1, 1, 2, 2, 4, 8, 1, 1, 1, 1, 1, 8};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[FV_PATH], header[256], zeros[32] = {0};
        FvTensorFile *file;
        FvError err;
        double value;
        int length = snprintf(header, sizeof header,
                              "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                              "\"b\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[4,%zu]}}",
                              names[i], 4 + 3 * sizes[i]);
        uint64_t stored = (uint64_t)length;
        join(path, *state, "other.safetensors");
        FvBytes parts[] = {{&stored, 8}, {header, (size_t)length}, {zeros, 4 + 3 * sizes[i]}};
        assert_ok(fv_file_write(path, parts, 3, &err), &err);
        assert_ok(fv_tensors_open(path, &file, &err), &err);
        const FvTensor *a = fv_tensors_find(file, "a"), *b = fv_tensors_find(file, "b");
        assert_string_equal(fv_type_name(b->type), names[i]);
        assert_int_equal(fv_tensor_bytes(b), 3 * sizes[i]);
        assert_ok(fv_tensors_readable(file, a, &err), &err);
        assert_int_equal(fv_tensors_readable(file, b, &err), FV_DATA);
        assert_non_null(strstr(err.text, path));
        assert_non_null(strstr(err.text, names[i]));
        fv_tensor_read(b, 0, 1, &value);
        assert_true(isnan(value)); /* not a number that could be mistaken for the element */
        fv_tensors_close(file);
    }
}

static void test_finds_among_thousands(void **state) {
    enum { MANY = 5000 };
    char path[FV_PATH];
    FvTensorFile *file;
    FvError err;
    FvTensor *many = calloc(MANY, sizeof *many);
    char(*names)[16] = calloc(MANY, sizeof *names);
    assert_true(many && names);
    for (size_t i = 0; i < MANY; i++) {
        snprintf(names[i], sizeof *names, "layer.%zu", (i * 37) % MANY);
        many[i] = (FvTensor){names[i], FV_U8, 1, {1}, u8, 1};
    }
    join(path, *state, "many.safetensors");
    assert_ok(fv_tensors_write(path, many, MANY, NULL, 0, &err), &err);
    assert_ok(fv_tensors_open(path, &file, &err), &err);
    for (size_t i = 0; i < MANY; i++) {
        const FvTensor *t = fv_tensors_find(file, names[i]);
        assert_non_null(t);
        assert_string_equal(t->name, names[i]);
    }
    assert_null(fv_tensors_find(file, "layer."));
    assert_null(fv_tensors_find(file, "layer.5000"));
    assert_null(fv_tensors_find(file, ""));
    fv_tensors_close(file);
    free(names);
    free(many);
}

static void test_refuses_to_write(void **state) {
    char path[FV_PATH];
    FvError err;
    const FvTensor twice[] = {tensors[0], tensors[0]};
    const FvMeta taken[] = {{"checksum", "x"}};
    join(path, *state, "refused.safetensors");
    assert_int_equal(fv_tensors_write(path, twice, 2, NULL, 0, &err), FV_IO);
    assert_int_equal(fv_tensors_write(path, tensors, 1, taken, 1, &err), FV_IO);
    assert_int_equal(access(path, F_OK), -1);
    join(path, *state, "absent/refused.safetensors");
    assert_int_equal(fv_tensors_write(path, tensors, 1, NULL, 0, &err), FV_IO);
    assert_non_null(strstr(err.text, path));
    assert_non_null(strstr(err.text, "No such file or directory"));
}

static size_t count_entries(const char *folder) {
    size_t count = 0;
    DIR *dir = opendir(folder);
    assert_non_null(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count - 2; /* . and .. */
}

/* A limit on file sizes stands for a full disk: the write fails after some bytes. */
static void test_disk_full(void **state) {
    char folder[FV_PATH], path[FV_PATH];
    FvError err;
    struct rlimit limit, small;
    join(folder, *state, "full");
    assert_ok(fv_make_folder(folder, &err), &err);
    join(path, folder, "a.safetensors");
    fv_tensors_close(write_and_open(path));
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = limit;
    small.rlim_cur = 700;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    FvStatus status = fv_tensors_write(path, tensors, TENSORS, NULL, 0, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(status, FV_IO);
    FvTensorFile *file;
    assert_ok(fv_tensors_open(path, &file, &err), &err);
    assert_ok(fv_tensors_verify(file, &err), &err);
    assert_string_equal(fv_tensors_metadata(file, "step"), "12"); /* the old file */
    fv_tensors_close(file);
    assert_int_equal(count_entries(folder), 1);
}

/* --- what is refused ------------------------------------------------------------------------ */

/* Writes a file with this header and `data` zero bytes behind it, and opens it. */
static FvStatus open_text(const char *folder, const char *header, size_t data, FvError *err) {
    char path[FV_PATH], zeros[64] = {0};
    FvTensorFile *file;
    uint64_t length = strlen(header);
    assert_true(data <= sizeof zeros);
    join(path, folder, "text.safetensors");
    assert_ok(fv_file_write(
                  path, (FvBytes[]){{&length, 8}, {header, (size_t)length}, {zeros, data}}, 3, err),
              err);
    FvStatus status = fv_tensors_open(path, &file, err);
    if (status == FV_OK)
        fv_tensors_close(file);
    else
        assert_non_null(strstr(err->text, path));
    return status;
}

static void test_headers(void **state) {
    static const struct {
        const char *header;
        size_t data;
        const char *why; /* part of the message; NULL: is read */
    } cases[] = {
        {"{}", 0, NULL},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}   ", 8, NULL},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
         "\"b\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[3,11]}}",
         11, NULL},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[0,9223372036854775807],\"data_offsets\":[0,0]}}",
         4, NULL},
        {" {}", 0, "starts without '{'"},
        {"{\"a\"", 0, "not valid JSON"},
        {"{\"a\":{},\"a\":{}}", 0, "twice"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0, "twice"},
        {"{\"a\":3}", 0, "not described by an object"},
        {"{\"a\":{\"shape\":[],\"data_offsets\":[0,4]}}", 4, "no dtype"},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[8],\"data_offsets\":[0,4]}}", 4,
         "F4, elements smaller than a byte"},
        {"{\"a\":{\"dtype\":\"F6_E2M3\",\"shape\":[4],\"data_offsets\":[0,3]}}", 3, "F6_E2M3"},
        {"{\"a\":{\"dtype\":\"G16\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4,
         "G16, which is not known"},
        {"{\"a\":{\"dtype\":16,\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "no dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4.0]}}", 4, "not two sizes"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,18446744073709551620]}}", 4,
         "not valid JSON"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, "not a list"},
        {"[]", 0, "starts without '{'"},
        {"{}{}", 0, "not valid JSON"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "no size"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4, "no size"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4,
         "up to 8"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "not two sizes"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,5]}}", 5, "disagree"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "damaged"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 7, "cut"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 5, "behind the last"},
        {"{}", 1, "behind the last"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[1,5]}}", 5, "gap or overlap"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
         4, "gap or overlap"},
        /* 2^62 x 4 elements of 4 bytes: 2^66, which is 0 in 64 bits */
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0,
         "disagree"},
        {"{\"__metadata__\":{\"a\":3}}", 0, "not a string"},
        {"{\"__metadata__\":[]}", 0, "not an object"},
    };
    FvError err;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        FvStatus status = open_text(*state, cases[i].header, cases[i].data, &err);
        if (!cases[i].why)
            assert_ok(status, &err);
        else if (status != FV_DATA || !strstr(err.text, cases[i].why))
            fail_msg("%s: status %d, %s", cases[i].header, (int)status, err.text);
    }
}

static void test_lengths(void **state) {
    static const uint64_t lengths[] = {3, 100000000, 100000001, UINT64_MAX, UINT64_MAX - 7};
    char path[FV_PATH];
    FvError err;
    FvTensorFile *file;
    join(path, *state, "length.safetensors");
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        assert_ok(fv_file_write(path, (FvBytes[]){{&lengths[i], 8}, {"{}", 2}}, 2, &err), &err);
        assert_int_equal(fv_tensors_open(path, &file, &err), FV_DATA);
    }
    assert_int_equal(fv_tensors_open(*state, &file, &err), FV_DATA); /* a folder */
    join(path, *state, "pipe.safetensors");
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(fv_tensors_open(path, &file, &err), FV_DATA); /* and is not waited for */
    join(path, *state, "absent.safetensors");
    assert_int_equal(fv_tensors_open(path, &file, &err), FV_DATA);
    assert_non_null(strstr(err.text, path));
}

/* Opens bytes as a file, reads all that it holds; the status of open or verify. */
static FvStatus read_bytes(const char *path, const char *bytes, size_t size) {
    FvTensorFile *file;
    FvError err;
    double value;
    FILE *out =
        fopen(path, "wb"); /* thousands of times: without fv_file_write's wait for the disk */
    assert_true(out && fwrite(bytes, 1, size, out) == size && fclose(out) == 0);
    FvStatus status = fv_tensors_open(path, &file, &err);
    if (status != FV_OK)
        return status;
    for (size_t i = 0; i < fv_tensors_count(file); i++) {
        const FvTensor *t = fv_tensors_at(file, i);
        for (size_t n = 0; n < t->count; n++)
            fv_tensor_read(t, n, 1, &value);
    }
    status = fv_tensors_verify(file, &err);
    fv_tensors_close(file);
    return status;
}

/* Cut at every length, and with bytes changed at random: refused, never a crash. A change may
 * turn the checksum's key into another: such a file carries none, and may pass. */
static void test_damage(void **state) {
    char path[FV_PATH], *bytes;
    size_t size;
    FvError err;
    join(path, *state, "whole.safetensors");
    fv_tensors_close(write_and_open(path));
    assert_ok(fv_file_read(path, &bytes, &size, &err), &err);
    join(path, *state, "damaged.safetensors");
    assert_int_equal(read_bytes(path, bytes, size), FV_OK);
    for (size_t cut = 0; cut < size; cut++)
        assert_int_equal(read_bytes(path, bytes, cut), FV_DATA);
    char *changed = malloc(size);
    assert_non_null(changed);
    for (size_t trial = 0; trial < 2000; trial++) {
        memcpy(changed, bytes, size);
        size_t changes = 1 + trial % 4;
        for (size_t i = 0; i < changes; i++) {
            size_t at = fv_random_below(1, 8 * trial + i, size);
            changed[at] = (char)(changed[at] ^ (1 + fv_random_below(2, 8 * trial + i, 255)));
        }
        FvStatus status = read_bytes(path, changed, size);
        bool carries = memcmp(changed + 8, "{\"__metadata__\":{\"checksum\":", 28) == 0;
        if (status != FV_DATA && !(status == FV_OK && !carries) &&
            !(memcmp(changed, bytes, size) == 0))
            fail_msg("trial %zu: status %d", trial, (int)status);
    }
    free(changed);
    free(bytes);
}

/* --- files ---------------------------------------------------------------------------------- */

static void test_folders(void **state) {
    char path[FV_PATH], name[FV_PATH];
    FvError err;
    join(path, *state, "one/two//three/");
    assert_ok(fv_make_folder(path, &err), &err);
    assert_ok(fv_make_folder(path, &err), &err);
    join(name, *state, "one/file");
    assert_ok(fv_file_write(name, &(FvBytes){"x", 1}, 1, &err), &err);
    assert_int_equal(fv_make_folder(name, &err), FV_IO);
    join(name, *state, "one/file/below");
    assert_int_equal(fv_make_folder(name, &err), FV_IO);
    char small[8];
    assert_int_equal(fv_path(&err, small, sizeof small, "%s", "1234567"), FV_OK);
    assert_int_equal(fv_path(&err, small, sizeof small, "%s", "12345678"), FV_IO);
}

static void test_removes_temporaries(void **state) {
    static const char *const names[] = {"a.tmp-12", "b.safetensors.tmp-7", "c.tmp-", "d.tmp-1x",
                                        "e.safetensors"};
    char folder[FV_PATH], path[FV_PATH];
    FvError err;
    join(folder, *state, "temporaries");
    assert_ok(fv_remove_temporaries(folder, &err), &err); /* is not there */
    assert_ok(fv_make_folder(folder, &err), &err);
    for (size_t i = 0; i < 5; i++) {
        join(path, folder, names[i]);
        assert_ok(fv_file_write(path, &(FvBytes){"x", 1}, 1, &err), &err);
    }
    assert_ok(fv_remove_temporaries(folder, &err), &err);
    for (size_t i = 0; i < 5; i++) {
        join(path, folder, names[i]);
        assert_int_equal(access(path, F_OK) == 0, i >= 2);
    }
}

static void test_utf8(void **state) {
    static const char *const cases[][2] = {
        {"plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80",
         "plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"cut \xe2\x82", "cut ??"},
        {"\xc0\xaf \xe0\x80\xaf", "?? ???"},           /* overlong */
        {"\xed\xa0\x80 \xf4\x90\x80\x80", "??? ????"}, /* surrogate, beyond U+10FFFF */
        {"\xff\x80 a", "?? a"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[64];
        snprintf(text, sizeof text, "%s", cases[i][0]);
        fv_utf8_clean(text);
        assert_string_equal(text, cases[i][1]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_small_floats),
        cmocka_unit_test(test_real_values),
        cmocka_unit_test(test_other_types),
        cmocka_unit_test(test_finds_among_thousands),
        cmocka_unit_test(test_refuses_to_write),
        cmocka_unit_test(test_disk_full),
        cmocka_unit_test(test_headers),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_removes_temporaries),
        cmocka_unit_test(test_utf8),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
