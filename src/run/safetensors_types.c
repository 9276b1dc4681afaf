/* Types of elements, and reading them. */
#include <math.h>
#include <string.h>

#include "base/memory.h"
#include "run/safetensors.h"

static const struct {
    const char *name;
    size_t size;
} types[FV_TYPES] = {
    [FV_F64] = {"F64", 8},
    [FV_F32] = {"F32", 4},
    [FV_F16] = {"F16", 2},
    [FV_BF16] = {"BF16", 2},
    [FV_I64] = {"I64", 8},
    [FV_I32] = {"I32", 4},
    [FV_U8] = {"U8", 1},
    [FV_BOOL] = {"BOOL", 1},
    [FV_I8] = {"I8", 1},
    [FV_I16] = {"I16", 2},
    [FV_U16] = {"U16", 2},
    [FV_U32] = {"U32", 4},
    [FV_U64] = {"U64", 8},
    [FV_F8_E4M3] = {"F8_E4M3", 1},
    [FV_F8_E5M2] = {"F8_E5M2", 1},
    [FV_F8_E8M0] = {"F8_E8M0", 1},
    [FV_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 1},
    [FV_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 1},
    [FV_C64] = {"C64", 8},
};

size_t fv_type_size(FvType type) {
    return types[type].size;
}

const char *fv_type_name(FvType type) {
    return types[type].name;
}

size_t fv_tensor_bytes(const FvTensor *t) {
    return fv_mul(t->count, types[t->type].size);
}

FvStatus fv_tensors_readable(const FvTensorFile *f, const FvTensor *t, FvError *err) {
    if (t->type < FV_BOOL)
        return FV_OK;
    return FV_FAIL(err, FV_DATA,
                   "%s: tensor %.100s has dtype %s; elements of F64, F32, F16, BF16, I64, I32 and "
                   "U8 are read",
                   fv_tensors_path(f), t->name, fv_type_name(t->type));
}

/* memcpy because files may place elements at any byte. */
static inline uint16_t load16(const unsigned char *at) {
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bfloat(uint16_t b) {
    return from_bits((uint32_t)b << 16);
}

/* Without branches, so that loops over it become vector instructions. The exponent's bias is 15
 * in a half and 127 in a float; subnormals are a fraction times 2^-24. */
static inline float from_half(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13, exponent = h & 0x7c00u;
    uint32_t normal = exponent == 0x7c00u ? rest | 0x7f800000u : rest + ((127u - 15u) << 23);
    float subnormal = (float)(int)(h & 0x3ffu) * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &subnormal, sizeof bits);
    return from_bits(sign | (exponent == 0 ? bits : normal));
}

static inline double element(FvType type, const unsigned char *at) {
    union {
        double f64;
        float f32;
        int64_t i64;
        int32_t i32;
    } value;
    switch (type) {
    case FV_F64:
        memcpy(&value, at, sizeof value.f64);
        return value.f64;
    case FV_F32:
        memcpy(&value, at, sizeof value.f32);
        return (double)value.f32;
    case FV_F16:
        return (double)from_half(load16(at));
    case FV_BF16:
        return (double)from_bfloat(load16(at));
    case FV_I64:
        memcpy(&value, at, sizeof value.i64);
        return (double)value.i64;
    case FV_I32:
        memcpy(&value, at, sizeof value.i32);
        return value.i32;
    case FV_U8:
        return *at;
    default:
        return NAN; /* is not readable */
    }
}

void fv_tensor_read(const FvTensor *t, size_t first, size_t count, double *out) {
    size_t size = types[t->type].size;
    for (size_t i = 0; i < count; i++)
        out[i] = element(t->type, (const unsigned char *)t->data + (first + i) * size);
}

void fv_tensor_read_real(const FvTensor *t, size_t first, size_t count, real *out) {
    const FvType stored_as_is = sizeof(real) == sizeof(float) ? FV_F32 : FV_F64;
    size_t size = types[t->type].size;
    const unsigned char *at = (const unsigned char *)t->data + first * size;
    if (count == 0)
        return; /* the data of an empty tensor may be NULL */
    if (t->type == stored_as_is)
        memcpy(out, at, count * sizeof *out);
    else if (t->type == FV_BF16)
        for (size_t i = 0; i < count; i++)
            out[i] = from_bfloat(load16(at + 2 * i));
    else if (t->type == FV_F16)
        for (size_t i = 0; i < count; i++)
            out[i] = from_half(load16(at + 2 * i));
    else
        for (size_t i = 0; i < count; i++)
            out[i] = (real)element(t->type, at + i * size);
}
