/* A study file: refused with one line, or loaded; what is loaded, written out and loaded again is
 * the same study. */
#include <string.h>

#include "fuzz.h"
#include "run/config.h"

static void check_kept(const FvStudy *study) {
    char path[FUZZ_PATH];
    FvError err;
    char *text = fv_study_format(study);
    REQUIRE(text);
    int file = fuzz_file(text, strlen(text), NULL, 0, path);
    if (fv_study_same(path, study, &err) != FV_OK) {
        fprintf(stderr, "%s\n%s", err.text, text);
        abort();
    }
    close(file);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const overrides[] = {"A.lr=0.5", "seeds=3,4", "batch=8"};
    char path[FUZZ_PATH];
    FvStudy study;
    FvModelConfig model;
    FvError err;
    int file = fuzz_file(data, size, NULL, 0, path);
    for (size_t count = 0; count <= 3; count += 3) { /* without and with a command line */
        if (fv_study_load(path, overrides, count, "small", &study, &err) == FV_OK) {
            REQUIRE(study.experiment_count > 0 && study.seed_count > 0);
            for (size_t i = 0; i < study.experiment_count; i++)
                REQUIRE(fv_config_model(&study.experiments[i].config, 1, 1, &model, &err) == FV_OK);
            check_kept(&study);
            fv_study_free(&study);
        } else {
            REQUIRE(*err.text && !strchr(err.text, '\n'));
        }
    }
    close(file);
    return 0;
}
