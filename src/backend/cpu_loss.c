/* Losses and measures; sums in double, in a fixed order. */
#include "backend/cpu.h"
#include "backend/cpu_math.h"

typedef struct Loss {
    size_t n;
    double scale;
    const real *x, *target;
    real *dx;
    double *loss;
} Loss;

FV_SIMD static double square_error(size_t n, const real *x, const real *target) {
    double lane[FV_DLANES] = {0}, sum = 0;
    size_t i = 0;
    for (; i + FV_DLANES <= n; i += FV_DLANES)
        for (size_t l = 0; l < FV_DLANES; l++) {
            double d = (double)x[i + l] - (double)target[i + l];
            lane[l] += d * d;
        }
    for (; i < n; i++) {
        double d = (double)x[i] - (double)target[i];
        sum += d * d;
    }
    for (size_t l = 0; l < FV_DLANES; l++)
        sum += lane[l];
    return sum;
}

static void mse_tile(void *arg, size_t frame, size_t thread) {
    const Loss *t = arg;
    (void)thread;
    t->loss[frame] =
        square_error(t->n, t->x + frame * t->n, t->target + frame * t->n) / (double)t->n;
}

void fv_cpu_mse(FvBackend *backend, size_t frames, size_t n, const real *x, const real *target,
                double *loss) {
    Loss t = {.n = n, .x = x, .target = target, .loss = loss};
    fv_cpu_run(fv_cpu(backend), frames, 0.5 * (double)(frames * n), mse_tile, &t);
}

FV_SIMD static void mse_back_range(size_t n, real scale, const real *x, const real *target,
                                   real *dx) {
    for (size_t i = 0; i < n; i++)
        dx[i] = scale * (x[i] - target[i]);
}

void fv_cpu_mse_back(FvBackend *backend, size_t frames, size_t n, double scale, const real *x,
                     const real *target, real *dx) {
    (void)backend;
    mse_back_range(frames * n, (real)(2 * scale / (double)n), x, target, dx);
}

static const double least_norms = 1e-8; /* of |x||y| */

FV_SIMD static void products(size_t n, const real *x, const real *y, double *xx, double *yy,
                             double *xy) {
    *xx = fv_ddot(n, x, x);
    *yy = fv_ddot(n, y, y);
    *xy = fv_ddot(n, x, y);
}

void fv_cpu_cosine(FvBackend *backend, size_t rows, size_t width, const real *x, const real *y,
                   double *cosine) {
    (void)backend;
    for (size_t r = 0; r < rows; r++) {
        double xx, yy, xy;
        products(width, x + r * width, y + r * width, &xx, &yy, &xy);
        double norms = sqrt(xx) * sqrt(yy);
        cosine[r] = xy / (norms < least_norms ? least_norms : norms);
    }
}

/* dx += a y - b x, dy += a x - c y */
FV_SIMD static void cosine_back_row(size_t n, double a, double b, double c, const real *x,
                                    const real *y, real *dx, real *dy) {
    for (size_t i = 0; i < n; i++) {
        dx[i] += (real)(a * (double)y[i] - b * (double)x[i]);
        dy[i] += (real)(a * (double)x[i] - c * (double)y[i]);
    }
}

void fv_cpu_cosine_back(FvBackend *backend, size_t rows, size_t width, double scale, const real *x,
                        const real *y, real *dx, real *dy) {
    (void)backend;
    for (size_t r = 0; r < rows; r++) {
        size_t at = r * width;
        double xx, yy, xy;
        products(width, x + at, y + at, &xx, &yy, &xy);
        double norms = sqrt(xx) * sqrt(yy), a = scale / least_norms, b = 0, c = 0;
        if (!(norms < least_norms)) {
            a = scale / norms;
            b = a * xy / xx;
            c = a * xy / yy;
        }
        cosine_back_row(width, a, b, c, x + at, y + at, dx + at, dy + at);
    }
}

/* --- entropy -------------------------------------------------------------------------------- */

void fv_cpu_entropy(FvBackend *backend, size_t frames, size_t heads, size_t keys, const real *probs,
                    double *entropy) {
    (void)backend;
    for (size_t f = 0; f < frames; f++) {
        double sum = 0;
        for (size_t i = 0; i < heads * keys; i++) {
            double p = (double)probs[f * heads * keys + i];
            if (p != 0) /* 0 log 0 = 0 */
                sum -= p * log(p);
        }
        entropy[f] = sum / (double)heads;
    }
}

void fv_cpu_entropy_back(FvBackend *backend, size_t frames, size_t heads, size_t keys,
                         const real *probs, const double *dentropy, real *dprobs) {
    (void)backend;
    for (size_t f = 0; f < frames; f++)
        for (size_t i = 0; i < heads * keys; i++) {
            double p = (double)probs[f * heads * keys + i];
            double slope = p != 0 ? -(log(p) + 1) / (double)heads : 0;
            dprobs[f * heads * keys + i] = (real)(dentropy[f] * slope);
        }
}

void fv_cpu_entropy_hinge(FvBackend *backend, size_t clips, size_t frames, const double *fine,
                          const double *coarse, double margin, double weight, double *hinge,
                          double *dfine, double *dcoarse) {
    (void)backend;
    for (size_t c = 0; c < clips; c++) {
        double difference = 0;
        for (size_t t = 0; t < frames; t++)
            difference += fine[c * frames + t] - coarse[c * frames + t];
        double value = difference / (double)frames + margin;
        bool active = !(value <= 0); /* NaN stays visible */
        hinge[c] = active ? value : 0;
        for (size_t t = 0; t < frames; t++) {
            dfine[c * frames + t] = active ? weight / (double)(clips * frames) : 0;
            dcoarse[c * frames + t] = -dfine[c * frames + t];
        }
    }
}
