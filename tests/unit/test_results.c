/* History files, summaries and results.h5.
 *   test_results                 the tests
 *   test_results --make FOLDER   writes the results.h5 that tests/python/test_results.py reads
 *   test_results --time FOLDER   times results.h5 of a whole study: 7 runs of 1500 steps */
#include <errno.h>
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
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <hdf5.h>

#include "base/rng.h"
#include "run/files.h"
#include "run/history.h"
#include "run/results.h"
#include "run/summary.h"

/* --- a fabricated study --------------------------------------------------------------------- */

enum { MOST_EXPERIMENTS = 7, MOST_SEEDS = 2, MAP_CLIPS = 4, FRAMES = 8, GRID = 8, SIZE = 64 };

typedef struct Sample {
    FvStudy study;
    FvExperiment experiments[MOST_EXPERIMENTS];
    uint64_t seeds[MOST_SEEDS];
    FvJobRecord records[MOST_EXPERIMENTS * MOST_SEEDS];
    const uint8_t *map_pixels[MOST_EXPERIMENTS];
    const FvDataInfo *data_of[MOST_EXPERIMENTS];
    FvDataInfo data;
    FvProvenance provenance;
    uint8_t pixels[MAP_CLIPS * FRAMES * SIZE * SIZE * 3];
} Sample;

static void set_text(char *out, const char *text) {
    snprintf(out, FV_TEXT, "%s", text);
}

static void set_defaults(FvConfig *c) {
#define SET_size(key, value)                 c->key = value;
#define SET_real(key, value)                 c->key = value;
#define SET_flag(key, value)                 c->key = value;
#define SET_text(key, value)                 set_text(c->key, value);
#define X(kind, key, value, low, high, help) SET_##kind(key, value)
    FV_CONFIG_KEYS(X)
#undef X
}

static Sample *make_sample(size_t experiments, size_t seeds) {
    static const char *const names[MOST_EXPERIMENTS] = {
        "A_baseline",     "B_temp_0.1",    "C_contrastive",  "D_freeze_dino",
        "E_hard_attn_32", "F_entropy_reg", "G_combined_best"};
    Sample *s = calloc(1, sizeof *s);
    assert_non_null(s);
    s->study = (FvStudy){.source = (char *)(uintptr_t) "study: sample\n",
                         .experiments = s->experiments,
                         .experiment_count = experiments,
                         .seeds = s->seeds,
                         .seed_count = seeds};
    snprintf(s->study.name, sizeof s->study.name, "sample");
    snprintf(s->study.path, sizeof s->study.path, "sample.yaml");
    s->data = (FvDataInfo){.count = {813, 64},
                           .frames = FRAMES,
                           .size = SIZE,
                           .source = "procedural",
                           .latents = "blocks"};
    memset(s->data.sha256, 'a', 64);
    for (size_t e = 0; e < experiments; e++) {
        snprintf(s->experiments[e].name, FV_NAME, "%s", names[e]);
        set_defaults(&s->experiments[e].config);
        snprintf(s->experiments[e].config.scale, FV_TEXT, "small");
        s->map_pixels[e] = s->pixels;
        s->data_of[e] = &s->data;
    }
    for (size_t i = 0; i < seeds; i++)
        s->seeds[i] = 10 * i;
    s->experiments[experiments - 1].config.freeze_dino = true;
    s->experiments[experiments - 1].config.hard_attn_k = 32;
    s->experiments[experiments - 1].config.temperature = 0.1;
    for (size_t i = 0; i < sizeof s->pixels; i++)
        s->pixels[i] = (uint8_t)(i / 3 % SIZE + fv_random_below(1, i, 8));
    s->provenance = (FvProvenance){.command_line = "fovea sample.yaml",
                                   .revision = "0123abc",
                                   .hosts = "rank 0: host, CPU\nrank 1: host, CPU",
                                   .start_time = "2026-01-06T12:00:00Z",
                                   .end_time = "",
                                   .weights = "",
                                   .weights_sha256 = "",
                                   .libraries = "HDF5 1.10\nOpenBLAS 0.3"};
    return s;
}

static void free_sample(Sample *s) {
    for (size_t j = 0; j < MOST_EXPERIMENTS * MOST_SEEDS; j++)
        fv_history_free(&s->records[j].history);
    free(s);
}

/* Numbers that look like a run's; every one different, so that mixed-up rows show. */
static void fill_history(FvHistory *h, uint64_t key) {
    uint64_t at = 0;
    for (size_t i = 0; i < FV_SERIES_COUNT; i++)
        for (size_t n = 0; n < h->steps; n++)
            h->series[i][n] = 1 + 0.1 * fv_uniform(key, at++);
    for (size_t i = 0; i < FV_EVAL_COUNT; i++)
        for (size_t n = 0; n < h->evals * h->clips * h->frames; n++)
            h->eval[i][n] = 1 + 0.1 * fv_uniform(key, at++);
    size_t patches = h->grid * h->grid, maps = h->maps * 2 * h->map_clips * h->frames;
    for (size_t n = 0; n < maps; n++) {
        h->cls[n] = 1.0f / 16;
        for (size_t i = 0; i < patches; i++)
            h->map[n * patches + i] = (float)((1 + 0.5 * fv_uniform(key, at++)) / (double)patches);
    }
    for (size_t n = 0; n < h->evals; n++)
        h->eval_step[n] = (int64_t)(100 * n);
    for (size_t n = 0; n < h->maps; n++)
        h->map_step[n] = (int64_t)(100 * n);
    for (size_t n = 0; n < h->map_clips; n++)
        h->map_clip[n] = (int64_t)(16 * n);
}

static void add_job(Sample *s, size_t job, size_t steps, size_t evals, size_t maps, size_t clips,
                    size_t map_clips, FvJobState state) {
    FvJobRecord *r = &s->records[job];
    FvError err;
    assert_int_equal(fv_history_create(steps + 1, evals + 1, maps + 1, clips, FRAMES, map_clips,
                                       GRID, &r->history, &err),
                     FV_OK);
    r->history.steps = steps;
    r->history.evals = evals;
    r->history.maps = maps;
    fill_history(&r->history, 100 + job);
    r->present = true;
    r->info = (FvJobInfo){.state = state,
                          .parameters = 531012,
                          .trained = 530000,
                          .device = "2 threads of a processor",
                          .ranks = 1,
                          .seconds = 12.5,
                          .checkpoint_seconds_last = 0.02,
                          .checkpoint_bytes = 4096,
                          .restarts = 1};
    if (state == FV_JOB_FAILED)
        snprintf(r->info.why, sizeof r->info.why, "step 42: loss_fine is nan \xe2\x80\x94 \xff");
}

/* Two experiments, two seeds: finished, running with fewer steps, failed before the first
 * evaluation and map, waiting. */
static Sample *make_mixed(void) {
    Sample *s = make_sample(2, 2);
    add_job(s, 0, 300, 4, 3, 6, MAP_CLIPS, FV_JOB_FINISHED);
    add_job(s, 1, 120, 2, 2, 6, MAP_CLIPS, FV_JOB_RUNNING);
    add_job(s, 2, 42, 0, 0, 6, MAP_CLIPS, FV_JOB_FAILED);
    return s;
}

static FvStatus write_sample(const Sample *s, const char *folder, FvError *err) {
    return fv_results_write(folder, &s->study, s->records, s->map_pixels, s->data_of,
                            &s->provenance, NULL, err);
}

static void write_it(const Sample *s, const char *folder) {
    FvError err;
    if (write_sample(s, folder, &err) != FV_OK)
        fail_msg("%s", err.text);
}

/* --- folders for tests ---------------------------------------------------------------------- */

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

/* --- history files -------------------------------------------------------------------------- */

static void test_history_round_trip(void **state) {
    char path[FV_PATH];
    FvError err;
    Sample *s = make_mixed();
    join(path, *state, "history.safetensors");
    for (size_t j = 0; j < 3; j++) {
        const FvJobRecord *r = &s->records[j];
        FvJobRecord back = {0};
        assert_int_equal(fv_history_save(path, &r->history, &r->info, NULL, &err), FV_OK);
        assert_int_equal(fv_history_load(path, &back.history, &back.info, &back.present, &err),
                         FV_OK);
        assert_true(back.present);
        assert_int_equal(back.history.capacity_steps, r->history.capacity_steps);
        assert_int_equal(back.history.capacity_evals, r->history.capacity_evals);
        assert_int_equal(back.history.capacity_maps, r->history.capacity_maps);
        FvTensor a[FV_HISTORY_TENSORS], b[FV_HISTORY_TENSORS];
        assert_int_equal(fv_history_tensors(&r->history, a), FV_HISTORY_TENSORS);
        assert_int_equal(fv_history_tensors(&back.history, b), FV_HISTORY_TENSORS);
        for (size_t i = 0; i < FV_HISTORY_TENSORS; i++) {
            assert_int_equal(a[i].count, b[i].count);
            assert_memory_equal(a[i].data, b[i].data, a[i].count * fv_type_size(a[i].type));
        }
        assert_int_equal(back.info.state, r->info.state);
        assert_int_equal(back.info.parameters, r->info.parameters);
        assert_int_equal(back.info.trained, r->info.trained);
        assert_int_equal(back.info.ranks, r->info.ranks);
        assert_int_equal(back.info.restarts, r->info.restarts);
        assert_int_equal(back.info.checkpoint_bytes, r->info.checkpoint_bytes);
        assert_true(back.info.seconds == r->info.seconds);
        assert_true(back.info.checkpoint_seconds_last == r->info.checkpoint_seconds_last);
        assert_string_equal(back.info.device, r->info.device);
        assert_string_equal(back.info.why,
                            j == 2 ? "step 42: loss_fine is nan \xe2\x80\x94 ?" : "");
        fv_history_free(&back.history);
    }
    free_sample(s);
}

/* A file that is not there is no error; one with any bit turned is FV_DATA. */
static void test_history_damage(void **state) {
    char path[FV_PATH], *bytes;
    size_t size;
    FvError err;
    FvJobRecord back = {.present = true};
    Sample *s = make_sample(1, 1);
    join(path, *state, "damaged.safetensors");
    assert_int_equal(fv_history_load(path, &back.history, &back.info, &back.present, &err), FV_OK);
    assert_false(back.present);
    add_job(s, 0, 3, 1, 1, 2, 1, FV_JOB_RUNNING);
    assert_int_equal(fv_history_save(path, &s->records[0].history, &s->records[0].info, NULL, &err),
                     FV_OK);
    assert_int_equal(fv_file_read(path, &bytes, &size, &err), FV_OK);
    for (size_t i = 0; i < 400; i++) {
        size_t at = fv_random_below(5, i, size), bit = fv_random_below(6, i, 8);
        bytes[at] = (char)(bytes[at] ^ 1 << bit);
        assert_int_equal(fv_file_write(path, &(FvBytes){bytes, size}, 1, &err), FV_OK);
        assert_int_equal(fv_history_load(path, &back.history, &back.info, &back.present, &err),
                         FV_DATA);
        assert_non_null(strstr(err.text, path));
        bytes[at] = (char)(bytes[at] ^ 1 << bit);
    }
    free(bytes);
    free_sample(s);
}

/* A history longer or shaped otherwise than the run asked for is refused, and changes nothing. */
static void test_history_does_not_fit(void **state) {
    char path[FV_PATH];
    FvError err;
    Sample *s = make_mixed();
    FvTensorFile *file;
    FvHistory small = {0}, other = {0};
    join(path, *state, "history.safetensors");
    assert_int_equal(fv_history_save(path, &s->records[0].history, &s->records[0].info, NULL, &err),
                     FV_OK);
    assert_int_equal(fv_tensors_open(path, &file, &err), FV_OK);
    assert_int_equal(fv_history_create(299, 9, 9, 6, FRAMES, MAP_CLIPS, GRID, &small, &err), FV_OK);
    assert_int_equal(fv_history_create(300, 9, 9, 5, FRAMES, MAP_CLIPS, GRID, &other, &err), FV_OK);
    small.steps = 1;
    small.series[0][0] = 7;
    assert_int_equal(fv_history_read(&small, file, &err), FV_DATA);
    assert_int_equal(fv_history_read(&other, file, &err), FV_DATA);
    assert_int_equal(small.steps, 1);
    assert_true(small.series[0][0] == 7);
    assert_int_equal(other.steps, 0);
    fv_tensors_close(file);
    fv_history_free(&small);
    fv_history_free(&other);
    free_sample(s);
}

/* --- summary -------------------------------------------------------------------------------- */

static void assert_near(double value, double expected) {
    /* sums of up to 200 numbers near 1: at most 200 roundings of 2^-53, relative */
    if (!(fabs(value - expected) <= 200 * 1.2e-16 * fabs(expected)))
        fail_msg("%.17g is not %.17g", value, expected);
}

static void test_summary(void **state) {
    (void)state;
    FvHistory h;
    FvSummary s;
    FvError err;
    assert_int_equal(fv_history_create(500, 3, 0, 2, 3, 0, 8, &h, &err), FV_OK);
    fv_summary(&h, &s);
    assert_true(isnan(s.last[FV_SERIES_ratio]) && isnan(s.held_out_ratio) &&
                isnan(s.held_out_step));
    h.steps = 500;
    for (size_t i = 0; i < 500; i++)
        h.series[FV_SERIES_ratio][i] = i < 300 ? 1e9 : 1 + (double)(i - 300);
    h.evals = 2;
    h.eval_step[1] = 400;
    for (size_t i = 0; i < 6; i++) {
        h.eval[FV_EVAL_loss_fine][i] = h.eval[FV_EVAL_loss_coarse][i] = 1e9;
        h.eval[FV_EVAL_loss_fine][6 + i] = (double)(1 + i);   /* 1 2 3, 4 5 6 */
        h.eval[FV_EVAL_loss_coarse][6 + i] = (double)(7 - i); /* 7 6 5, 4 3 2 */
    }
    fv_summary(&h, &s);
    assert_int_equal(s.steps, 200);
    assert_near(s.last[FV_SERIES_ratio], 100.5); /* mean of 1 .. 200 */
    assert_near(s.held_out[FV_EVAL_loss_fine], 3.5);
    assert_near(s.held_out[FV_EVAL_loss_coarse], 4.5);
    assert_near(s.held_out_ratio, 3.5 / 4.5);
    assert_near(s.held_out_ratio_chosen, (3.0 + 6.0) / (5.0 + 2.0));
    assert_true(s.held_out_step == 400);
    h.steps = 2;
    h.series[FV_SERIES_ratio][1] = 3e9;
    h.frames = 2;
    fv_summary(&h, &s);
    assert_int_equal(s.steps, 2);
    assert_near(s.last[FV_SERIES_ratio], 2e9);
    assert_true(isnan(s.held_out_ratio_chosen)); /* no frame has a chosen query */
    fv_history_free(&h);
}

/* --- results.h5 ----------------------------------------------------------------------------- */

enum { MOST_VALUES = 20000 };

/* Reads a whole dataset of doubles; returns the number of values. */
static size_t read_doubles(hid_t file, const char *name, double *out, size_t most) {
    hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    assert_true(set >= 0);
    hid_t space = H5Dget_space(set);
    size_t count = (size_t)H5Sget_simple_extent_npoints(space);
    assert_true(count <= most);
    assert_true(H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, out) >= 0);
    H5Sclose(space);
    H5Dclose(set);
    return count;
}

static hid_t open_results(const char *folder) {
    char path[FV_PATH];
    join(path, folder, "results.h5");
    hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(file >= 0);
    return file;
}

static haddr_t address_of(hid_t file, const char *name) {
    H5O_info_t info;
    assert_true(H5Oget_info_by_name(file, name, &info, H5P_DEFAULT) >= 0);
    return info.addr;
}

static bool is_there(hid_t file, const char *name) {
    return H5Lexists(file, name, H5P_DEFAULT) > 0;
}

static void test_results_values(void **state) {
    Sample *s = make_mixed();
    double *values = malloc(MOST_VALUES * sizeof *values);
    assert_non_null(values);
    write_it(s, *state);
    hid_t file = open_results(*state);
    const FvHistory *h = &s->records[1].history;
    assert_int_equal(read_doubles(file, "/runs/A_baseline/seed_10/ratio", values, MOST_VALUES),
                     120);
    assert_memory_equal(values, h->series[FV_SERIES_ratio], 120 * sizeof *values);
    assert_int_equal(
        read_doubles(file, "/runs/A_baseline/seed_10/eval/cosine", values, MOST_VALUES),
        2 * 6 * FRAMES);
    assert_memory_equal(values, h->eval[FV_EVAL_cosine], 2 * 6 * FRAMES * sizeof *values);
    assert_int_equal(
        read_doubles(file, "/runs/A_baseline/seed_0/attention/map", values, MOST_VALUES),
        3 * 2 * MAP_CLIPS * FRAMES * GRID * GRID);
    for (size_t i = 0; i < 3 * 2 * MAP_CLIPS * FRAMES * GRID * GRID; i++)
        assert_true(values[i] == (double)s->records[0].history.map[i]);
    assert_int_equal(read_doubles(file, "/summary/loss_fine", values, MOST_VALUES), 4 * 300);
    for (size_t j = 0; j < 4; j++)
        for (size_t i = 0; i < 300; i++)
            assert_true(i < s->records[j].history.steps
                            ? values[j * 300 + i] ==
                                  s->records[j].history.series[FV_SERIES_loss_fine][i]
                            : isnan(values[j * 300 + i]));
    free(values);
    H5Fclose(file);
    free_sample(s);
}

static void test_results_shares_pixels(void **state) {
    Sample *s = make_mixed();
    write_it(s, *state);
    hid_t file = open_results(*state);
    assert_true(address_of(file, "/runs/A_baseline/seed_0/attention/pixels") ==
                address_of(file, "/runs/A_baseline/seed_10/attention/pixels"));
    assert_false(is_there(file, "/runs/B_temp_0.1/seed_0/attention")); /* no map yet */
    H5Fclose(file);
    free_sample(s);
}

/* A study with nothing measured, one without evaluations and maps, one without pixels. */
static void test_results_of_little(void **state) {
    Sample *s = make_sample(1, 1);
    s->data_of[0] = NULL;
    write_it(s, *state);
    hid_t file = open_results(*state);
    double value = 0;
    assert_int_equal(read_doubles(file, "/summary/ratio_last200", &value, 1), 1);
    assert_true(isnan(value));
    H5Fclose(file);
    add_job(s, 0, 5, 0, 2, 0, 0, FV_JOB_STOPPED);
    write_it(s, *state);
    file = open_results(*state);
    assert_false(is_there(file, "/runs/A_baseline/seed_0/attention"));
    assert_false(is_there(file, "/runs/A_baseline/seed_0/eval"));
    assert_true(is_there(file, "/runs/A_baseline/seed_0/loss_fine"));
    H5Fclose(file);
    fv_history_free(&s->records[0].history);
    add_job(s, 0, 5, 1, 2, 3, 2, FV_JOB_FINISHED);
    s->map_pixels[0] = NULL;
    write_it(s, *state);
    file = open_results(*state);
    assert_true(is_there(file, "/runs/A_baseline/seed_0/attention/map"));
    assert_false(is_there(file, "/runs/A_baseline/seed_0/attention/pixels"));
    H5Fclose(file);
    free_sample(s);
}

/* Nothing stays open after a write: files and datasets would pile up over a long run. */
static void test_results_leak_nothing(void **state) {
    Sample *s = make_mixed();
    write_it(s, *state);
    assert_int_equal(H5Fget_obj_count((hid_t)H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
    free_sample(s);
}

/* A reader that holds the old file keeps it, whole, while a new one takes the name. */
static void test_results_replaced_under_reader(void **state) {
    Sample *s = make_mixed();
    double value[300];
    write_it(s, *state);
    hid_t old = open_results(*state);
    double first = s->records[0].history.series[0][0];
    s->records[0].history.series[0][0] = -1;
    write_it(s, *state);
    assert_int_equal(read_doubles(old, "/runs/A_baseline/seed_0/loss_fine", value, 300), 300);
    assert_true(value[0] == first);
    H5Fclose(old);
    hid_t new = open_results(*state);
    assert_int_equal(read_doubles(new, "/runs/A_baseline/seed_0/loss_fine", value, 300), 300);
    assert_true(value[0] == -1);
    H5Fclose(new);
    free_sample(s);
}

/* A write that the system refuses after some bytes, as a full disk does: FV_IO with the reason,
 * the old file as it was, no temporary file. */
static void test_results_disk_full(void **state) {
    char path[FV_PATH], *before, *after;
    size_t size, size_after;
    FvError err;
    Sample *s = make_mixed();
    struct rlimit limit, small;
    join(path, *state, "results.h5");
    write_it(s, *state);
    assert_int_equal(fv_file_read(path, &before, &size, &err), FV_OK);
    s->records[0].history.series[0][0] = -1;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = limit;
    small.rlim_cur = size / 2;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    FvStatus status = write_sample(s, *state, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(status, FV_IO);
    assert_non_null(strstr(err.text, path));
    assert_non_null(strstr(err.text, strerror(EFBIG)));
    assert_int_equal(fv_file_read(path, &after, &size_after, &err), FV_OK);
    assert_int_equal(size, size_after);
    assert_memory_equal(before, after, size);
    join(path, *state, "results.h5.tmp-");
    char name[FV_PATH + 32];
    snprintf(name, sizeof name, "%s%ld", path, (long)getpid());
    assert_int_equal(access(name, F_OK), -1);
    free(before);
    free(after);
    free_sample(s);
}

/* --- by hand -------------------------------------------------------------------------------- */

static int make_file(const char *folder) {
    FvError err;
    Sample *s = make_mixed();
    FvStatus status = fv_make_folder(folder, &err);
    if (status == FV_OK)
        status = write_sample(s, folder, &err);
    if (status != FV_OK)
        fprintf(stderr, "%s\n", err.text);
    free_sample(s);
    return status;
}

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int time_writes(const char *folder) {
    enum { REPEATS = 10 };
    FvError err;
    Sample *s = make_sample(7, 1);
    struct stat info;
    char path[FV_PATH];
    join(path, folder, "results.h5");
    for (size_t j = 0; j < 7; j++)
        add_job(s, j, 1500, 16, 16, 64, MAP_CLIPS, FV_JOB_FINISHED);
    for (int i = 0; i < REPEATS; i++) {
        double start = now(CLOCK_MONOTONIC), busy = now(CLOCK_PROCESS_CPUTIME_ID);
        FvStatus status = write_sample(s, folder, &err);
        if (status != FV_OK || stat(path, &info) != 0) {
            fprintf(stderr, "%s\n", err.text);
            return FV_IO;
        }
        printf("%.1f ms, %.1f ms of them computing, %.1f MB\n",
               1e3 * (now(CLOCK_MONOTONIC) - start), 1e3 * (now(CLOCK_PROCESS_CPUTIME_ID) - busy),
               1e-6 * (double)info.st_size);
    }
    free_sample(s);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--make") == 0)
        return make_file(argv[2]);
    if (argc == 3 && strcmp(argv[1], "--time") == 0)
        return time_writes(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_history_round_trip),
        cmocka_unit_test(test_history_damage),
        cmocka_unit_test(test_history_does_not_fit),
        cmocka_unit_test(test_summary),
        cmocka_unit_test(test_results_values),
        cmocka_unit_test(test_results_shares_pixels),
        cmocka_unit_test(test_results_of_little),
        cmocka_unit_test(test_results_leak_nothing),
        cmocka_unit_test(test_results_replaced_under_reader),
        cmocka_unit_test(test_results_disk_full),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
