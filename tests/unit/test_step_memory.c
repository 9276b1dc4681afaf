/* A training step, once warm, allocates nothing: every allocation of this program is counted. Not
 * built with sanitizers, which bring an allocator of their own. */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model_fixture.h"

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t size);

/* The one number that the functions below can reach. */
static size_t allocations;

/* OpenBLAS's kernels for small matrices take a few hundred bytes each; they are not ours. */
static void count(const void *caller) {
    Dl_info where;
    if (dladdr(caller, &where) && where.dli_fname && strstr(where.dli_fname, "openblas"))
        return;
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
}

void *malloc(size_t size) {
    count(__builtin_return_address(0));
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size) {
    count(__builtin_return_address(0));
    return __libc_calloc(n, size);
}

void *realloc(void *p, size_t size) {
    count(__builtin_return_address(0));
    return __libc_realloc(p, size);
}

static void steps_allocate_nothing(bool deep, size_t threads) {
    FvModelConfig c = fixture_config();
    c.deep = deep;
    c.contrastive = 0.1;
    c.entropy_margin = 0.5;
    Fixture f = fixture_create(&c, threads, 1, 0);
    fixture_train(&f, 2);
    size_t before = allocations;
    fixture_train(&f, 3);
    size_t after = allocations;
    fixture_destroy(&f);
    assert_true(before > 0); /* creating the model was seen */
    assert_int_equal(after - before, 0);
}

static void deep_steps_allocate_nothing(void **state) {
    (void)state;
    steps_allocate_nothing(true, 1);
    steps_allocate_nothing(true, 2);
}

static void shallow_steps_allocate_nothing(void **state) {
    (void)state;
    steps_allocate_nothing(false, 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(deep_steps_allocate_nothing),
        cmocka_unit_test(shallow_steps_allocate_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
