#include "base/rng.h"

#include <math.h>

uint64_t fv_stream(uint64_t seed, const char *name) {
    uint64_t key = fv_mix(seed);
    for (const char *c = name; *c; c++)
        key = fv_mix(key ^ (unsigned char)*c);
    return key;
}

double fv_uniform(uint64_t key, uint64_t index) {
    return (double)(fv_random(key, index) >> 11) * 0x1p-53;
}

double fv_normal(uint64_t key, uint64_t index) {
    const double two_pi = 6.283185307179586;
    double u = 1.0 - fv_uniform(key, 2 * index); /* in (0, 1] */
    double v = fv_uniform(key, 2 * index + 1);
    return sqrt(-2.0 * log(u)) * cos(two_pi * v);
}

void fv_permutation(uint64_t key, size_t n, uint32_t *order) {
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    for (size_t i = n; i > 1; i--) {
        size_t j = (size_t)fv_random_below(key, i, i);
        uint32_t swap = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swap;
    }
}
