/* `fovea pretrain DATA`: self-distillation of an encoder from the frames of clips, over all ranks.
 * OUT gets a Hugging Face DINOv2 folder (config.json, model.safetensors: the teacher), and
 * pretrain.tsv with the measures of every step. */
#ifndef FV_RUN_PRETRAIN_H
#define FV_RUN_PRETRAIN_H

#include "run/execute.h"

/* options.study is DATA: "procedural" or a clips.h5; options.overrides set keys of
 * pretrain_config.h.
 * Collective over the world; *speaker and *abort as for fv_execute. */
FvStatus fv_pretrain(const FvInvocation *, bool *speaker, bool *abort, FvError *err);

#endif
