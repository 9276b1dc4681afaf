/* Seconds from a Llama folder on disk to a model's memory: bench_weights FOLDER [ROUNDS] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "model/model.h"
#include "run/model_folder.h"
#include "run/weights.h"

static FvStatus run(const char *folder, size_t rounds, FvError *err) {
    FvConfig c = *fv_config_defaults();
    FvModelConfig config;
    FvBackend *be;
    FvModel *m;
    snprintf(c.dino_from, sizeof c.dino_from, "none");
    snprintf(c.lm_from, sizeof c.lm_from, "%s", folder);
    fv_folder_preset(&c);
    FV_TRY(fv_config_model(&c, 1, 1, &config, err));
    config.freeze_lm = true; /* no gradients, no moments */
    FV_TRY(fv_cpu_backend_create(1, &be, err));
    FV_TRY(fv_model_create(&config, be, &m, err));
    for (size_t i = 0; i < rounds; i++) {
        double start = fv_now();
        FV_TRY(fv_weights_start(&c, fv_model_params(m), be, 0, err));
        printf("weights: %zu parameters in %.3f s\n", fv_model_params(m)->total, fv_now() - start);
    }
    fv_model_destroy(m);
    fv_backend_destroy(be);
    return FV_OK;
}

int main(int argc, char **argv) {
    FvError err;
    if (argc < 2) {
        fprintf(stderr, "usage: bench_weights FOLDER [ROUNDS]\n");
        return FV_USAGE;
    }
    size_t rounds = argc > 2 ? (size_t)strtoul(argv[2], NULL, 10) : 3;
    FvStatus status = run(argv[1], rounds, &err);
    if (status != FV_OK)
        fprintf(stderr, "bench_weights: %s\n", err.text);
    return (int)status;
}
