/* Elementary functions and sums that the compiler turns into vector code.
 *
 * The files that include this are compiled with -ffp-contract=fast -fno-math-errno
 * -fno-trapping-math, never with -ffast-math: NaN and infinities go through every function below.
 * Sums add a fixed number of lanes in a fixed order, whatever the width of the registers. */
#ifndef FV_BACKEND_CPU_MATH_H
#define FV_BACKEND_CPU_MATH_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/real.h"

/* Marks a hot function: compiled for AVX-512, AVX2 + FMA and plain x86-64, chosen at load. Not
 * under sanitizers, whose run time is not ready when the choice is made. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) &&                             \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(FV_NO_CLONES)
#define FV_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FV_SIMD
#endif

/* Helpers of the hot functions must become part of them to be compiled for the same processor. */
#define FV_INLINE static inline __attribute__((always_inline))

/* 64 bytes of lanes at any address: one AVX-512 register, or several narrower ones. */
enum { FV_LANES = 64 / sizeof(real), FV_DLANES = 8 };
typedef real FvLanes __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));
typedef double FvDLanes __attribute__((vector_size(64), aligned(sizeof(double)), may_alias));

/* Sum of the lanes by halves. */
FV_INLINE real fv_lanes_sum(const FvLanes *lanes) {
    real v[FV_LANES];
    memcpy(v, lanes, sizeof v);
    for (int half = FV_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}

FV_INLINE double fv_dlanes_sum(const FvDLanes *lanes) {
    double v[FV_DLANES];
    memcpy(v, lanes, sizeof v);
    for (int half = FV_DLANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}

FV_INLINE real fv_sum(size_t n, const real *x) {
    FvLanes s = {0};
    size_t i = 0;
    for (; i + FV_LANES <= n; i += FV_LANES)
        s += *(const FvLanes *)(x + i);
    real sum = fv_lanes_sum(&s);
    for (; i < n; i++)
        sum += x[i];
    return sum;
}

FV_INLINE real fv_dot(size_t n, const real *x, const real *y) {
    FvLanes s = {0};
    size_t i = 0;
    for (; i + FV_LANES <= n; i += FV_LANES)
        s += *(const FvLanes *)(x + i) * *(const FvLanes *)(y + i);
    real sum = fv_lanes_sum(&s);
    for (; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/* The same in double. */
FV_INLINE double fv_ddot(size_t n, const real *x, const real *y) {
    double v[FV_DLANES] = {0}, sum = 0;
    size_t i = 0;
    for (; i + FV_DLANES <= n; i += FV_DLANES)
        for (size_t l = 0; l < FV_DLANES; l++)
            v[l] += (double)x[i + l] * (double)y[i + l];
    for (; i < n; i++)
        sum += (double)x[i] * (double)y[i];
    FvDLanes s;
    memcpy(&s, v, sizeof s);
    return sum + fv_dlanes_sum(&s);
}

/* Largest element; a NaN is passed over, a row of them gives -inf. */
FV_INLINE real fv_max(size_t n, const real *x) {
    real v[FV_LANES], max = (real)-INFINITY;
    size_t i = 0;
    for (size_t l = 0; l < FV_LANES; l++)
        v[l] = max;
    for (; i + FV_LANES <= n; i += FV_LANES)
        for (size_t l = 0; l < FV_LANES; l++)
            v[l] = x[i + l] > v[l] ? x[i + l] : v[l];
    for (; i < n; i++)
        max = x[i] > max ? x[i] : max;
    for (size_t l = 0; l < FV_LANES; l++)
        max = v[l] > max ? v[l] : max;
    return max;
}

#ifdef FV_DOUBLE

FV_INLINE real fv_exp(real x) {
    return exp(x);
}

/* Phi(x) of the standard normal and exp(-x^2 / 2). */
FV_INLINE void fv_normal_cdf(real x, real *cdf, real *e) {
    *cdf = 0.5 * erfc(-x * 0.70710678118654752440);
    *e = exp(-0.5 * x * x);
}

#else

/* exp(x + low) for |low| <= 0.1, x clamped to where the result is 0 or inf: x = n ln 2 + r, and
 * e^r = 1 + r + r^2 p(r). p was fitted by Lawson's reweighted least squares to the relative error
 * on |r| <= 0.45: at most 1.9e-8 there and 3e-9 on |r| <= 0.35, which is all of it when low = 0.
 * Measured on every 16th float, with rounding: at most 1.2 units in the last place of all normal
 * results. 2^n is applied in two halves, so that results below the normal range are right too. */
FV_INLINE real fv_exp_sum(real x, real low) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
    x = x > 100.0f ? 100.0f : x;     /* comparisons that let NaN pass */
    x = x < -110.0f ? -110.0f : x;
    float shifted = x * 1.44269504f + round;
    float n = shifted - round;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-06f + low; /* ln 2 in two parts */
    float p = 0.00137650245f;
    p = p * r + 0.00839285925f;
    p = p * r + 0.0416715182f;
    p = p * r + 0.166662544f;
    p = p * r + 0.499999702f;
    p = p * (r * r) + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)bits - 0x4b400000u); /* n, or anything for NaN */
    int32_t half = bits >> 1;
    uint32_t bits1 = ((uint32_t)half + 127u) << 23;
    uint32_t bits2 = ((uint32_t)bits - (uint32_t)half + 127u) << 23;
    float scale1, scale2;
    memcpy(&scale1, &bits1, sizeof scale1);
    memcpy(&scale2, &bits2, sizeof scale2);
    return p * scale1 * scale2;
}

FV_INLINE real fv_exp(real x) {
    return fv_exp_sum(x, 0.0f);
}

/* Phi(x) of the standard normal and exp(-x^2 / 2), with a small relative error in the negative
 * tail too: Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + 0.3 a). P was fitted like the polynomial
 * above, to erfcx(a / sqrt 2) / 2 on 0 <= a <= 15: relative error at most 3.5e-9 before rounding.
 * Measured likewise: GELU within 4.4 eps of its value for |x| < 13. a^2 is split into the exact
 * square of a's leading 11 bits and the rest. */
FV_INLINE void fv_normal_cdf(real x, real *cdf, real *e) {
    float a = x < 0.0f ? -x : x;
    a = a > 15.0f ? 15.0f : a; /* Phi(-15) is below the smallest float */
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    bits &= 0xffffe000u;
    float high;
    memcpy(&high, &bits, sizeof high);
    *e = fv_exp_sum(-0.5f * (high * high), -0.5f * ((a - high) * (a + high)));
    float t = 1.0f / (1.0f + 0.3f * a);
    float p = -0.0206286512f;
    p = p * t + 0.112464742f;
    p = p * t - 0.228284675f;
    p = p * t + 0.191883154f;
    p = p * t - 0.0795090648f;
    p = p * t + 0.096204881f;
    p = p * t + 0.0783722323f;
    p = p * t + 0.110239346f;
    p = p * t + 0.119571317f;
    p = p * t + 0.119686717f;
    float tail = *e * (t * p);
    *cdf = x < 0.0f ? tail : 1.0f - tail;
}

#endif

/* gelu(x) = x Phi(x) and its derivative Phi(x) + x phi(x) */
FV_INLINE real fv_gelu(real x) {
    real cdf, e;
    fv_normal_cdf(x, &cdf, &e);
    return x * cdf;
}

FV_INLINE real fv_gelu_slope(real x) {
    real cdf, e;
    fv_normal_cdf(x, &cdf, &e);
    return cdf + x * (e * (real)0.39894228040143267794); /* 1 / sqrt(2 pi) */
}

FV_INLINE real fv_sigmoid(real x) {
    return 1 / (1 + fv_exp(-x));
}

#endif
