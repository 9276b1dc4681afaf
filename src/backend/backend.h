/* The table of operations that the model is written against. A backend (CPU here, CUDA beside it)
 * fills every entry with the same meaning.
 *
 * Tensors are dense, row-major and live in the backend's memory; the caller owns them. Images are
 * channels-last: [frame, position, channel]. Index arrays (int32_t) and metrics (double) live in
 * the backend's memory too. Operations run in the order they are called and may return before
 * they have run; sync() waits and reports what went wrong. Sums have a fixed order: the same call
 * gives the same bits, whatever the number of threads.
 *
 * Tensors that only products read (an activation, the output of a norm or of attention) may be
 * operand tensors, from alloc_operands: the backend keeps them in the type that its products read,
 * whatever the pointer's, so nobody counts elements from the pointer and the host reads none. They
 * are taken as y of gelu, swiglu, layernorm, rmsnorm and head_linear, as out of attention, query
 * and patchify, as x of linear, linear_back, head_linear, conv and conv_back, as k and v of query
 * and query_back where dk and dv are NULL, and by copy_operands and first_nonfinite. Any other
 * operation on one is refused.
 *
 * In every *_back: gradients of parameters (dw, dbias, dgamma, ...) are accumulated (+=) and may
 * be NULL, meaning frozen; gradients of activations are overwritten unless `add` is true or the
 * comment says "+=", and may be NULL where the comment says so. */
#ifndef FV_BACKEND_BACKEND_H
#define FV_BACKEND_BACKEND_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/real.h"
#include "base/status.h"

typedef struct FvBackend FvBackend;

enum { FV_MARKS = 2 };

/* Multi-head attention over packed rows: queries [batch, rows, heads * width], keys and values
 * [batch, keys, kv_heads * width]; head h reads key head h / (heads / kv_heads). */
typedef struct FvAttention {
    size_t batch, rows, keys, heads, kv_heads, width;
    double scale; /* multiplies the scores */
    bool causal;  /* row i sees keys j <= i + (keys - rows) */
    /* [batch] or NULL: keys below first[b] are padding, never seen. A row with nothing to see
     * gets probabilities and output 0. */
    const int32_t *first;
} FvAttention;

/* One query per frame over that frame's keys: q [frames, heads * width], k and v
 * [frames, keys, heads * width], probs [frames, heads, keys]. */
typedef struct FvQuery {
    size_t frames, keys, heads, width;
    double scale; /* multiplies the scores: 1 / (sqrt(width) * temperature) */
    size_t top_k; /* keep the k largest scores (ties: lower index); 0 or > keys keeps all */
    bool shared;  /* k and v are [frames, keys, width], read by every head; dk and dv are NULL */
} FvQuery;

typedef struct FvConv { /* 3 x 3, padding 1 */
    size_t frames, height, width, in, out;
    size_t stride; /* 1 or 2; the output has fv_conv_side(height, stride) rows, columns alike */
} FvConv;

static inline size_t fv_conv_side(size_t side, size_t stride) { /* ceil(side / stride) */
    return side / stride + (side % stride != 0);
}

typedef struct FvAdamW {
    double lr, beta1, beta2, eps, weight_decay;
    double clip_norm; /* gradients are multiplied by min(1, clip_norm / (norm + 1e-6)) */
    size_t step;      /* 1 for the first update: bias correction */
} FvAdamW;

/* What changes from update to update lies in the backend's memory, so that recorded work reads
 * each step's own: the learning rate and the bias corrections 1 - beta^step. */
enum { FV_RATES = 3 };
static inline void fv_adamw_rates(const FvAdamW *a, double rates[FV_RATES]) {
    rates[0] = a->lr;
    rates[1] = 1 - pow(a->beta1, (double)a->step);
    rates[2] = 1 - pow(a->beta2, (double)a->step);
}

typedef struct FvOps {
    void (*destroy)(FvBackend *);

    /* --- memory; upload and download take host pointers ------------------------------------- */
    FvStatus (*alloc)(FvBackend *, size_t bytes, void **out, FvError *); /* zeroed, FV_ALIGN */
    /* zeroed memory for `count` elements of operand tensors, operand_bytes each, FV_ALIGN */
    FvStatus (*alloc_operands)(FvBackend *, size_t count, void **out, FvError *);
    /* the same for weights, of which products may read a copy: adamw keeps that up to date, who
     * writes weights otherwise calls weights_changed for what was written, before they are used */
    FvStatus (*alloc_weights)(FvBackend *, size_t count, void **out, FvError *);
    void (*weights_changed)(FvBackend *, size_t count, const real *w);
    void (*release)(FvBackend *, void *); /* what any of the three gave */
    /* bytes that alloc could still find, shared with whoever else takes memory there */
    size_t (*memory_left)(FvBackend *);
    /* src may change at once; the transfer runs beside the operations called before it */
    void (*upload)(FvBackend *, void *dst, const void *src, size_t bytes);
    void (*download)(FvBackend *, void *dst, const void *src, size_t bytes); /* waits */
    void (*zero)(FvBackend *, void *dst, size_t bytes);
    FvStatus (*sync)(FvBackend *, FvError *);
    /* Memory of the host that transfers reach fastest (pinned, on a GPU). */
    FvStatus (*host_alloc)(FvBackend *, size_t bytes, void **out, FvError *); /* zeroed */
    void (*host_release)(FvBackend *, void *);

    /* --- the queue --------------------------------------------------------------------------- */
    /* dst of host_alloc; holds the values once a mark behind this call is reached */
    void (*download_later)(FvBackend *, void *dst, const void *src, size_t bytes);
    /* Sets mark 0 .. FV_MARKS - 1 behind everything called so far. */
    void (*mark)(FvBackend *, size_t mark);
    bool (*reached)(FvBackend *, size_t mark);             /* true after a failure, too */
    FvStatus (*wait)(FvBackend *, size_t mark, FvError *); /* until reached; reports like sync */
    /* Where `records` is set: from record() to recorded(), operations are not run but recorded, in
     * place of an earlier recording; replay() runs them as one, with the tensors' values of then.
     * Between the two nothing may wait, transfer from or to the host, or need more workspace than
     * the same operations did when they ran before. */
    FvStatus (*record)(FvBackend *, FvError *);
    FvStatus (*recorded)(FvBackend *, FvError *);
    void (*replay)(FvBackend *);
    void (*unrecord)(FvBackend *); /* before what a recording names is released */

    /* --- rows and elements ------------------------------------------------------------------ */
    void (*copy)(FvBackend *, size_t n, const real *x, real *y);
    /* the same for operand tensors: n elements of operand_bytes */
    void (*copy_operands)(FvBackend *, size_t n, const real *x, real *y);
    void (*add)(FvBackend *, size_t n, const real *x, real *y); /* y += x */
    /* dst[di(i)] (+)= src[si(i)] for i < rows, rows of `width`; an index array NULL means i, a
     * source or target index < 0 skips the row. With add, repeated targets are summed in the
     * order of i; without, targets must not repeat. */
    void (*copy_rows)(FvBackend *, size_t rows, size_t width, const real *src, const int32_t *si,
                      real *dst, const int32_t *di, bool add);
    /* y = x + scale * a, scale [width] or NULL for 1; y may be x */
    void (*residual)(FvBackend *, size_t rows, size_t width, const real *x, const real *scale,
                     const real *a, real *y);
    /* da = scale * dy; dscale += sum over rows of a * dy. (The gradient of x is dy itself.) */
    void (*residual_back)(FvBackend *, size_t rows, size_t width, const real *scale, const real *a,
                          const real *dy, real *da, real *dscale);

    /* --- dense layers ----------------------------------------------------------------------- */
    /* y [rows, out] = x [rows, in] w^T + bias; w [out, in]; bias [out] or NULL */
    void (*linear)(FvBackend *, size_t rows, size_t in, size_t out, const real *x, const real *w,
                   const real *bias, real *y);
    /* dx (NULL: not needed) = or += dy w; dw += dy^T x; dbias += column sums of dy */
    void (*linear_back)(FvBackend *, size_t rows, size_t in, size_t out, const real *x,
                        const real *w, const real *dy, real *dx, bool add, real *dw, real *dbias);
    /* One product per head: y [rows, heads * out], y_h = x_h w_h^T + bias_h; x [rows, heads * in],
     * w [heads, out, in], bias [heads * out] or NULL. back: dx_h = dy_h w_h; for frozen w alone */
    void (*head_linear)(FvBackend *, size_t rows, size_t heads, size_t in, size_t out,
                        const real *x, const real *w, const real *bias, real *y);
    void (*head_linear_back)(FvBackend *, size_t rows, size_t heads, size_t in, size_t out,
                             const real *w, const real *dy, real *dx);
    /* exact GELU, x * Phi(x); gelu_back: dx = dy * gelu'(x), dx may be dy */
    void (*gelu)(FvBackend *, size_t n, const real *x, real *y);
    void (*gelu_back)(FvBackend *, size_t n, const real *x, const real *dy, real *dx);
    /* max(x, 0), NaN stays NaN; relu_back: dx = dy where x > 0, else 0; y may be x, dx may be dy */
    void (*relu)(FvBackend *, size_t n, const real *x, real *y);
    void (*relu_back)(FvBackend *, size_t n, const real *x, const real *dy, real *dx);
    /* y = silu(gate) * up; dgate may be dy */
    void (*swiglu)(FvBackend *, size_t n, const real *gate, const real *up, real *y);
    void (*swiglu_back)(FvBackend *, size_t n, const real *gate, const real *up, const real *dy,
                        real *dgate, real *dup);

    /* --- normalisation; mean, rstd [rows] are kept for the backward pass --------------------- */
    void (*layernorm)(FvBackend *, size_t rows, size_t width, double eps, const real *x,
                      const real *gamma, const real *beta, real *y, real *mean, real *rstd);
    void (*layernorm_back)(FvBackend *, size_t rows, size_t width, const real *x, const real *gamma,
                           const real *mean, const real *rstd, const real *dy, real *dx, bool add,
                           real *dgamma, real *dbeta);
    void (*rmsnorm)(FvBackend *, size_t rows, size_t width, double eps, const real *x,
                    const real *gamma, real *y, real *rstd);
    void (*rmsnorm_back)(FvBackend *, size_t rows, size_t width, const real *x, const real *gamma,
                         const real *rstd, const real *dy, real *dx, bool add, real *dgamma);
    /* y = x * r, r = target / (std(x) + 1e-6) per row, std with n - 1; keeps std [rows]. A
     * constant row has std 0 and gradient r * dy. */
    void (*rescale)(FvBackend *, size_t rows, size_t width, double target, const real *x, real *y,
                    real *std);
    void (*rescale_back)(FvBackend *, size_t rows, size_t width, double target, const real *x,
                         const real *std, const real *dy, real *dx);

    /* --- attention -------------------------------------------------------------------------- */
    /* probs [batch, heads, rows, keys] is kept for the backward pass */
    void (*attention)(FvBackend *, const FvAttention *, const real *q, const real *k, const real *v,
                      real *probs, real *out);
    /* dq is overwritten; dk, dv += */
    void (*attention_back)(FvBackend *, const FvAttention *, const real *q, const real *k,
                           const real *v, const real *probs, const real *dout, real *dq, real *dk,
                           real *dv);
    void (*query)(FvBackend *, const FvQuery *, const real *q, const real *k, const real *v,
                  real *probs, real *out);
    /* dprobs: a further gradient of probs [frames, heads, keys] (the entropy term's) or NULL.
     * dq is overwritten; dk, dv += or both NULL. k and v may be the same tensor, dk and dv too. */
    void (*query_back)(FvBackend *, const FvQuery *, const real *q, const real *k, const real *v,
                       const real *probs, const real *dout, const real *dprobs, real *dq, real *dk,
                       real *dv);
    /* Rotary embedding in place, rotate-half form (Llama): x [batch, rows, heads * width], row r of
     * clip b stands at position row0 + r - first[b] (first NULL: 0). inverse rotates back, which
     * is the backward pass. */
    void (*rope)(FvBackend *, size_t batch, size_t rows, size_t heads, size_t width, size_t row0,
                 const int32_t *first, double theta, bool inverse, real *x);

    /* --- images ----------------------------------------------------------------------------- */
    /* pixels uint8 [frames, size, size, 3] -> out [frames * grid * grid, 3 * patch * patch],
     * elements in the order (channel, y, x), scaled to [0, 1] and normalised with the ImageNet
     * mean and deviation; grid = size / patch, pixels beyond grid * patch are not read */
    void (*patchify)(FvBackend *, size_t frames, size_t size, size_t patch, const uint8_t *pixels,
                     real *out);
    /* x [frames, patches + 1, width]: row 0 = cls + pos[0], row 1 + n = patch[n] + pos[1 + n] */
    void (*tokens)(FvBackend *, size_t frames, size_t patches, size_t width, const real *patch,
                   const real *cls, const real *pos, real *x);
    void (*tokens_back)(FvBackend *, size_t frames, size_t patches, size_t width, const real *dx,
                        real *dpatch, real *dcls, real *dpos);
    /* x [frames, height * width, in], w [out, 3, 3, in], bias [out] or NULL, y [frames, rows *
     * columns of the output, out]; y(i, j) is centred on x(i * stride, j * stride) */
    void (*conv)(FvBackend *, const FvConv *, const real *x, const real *w, const real *bias,
                 real *y);
    void (*conv_back)(FvBackend *, const FvConv *, const real *x, const real *w, const real *dy,
                      real *dx /* NULL: not needed */, bool add, real *dw, real *dbias);
    /* y[f, p, c] = gb[f, c] * x[f, p, c] + gb[f, channels + c]; gb [frames, 2 * channels] */
    void (*film)(FvBackend *, size_t frames, size_t positions, size_t channels, const real *x,
                 const real *gb, real *y);
    void (*film_back)(FvBackend *, size_t frames, size_t positions, size_t channels, const real *x,
                      const real *gb, const real *dy, real *dx, bool add, real *dgb);

    /* --- losses and measures; sums in double ------------------------------------------------ */
    /* loss[f] = mean over the frame's n elements of (x - target)^2; back: dx = scale * d loss[f] */
    void (*mse)(FvBackend *, size_t frames, size_t n, const real *x, const real *target,
                double *loss);
    void (*mse_back)(FvBackend *, size_t frames, size_t n, double scale, const real *x,
                     const real *target, real *dx);
    /* cosine[r] = x.y / max(|x||y|, 1e-8); back: dx += scale * d cosine[r] / dx, same for dy */
    void (*cosine)(FvBackend *, size_t rows, size_t width, const real *x, const real *y,
                   double *cosine);
    void (*cosine_back)(FvBackend *, size_t rows, size_t width, double scale, const real *x,
                        const real *y, real *dx, real *dy);
    /* entropy[f] = mean over heads of -sum p log p (nats, 0 log 0 = 0); back: dprobs =
     * dentropy[f] * its derivative, 0 where p = 0 */
    void (*entropy)(FvBackend *, size_t frames, size_t heads, size_t keys, const real *probs,
                    double *entropy);
    void (*entropy_back)(FvBackend *, size_t frames, size_t heads, size_t keys, const real *probs,
                         const double *dentropy, real *dprobs);
    /* hinge[c] = relu(H_fine - H_coarse + margin), H the mean entropy of clip c's frames;
     * dfine, dcoarse [clips * frames] = the derivatives of weight * mean over clips of hinge */
    void (*entropy_hinge)(FvBackend *, size_t clips, size_t frames, const double *fine,
                          const double *coarse, double margin, double weight, double *hinge,
                          double *dfine, double *dcoarse);

    /* --- self-distillation ------------------------------------------------------------------ */
    /* y = x / max(|x|, 1e-12) per row; keeps norm [rows]. back: dx = or += */
    void (*normalize)(FvBackend *, size_t rows, size_t width, const real *x, real *y, real *norm);
    void (*normalize_back)(FvBackend *, size_t rows, size_t width, const real *y, const real *norm,
                           const real *dy, real *dx, bool add);
    /* p = softmax((x - centre) / temperature) per row; centre [width] or NULL */
    void (*softmax)(FvBackend *, size_t rows, size_t width, double temperature, const real *x,
                    const real *centre, real *p);
    /* loss[r] = -target . log p, p = softmax(x / temperature), which is kept; a row of target may
     * have any sum. back: dx = scale * d loss[r] */
    void (*cross_entropy)(FvBackend *, size_t rows, size_t width, double temperature, const real *x,
                          const real *target, real *p, double *loss);
    void (*cross_entropy_back)(FvBackend *, size_t rows, size_t width, double temperature,
                               double scale, const real *p, const real *target, real *dx);
    /* y += share * (x - y) */
    void (*approach)(FvBackend *, size_t n, double share, const real *x, real *y);

    /* --- optimizer -------------------------------------------------------------------------- */
    /* norm[0] = square root of the sum of squares, in double; norm[1] += 0 * norm[0]: from the
     * first norm on that is not finite it is NaN */
    void (*norm)(FvBackend *, size_t n, const real *x, double *norm);
    /* AdamW as PyTorch's: p -= lr * weight_decay * p, then the bias-corrected step. rates
     * [FV_RATES] (lr and step of FvAdamW are not read) and norm [2] lie in the backend's memory;
     * where either number of norm is not finite, nothing changes. */
    void (*adamw)(FvBackend *, const FvAdamW *, const double *rates, size_t n, const double *norm,
                  const real *g, real *p, real *m, real *v);
    /* index of the first element that is not finite, n if all are; waits */
    size_t (*first_nonfinite)(FvBackend *, size_t n, const real *x);
} FvOps;

struct FvBackend {
    const FvOps *ops;
    const char *name;     /* "cpu" */
    char description[96]; /* processor or GPU, as the tables print it */
    bool on_host;         /* the host may read and write its memory between operations */
    bool records;         /* record(), recorded(), replay() are there */
    size_t operand_bytes; /* of an element of an operand tensor */
};

/* Frees a backend of any kind; NULL is fine. What was allocated from it is released before. */
static inline void fv_backend_destroy(FvBackend *backend) {
    if (backend)
        backend->ops->destroy(backend);
}

/* threads >= 1, counting the caller, which computes too. One backend serves one job at a time. */
FvStatus fv_cpu_backend_create(size_t threads, FvBackend **out, FvError *err);

/* OpenBLAS before 0.3.24 does not know newer processors and falls back to AVX2 kernels at half the
 * speed. Name of the kernels (OPENBLAS_CORETYPE, read when the library is loaded) that suit this
 * processor better than those in use, NULL when there are none. */
const char *fv_cpu_better_blas_core(void);
/* Name, version and options of the BLAS in use. */
const char *fv_cpu_blas_name(void);

/* Workspace of the CPU operations: grown on first use of a larger shape, so that steps after the
 * first allocate nothing. Bytes now held. */
size_t fv_cpu_workspace_bytes(const FvBackend *);

#endif
