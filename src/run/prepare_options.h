/* The command line of `fovea prepare`. */
#ifndef FV_RUN_PREPARE_OPTIONS_H
#define FV_RUN_PREPARE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct FvPrepareOptions {
    const char *output, *captions, *tokenizer; /* tokenizer: NULL for bytes */
    size_t frames, stride, size, most;         /* most clips per video, 0: no limit */
    size_t clips[2];                           /* procedural, per FvSplit */
    size_t max_tokens;                         /* 0: not given */
    uint64_t seed;
    double held_out;
    bool center, procedural, masks, help;
    char **inputs;
    size_t input_count;
} FvPrepareOptions;

/* argv[0] is "prepare"; the options point into argv, whose order changes. FV_USAGE for what is not
 * understood or does not go together. Uses getopt_long's state. */
FvStatus fv_prepare_parse(int argc, char **argv, FvPrepareOptions *out, FvError *err);

void fv_prepare_print_help(void);

#endif
