/* Folders of published models: where they are, and the sizes that their config.json gives. */
#ifndef FV_RUN_MODEL_FOLDER_H
#define FV_RUN_MODEL_FOLDER_H

#include "run/config.h"

/* The files behind a dino_from or lm_from: a safetensors file or its index; a folder that holds
 * one; or the name of a folder in models/, here or beside the program. config: "" when there is
 * none. FV_DATA when there are no weights. */
FvStatus fv_folder_find(const char *from, char weights[FV_TEXT], char config[FV_TEXT],
                        FvError *err);

/* What `auto` of dino_from and lm_from becomes: the model of that scale in models/, where it is
 * there and has the sizes of the configuration, else "none". */
void fv_folder_choose(FvConfig *);

/* Whether models/ has both models of the seed scale. */
bool fv_folder_has_seed(void);

/* Sets the sizes of dino_from's and lm_from's config.json, where there is one that can be read: a
 * layer between the scale's preset and what the study gives. */
void fv_folder_preset(FvConfig *);

/* Compares a config.json with the sizes of a configuration. FV_DATA names key and both values. */
FvStatus fv_folder_check_dino(const char *config, const FvConfig *, FvError *err);
FvStatus fv_folder_check_lm(const char *config, const FvConfig *, FvError *err);

#endif
