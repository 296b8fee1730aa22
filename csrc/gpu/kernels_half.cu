#include "gpu/kernels_impl.h"

namespace fusedcomm::gpu {

const Kernels& half_kernels() { return kKernels<Half>; }

}  // namespace fusedcomm::gpu
