// Tokens from probabilities.
#include "gpu/sampling/draw.h"
#include "gpu/sampling/launch.h"

namespace fusedcomm::gpu::sampling {

int sample(const Rows& probs, const float* uniforms, int32_t* out, int device, void* stream) {
  return launch_typed<DrawMemory, sample_kernel<BFloat16>, sample_kernel<Half>, sample_kernel<float>>(
      probs, device, stream, uniforms, out);
}

int sample_top_k_top_p(const Rows& probs, const Limit& top_k, const PerRow& top_p, const float* uniforms, bool joint,
                       int32_t* out, int device, void* stream) {
  if (joint) {
    return launch_typed<FilteredDrawMemory, sample_joint_kernel<BFloat16>, sample_joint_kernel<Half>,
                        sample_joint_kernel<float>>(probs, device, stream, top_k, top_p, uniforms, out);
  }
  return launch_typed<FilteredDrawMemory, sample_top_k_first_kernel<BFloat16>, sample_top_k_first_kernel<Half>,
                      sample_top_k_first_kernel<float>>(probs, device, stream, top_k, top_p, uniforms, out);
}

}  // namespace fusedcomm::gpu::sampling
