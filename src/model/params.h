/* The table of parameters: one line per parameter where the model is built gives its name, shape,
 * start value and role; sizes, memory, gradients, averaging, checkpoints and counts follow. */
#ifndef FV_MODEL_PARAMS_H
#define FV_MODEL_PARAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"

typedef enum FvRole {
    FV_TRAINED,
    FV_FROZEN, /* used, not trained */
    FV_UNUSED  /* the configured graph does not read it: neither trained nor decayed */
} FvRole;

typedef enum FvInit {
    FV_INIT_CONSTANT, /* value */
    FV_INIT_NORMAL,   /* value * normal(0, 1) */
    FV_INIT_UNIFORM   /* uniform(-value, value) */
} FvInit;

/* What an operation is given: the values, and where the gradient is accumulated (NULL unless
 * trained). */
typedef struct FvWeight {
    real *w, *g;
} FvWeight;

enum { FV_PARAM_RANK = 4, FV_PARAM_NAME = 96 };

typedef struct FvParam {
    char name[FV_PARAM_NAME];
    size_t rank, shape[FV_PARAM_RANK]; /* as in files: convolutions [out, in, 3, 3] */
    size_t count;
    FvInit init;
    double value;
    FvRole role;
    bool channels_last;  /* kept as [a, y, x, c] in memory, [a, c, y, x] in files */
    size_t offset, slot; /* elements into w, and (trained) into g, m and v */
    FvWeight *weight;    /* set once memory is there */
} FvParam;

typedef struct FvParams {
    FvParam *list;
    size_t count, capacity;
    size_t total, trained;         /* numbers of parameters */
    size_t memory, trained_memory; /* elements of w; of g, m and v each (padded) */
    real *w, *g, *m, *v;           /* in the backend's memory */
    bool out_of_memory;            /* the table could not grow */
} FvParams;

/* Adds a parameter; dims end with 0. The table must not grow once memory is bound. */
void fv_params_add(FvParams *, FvWeight *weight, FvRole, FvInit, double value, const char *name,
                   const size_t *dims, bool channels_last);

/* Points every weight into the four blocks. */
void fv_params_bind(FvParams *, real *w, real *g, real *m, real *v);

/* Start values: parameter `name` of a seed is a function of (seed, name) alone, so that all
 * experiments of one seed start from the same weights. Those marked in `set` [count] have theirs
 * already; NULL: none has. */
FvStatus fv_params_init(FvParams *, FvBackend *, uint64_t seed, const bool *set, FvError *);

const FvParam *fv_params_find(const FvParams *, const char *name);

/* Which of the blocks fv_params_get and _set reach. */
typedef enum FvBlock { FV_BLOCK_W, FV_BLOCK_G, FV_BLOCK_M, FV_BLOCK_V } FvBlock;

/* Copies a parameter (or its gradient or moments) to or from host memory in the file's layout. */
FvStatus fv_params_get(const FvParams *, FvBackend *, const FvParam *, FvBlock, real *out,
                       FvError *);
FvStatus fv_params_set(FvParams *, FvBackend *, const FvParam *, FvBlock, const real *values,
                       FvError *);

/* One AdamW step on everything trained; rates [FV_RATES] and the gradient norm [2] lie in the
 * backend's memory. */
void fv_params_update(FvParams *, FvBackend *, const FvAdamW *, const double *rates,
                      const double *norm);

void fv_params_free(FvParams *);

#endif
