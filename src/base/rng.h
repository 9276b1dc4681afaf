/* Counter-based random numbers: value i of a stream depends on (stream key, i) alone, so order of
 * use, threads and ranks cannot change it. */
#ifndef FV_BASE_RNG_H
#define FV_BASE_RNG_H

#include <stddef.h>
#include <stdint.h>

/* Finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters every bit. */
static inline uint64_t fv_mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Number `index` of the stream `key`, all 64 bits uniform. */
static inline uint64_t fv_random(uint64_t key, uint64_t index) {
    return fv_mix(fv_mix(key) ^ fv_mix(index * 0xd1342543de82ef95u + 1));
}

__extension__ typedef unsigned __int128 FvWide; /* the product of two 64-bit numbers */

/* Uniform integer in [0, n), n > 0; bias below 2^-32 for n < 2^32. */
static inline uint64_t fv_random_below(uint64_t key, uint64_t index, uint64_t n) {
    return (uint64_t)(((FvWide)fv_random(key, index) * n) >> 64);
}

/* Key of the sub-stream `name` of `seed`. */
uint64_t fv_stream(uint64_t seed, const char *name);

/* Uniform in [0, 1) and standard normal (Box-Muller), number `index` of the stream. */
double fv_uniform(uint64_t key, uint64_t index);
double fv_normal(uint64_t key, uint64_t index);

/* Writes a permutation of 0 .. n-1 (Fisher-Yates) that is a function of key and n alone. */
void fv_permutation(uint64_t key, size_t n, uint32_t *order);

#endif
