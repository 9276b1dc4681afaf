/* Configuration of an experiment: one table of keys yields the YAML parser, the command line
 * (key=value), --help and the attributes of results.h5. */
#ifndef FV_RUN_CONFIG_H
#define FV_RUN_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/config.h"

/* X(kind, key, default, lowest, highest, help). Kinds: size (size_t), real (double), flag (bool),
 * text (char[FV_TEXT]); for text, lowest is the list of allowed values "a|b|c" or "" for any.
 * The sizes' defaults are those of `scale: small`. */
#define FV_CONFIG_KEYS(X)                                                                          \
    /* what is run */                                                                              \
    X(text, scale, "auto", "auto|small|seed", 0,                                                   \
      "sizes of model and data: the study's (seed), a small one for CPUs, or what fits")           \
    X(size, steps, 1500, 1, 100000000, "training steps")                                           \
    X(size, batch, 2, 1, 65536, "clips per step, over all ranks of the experiment")                \
    X(text, precision, "auto", "auto|fp32|bf16", 0,                                                \
      "what matrix products read on a GPU: floats, or bfloat16 (sums, weights, optimizer and "     \
      "the rest are fp32); auto: bf16 on a GPU, fp32 on the processor, which has no bf16")         \
    /* data */                                                                                     \
    X(text, data, "procedural", "", 0, "\"procedural\" or a clips.h5 made by fovea prepare")       \
    X(text, latents, "auto", "auto|file|blocks", 0,                                                \
      "prediction targets: the data file's /latents, block means, or the file's where it has "     \
      "them")                                                                                      \
    X(text, text, "none", "none|captions", 0, "what stands before the mode token")                 \
    X(size, clips_train, 813, 1, 10000000, "procedural clips for training")                        \
    X(size, clips_held_out, 64, 1, 10000000, "procedural clips held out")                          \
    X(size, data_seed, 0, 0, 4294967295, "seed of the procedural clips")                           \
    X(size, frames, 8, 1, 4096, "frames per clip")                                                 \
    X(size, image_size, 64, 8, 4096, "pixels per side, a multiple of 8")                           \
    /* interventions */                                                                            \
    X(real, temperature, 1, 1e-6, 1e6, "divides the query's attention scores")                     \
    X(real, contrastive, 0, -1e6, 1e6, "weight of the cosine between coarse and fine features")    \
    X(flag, freeze_dino, false, 0, 1, "encoder weights stay as they are")                          \
    X(flag, freeze_lm, false, 0, 1, "language model weights stay as they are")                     \
    X(size, hard_attn_k, 0, 0, 1048576,                                                            \
      "keep the k largest attention scores, counted on a 16 x 16 grid (other grids keep the "      \
      "share); 0 is off")                                                                          \
    X(real, entropy_margin, 0, 0, 1e6,                                                             \
      "fine attention is to be this many nats sharper than coarse; 0 is off")                      \
    X(real, lambda_coarse, 1, 0, 1e6, "weight of the coarse pass's loss")                          \
    X(text, query_mode, "deep", "deep|shallow", 0,                                                 \
      "the query runs through every layer, or reads the last one")                                 \
    X(flag, vision, true, 0, 1, "off: visual tokens are zero, the floor of the study")             \
    /* savings */                                                                                  \
    X(flag, skip_tail, true, 0, 1,                                                                 \
      "deep: the encoder's last layer computes no more than the query reads of it")                \
    X(flag, share_text, true, 0, 1, "the passes share one run of the text")                        \
    X(flag, share_convolutions, true, 0, 1,                                                        \
      "the passes share one run of the head's convolutions before the modulation")                 \
    X(flag, cache_encoder, true, 0, 1,                                                             \
      "freeze_dino: each clip is encoded once, as far as memory reaches")                          \
    /* optimizer */                                                                                \
    X(real, lr, 3e-4, 0, 1e3, "AdamW learning rate")                                               \
    X(real, weight_decay, 0.01, 0, 1e3, "decoupled weight decay of every trained parameter")       \
    X(real, beta1, 0.9, 0, 0.9999999, "AdamW")                                                     \
    X(real, beta2, 0.999, 0, 0.9999999, "AdamW")                                                   \
    X(real, adam_eps, 1e-8, 1e-30, 1, "AdamW")                                                     \
    X(real, clip_norm, 1, 1e-12, 1e30, "gradients are scaled down to this norm")                   \
    X(size, warmup_steps, 0, 0, 100000000, "linear warm-up of the rate")                           \
    X(text, schedule, "constant", "constant|cosine", 0, "rate after the warm-up")                  \
    /* what is kept */                                                                             \
    X(size, eval_every, 100, 1, 100000000, "steps between evaluations on the held-out clips")      \
    X(size, map_every, 100, 1, 100000000, "steps between attention maps")                          \
    X(size, map_clips, 4, 0, 1024, "held-out clips whose attention maps are kept")                 \
    X(size, checkpoint_steps, 500, 1, 100000000, "steps between checkpoints")                      \
    X(real, checkpoint_seconds, 60, 0.01, 1e9, "seconds between checkpoints")                      \
    /* how it is computed */                                                                       \
    X(flag, graph, true, 0, 1, "GPU: a step is recorded once and replayed, not queued anew")       \
    X(text, comm, "auto", "auto|mpi|nccl", 0,                                                      \
      "how ranks of an experiment average gradients; auto: NCCL where each has its own GPU")       \
    X(real, watchdog, 600, 0.1, 1e9, "seconds without a step after which a run counts as hung")    \
    /* start values */                                                                             \
    X(text, dino_from, "auto", "", 0,                                                              \
      "DINOv2 encoder to start from: a safetensors file, a Hugging Face folder or the name of "    \
      "one in models/; none: random weights; auto: what models/ has for the scale")                \
    X(text, lm_from, "auto", "", 0, "Llama language model to start from, likewise")                \
    X(text, pos_interp, "hf", "hf|meta", 0,                                                        \
      "resizing of the encoder's position table: as transformers or as the original DINOv2")       \
    X(text, init_from, "", "", 0,                                                                  \
      "safetensors file that sets any parameters by name, over the others")                        \
    /* sizes of the model */                                                                       \
    X(size, patch, 8, 1, 1024, "pixels per patch side")                                            \
    X(size, dino_width, 64, 1, 65536, "encoder width")                                             \
    X(size, dino_heads, 4, 1, 1024, "encoder heads")                                               \
    X(size, dino_layers, 4, 1, 1024, "encoder layers")                                             \
    X(size, dino_mlp, 256, 1, 1048576, "encoder MLP width")                                        \
    X(size, lm_width, 64, 2, 65536, "language model width")                                        \
    X(size, lm_layers, 4, 1, 1024, "language model layers")                                        \
    X(size, lm_heads, 4, 1, 1024, "language model query heads")                                    \
    X(size, lm_kv_heads, 2, 1, 1024, "language model key and value heads")                         \
    X(size, lm_mlp, 192, 1, 1048576, "language model MLP width")                                   \
    X(size, lm_vocab, 256, 1, 10000000, "vocabulary")                                              \
    X(real, lm_rope_theta, 10000, 1, 1e12, "rotary base")                                          \
    X(real, lm_rms_eps, 1e-5, 0, 1, "RMSNorm epsilon")                                             \
    X(size, query_width, 64, 1, 65536, "width of a query")                                         \
    X(size, head_width, 32, 1, 4096, "channels of the prediction head")                            \
    X(size, film_width, 512, 1, 65536, "hidden width of the FiLM generator")

enum { FV_TEXT = 512, FV_NAME = 64 };

#define FV_FIELD_size(key) size_t key;
#define FV_FIELD_real(key) double key;
#define FV_FIELD_flag(key) bool key;
#define FV_FIELD_text(key) char key[FV_TEXT];

typedef struct FvConfig {
#define X(kind, key, value, low, high, help) FV_FIELD_##kind(key)
    FV_CONFIG_KEYS(X)
#undef X
} FvConfig;

enum {
#define X(kind, key, value, low, high, help) +1
    FV_KEY_COUNT = 0 FV_CONFIG_KEYS(X)
#undef X
};

typedef enum FvKeyKind { FV_KEY_size, FV_KEY_real, FV_KEY_flag, FV_KEY_text } FvKeyKind;

typedef struct FvKey {
    const char *name, *help;
    FvKeyKind kind;
    size_t offset;       /* into the struct that holds the values: FvConfig for a study's keys */
    double low, high;    /* numbers */
    const char *choices; /* text: "a|b|c", or "" for any */
} FvKey;

/* Rows of a table of keys for a struct of fields that X lines as those above declare. */
#define FV_KEY_ROW(type, kind, key, low, high, choices, help)                                      \
    {#key, help, FV_KEY_##kind, offsetof(type, key), low, high, choices},
#define FV_KEY_ROW_size(type, key, low, high, help)                                                \
    FV_KEY_ROW(type, size, key, low, high, NULL, help)
#define FV_KEY_ROW_real(type, key, low, high, help)                                                \
    FV_KEY_ROW(type, real, key, low, high, NULL, help)
#define FV_KEY_ROW_flag(type, key, low, high, help)                                                \
    FV_KEY_ROW(type, flag, key, low, high, NULL, help)
#define FV_KEY_ROW_text(type, key, low, high, help) FV_KEY_ROW(type, text, key, 0, high, low, help)

/* A table of keys, ended by name NULL, and the struct of their defaults. */
typedef struct FvKeys {
    const FvKey *list;
    const void *defaults;
} FvKeys;

/* The key of that name; NULL when there is none. */
const FvKey *fv_keys_find(const FvKeys *, const char *name);

/* Sets a key from text. FV_USAGE tells `where` ("file:line", "command line: ..."), key, text, what
 * is allowed and the default. */
FvStatus fv_keys_set(const FvKeys *, void *values, const FvKey *, const char *text,
                     const char *where, FvError *);

/* Prints every key with its default, range and help (for --help). */
void fv_keys_print_help(const FvKeys *);

/* The study's keys in the order above; ends with name NULL. */
const FvKey *fv_config_keys(void);
const FvKey *fv_config_find(const char *name);

/* False for keys that say when a run is saved, or which way the same sums are made. */
bool fv_key_changes_results(const FvKey *);

/* The defaults of the table, with scale still "auto". */
const FvConfig *fv_config_defaults(void);

/* Sets the keys of the preset of config->scale: those of "seed"; "small" is the table itself. */
void fv_config_preset(FvConfig *);

/* fv_keys_set for a study's key. */
FvStatus fv_config_set(FvConfig *, const FvKey *, const char *text, const char *where, FvError *);

/* Refuses values that are allowed each alone but not together, sizes of the model included. The
 * message names the keys; the caller puts file and experiment before it. */
FvStatus fv_config_check(const FvConfig *, FvError *);

/* Nearest of the names offered to the one that was written: start from {wanted, NULL, 0}. `name`
 * stays NULL while nothing offered looks like a slip of the pen. */
typedef struct FvNearest {
    const char *wanted, *name;
    size_t distance; /* of name: letters changed, added or left out */
} FvNearest;

void fv_nearest_offer(FvNearest *, const char *name);

/* Copies text for a message: at most size - 1 bytes, cut between characters and then ending in
 * "...", without control characters. Returns out. */
const char *fv_shown(const char *text, char *out, size_t size);

/* Whether text is UTF-8 without control characters: what YAML, terminals and HDF5 readers can all
 * show. */
bool fv_printable(const char *text);

/* Value of a key as text (numbers with %.17g shortened where that round-trips, flags as
 * true/false; `vision` as on/off); FV_TEXT bytes hold any. */
void fv_config_format(const void *values, const FvKey *, char *out, size_t size);

/* Prints the study's keys, in groups, and what the scales set. */
void fv_config_print_help(void);

typedef struct FvExperiment {
    char name[FV_NAME];
    FvConfig config; /* every key resolved; scale is "small" or "seed" */
} FvExperiment;

typedef struct FvStudy {
    char name[FV_NAME];        /* `study:` of the file, or the file's name without .yaml */
    char path[FV_TEXT];        /* the file read */
    char *source;              /* its text, UTF-8 */
    FvExperiment *experiments; /* in the file's order */
    size_t experiment_count;
    uint64_t *seeds;
    size_t seed_count;
} FvStudy;

/* Reads a study: `study:` NAME, `base:` mapping of keys, `experiments:` mapping of NAME to a
 * mapping of keys, `seeds:` list (default [0]). Names hold letters, digits and . _ - (they become
 * folders and HDF5 groups). Values come, later over earlier, from: the table, the scale's
 * preset, base, key=value of `overrides`, the experiment's own keys, NAME.key=value of
 * `overrides`. auto_scale ("small" or "seed") is what `scale: auto` becomes. Unknown keys (with
 * the nearest name), wrong types and values out of range fail with file, line, key and what is
 * allowed: FV_USAGE, or FV_DEVICE when memory is out. `overrides` may also hold seeds=0,1,2 and
 * study=NAME. On failure *out is empty and needs no free. */
FvStatus fv_study_load(const char *path, const char *const *overrides, size_t override_count,
                       const char *auto_scale, FvStudy *out, FvError *err);
void fv_study_free(FvStudy *);

/* One text for the whole resolved study (YAML; loads again to the same study): kept in OUT, and
 * what a re-run is compared with. malloc'ed, NULL when memory is out. */
char *fv_study_format(const FvStudy *);

/* Compares a resolved study kept in OUT with the one asked for: FV_USAGE naming the first keys
 * that differ with both values, or an experiment or seed that is kept there and no longer asked
 * for. Keys that cannot change results (checkpoint_steps, checkpoint_seconds), the study's name,
 * the order and added experiments or seeds are no difference. */
FvStatus fv_study_same(const char *kept_path, const FvStudy *asked, FvError *err);

/* Sizes and switches of the model that one rank trains: batch / ranks clips, `hard_attn_k` scaled
 * to this grid, max_text from the data. FV_USAGE when ranks do not divide the batch or no model
 * can have these sizes. */
FvStatus fv_config_model(const FvConfig *, size_t ranks, size_t max_text, FvModelConfig *,
                         FvError *err);

#endif
