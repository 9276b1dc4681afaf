/* `fovea info`: the parameters of a study's model, and what a weights file would set. */
#ifndef FV_RUN_INFO_H
#define FV_RUN_INFO_H

#include "base/status.h"

/* info STUDY.yaml [FILE] [key=value ...] or info FILE.safetensors; argv[0] is "info". */
FvStatus fv_info(int argc, char **argv, FvError *err);

#endif
