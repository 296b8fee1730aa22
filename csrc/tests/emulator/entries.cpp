// What a test calls: the launches of csrc/gpu/sampling.h on the emulated GPU.
#include "gpu/sampling.h"
#include "machine.h"

namespace s = fusedcomm::gpu::sampling;
using fusedcomm::emulator::Machine;

#define FUSEDCOMM_ENTRY extern "C" __attribute__((visibility("default")))

FUSEDCOMM_ENTRY void emulated_reset(uint64_t seed, int accesses_between_switches, int blocks, int threads) {
  Machine::the().reset(seed, accesses_between_switches);
  s::set_team(0, blocks, threads);
}
FUSEDCOMM_ENTRY void emulated_allow(const void* start, int64_t bytes, bool writes) {
  Machine::the().allow(start, bytes, writes);
}
FUSEDCOMM_ENTRY const char* emulated_errors() { return Machine::the().errors().c_str(); }

FUSEDCOMM_ENTRY int top_k_renorm(const s::Rows& probs, const s::Limit& top_k, float* out) {
  return s::top_k_renorm(probs, top_k, out, 0, nullptr);
}
FUSEDCOMM_ENTRY int top_p_renorm(const s::Rows& probs, const s::PerRow& top_p, float* out) {
  return s::top_p_renorm(probs, top_p, out, 0, nullptr);
}
FUSEDCOMM_ENTRY int top_k_top_p_renorm(const s::Rows& probs, const s::Limit& top_k, const s::PerRow& top_p,
                                       float* out) {
  return s::top_k_top_p_renorm(probs, top_k, top_p, out, 0, nullptr);
}
FUSEDCOMM_ENTRY int min_p_renorm(const s::Rows& probs, const s::PerRow& min_p, float* out) {
  return s::min_p_renorm(probs, min_p, out, 0, nullptr);
}
FUSEDCOMM_ENTRY int softmax_temperature(const s::Rows& logits, const s::PerRow& temperature, float* out) {
  return s::softmax_temperature(logits, temperature, out, 0, nullptr);
}

FUSEDCOMM_ENTRY int sample(const s::Rows& probs, const float* uniforms, int32_t* out) {
  return s::sample(probs, uniforms, out, 0, nullptr);
}
FUSEDCOMM_ENTRY int sample_top_k_top_p(const s::Rows& probs, const s::Limit& top_k, const s::PerRow& top_p,
                                       const float* uniforms, bool joint, int32_t* out) {
  return s::sample_top_k_top_p(probs, top_k, top_p, uniforms, joint, out, 0, nullptr);
}

FUSEDCOMM_ENTRY int chain_speculative_sampling(const s::ChainArguments& arguments) {
  return s::chain_speculative_sampling(arguments, 0, nullptr);
}
FUSEDCOMM_ENTRY int dflash_chain_verify(const s::BlockArguments& arguments) {
  return s::dflash_chain_verify(arguments, 0, nullptr);
}
FUSEDCOMM_ENTRY int greedy_chain_verify(const s::GreedyArguments& arguments) {
  return s::greedy_chain_verify(arguments, 0, nullptr);
}
FUSEDCOMM_ENTRY int tree_speculative_sampling(const s::TreeArguments& arguments) {
  return s::tree_speculative_sampling(arguments, 0, nullptr);
}
