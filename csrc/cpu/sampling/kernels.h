// Filters of probabilities, the choice of tokens and speculative verification on CPUs, one table of them an instruction
// set. Each works on rows (or chains, or trees) begin … end of a call, in the scratch memory of its thread.
#pragma once

#include <cstdint>

#include "fusedcomm/sampling.h"

namespace fusedcomm::cpu::sampling {

using fusedcomm::sampling::BlockArguments;
using fusedcomm::sampling::ChainArguments;
using fusedcomm::sampling::GreedyArguments;
using fusedcomm::sampling::Integers;
using fusedcomm::sampling::kMaxVocab;
using fusedcomm::sampling::Limit;
using fusedcomm::sampling::PerRow;
using fusedcomm::sampling::Rows;
using fusedcomm::sampling::TreeArguments;

constexpr int kNumRowTypes = 3;
constexpr int kRunVectors = 64;  // of a run: what is summed and looked up at once
constexpr int kMinLanes = 4, kMaxLanes = 16;
constexpr int kNumBins = 1 << 12;

// What a thread needs for a row of any length; what has not been touched takes no memory.
struct Scratch {
  // the largest value of each lane of each run
  float groups[kMaxVocab / kRunVectors + kMaxLanes];
  // the mass of each run
  uint64_t masses[kMaxVocab / (kRunVectors * kMinLanes)];
  uint64_t bins[kNumBins];
  // values of the row that matter, and those of them that still do; stores of whole vectors may go past the last one
  float candidates[kMaxVocab + kMaxLanes];
  float remaining[kMaxVocab + kMaxLanes];
};

// Of rows of one type. out: fp32 [count, vocab]; tokens: int32 [count].
struct RowKernels {
  void (*top_k_renorm)(const Rows&, const Limit& top_k, float* out, int64_t begin, int64_t end, Scratch&);
  void (*top_p_renorm)(const Rows&, const PerRow& top_p, float* out, int64_t begin, int64_t end, Scratch&);
  void (*top_k_top_p_renorm)(const Rows&, const Limit& top_k, const PerRow& top_p, float* out, int64_t begin,
                             int64_t end, Scratch&);
  void (*min_p_renorm)(const Rows&, const PerRow& min_p, float* out, int64_t begin, int64_t end, Scratch&);
  void (*softmax_temperature)(const Rows&, const PerRow& temperature, float* out, int64_t begin, int64_t end, Scratch&);
  void (*sample)(const Rows&, const float* uniforms, int32_t* tokens, int64_t begin, int64_t end, Scratch&);
  void (*sample_top_k_top_p)(const Rows&, const Limit& top_k, const PerRow& top_p, const float* uniforms, bool joint,
                             int32_t* tokens, int64_t begin, int64_t end, Scratch&);
};

struct Kernels {
  const char* isa;
  RowKernels rows[kNumRowTypes];  // by DType
  void (*chain_speculative_sampling)(const ChainArguments&, int64_t begin, int64_t end, Scratch&);
  void (*dflash_chain_verify)(const BlockArguments&, int64_t begin, int64_t end, Scratch&);
  void (*greedy_chain_verify)(const GreedyArguments&, int64_t begin, int64_t end);
  // predicts is -1 everywhere before
  void (*tree_speculative_sampling)(const TreeArguments&, int64_t begin, int64_t end, Scratch&);
};

// The fastest table this machine runs; `isa` (nullptr: automatic) asks for one by name, nullptr comes back without it.
const Kernels* find_kernels(const char* isa = nullptr);

}  // namespace fusedcomm::cpu::sampling
