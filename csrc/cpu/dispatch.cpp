#include <cstring>

#include "cpu/kernels.h"

namespace fusedcomm {

namespace generic {
extern const cpu::Kernels kKernels[cpu::kNumDTypes];
}
#if defined(__x86_64__)
namespace avx2 {
extern const cpu::Kernels kKernels[cpu::kNumDTypes];
}
namespace avx512 {
extern const cpu::Kernels kKernels[cpu::kNumDTypes];
}
#endif

namespace cpu {

const Kernels* find_kernels(DType dtype, const char* isa) {
  const auto wanted = [isa](const char* name) { return isa == nullptr || std::strcmp(isa, name) == 0; };
  const int i = static_cast<int>(dtype);
#if defined(__x86_64__)
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return &avx512::kKernels[i];
  }
  // Every AVX2 machine has F16C (older compilers cannot ask for it by name).
  if (wanted("avx2") && __builtin_cpu_supports("avx2")) return &avx2::kKernels[i];
#endif
  return wanted("generic") ? &generic::kKernels[i] : nullptr;
}

}  // namespace cpu
}  // namespace fusedcomm
