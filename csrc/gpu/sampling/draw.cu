// Tokens from probabilities.
#include "gpu/sampling/draw.h"
#include "gpu/sampling/launch.h"

namespace fusedcomm::gpu::sampling {

int sample(const Rows& probs, const float* uniforms, int32_t* out, int device, void* stream) {
  return launch_typed<Sample>(device, stream, probs, uniforms, out);
}

int sample_top_k_top_p(const Rows& probs, const Limit& top_k, const PerRow& top_p, const float* uniforms, bool joint,
                       int32_t* out, int device, void* stream) {
  if (joint) return launch_typed<SampleJoint>(device, stream, probs, top_k, top_p, uniforms, out);
  return launch_typed<SampleTopKFirst>(device, stream, probs, top_k, top_p, uniforms, out);
}

}  // namespace fusedcomm::gpu::sampling
