/* bfloat16 of the stand-in for CUDA: the upper half of a float, rounded to nearest even. */
#ifndef TESTS_CUDA_HOST_CUDA_BF16_H
#define TESTS_CUDA_HOST_CUDA_BF16_H

#ifdef __cplusplus
#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        uint32_t u = std::bit_cast<uint32_t>(x);
        if (x != x) /* CUDA's one NaN */
            u = 0x7fff0000u;
        else if ((u & 0x7f800000u) != 0x7f800000u)
            u += 0x7fffu + (u >> 16 & 1);
        bits = (unsigned short)(u >> 16);
    }
    operator float() const {
        return std::bit_cast<float>((uint32_t)bits << 16);
    }
};

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

static inline __nv_bfloat16 __float2bfloat16(float x) {
    return __nv_bfloat16(x);
}
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    return __nv_bfloat16(x);
}
static inline float __bfloat162float(__nv_bfloat16 x) {
    return (float)x;
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
#else
typedef struct {
    unsigned short bits;
} __nv_bfloat16;
typedef struct {
    __nv_bfloat16 x, y;
} __nv_bfloat162;
#endif
#endif
