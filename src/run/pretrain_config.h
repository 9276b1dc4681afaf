/* Settings of `fovea pretrain`: its keys, what is asked for on the command line, and what is kept
 * of them beside the result. */
#ifndef FV_RUN_PRETRAIN_CONFIG_H
#define FV_RUN_PRETRAIN_CONFIG_H

#include "run/config.h"
#include "run/options.h"

/* As FV_CONFIG_KEYS: X(kind, key, default, lowest, highest, help). */
#define FV_PRETRAIN_KEYS(X)                                                                        \
    X(size, steps, 3000, 1, 100000000, "training steps")                                           \
    X(size, batch, 32, 1, 65536, "images per step, over all ranks")                                \
    X(size, seed, 0, 0, 4294967295, "of start weights, order and crops")                           \
    X(size, clips, 8192, 2, 10000000, "procedural clips")                                          \
    X(size, data_seed, 1, 0, 4294967295, "seed of the procedural clips; a study draws from 0")     \
    X(size, frames, 4, 1, 4096, "procedural: frames per clip, of which a step takes one")          \
    X(size, image_size, 64, 8, 4096, "procedural: pixels per side of a frame")                     \
    X(size, crop_size, 64, 8, 4096, "pixels per side of the two large crops")                      \
    X(size, local_size, 32, 8, 4096, "pixels per side of the small crops")                         \
    X(size, locals, 4, 0, 64, "small crops per image")                                             \
    X(real, crop_area, 0.4, 0.001, 1,                                                              \
      "share of the frame's area: large crops cover more, small crops less")                       \
    X(real, local_area, 0.05, 0.001, 1, "least share that a small crop covers")                    \
    X(real, mask_share, 0.3, 0, 0.9,                                                               \
      "share of the patches of the large crops that the student does not see; 0 is plain DINO")    \
    X(real, patch_weight, 1, 0, 1e6, "weight of the loss of these patches")                        \
    X(real, jitter, 0.2, 0, 1, "brightness, contrast, saturation and hue of crops")                \
    X(real, grey, 0.1, 0, 1, "probability of a grey crop")                                         \
    X(real, blur, 0.3, 0, 1, "probability of a blurred crop")                                      \
    X(size, patch, 8, 1, 1024, "pixels per patch side")                                            \
    X(size, dino_width, 64, 1, 65536, "encoder width")                                             \
    X(size, dino_heads, 4, 1, 1024, "encoder heads")                                               \
    X(size, dino_layers, 4, 1, 1024, "encoder layers")                                             \
    X(size, dino_mlp, 256, 1, 1048576, "encoder MLP width")                                        \
    X(size, head_width, 256, 1, 65536, "hidden width of the projection head")                      \
    X(size, head_out, 64, 1, 65536, "its unit vector")                                             \
    X(size, prototypes, 1024, 2, 1048576, "what teacher and student distribute an image over")     \
    X(real, student_temperature, 0.1, 1e-3, 1e3, "of the student's softmax")                       \
    X(real, teacher_temperature, 0.04, 1e-3, 1e3, "of the teacher's, after its warm-up")           \
    X(real, teacher_temperature_start, 0.04, 1e-3, 1e3, "at the first step")                       \
    X(size, teacher_warmup, 0, 0, 100000000, "steps from the one to the other")                    \
    X(real, momentum, 0.99, 0, 1, "of the teacher; rises to 1 along a cosine")                     \
    X(real, center_momentum, 0.9, 0, 1, "of the centre of the teacher's outputs")                  \
    X(real, lr, 1e-3, 0, 1e3, "AdamW rate after the warm-up; falls along a cosine")                \
    X(real, lr_end, 1e-6, 0, 1e3, "rate of the last step")                                         \
    X(size, warmup_steps, 300, 0, 100000000, "linear warm-up of the rate")                         \
    X(real, weight_decay, 0.04, 0, 1e3, "at the first step")                                       \
    X(real, weight_decay_end, 0.4, 0, 1e3, "at the last step, along a cosine")                     \
    X(real, clip_norm, 3, 1e-12, 1e30, "gradients are scaled down to this norm")                   \
    X(size, still_steps, 100, 0, 100000000, "first steps, in which the prototypes do not learn")   \
    X(size, checkpoint_steps, 1000, 1, 100000000, "steps between checkpoints")                     \
    X(real, checkpoint_seconds, 60, 0.01, 1e9, "seconds between checkpoints")

typedef struct FvPretrainConfig {
#define X(kind, key, value, low, high, help) FV_FIELD_##kind(key)
    FV_PRETRAIN_KEYS(X)
#undef X
} FvPretrainConfig;

/* The keys that the options set, over the defaults. FV_USAGE names the key or option that is wrong,
 * alone or together with others, or does not suit that many ranks. */
FvStatus fv_pretrain_read(const FvOptions *, size_t ranks, FvPretrainConfig *, FvError *err);

void fv_pretrain_print_help(void);

/* Everything that decides the result, a line "key: value" each; data: the SHA-256 of the data.
 * malloc'ed, NULL when memory is out. */
char *fv_pretrain_describe(const FvPretrainConfig *, const char *data);

/* Compares such a text with the one kept at `path`: FV_USAGE names the first line that differs. */
FvStatus fv_pretrain_same(const char *path, const char *text, FvError *err);

#endif
