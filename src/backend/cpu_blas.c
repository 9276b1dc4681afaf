#include <cblas.h>
#include <string.h>

#include "backend/backend.h"

const char *fv_cpu_better_blas_core(void) {
#if defined(__x86_64__) && defined(OPENBLAS_VERSION)
    static const char *const wide[] = {"SkylakeX", "Cooperlake", "SapphireRapids"};
    const char *chosen = openblas_get_corename();
    for (size_t i = 0; chosen && i < sizeof wide / sizeof *wide; i++)
        if (strcmp(chosen, wide[i]) == 0)
            return NULL;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return NULL;
    return __builtin_cpu_supports("avx512bf16") ? "Cooperlake" : "SkylakeX";
#else
    return NULL;
#endif
}

const char *fv_cpu_blas_name(void) {
    return openblas_get_config();
}
