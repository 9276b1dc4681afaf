/* `fovea info`: the parameters of a study's model, and what a weights file would set. */
#ifndef FV_RUN_INFO_H
#define FV_RUN_INFO_H

#include "base/status.h"

/* info STUDY.yaml [FILE] [key=value ...], or info FILE, a safetensors file or an index of shards by
 * name or content; argv[0] is "info". */
FvStatus fv_info(int argc, char **argv, FvError *err);

#endif
