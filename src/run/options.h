/* The command line of a study run. */
#ifndef FV_RUN_OPTIONS_H
#define FV_RUN_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

typedef struct FvOptions {
    const char *study; /* path, NULL: configs/ablations.yaml */
    const char *out, *only, *device, *stage;
    size_t ranks_per_experiment, jobs_per_rank;
    size_t threads; /* per rank; 0: its share of the cores */
    bool fresh, list, dry_run, help, version;
    const char **overrides; /* key=value; malloc'ed */
    size_t override_count;
} FvOptions;

FvStatus fv_options_parse(int argc, char **argv, FvOptions *out, FvError *err);
void fv_options_free(FvOptions *);
/* The options' part of --help. */
void fv_options_print_help(void);

#endif
