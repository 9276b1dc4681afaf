/* The index of a sharded safetensors file, beside the shards "1" (tensors a, b) and "2" (c). */
#include <string.h>

#include "fuzz.h"
#include "run/files.h"
#include "run/safetensors.h"

/* Made at the first input, removed at the end. */
static char folder[FV_PATH], *const names[] = {"1", "2", "x.index.json"};

static void in_folder(const char *name, char path[FV_PATH]) {
    REQUIRE(fv_path(NULL, path, FV_PATH, "%s/%s", folder, name) == FV_OK);
}

static void remove_folder(void) {
    char path[FV_PATH];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        in_folder(names[i], path);
        unlink(path);
    }
    rmdir(folder);
}

static void make_folder(void) {
    static const float values[3] = {1, 2, 3};
    const FvTensor tensors[] = {{"a", FV_F32, 1, {1}, values, 1},
                                {"b", FV_F32, 1, {1}, values, 1},
                                {"c", FV_F32, 1, {3}, values, 3}};
    char path[FV_PATH];
    const char *above = getenv("TMPDIR");
    REQUIRE(fv_path(NULL, folder, sizeof folder, "%s/fovea-fuzz-XXXXXX", above ? above : "/tmp") ==
            FV_OK);
    REQUIRE(mkdtemp(folder) && atexit(remove_folder) == 0);
    in_folder("1", path);
    REQUIRE(fv_tensors_write(path, tensors, 2, NULL, 0, NULL) == FV_OK);
    in_folder("2", path);
    REQUIRE(fv_tensors_write(path, tensors + 2, 1, NULL, 0, NULL) == FV_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char input[FUZZ_PATH], path[FV_PATH];
    FvTensorFile *tensors;
    FvError err;
    if (!*folder)
        make_folder();
    int file = fuzz_file(data, size, NULL, 0, input);
    in_folder("x.index.json", path);
    unlink(path); /* the input before */
    REQUIRE(symlink(input, path) == 0);
    if (fv_tensors_open(path, &tensors, &err) == FV_OK) {
        size_t count = fv_tensors_count(tensors); /* whole shards: none, 1, 2 or both */
        REQUIRE(count <= 3);
        for (size_t i = 0; i < count; i++) {
            const FvTensor *t = fv_tensors_at(tensors, i);
            real value = 0;
            REQUIRE(fv_tensors_find(tensors, t->name) == t);
            fv_tensor_read_real(t, 0, 1, &value);
            REQUIRE(value == 1);
        }
        REQUIRE(!fv_tensors_find(tensors, "a") == !fv_tensors_find(tensors, "b"));
        REQUIRE(fv_tensors_verify(tensors, &err) == FV_OK);
        fv_tensors_metadata(tensors, "total_size");
        fv_tensors_close(tensors);
    } else {
        REQUIRE(!strchr(err.text, '\n'));
    }
    close(file);
    return 0;
}
