#include "run/info.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "run/config.h"
#include "run/safetensors.h"

static void print_shape(size_t rank, const size_t *shape) {
    char text[96] = "[";
    size_t used = 1;
    for (size_t i = 0; i < rank && used < sizeof text; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%zu", i ? ", " : "", shape[i]);
    printf("%s]", text);
}

static void print_file(const FvTensorFile *file) {
    for (size_t i = 0; i < fv_tensors_count(file); i++) {
        const FvTensor *t = fv_tensors_at(file, i);
        printf("%-64s %-5s ", t->name, fv_type_name(t->type));
        print_shape(t->rank, t->shape);
        putchar('\n');
    }
}

static bool fits(const FvTensor *t, const FvParam *p) {
    return t->rank == p->rank && memcmp(t->shape, p->shape, p->rank * sizeof *p->shape) == 0;
}

static void print_params(const FvParams *params, const FvTensorFile *file) {
    static const char *const roles[] = {"trained", "frozen", "unused"};
    size_t filled = 0;
    for (size_t i = 0; i < params->count; i++) {
        const FvParam *p = &params->list[i];
        const FvTensor *t = file ? fv_tensors_find(file, p->name) : NULL;
        printf("%-64s %-8s ", p->name, roles[p->role]);
        print_shape(p->rank, p->shape);
        if (file)
            printf("  %s", !t ? "missing" : fits(t, p) ? "filled" : "another shape");
        putchar('\n');
        filled += t && fits(t, p);
    }
    printf("%zu parameters in %zu tensors, %zu of them trained\n", params->total, params->count,
           params->trained);
    for (size_t i = 0; file && i < fv_tensors_count(file); i++)
        if (!fv_params_find(params, fv_tensors_at(file, i)->name))
            printf("left over: %s\n", fv_tensors_at(file, i)->name);
    if (file)
        printf("%zu of %zu tensors would be filled\n", filled, params->count);
}

static FvStatus info_study(const char *path, const char *weights, const char *const *overrides,
                           size_t count, FvError *err) {
    FvStudy study;
    FvTensorFile *file = NULL;
    FvParams params = {0};
    FvModelConfig model;
    FV_TRY(fv_study_load(path, overrides, count, "small", &study, err));
    FvStatus status = fv_config_model(&study.experiments[0].config, 1, 1, &model, err);
    if (status == FV_OK)
        status = fv_model_declare(&model, &params, err);
    if (status == FV_OK && weights)
        status = fv_tensors_open(weights, &file, err);
    if (status == FV_OK) {
        printf("%s, experiment %s\n", path, study.experiments[0].name);
        print_params(&params, file);
    }
    fv_tensors_close(file);
    fv_params_free(&params);
    fv_study_free(&study);
    return status;
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
    FvStatus status;
    size_t length = files[0] ? strlen(files[0]) : 0;
    if (named < 1 || named > 2) {
        status = FV_FAIL(err, FV_USAGE,
                         "usage: fovea info STUDY.yaml [FILE.safetensors] [key=value ...], or "
                         "fovea info FILE.safetensors");
    } else if (length > 12 && strcmp(files[0] + length - 12, ".safetensors") == 0) {
        FvTensorFile *file;
        status = fv_tensors_open(files[0], &file, err);
        if (status == FV_OK) {
            print_file(file);
            fv_tensors_close(file);
        }
    } else {
        status = info_study(files[0], files[1], overrides, count, err);
    }
    free(overrides);
    return status;
}
