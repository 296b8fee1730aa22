#include <cstring>

#include "cpu/kernels.h"
#include "cpu/sampling/kernels.h"

namespace fusedcomm {

namespace generic {
extern const cpu::Kernels kKernels[cpu::kNumDTypes];
namespace sampling {
extern const cpu::sampling::Kernels kKernels;
}
}  // namespace generic
#if defined(__x86_64__)
namespace avx2 {
extern const cpu::Kernels kKernels[cpu::kNumDTypes];
namespace sampling {
extern const cpu::sampling::Kernels kKernels;
}
}  // namespace avx2
namespace avx512 {
extern const cpu::Kernels kKernels[cpu::kNumDTypes];
namespace sampling {
extern const cpu::sampling::Kernels kKernels;
}
}  // namespace avx512
#endif

namespace cpu {

namespace {

// Whether an instruction set is asked for: by its name, or nullptr for any.
bool is_wanted(const char* isa, const char* name) { return isa == nullptr || std::strcmp(isa, name) == 0; }

#if defined(__x86_64__)
bool serves_avx512(const char* isa) {
  return is_wanted(isa, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Every AVX2 machine has F16C (older compilers cannot ask for it by name).
bool serves_avx2(const char* isa) { return is_wanted(isa, "avx2") && __builtin_cpu_supports("avx2"); }
#endif

}  // namespace

const Kernels* find_kernels(DType dtype, const char* isa) {
  const int i = static_cast<int>(dtype);
#if defined(__x86_64__)
  if (serves_avx512(isa)) return &avx512::kKernels[i];
  if (serves_avx2(isa)) return &avx2::kKernels[i];
#endif
  return is_wanted(isa, "generic") ? &generic::kKernels[i] : nullptr;
}

const sampling::Kernels* sampling::find_kernels(const char* isa) {
#if defined(__x86_64__)
  if (serves_avx512(isa)) return &avx512::sampling::kKernels;
  if (serves_avx2(isa)) return &avx2::sampling::kKernels;
#endif
  return is_wanted(isa, "generic") ? &generic::sampling::kKernels : nullptr;
}

}  // namespace cpu
}  // namespace fusedcomm
