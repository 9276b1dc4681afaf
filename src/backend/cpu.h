/* What the files of the CPU backend share. */
#ifndef FV_BACKEND_CPU_H
#define FV_BACKEND_CPU_H

#include <cblas.h>

#include "backend/backend.h"
#include "backend/pool.h"
#include "base/memory.h"

#ifdef FV_DOUBLE
#define FV_CBLAS(name) cblas_d##name
#else
#define FV_CBLAS(name) cblas_s##name
#endif

/* A block that only grows; its content does not survive growth. */
typedef struct FvScratch {
    void *data;
    size_t bytes;
} FvScratch;

typedef struct FvRope { /* cos and sin of position * theta^(-2 i / width): [positions][width] */
    double theta;
    size_t width, positions;
    FvScratch table;
} FvRope;

typedef struct FvCpu {
    FvBackend base; /* first: a FvBackend * is a FvCpu * */
    FvPool *pool;
    FvScratch *own;   /* [threads]: each thread's workspace */
    FvScratch shared; /* one workspace for the whole operation */
    FvRope rope;
    real pixel[3][256]; /* [channel][byte]: normalised with the ImageNet mean and deviation */
    size_t refused;     /* bytes of the first workspace that could not be had since the last sync */
} FvCpu;

static inline FvCpu *fv_cpu(FvBackend *backend) {
    return (FvCpu *)backend;
}

/* Make the workspaces at least that large. On false there is no memory: the operation returns
 * without effect, and sync() reports it. */
bool fv_cpu_grow(FvCpu *, FvScratch *, size_t bytes);
bool fv_cpu_workspace(FvCpu *, size_t own_bytes, size_t shared_bytes);

/* Runs the tiles on the pool when `cost`, in nanoseconds of one core, is worth a wake-up; on the
 * caller otherwise. Never fewer or other tiles: results do not depend on the choice. */
void fv_cpu_run(FvCpu *, size_t tiles, double cost, FvTile *run, void *arg);

/* Parts of a range of n, `size` each except the last. */
typedef struct FvTiles {
    size_t n, size, count;
} FvTiles;

static inline size_t fv_min(size_t a, size_t b) {
    return a < b ? a : b;
}

static inline size_t fv_max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

static inline size_t fv_ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* At most `parts` equal parts of at least `least`, each a multiple of `multiple` but the last;
 * none when n is 0. */
static inline FvTiles fv_split(size_t n, size_t parts, size_t least, size_t multiple) {
    size_t fit = fv_max_size(1, fv_min(parts, n / least));
    size_t size = fv_max_size(1, fv_ceil_div(fv_ceil_div(n, fit), multiple) * multiple);
    return (FvTiles){n, size, fv_ceil_div(n, size)};
}

static inline size_t fv_split_start(const FvTiles *s, size_t part) {
    return part * s->size;
}

static inline size_t fv_split_length(const FvTiles *s, size_t part) {
    return fv_min(s->size, s->n - part * s->size);
}

/* Rows of `width` in parts that suit operations which stream once through memory. */
static inline FvTiles fv_split_rows(size_t rows, size_t width) {
    enum { PART = 8192 }; /* elements: some microseconds, and within the first-level cache */
    size_t size = fv_max_size(1, PART / fv_max_size(1, width));
    return (FvTiles){rows, size, fv_ceil_div(rows, size)};
}

/* The same for sums over rows, whose partial sums are added afterwards: few parts. */
static inline FvTiles fv_split_sums(size_t rows, size_t width) {
    enum { PARTS = 16 };
    return fv_split(rows, PARTS, fv_max_size(1, 4096 / fv_max_size(1, width)), 1);
}

/* Adds partial sums [parts][n] to `sum` in the order of the parts. */
void fv_cpu_add_parts(FvCpu *, size_t parts, size_t n, size_t stride, const real *part, real *sum);

/* C [m, n] = alpha A B + beta C, row-major with row strides */
static inline void fv_gemm(bool trans_a, bool trans_b, size_t m, size_t n, size_t k, real alpha,
                           const real *a, size_t lda, const real *b, size_t ldb, real beta, real *c,
                           size_t ldc) {
    FV_CBLAS(gemm)
    (CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans, trans_b ? CblasTrans : CblasNoTrans,
     (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, c,
     (blasint)ldc);
}

/* --- the operations, by file ----------------------------------------------------------------- */

/* cpu_memory.c */
size_t fv_cpu_memory_left(FvBackend *);

/* cpu_rows.c */
void fv_cpu_copy(FvBackend *, size_t n, const real *x, real *y);
void fv_cpu_add(FvBackend *, size_t n, const real *x, real *y);
void fv_cpu_copy_rows(FvBackend *, size_t rows, size_t width, const real *src, const int32_t *si,
                      real *dst, const int32_t *di, bool add);
void fv_cpu_residual(FvBackend *, size_t rows, size_t width, const real *x, const real *scale,
                     const real *a, real *y);
void fv_cpu_residual_back(FvBackend *, size_t rows, size_t width, const real *scale, const real *a,
                          const real *dy, real *da, real *dscale);

/* cpu_activation.c */
void fv_cpu_gelu(FvBackend *, size_t n, const real *x, real *y);
void fv_cpu_gelu_back(FvBackend *, size_t n, const real *x, const real *dy, real *dx);
void fv_cpu_relu(FvBackend *, size_t n, const real *x, real *y);
void fv_cpu_relu_back(FvBackend *, size_t n, const real *x, const real *dy, real *dx);
void fv_cpu_swiglu(FvBackend *, size_t n, const real *gate, const real *up, real *y);
void fv_cpu_swiglu_back(FvBackend *, size_t n, const real *gate, const real *up, const real *dy,
                        real *dgate, real *dup);

/* cpu_linear.c */
void fv_cpu_linear(FvBackend *, size_t rows, size_t in, size_t out, const real *x, const real *w,
                   const real *bias, real *y);
void fv_cpu_linear_back(FvBackend *, size_t rows, size_t in, size_t out, const real *x,
                        const real *w, const real *dy, real *dx, bool add, real *dw, real *dbias);

void fv_cpu_head_linear(FvBackend *, size_t rows, size_t heads, size_t in, size_t out,
                        const real *x, const real *w, const real *bias, real *y);
void fv_cpu_head_linear_back(FvBackend *, size_t rows, size_t heads, size_t in, size_t out,
                             const real *w, const real *dy, real *dx);

/* cpu_norm.c */
void fv_cpu_layernorm(FvBackend *, size_t rows, size_t width, double eps, const real *x,
                      const real *gamma, const real *beta, real *y, real *mean, real *rstd);
void fv_cpu_layernorm_back(FvBackend *, size_t rows, size_t width, const real *x, const real *gamma,
                           const real *mean, const real *rstd, const real *dy, real *dx, bool add,
                           real *dgamma, real *dbeta);
void fv_cpu_rmsnorm(FvBackend *, size_t rows, size_t width, double eps, const real *x,
                    const real *gamma, real *y, real *rstd);
void fv_cpu_rmsnorm_back(FvBackend *, size_t rows, size_t width, const real *x, const real *gamma,
                         const real *rstd, const real *dy, real *dx, bool add, real *dgamma);
void fv_cpu_rescale(FvBackend *, size_t rows, size_t width, double target, const real *x, real *y,
                    real *std);
void fv_cpu_rescale_back(FvBackend *, size_t rows, size_t width, double target, const real *x,
                         const real *std, const real *dy, real *dx);

/* cpu_attention.c */
void fv_cpu_attention(FvBackend *, const FvAttention *, const real *q, const real *k, const real *v,
                      real *probs, real *out);
void fv_cpu_attention_back(FvBackend *, const FvAttention *, const real *q, const real *k,
                           const real *v, const real *probs, const real *dout, real *dq, real *dk,
                           real *dv);
void fv_cpu_rope(FvBackend *, size_t batch, size_t rows, size_t heads, size_t width, size_t row0,
                 const int32_t *first, double theta, bool inverse, real *x);

/* cpu_query.c */
void fv_cpu_query(FvBackend *, const FvQuery *, const real *q, const real *k, const real *v,
                  real *probs, real *out);
void fv_cpu_query_back(FvBackend *, const FvQuery *, const real *q, const real *k, const real *v,
                       const real *probs, const real *dout, const real *dprobs, real *dq, real *dk,
                       real *dv);

/* cpu_conv.c */
void fv_cpu_conv(FvBackend *, const FvConv *, const real *x, const real *w, const real *bias,
                 real *y);
void fv_cpu_conv_back(FvBackend *, const FvConv *, const real *x, const real *w, const real *dy,
                      real *dx, bool add, real *dw, real *dbias);

/* cpu_image.c */
void fv_cpu_patchify(FvBackend *, size_t frames, size_t size, size_t patch, const uint8_t *pixels,
                     real *out);
void fv_cpu_tokens(FvBackend *, size_t frames, size_t patches, size_t width, const real *patch,
                   const real *cls, const real *pos, real *x);
void fv_cpu_tokens_back(FvBackend *, size_t frames, size_t patches, size_t width, const real *dx,
                        real *dpatch, real *dcls, real *dpos);
void fv_cpu_film(FvBackend *, size_t frames, size_t positions, size_t channels, const real *x,
                 const real *gb, real *y);
void fv_cpu_film_back(FvBackend *, size_t frames, size_t positions, size_t channels, const real *x,
                      const real *gb, const real *dy, real *dx, bool add, real *dgb);

/* cpu_loss.c */
void fv_cpu_mse(FvBackend *, size_t frames, size_t n, const real *x, const real *target,
                double *loss);
void fv_cpu_mse_back(FvBackend *, size_t frames, size_t n, double scale, const real *x,
                     const real *target, real *dx);
void fv_cpu_cosine(FvBackend *, size_t rows, size_t width, const real *x, const real *y,
                   double *cosine);
void fv_cpu_cosine_back(FvBackend *, size_t rows, size_t width, double scale, const real *x,
                        const real *y, real *dx, real *dy);
void fv_cpu_entropy(FvBackend *, size_t frames, size_t heads, size_t keys, const real *probs,
                    double *entropy);
void fv_cpu_entropy_back(FvBackend *, size_t frames, size_t heads, size_t keys, const real *probs,
                         const double *dentropy, real *dprobs);
void fv_cpu_entropy_hinge(FvBackend *, size_t clips, size_t frames, const double *fine,
                          const double *coarse, double margin, double weight, double *hinge,
                          double *dfine, double *dcoarse);

/* cpu_distill.c */
void fv_cpu_normalize(FvBackend *, size_t rows, size_t width, const real *x, real *y, real *norm);
void fv_cpu_normalize_back(FvBackend *, size_t rows, size_t width, const real *y, const real *norm,
                           const real *dy, real *dx, bool add);
void fv_cpu_softmax(FvBackend *, size_t rows, size_t width, double temperature, const real *x,
                    const real *centre, real *p);
void fv_cpu_cross_entropy(FvBackend *, size_t rows, size_t width, double temperature, const real *x,
                          const real *target, real *p, double *loss);
void fv_cpu_cross_entropy_back(FvBackend *, size_t rows, size_t width, double temperature,
                               double scale, const real *p, const real *target, real *dx);
void fv_cpu_approach(FvBackend *, size_t n, double share, const real *x, real *y);

/* cpu_optimizer.c */
void fv_cpu_norm(FvBackend *, size_t n, const real *x, double *norm);
void fv_cpu_adamw(FvBackend *, const FvAdamW *, const double *rates, size_t n, const double *norm,
                  const real *g, real *p, real *m, real *v);
size_t fv_cpu_first_nonfinite(FvBackend *, size_t n, const real *x);

#endif
