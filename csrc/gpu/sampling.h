// Filters of probabilities, the choice of tokens, and speculative verification on GPUs, as the host launches them.
// Pointers are to memory of the device, which is the current one. The status is the runtime's; 0 is success.
#pragma once

#include "fusedcomm/sampling.h"

namespace fusedcomm::gpu::sampling {

using fusedcomm::sampling::BlockArguments;
using fusedcomm::sampling::ChainArguments;
using fusedcomm::sampling::GreedyArguments;
using fusedcomm::sampling::Integers;
using fusedcomm::sampling::Limit;
using fusedcomm::sampling::PerRow;
using fusedcomm::sampling::Rows;
using fusedcomm::sampling::TreeArguments;

// out: fp32 [count, vocab].
int top_k_renorm(const Rows& probs, const Limit& top_k, float* out, int device, void* stream);
int top_p_renorm(const Rows& probs, const PerRow& top_p, float* out, int device, void* stream);
int top_k_top_p_renorm(const Rows& probs, const Limit& top_k, const PerRow& top_p, float* out, int device,
                       void* stream);
int min_p_renorm(const Rows& probs, const PerRow& min_p, float* out, int device, void* stream);
int softmax_temperature(const Rows& logits, const PerRow& temperature, float* out, int device, void* stream);

// uniforms, out: [count].
int sample(const Rows& probs, const float* uniforms, int32_t* out, int device, void* stream);
int sample_top_k_top_p(const Rows& probs, const Limit& top_k, const PerRow& top_p, const float* uniforms, bool joint,
                       int32_t* out, int device, void* stream);

int chain_speculative_sampling(const ChainArguments& arguments, int device, void* stream);
int dflash_chain_verify(const BlockArguments& arguments, int device, void* stream);
int greedy_chain_verify(const GreedyArguments& arguments, int device, void* stream);
int tree_speculative_sampling(const TreeArguments& arguments, int device, void* stream);

// For measurements: blocks that share a row, and their threads, on a device from now on; 0: by the rule. An even number
// of warps for slices of more than 16,384 elements; so few blocks that they could not keep a row, more than 16, and
// more than 512 threads are not taken.
void set_team(int device, int blocks, int threads);

}  // namespace fusedcomm::gpu::sampling
