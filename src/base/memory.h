/* Sizes that cannot overflow silently, and one-block allocation. */
#ifndef FV_BASE_MEMORY_H
#define FV_BASE_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#include "base/real.h"

/* Saturating arithmetic: an overflow becomes SIZE_MAX, which every allocator refuses. */
static inline size_t fv_mul(size_t a, size_t b) {
    size_t r;
    return __builtin_mul_overflow(a, b, &r) ? SIZE_MAX : r;
}

static inline size_t fv_add(size_t a, size_t b) {
    size_t r;
    return __builtin_add_overflow(a, b, &r) ? SIZE_MAX : r;
}

static inline size_t fv_mul3(size_t a, size_t b, size_t c) {
    return fv_mul(fv_mul(a, b), c);
}

static inline size_t fv_mul4(size_t a, size_t b, size_t c, size_t d) {
    return fv_mul(fv_mul(a, b), fv_mul(c, d));
}

enum { FV_ALIGN = 64 }; /* bytes: a cache line, and a whole AVX-512 register */

/* Hands out aligned slices of one block, and of a second one for operand tensors, whose elements
 * are as wide as the backend says. With base NULL nothing is handed out and only `used` and
 * `operands_used` grow: the same carving code first measures, then carves. */
typedef struct FvArena {
    char *base, *operands;
    size_t used;          /* bytes of base */
    size_t operands_used; /* elements of operands */
    size_t operand_bytes; /* of an element; needed for carving */
} FvArena;

static inline void *fv_take_bytes(FvArena *arena, size_t bytes) {
    void *p = arena->base ? arena->base + arena->used : NULL;
    size_t padded = fv_mul(fv_add(bytes, FV_ALIGN - 1) / FV_ALIGN, FV_ALIGN);
    arena->used = fv_add(arena->used, padded);
    return p;
}

/* count elements of `real` */
static inline real *fv_take(FvArena *arena, size_t count) {
    return fv_take_bytes(arena, fv_mul(count, sizeof(real)));
}

/* count elements of an operand tensor: see backend.h */
static inline real *fv_take_operand(FvArena *arena, size_t count) {
    void *p =
        arena->operands ? arena->operands + arena->operands_used * arena->operand_bytes : NULL;
    size_t padded = fv_mul(fv_add(count, FV_ALIGN - 1) / FV_ALIGN, FV_ALIGN);
    arena->operands_used = fv_add(arena->operands_used, padded);
    return p;
}

#endif
