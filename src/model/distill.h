/* Self-distillation of the encoder (DINO: Caron et al. 2021): a student sees crops of two sizes, a
 * teacher, the slow average of the student, sees the large ones; each of the student's crops is to
 * predict the teacher's distribution over prototypes for another crop of the same image. In the
 * large crops some patches may be hidden from the student, which is to predict the teacher's
 * distributions for them (iBOT: Zhou et al. 2022; both together are DINOv2's objective).
 *
 * A step, see run/pretrain.c:
 *     fv_distill_load, fv_distill_forward, fv_distill_backward, average params->g and the batch
 *     centre over the ranks, fv_distill_norm, fv_distill_measure, fv_distill_update,
 *     fv_distill_follow */
#ifndef FV_MODEL_DISTILL_H
#define FV_MODEL_DISTILL_H

#include <stdint.h>

#include "model/params.h"

typedef struct FvDistillConfig {
    size_t masked;                           /* patches hidden in each large crop; 0: none */
    double patch_weight;                     /* of their loss, beside 1 for the crops' */
    size_t images;                           /* per step, of this rank */
    size_t size, local_size, locals;         /* pixels of the 2 large and of the small crops,
                                                number of small crops per image */
    size_t patch, width, heads, layers, mlp; /* encoder */
    size_t head_width, head_out, prototypes; /* projection head: hidden layers, unit vector */
} FvDistillConfig;

enum { FV_GLOBAL_CROPS = 2 };

typedef struct FvDistill FvDistill;

/* One block each for weights, gradients with moments, and activations. FV_USAGE for sizes that no
 * model can have. */
FvStatus fv_distill_create(const FvDistillConfig *, FvBackend *, FvDistill **out, FvError *err);
void fv_distill_destroy(FvDistill *);

/* "student." and "teacher." + Hugging Face names and head.*; `center` [2, prototypes], the running
 * means of the teacher's outputs for crops and for hidden patches. Only the student is trained. */
FvParams *fv_distill_params(FvDistill *);

/* Start values of a seed; the teacher starts as the student. */
FvStatus fv_distill_init(FvDistill *, uint64_t seed, FvError *err);

/* Host memory: globals uint8 [2, images, size, size, 3], locals uint8 [locals, images, local_size,
 * local_size, 3], masked: the hidden patches of every large crop, as rows of [2, images, patches].
 * FV_DEVICE when memory is out. */
FvStatus fv_distill_load(FvDistill *, const uint8_t *globals, const uint8_t *locals,
                         const int32_t *masked, FvError *err);
size_t fv_distill_patches(const FvDistillConfig *); /* of a large crop */

void fv_distill_forward(FvDistill *, double teacher_temperature, double student_temperature);

/* Gradient of the loss for the student, into params->g. With `still` the prototypes get none. */
void fv_distill_backward(FvDistill *, bool still);

/* Norm of params->g, to be read by fv_distill_measure and fv_distill_update. */
void fv_distill_norm(FvDistill *);
void fv_distill_update(FvDistill *, const FvAdamW *);

typedef struct FvDistillMeasures {
    /* nats; means over this rank's images: cross-entropy over all pairs of crops and over hidden
     * patches (0 without), and the entropies of the teacher's distributions for them */
    double loss, patch_loss, teacher_entropy, patch_entropy;
    double norm; /* after fv_distill_norm */
} FvDistillMeasures;

/* Waits for the step. */
FvStatus fv_distill_measure(FvDistill *, FvDistillMeasures *, FvError *err);

/* Means of the teacher's outputs over this step's crops and hidden patches [2, prototypes], in the
 * backend's memory: to be averaged over the ranks before fv_distill_follow. */
real *fv_distill_batch_center(FvDistill *);

/* teacher += (1 - momentum) * (student - teacher), and the centre likewise towards the batch's. */
void fv_distill_follow(FvDistill *, double momentum, double center_momentum);

#endif
