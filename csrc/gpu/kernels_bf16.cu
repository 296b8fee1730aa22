#include "gpu/kernels_impl.h"

namespace fusedcomm::gpu {

const Kernels& bf16_kernels() { return kKernels<BFloat16>; }

}  // namespace fusedcomm::gpu
