/* What the fuzz targets share: the input as a file, since the readers take paths, and REQUIRE,
 * whose failure libFuzzer reports as a crash of this input. */
#ifndef TESTS_FUZZ_FUZZ_H
#define TESTS_FUZZ_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);          \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* Called by libFuzzer. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { FUZZ_PATH = 32 };

/* A file in memory that holds the two parts, and its path. The caller closes it. */
static inline int fuzz_file(const void *first, size_t first_size, const void *second,
                            size_t second_size, char path[FUZZ_PATH]) {
    int file = memfd_create("input", MFD_CLOEXEC);
    REQUIRE(file >= 0);
    REQUIRE(write(file, first, first_size) == (ssize_t)first_size);
    REQUIRE(write(file, second, second_size) == (ssize_t)second_size);
    REQUIRE(lseek(file, 0, SEEK_SET) == 0);
    snprintf(path, FUZZ_PATH, "/proc/self/fd/%d", file);
    return file;
}

#endif
