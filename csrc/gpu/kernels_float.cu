#include "gpu/kernels_impl.h"

namespace fusedcomm::gpu {

const Kernels& float_kernels() { return kKernels<float>; }

}  // namespace fusedcomm::gpu
