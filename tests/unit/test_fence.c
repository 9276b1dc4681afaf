/* One writer for a folder: who may take it, and what the one before it can still do. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "run/fence.h"

typedef struct Folder {
    char path[64];
    FvFence fence;
    int lock;
} Folder;

static void in_job(const char *job, const char *restart) {
    if (job)
        setenv("SLURM_JOB_ID", job, 1);
    else
        unsetenv("SLURM_JOB_ID");
    if (restart)
        setenv("SLURM_RESTART_COUNT", restart, 1);
    else
        unsetenv("SLURM_RESTART_COUNT");
}

static int setup(void **state) {
    static const char pattern[] = "/tmp/fence-XXXXXX";
    Folder *f = calloc(1, sizeof *f);
    if (!f)
        return -1;
    f->lock = -1;
    memcpy(f->path, pattern, sizeof pattern);
    in_job(NULL, NULL);
    *state = f;
    return mkdtemp(f->path) ? 0 : -1;
}

static int teardown(void **state) {
    Folder *f = *state;
    char path[128];
    static const char *const files[] = {"owner", "lock", "file", ""};
    fv_fence_release(f->lock);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, "%s/%s", f->path, files[i]);
        remove(path);
    }
    free(f);
    in_job(NULL, NULL);
    return 0;
}

static FvStatus replace_file(const Folder *f, const char *text, FvError *err) {
    char path[128];
    snprintf(path, sizeof path, "%s/file", f->path);
    return fv_file_replace(path, &(FvBytes){text, strlen(text)}, 1, &f->fence, err);
}

static void check_file(const Folder *f, const char *want) {
    char path[128], *text;
    size_t size;
    snprintf(path, sizeof path, "%s/file", f->path);
    assert_int_equal(fv_file_read(path, &text, &size, NULL), FV_OK);
    assert_string_equal(text, want);
    free(text);
}

static void take(Folder *f) {
    FvError err;
    assert_int_equal(fv_fence_take(f->path, &f->fence, &f->lock, &err), FV_OK);
    assert_int_equal(replace_file(f, "first", &err), FV_OK);
}

static void a_second_run_is_refused_and_changes_nothing(void **state) {
    Folder *f = *state;
    FvFence second = {0};
    FvError err;
    int lock = -1;
    take(f);
    assert_int_equal(fv_fence_take(f->path, &second, &lock, &err), FV_IO);
    assert_non_null(strstr(err.text, "another fovea is writing there"));
    assert_int_equal(lock, -1);
    assert_int_equal(replace_file(f, "still first", &err), FV_OK);
    check_file(f, "still first");
}

static void another_job_and_the_same_start_are_refused(void **state) {
    Folder *f = *state;
    FvFence second = {0};
    FvError err;
    int lock = -1;
    in_job("71", "1");
    take(f);
    static const char *const others[][2] = {{"72", "5"}, {"71", "1"}, {"71", NULL}, {NULL, "5"}};
    for (size_t i = 0; i < 4; i++) {
        in_job(others[i][0], others[i][1]);
        assert_int_equal(fv_fence_take(f->path, &second, &lock, &err), FV_IO);
        assert_non_null(strstr(err.text, "job 71"));
    }
    assert_int_equal(replace_file(f, "still first", &err), FV_OK);
}

/* The first start's processes live on and hold the lock. */
static void a_later_start_of_the_job_takes_over(void **state) {
    Folder *f = *state;
    Folder later = *f;
    FvError err;
    in_job("71", NULL);
    take(f);
    in_job("71", "1");
    later.lock = -1;
    assert_int_equal(fv_fence_take(later.path, &later.fence, &later.lock, &err), FV_OK);
    assert_int_equal(replace_file(&later, "second", &err), FV_OK);
    assert_int_equal(replace_file(f, "orphan", &err), FV_IO);
    assert_non_null(strstr(err.text, "job 71 (restart 1)"));
    check_file(&later, "second");
    fv_fence_release(later.lock);
}

static void a_released_folder_can_be_taken(void **state) {
    Folder *f = *state;
    FvError err;
    take(f);
    fv_fence_release(f->lock);
    f->lock = -1;
    FvFence before = f->fence;
    assert_int_equal(fv_fence_take(f->path, &f->fence, &f->lock, &err), FV_OK);
    assert_string_not_equal(before.owner, f->fence.owner);
    assert_int_equal(fv_fence_check(&before, &err), FV_IO);
    assert_int_equal(fv_fence_check(&f->fence, &err), FV_OK);
}

static void a_folder_that_vanished_or_a_damaged_owner_is_told(void **state) {
    Folder *f = *state;
    char path[128];
    FvError err;
    take(f);
    snprintf(path, sizeof path, "%s/owner", f->path);
    assert_int_equal(fv_file_write(path, &(FvBytes){"host", 4}, 1, &err), FV_OK);
    assert_int_equal(replace_file(f, "blind", &err), FV_IO);
    assert_non_null(strstr(err.text, "damaged"));
    unlink(path);
    assert_int_equal(replace_file(f, "blind", &err), FV_IO);
    assert_non_null(strstr(err.text, "owner"));
    check_file(f, "first");
}

static void without_a_fence_nothing_is_checked(void **state) {
    (void)state;
    const FvFence none = {0};
    assert_int_equal(fv_fence_check(NULL, NULL), FV_OK);
    assert_int_equal(fv_fence_check(&none, NULL), FV_OK);
}

#define FOLDER_TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        FOLDER_TEST(a_second_run_is_refused_and_changes_nothing),
        FOLDER_TEST(another_job_and_the_same_start_are_refused),
        FOLDER_TEST(a_later_start_of_the_job_takes_over),
        FOLDER_TEST(a_released_folder_can_be_taken),
        FOLDER_TEST(a_folder_that_vanished_or_a_damaged_owner_is_told),
        cmocka_unit_test(without_a_fence_nothing_is_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
