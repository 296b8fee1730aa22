// The operators of sampling and of speculative verification on CPUs.
#include "bind/sampling.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "cpu/sampling/kernels.h"

namespace fusedcomm {

namespace {

using cpu::sampling::Kernels;
using cpu::sampling::RowKernels;
using cpu::sampling::Scratch;

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// Not initialised: what no row has touched takes no memory.
Scratch& scratch_of_thread() {
  static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
  return *scratch;
}

// Calls body(begin, end) for parts of `count` rows of so many elements, on the threads that torch has.
template <class Body>
void for_rows(int64_t count, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  if (count <= grain) {
    body(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, body);
  }
}

struct CpuSampling {
  static int32_t type() { return aoti_torch_device_type_cpu(); }

  static void top_k_renorm(int32_t, const sampling::Rows& probs, const sampling::Limit& top_k, float* out) {
    run(&RowKernels::top_k_renorm, probs, top_k, out);
  }
  static void top_p_renorm(int32_t, const sampling::Rows& probs, const sampling::PerRow& top_p, float* out) {
    run(&RowKernels::top_p_renorm, probs, top_p, out);
  }
  static void top_k_top_p_renorm(int32_t, const sampling::Rows& probs, const sampling::Limit& top_k,
                                 const sampling::PerRow& top_p, float* out) {
    run(&RowKernels::top_k_top_p_renorm, probs, top_k, top_p, out);
  }
  static void min_p_renorm(int32_t, const sampling::Rows& probs, const sampling::PerRow& min_p, float* out) {
    run(&RowKernels::min_p_renorm, probs, min_p, out);
  }
  static void softmax_temperature(int32_t, const sampling::Rows& logits, const sampling::PerRow& temperature,
                                  float* out) {
    run(&RowKernels::softmax_temperature, logits, temperature, out);
  }
  static void sample(int32_t, const sampling::Rows& probs, const float* uniforms, int32_t* out) {
    run(&RowKernels::sample, probs, uniforms, out);
  }
  static void sample_top_k_top_p(int32_t, const sampling::Rows& probs, const sampling::Limit& top_k,
                                 const sampling::PerRow& top_p, const float* uniforms, bool joint, int32_t* out) {
    run(&RowKernels::sample_top_k_top_p, probs, top_k, top_p, uniforms, joint, out);
  }

  static void chain_speculative_sampling(int32_t, const sampling::ChainArguments& a) {
    const auto verify = cpu::sampling::find_kernels()->chain_speculative_sampling;
    for_rows(a.batch, a.vocab, [&](int64_t begin, int64_t end) { verify(a, begin, end, scratch_of_thread()); });
  }
  static void dflash_chain_verify(int32_t, const sampling::BlockArguments& a) {
    const auto verify = cpu::sampling::find_kernels()->dflash_chain_verify;
    for_rows(a.batch, a.vocab, [&](int64_t begin, int64_t end) { verify(a, begin, end, scratch_of_thread()); });
  }
  static void greedy_chain_verify(int32_t, const sampling::GreedyArguments& a) {
    const auto verify = cpu::sampling::find_kernels()->greedy_chain_verify;
    for_rows(a.batch, a.size, [&](int64_t begin, int64_t end) { verify(a, begin, end); });
  }
  static void tree_speculative_sampling(int32_t, const sampling::TreeArguments& a) {
    const auto verify = cpu::sampling::find_kernels()->tree_speculative_sampling;
    std::fill_n(a.predicts, a.num_positions, -1);
    for_rows(a.batch, a.vocab, [&](int64_t begin, int64_t end) { verify(a, begin, end, scratch_of_thread()); });
  }

 private:
  template <class Kernel, class... Arguments>
  static void run(Kernel RowKernels::* kernel, const sampling::Rows& rows, const Arguments&... arguments) {
    const auto function = cpu::sampling::find_kernels()->rows[int(rows.dtype)].*kernel;
    for_rows(rows.count, rows.vocab,
             [&](int64_t begin, int64_t end) { function(rows, arguments..., begin, end, scratch_of_thread()); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CPU, m) { implement_sampling<CpuSampling>(m); }

}  // namespace
}  // namespace fusedcomm
