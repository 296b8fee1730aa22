// Filters of probabilities, and the softmax.
#include "gpu/sampling/launch.h"
#include "gpu/sampling/renorm.h"
#include "gpu/sampling/softmax.h"

namespace fusedcomm::gpu::sampling {

int top_k_renorm(const Rows& probs, const Limit& top_k, float* out, int device, void* stream) {
  return launch_typed<TopKRenorm>(device, stream, probs, top_k, out);
}

int top_p_renorm(const Rows& probs, const PerRow& top_p, float* out, int device, void* stream) {
  return launch_typed<TopPRenorm>(device, stream, probs, top_p, out);
}

int top_k_top_p_renorm(const Rows& probs, const Limit& top_k, const PerRow& top_p, float* out, int device,
                       void* stream) {
  return launch_typed<TopKTopPRenorm>(device, stream, probs, top_k, top_p, out);
}

int min_p_renorm(const Rows& probs, const PerRow& min_p, float* out, int device, void* stream) {
  return launch_typed<MinPRenorm>(device, stream, probs, min_p, out);
}

int softmax_temperature(const Rows& logits, const PerRow& temperature, float* out, int device, void* stream) {
  return launch_typed<SoftmaxTemperature>(device, stream, logits, temperature, out);
}

}  // namespace fusedcomm::gpu::sampling
