#include "run/info.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/model.h"
#include "run/config.h"
#include "run/model_folder.h"
#include "run/safetensors.h"
#include "run/weights.h"

static void print_shape(size_t rank, const size_t *shape) {
    char text[96] = "[";
    size_t used = 1;
    for (size_t i = 0; i < rank && used < sizeof text; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%zu", i ? ", " : "", shape[i]);
    printf("%s]", text);
}

static void print_file(const FvTensorFile *file) {
    size_t parameters = 0, bytes = 0;
    char name[FV_TEXT];
    for (size_t i = 0; i < fv_tensors_count(file); i++) {
        const FvTensor *t = fv_tensors_at(file, i);
        printf("%-64s %-7s ", fv_shown(t->name, name, sizeof name), fv_type_name(t->type));
        print_shape(t->rank, t->shape);
        putchar('\n');
        parameters += t->count;
        bytes += fv_tensor_bytes(t);
    }
    printf("%zu parameters in %zu tensors, %zu bytes\n", parameters, fv_tensors_count(file), bytes);
}

static FvStatus info_file(const char *path, bool folder, FvError *err) {
    char weights[FV_TEXT], config[FV_TEXT];
    FvTensorFile *file;
    if (folder)
        FV_TRY(fv_folder_find(path, weights, config, err));
    FV_TRY(fv_tensors_open(folder ? weights : path, &file, err));
    print_file(file);
    fv_tensors_close(file);
    return FV_OK;
}

static void print_left(const char *name) {
    char shown[FV_TEXT];
    printf("left over: %s\n", fv_shown(name, shown, sizeof shown));
}

static FvStatus print_params(const FvParams *params, const char *from, FvError *err) {
    static const char *const roles[] = {"trained", "frozen", "unused"};
    static const char *const fits[] = {"missing", "filled", "another shape"};
    size_t filled = 0;
    FvFit *fit = calloc(params->count + 1, sizeof *fit);
    FvStatus status = fit ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory");
    if (status == FV_OK && from)
        status = fv_weights_fit(from, params, fit, print_left, err);
    for (size_t i = 0; status == FV_OK && i < params->count; i++) {
        const FvParam *p = &params->list[i];
        printf("%-64s %-8s ", p->name, roles[p->role]);
        print_shape(p->rank, p->shape);
        printf("%s%s\n", from ? "  " : "", from ? fits[fit[i]] : "");
        filled += fit[i] == FV_FIT_FILLED;
    }
    free(fit);
    FV_TRY(status);
    printf("%zu parameters in %zu tensors, %zu of them trained\n", params->total, params->count,
           params->trained);
    if (from)
        printf("%zu of %zu tensors would be filled\n", filled, params->count);
    return FV_OK;
}

static FvStatus info_study(const char *path, const char *weights, const char *const *overrides,
                           size_t count, FvError *err) {
    FvStudy study;
    FvParams params = {0};
    FvModelConfig model;
    FV_TRY(fv_study_load(path, overrides, count, "small", &study, err));
    FvStatus status = fv_config_model(&study.experiments[0].config, 1, 1, &model, err);
    if (status == FV_OK)
        status = fv_model_declare(&model, &params, err);
    if (status == FV_OK) {
        printf("%s, experiment %s\n", path, study.experiments[0].name);
        status = print_params(&params, weights, err);
    }
    fv_params_free(&params);
    fv_study_free(&study);
    return status;
}

static bool named_as_study(const char *path) {
    const char *dot = strrchr(path, '.');
    return dot && (strcmp(dot, ".yaml") == 0 || strcmp(dot, ".yml") == 0);
}

FvStatus fv_info(int argc, char **argv, FvError *err) {
    const char *files[2] = {NULL, NULL};
    const char **overrides = calloc((size_t)argc + 1, sizeof *overrides);
    size_t count = 0, named = 0;
    if (!overrides)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    for (int i = 1; i < argc; i++) {
        if (strchr(argv[i], '='))
            overrides[count++] = argv[i];
        else if (named < 2)
            files[named++] = argv[i];
        else
            named = 3;
    }
    static const char usage[] =
        "usage: fovea info STUDY.yaml [FILE|FOLDER] [key=value ...], or fovea "
        "info FILE|FOLDER";
    FvStatus status = FV_OK;
    struct stat what;
    bool folder = named > 0 && stat(files[0], &what) == 0 && S_ISDIR(what.st_mode);
    if (named == 1 && strcmp(files[0], "--help") == 0) {
        puts(usage);
    } else if (named < 1 || named > 2) {
        status = FV_FAIL(err, FV_USAGE, "%s", usage);
    } else if (folder || fv_tensors_recognise(files[0])) {
        status = named == 1 && count == 0 ? info_file(files[0], folder, err)
                                          : FV_FAIL(err, FV_USAGE,
                                                    "%s: holds weights; a study comes before them: "
                                                    "fovea info STUDY.yaml %s",
                                                    files[0], files[0]);
    } else {
        status = info_study(files[0], files[1], overrides, count, err);
        if (status == FV_USAGE && named == 1 && !named_as_study(files[0])) {
            FvError why = *err;
            status = FV_FAIL(err, FV_USAGE, "no safetensors file, and no study: %s", why.text);
        }
    }
    free(overrides);
    return status;
}
