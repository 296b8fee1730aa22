// The operators of sampling and of speculative verification on GPUs.
#include "bind/gpu_stream.h"
#include "bind/sampling.h"
#include "gpu/communicator.h"
#include "gpu/sampling.h"

namespace fusedcomm {

namespace {

struct GpuSampling {
  static int32_t type() { return aoti_torch_device_type_cuda(); }

  static void top_k_renorm(int32_t device, const sampling::Rows& probs, const sampling::Limit& top_k, float* out) {
    launch(device, gpu::sampling::top_k_renorm, probs, top_k, out);
  }
  static void top_p_renorm(int32_t device, const sampling::Rows& probs, const sampling::PerRow& top_p, float* out) {
    launch(device, gpu::sampling::top_p_renorm, probs, top_p, out);
  }
  static void top_k_top_p_renorm(int32_t device, const sampling::Rows& probs, const sampling::Limit& top_k,
                                 const sampling::PerRow& top_p, float* out) {
    launch(device, gpu::sampling::top_k_top_p_renorm, probs, top_k, top_p, out);
  }
  static void min_p_renorm(int32_t device, const sampling::Rows& probs, const sampling::PerRow& min_p, float* out) {
    launch(device, gpu::sampling::min_p_renorm, probs, min_p, out);
  }
  static void softmax_temperature(int32_t device, const sampling::Rows& logits, const sampling::PerRow& temperature,
                                  float* out) {
    launch(device, gpu::sampling::softmax_temperature, logits, temperature, out);
  }
  static void sample(int32_t device, const sampling::Rows& probs, const float* uniforms, int32_t* out) {
    launch(device, gpu::sampling::sample, probs, uniforms, out);
  }
  static void sample_top_k_top_p(int32_t device, const sampling::Rows& probs, const sampling::Limit& top_k,
                                 const sampling::PerRow& top_p, const float* uniforms, bool joint, int32_t* out) {
    launch(device, gpu::sampling::sample_top_k_top_p, probs, top_k, top_p, uniforms, joint, out);
  }

  static void chain_speculative_sampling(int32_t device, const sampling::ChainArguments& arguments) {
    launch(device, gpu::sampling::chain_speculative_sampling, arguments);
  }
  static void dflash_chain_verify(int32_t device, const sampling::BlockArguments& arguments) {
    launch(device, gpu::sampling::dflash_chain_verify, arguments);
  }
  static void greedy_chain_verify(int32_t device, const sampling::GreedyArguments& arguments) {
    launch(device, gpu::sampling::greedy_chain_verify, arguments);
  }
  static void tree_speculative_sampling(int32_t device, const sampling::TreeArguments& arguments) {
    launch(device, gpu::sampling::tree_speculative_sampling, arguments);
  }

 private:
  template <class Function, class... Arguments>
  static void launch(int32_t device, const Function& function, const Arguments&... arguments) {
    const gpu::DeviceGuard guard(device);
    const int status = function(arguments..., device, current_stream(device));
    STD_TORCH_CHECK(status == 0, "launching a sampling kernel failed with the GPU's error ", status);
  }
};

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CUDA, m) { implement_sampling<GpuSampling>(m); }

}  // namespace
}  // namespace fusedcomm

// For measurements: blocks that share a row, and their threads, on a device from now on; 0: by the rule.
extern "C" __attribute__((visibility("default"))) void fusedcomm_gpu_set_sampling_team(int32_t device, int32_t blocks,
                                                                                       int32_t threads) {
  const fusedcomm::gpu::DeviceGuard guard(device);
  fusedcomm::gpu::sampling::set_team(device, blocks, threads);
}
