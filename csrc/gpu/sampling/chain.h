// Verification of chains of drafts. Every block of a team finds out by itself how many are accepted.
#pragma once

#include "gpu/sampling/residual.h"

namespace fusedcomm::gpu::sampling {

// What a row of probabilities [vocab] gives an id; 0 where it is NaN, negative, or the id is none.
__device__ inline float probability_of(const float* row, int64_t id, int vocab) {
  if (!is_inside(id, vocab)) return 0.0f;
  const float p = row[id];
  return p > 0.0f ? p : 0.0f;
}

// How many of n hold before the first that does not; by a warp, and the same in all its lanes.
template <class Holds>
__device__ inline int count_leading(int n, const Holds& holds) {
  for (int first = 0; first < n; first += kWarpSize) {
    const int i = first + lane();
    const uint64_t refused = ballot(i < n && !holds(i));
    if (refused != 0) return first + first_lane(refused);
  }
  return n;
}

// The drafts that are accepted, a place for the token after them, then -1; by a block.
template <class Out, class Draft>
__device__ inline void commit(Out* out, int num_drafts, int accepted, const Draft& draft) {
  for (int i = int(threadIdx.x); i <= num_drafts; i += int(blockDim.x)) {
    if (i != accepted) out[i] = i < accepted ? Out(draft(i)) : Out(-1);
  }
}

struct VerifyChain {
  static constexpr int kBlocksOfSm = 2;
  using Arguments = ChainArguments;
  template <class Team>
  using Memory = ResidualMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t chain = team.row(), n = a.num_drafts;
    const float* const target = a.target_probs + chain * (n + 1) * a.vocab;
    const float* const draft = a.draft_probs + chain * n * a.vocab;
    const auto id = [&](int i) { return at(a.draft_ids, chain * n + i); };
    const int accepted = count_leading(int(n), [&](int i) {
      const float p = probability_of(target + int64_t(i) * a.vocab, id(i), a.vocab);
      const float q = probability_of(draft + int64_t(i) * a.vocab, id(i), a.vocab);
      return a.uniforms[chain * n + i] * q < p;
    });
    int32_t* const output = a.output_ids + chain * (n + 1);
    if (team.rank() == 0) {
      commit(output, int(n), accepted, id);
      if (threadIdx.x == 0) a.accepted[chain] = accepted;
    }
    const int64_t refused = int64_t(accepted) * a.vocab;
    Slice slice(team, Difference(target + refused, accepted < n ? draft + refused : nullptr), a.vocab,
                room_for_slice(memory));
    draw_residual(team, memory, slice, a.final_uniforms[chain], [&](int token) { output[accepted] = token; });
  }
};

struct VerifyBlock {
  static constexpr int kBlocksOfSm = 2;
  using Arguments = BlockArguments;
  template <class Team>
  using Memory = ResidualMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t first = team.row() * a.size;
    const float* const target = a.target_probs + first * a.vocab;
    const int64_t* const drafts = a.candidates + first + 1;
    const int num_drafts = a.size - 1;
    const int accepted = count_leading(num_drafts, [&](int i) {
      const float p = probability_of(target + int64_t(i) * a.vocab, drafts[i], a.vocab);
      return p > 0.0f && (a.uniforms[first + i] < divide(p, a.threshold_acc) || p >= a.threshold_single);
    });
    if (team.rank() == 0) {
      commit(a.out.tokens + first, num_drafts, accepted, [&](int i) { return drafts[i]; });
      if (threadIdx.x == 0) a.out.accept_len[team.row()] = accepted;
    }
    Slice slice(team,
                Without(target + int64_t(accepted) * a.vocab, accepted < num_drafts ? drafts[accepted] : -1, a.vocab),
                a.vocab, room_for_slice(memory));
    draw_residual(team, memory, slice, a.final_uniforms[team.row()], [&](int token) {
      a.out.bonus[team.row()] = token;
      a.out.tokens[first + accepted] = token;
    });
  }
};

constexpr int kGreedyThreads = 128;

// A chain a block. Ids are compared as they are, whatever they are.
__device__ inline void verify_greedily(const GreedyArguments& a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t first = int64_t(blockIdx.x) * a.size;
  const int num_drafts = a.size - 1;
  const auto draft = [&](int i) { return at(a.candidates, first + 1 + i); };
  const int accepted = count_leading(num_drafts, [&](int i) { return draft(i) == at(a.target_predict, first + i); });
  commit(a.out.tokens + first, num_drafts, accepted, draft);
  if (threadIdx.x != 0) return;
  const int64_t bonus = at(a.target_predict, first + accepted);
  a.out.accept_len[blockIdx.x] = accepted;
  a.out.bonus[blockIdx.x] = bonus;
  a.out.tokens[first + accepted] = bonus;
}

}  // namespace fusedcomm::gpu::sampling
