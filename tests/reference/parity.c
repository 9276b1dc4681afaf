/* Hidden states of a Hugging Face folder, for parity_large.py:
 *     parity dinov2|llama FOLDER INPUT.safetensors OUTPUT.safetensors */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../unit/parity.h"
#include "run/safetensors.h"

enum { NAME = 32 };

static FvStatus write_states(const char *path, const Parity *p, FvError *err) {
    FvTensor *tensors = calloc(p->layers + 2, sizeof *tensors);
    char(*names)[NAME] = calloc(p->layers + 2, sizeof *names);
    FvStatus status = tensors && names ? FV_OK : FV_FAIL(err, FV_DEVICE, "out of memory");
    for (size_t i = 0; status == FV_OK && i < p->layers + 2; i++) {
        snprintf(names[i], NAME, i <= p->layers ? "hidden.%zu" : "last_hidden_state", i);
        tensors[i] = (FvTensor){.name = names[i],
                                .type = sizeof(real) == sizeof(float) ? FV_F32 : FV_F64,
                                .rank = p->rank,
                                .data = p->states + i * p->count,
                                .count = p->count};
        memcpy(tensors[i].shape, p->shape, p->rank * sizeof *p->shape);
    }
    if (status == FV_OK)
        status = fv_tensors_write(path, tensors, p->layers + 2, NULL, 0, err);
    free(tensors);
    free(names);
    return status;
}

int main(int argc, char **argv) {
    FvError err;
    Parity p = {0};
    bool dino = argc == 5 && strcmp(argv[1], "dinov2") == 0;
    if (!dino && (argc != 5 || strcmp(argv[1], "llama") != 0)) {
        fprintf(stderr, "usage: parity dinov2|llama FOLDER INPUT OUTPUT\n");
        return FV_USAGE;
    }
    FvStatus status =
        dino ? parity_dinov2(argv[2], argv[3], &p, &err) : parity_llama(argv[2], argv[3], &p, &err);
    if (status == FV_OK)
        status = write_states(argv[4], &p, &err);
    parity_free(&p);
    if (status != FV_OK)
        fprintf(stderr, "parity: %s\n", err.text);
    return (int)status;
}
