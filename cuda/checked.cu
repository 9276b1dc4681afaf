/* Operand tensors come as pointers to float. In bf16 mode, operations that read and write floats
 * alone look at every tensor they are given first. */
#include <type_traits>

#include "cuda/kernel.cuh"

template <typename T> static bool holds_floats(FvCuda *cuda, const char *name, T argument) {
    if constexpr (std::is_same<T, real *>::value || std::is_same<T, const real *>::value)
        return fv_cuda_is_float(cuda, name, argument);
    (void)cuda, (void)name, (void)argument; /* a size, a number, a shape */
    return true;
}

void fv_cuda_check_floats(FvCuda *cuda, const FvOps *plain) {
    cuda->plain = plain;
    cuda->checked = *plain;
    cuda->base.ops = &cuda->checked;
#define FV_CHECK(name)                                                                             \
    cuda->checked.name = [](FvBackend *backend, auto... arguments) {                               \
        if ((holds_floats(fv_cuda(backend), #name, arguments) && ...))                             \
            fv_cuda(backend)->plain->name(backend, arguments...);                                  \
    };
    FV_CHECK(copy)
    FV_CUDA_FLOAT_OPS(FV_CHECK)
#undef FV_CHECK
}
