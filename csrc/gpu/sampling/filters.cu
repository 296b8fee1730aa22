// Filters of probabilities, and the softmax.
#include "gpu/sampling/launch.h"
#include "gpu/sampling/renorm.h"
#include "gpu/sampling/softmax.h"

namespace fusedcomm::gpu::sampling {

int top_k_renorm(const Rows& probs, const Limit& top_k, float* out, int device, void* stream) {
  return launch_typed<TopKMemory, top_k_renorm_kernel<BFloat16>, top_k_renorm_kernel<Half>, top_k_renorm_kernel<float>>(
      probs, device, stream, top_k, out);
}

int top_p_renorm(const Rows& probs, const PerRow& top_p, float* out, int device, void* stream) {
  return launch_typed<TopPMemory, top_p_renorm_kernel<BFloat16>, top_p_renorm_kernel<Half>, top_p_renorm_kernel<float>>(
      probs, device, stream, top_p, out);
}

int top_k_top_p_renorm(const Rows& probs, const Limit& top_k, const PerRow& top_p, float* out, int device,
                       void* stream) {
  return launch_typed<TopKTopPMemory, top_k_top_p_renorm_kernel<BFloat16>, top_k_top_p_renorm_kernel<Half>,
                      top_k_top_p_renorm_kernel<float>>(probs, device, stream, top_k, top_p, out);
}

int min_p_renorm(const Rows& probs, const PerRow& min_p, float* out, int device, void* stream) {
  return launch_typed<MinPMemory, min_p_renorm_kernel<BFloat16>, min_p_renorm_kernel<Half>, min_p_renorm_kernel<float>>(
      probs, device, stream, min_p, out);
}

int softmax_temperature(const Rows& logits, const PerRow& temperature, float* out, int device, void* stream) {
  return launch_typed<SoftmaxMemory, softmax_temperature_kernel<BFloat16>, softmax_temperature_kernel<Half>,
                      softmax_temperature_kernel<float>>(logits, device, stream, temperature, out);
}

}  // namespace fusedcomm::gpu::sampling
