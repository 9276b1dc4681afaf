/* A safetensors file: opened, every element read, checksum compared, or refused.
 *
 * An input that begins with '{' is a header, up to the first zero byte, with the data behind it:
 * the length that stands before a header is put there, because random changes hardly ever keep it
 * right. Any other input is the file as it is. */
#include <string.h>

#include "fuzz.h"
#include "run/safetensors.h"

/* In blocks of their exact size, so that a read too many is seen. */
static void read_elements(const FvTensor *t) {
    double *values = malloc(t->count * sizeof *values);
    real *reals = malloc(t->count * sizeof *reals);
    REQUIRE(values && reals);
    fv_tensor_read(t, 0, t->count, values);
    fv_tensor_read_real(t, 0, t->count, reals);
    for (size_t i = 0; i < t->count; i++) {
        double value = values[i], got = (double)reals[i];
        bool same = (value != value && got != got) ||
                    /* beyond the range of float: undefined to convert here */
                    !(value <= 3e38 && value >= -3e38) || got == (double)(real)value;
        REQUIRE(same);
    }
    free(values);
    free(reals);
}

/* The tensors fill the data of `size` bytes, one after the other. */
static void check_places(const FvTensorFile *file, size_t size) {
    const unsigned char *next = NULL;
    size_t bytes = 0;
    for (size_t i = 0; i < fv_tensors_count(file); i++) {
        const FvTensor *t = fv_tensors_at(file, i);
        REQUIRE(!next || t->data == next);
        REQUIRE(fv_tensors_find(file, t->name) == t);
        next = (const unsigned char *)t->data + fv_tensor_bytes(t);
        bytes += fv_tensor_bytes(t);
    }
    REQUIRE(bytes == size);
}

static void check_file(const char *path, size_t data_size) {
    FvTensorFile *tensors;
    FvError err;
    if (fv_tensors_open(path, &tensors, &err) != FV_OK) {
        REQUIRE(!strchr(err.text, '\n'));
        return;
    }
    REQUIRE(fv_tensors_recognise(path));
    check_places(tensors, data_size);
    for (size_t i = 0; i < fv_tensors_count(tensors); i++)
        read_elements(fv_tensors_at(tensors, i));
    if (fv_tensors_verify(tensors, &err) != FV_OK)
        REQUIRE(fv_tensors_metadata(tensors, "checksum"));
    fv_tensors_close(tensors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[FUZZ_PATH];
    uint64_t length = 0;
    if (size > 0 && data[0] == '{') {
        unsigned char *start = malloc(8 + size);
        REQUIRE(start);
        length = strnlen((const char *)data, size);
        size_t next = length < size ? length + 1 : size; /* behind the zero byte */
        memcpy(start, &length, 8);
        memcpy(start + 8, data, length);
        int file = fuzz_file(start, 8 + length, data + next, size - next, path);
        check_file(path, size - next);
        close(file);
        free(start);
    } else {
        int file = fuzz_file(data, size, NULL, 0, path);
        memcpy(&length, data, size < 8 ? size : 8);
        check_file(path, size - 8 - length); /* looked at only when the file could be opened */
        close(file);
    }
    return 0;
}
