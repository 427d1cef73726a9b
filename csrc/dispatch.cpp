// Which instruction sets this build holds and this machine runs.
#include <vector>

#include "kernels.h"
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace elinvar {
namespace scalar {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

const Kernels* const* available_kernels(int* count) {
    static const std::vector<const Kernels*> all = [] {
        std::vector<const Kernels*> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
        const bool avx512 =
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni");
        if (avx2 && avx512) found.push_back(&avx512::kernels);
        if (avx2) found.push_back(&avx2::kernels);
#elif defined(__aarch64__)
        if (getauxval(AT_HWCAP) & (1UL << 20)) found.push_back(&neon::kernels);  // ASIMDDP
#endif
        found.push_back(&scalar::kernels);
        return found;
    }();
    *count = static_cast<int>(all.size());
    return all.data();
}

}  // namespace elinvar
