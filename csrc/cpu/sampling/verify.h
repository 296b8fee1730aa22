// Verification of drafts in chains and trees.
#pragma once

#include "cpu/sampling/draw.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

inline bool is_inside(int64_t index, int64_t size) { return index >= 0 && index < size; }

// What a row of probabilities [vocab] gives an id; 0 where it is NaN, negative, or the id is none.
inline float probability_of(const float* row, int64_t id, int64_t vocab) {
  if (!is_inside(id, vocab)) return 0.0f;
  const float p = row[id];
  return p > 0.0f ? p : 0.0f;
}

// ---- the token after the last draft that was accepted: fusedcomm/ops/speculative/residual.py ----

// What the target has over the draft, which may be null.
class Difference {
 public:
  using Value = Probability;

  Difference(const float* target, const float* draft) : target_(target), draft_(draft) {}

  bool leaves_out() const { return draft_ != nullptr; }
  FUSEDCOMM_INLINE F32 whole(int64_t i) const {
    const F32 x = load_bits<F32>(target_ + i);
    return Probability::of(draft_ != nullptr ? x - load_bits<F32>(draft_ + i) : x);
  }
  FUSEDCOMM_INLINE F32 part(int64_t i, int64_t count) const {
    const F32 x = load_partial(target_ + i, count);
    return Probability::of(draft_ != nullptr ? x - load_partial(draft_ + i, count) : x);
  }

 private:
  const float* target_;
  const float* draft_;
};

// The target without one token; one that is no id leaves all in.
class Without {
 public:
  using Value = Probability;

  Without(const float* target, int64_t token, int64_t vocab)
      : target_(target), token_(is_inside(token, vocab) ? token : -1) {}

  bool leaves_out() const { return token_ >= 0; }
  FUSEDCOMM_INLINE F32 whole(int64_t i) const { return clear(i, Probability::of(load_bits<F32>(target_ + i))); }
  FUSEDCOMM_INLINE F32 part(int64_t i, int64_t count) const {
    return clear(i, Probability::of(load_partial(target_ + i, count)));
  }

 private:
  FUSEDCOMM_INLINE F32 clear(int64_t i, F32 x) const {
    if (token_ >= i && token_ - i < kLanes) x[token_ - i] = 0.0f;
    return x;
  }

  const float* target_;
  int64_t token_;
};

// Of what the reader leaves of the target, or of all of the target where that is nothing.
template <class R>
int32_t draw_residual(const R& left, const float* target, int64_t vocab, float u, Scratch& scratch) {
  Row<R> row = {left, vocab, scratch};
  const uint64_t total = survey<true>(row);
  if (row.largest > 0.0f || !left.leaves_out()) return draw_from(row, total, u);
  Row<Difference> all = {Difference(target, nullptr), vocab, scratch};
  const uint64_t total_of_all = survey<true>(all);
  return draw_from(all, total_of_all, u);
}

// ---- chains ----

// The drafts that are accepted, the token after them, then -1.
template <class Out, class Draft>
inline void commit(Out* out, int64_t num_drafts, int64_t accepted, int64_t token, const Draft& draft) {
  for (int64_t i = 0; i <= num_drafts; ++i)
    out[i] = i < accepted ? Out(draft(i)) : i == accepted ? Out(token) : Out(-1);
}

inline void chain_speculative_sampling(const ChainArguments& a, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t n = a.num_drafts, vocab = a.vocab;
  for (int64_t chain = begin; chain < end; ++chain) {
    const float* const target = a.target_probs + chain * (n + 1) * vocab;
    const float* const draft = a.draft_probs + chain * n * vocab;
    const auto id = [&](int64_t i) { return at(a.draft_ids, chain * n + i); };
    int64_t accepted = 0;
    for (; accepted < n; ++accepted) {
      const float p = probability_of(target + accepted * vocab, id(accepted), vocab);
      const float q = probability_of(draft + accepted * vocab, id(accepted), vocab);
      if (!(a.uniforms[chain * n + accepted] * q < p)) break;
    }
    const float* const row = target + accepted * vocab;
    const Difference left(row, accepted < n ? draft + accepted * vocab : nullptr);
    const int32_t token = draw_residual(left, row, vocab, a.final_uniforms[chain], scratch);
    a.accepted[chain] = int32_t(accepted);
    commit(a.output_ids + chain * (n + 1), n, accepted, token, id);
  }
}

inline void dflash_chain_verify(const BlockArguments& a, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t n = a.size - 1, vocab = a.vocab;
  for (int64_t chain = begin; chain < end; ++chain) {
    const int64_t first = chain * a.size;
    const float* const target = a.target_probs + first * vocab;
    const int64_t* const drafts = a.candidates + first + 1;
    int64_t accepted = 0;
    for (; accepted < n; ++accepted) {
      const float p = probability_of(target + accepted * vocab, drafts[accepted], vocab);
      const bool is_likely = a.uniforms[first + accepted] < p / a.threshold_acc || p >= a.threshold_single;
      if (!(p > 0.0f && is_likely)) break;
    }
    const float* const row = target + accepted * vocab;
    const Without left(row, accepted < n ? drafts[accepted] : -1, vocab);
    const int32_t token = draw_residual(left, row, vocab, a.final_uniforms[chain], scratch);
    a.out.accept_len[chain] = int32_t(accepted);
    a.out.bonus[chain] = token;
    commit(a.out.tokens + first, n, accepted, token, [&](int64_t i) { return drafts[i]; });
  }
}

// Ids are compared as they are, whatever they are.
inline void greedy_chain_verify(const GreedyArguments& a, int64_t begin, int64_t end) {
  const int64_t n = a.size - 1;
  for (int64_t chain = begin; chain < end; ++chain) {
    const int64_t first = chain * a.size;
    const auto draft = [&](int64_t i) { return at(a.candidates, first + 1 + i); };
    int64_t accepted = 0;
    while (accepted < n && draft(accepted) == at(a.target_predict, first + accepted)) ++accepted;
    const int64_t bonus = at(a.target_predict, first + accepted);
    a.out.accept_len[chain] = int32_t(accepted);
    a.out.bonus[chain] = bonus;
    commit(a.out.tokens + first, n, accepted, bonus, draft);
  }
}

// ---- trees ----

// A walk visits no more than the D - 1 nodes that a tree has below its root, so it ends whatever the links are.
inline void tree_speculative_sampling(const TreeArguments& a, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t vocab = a.vocab, limit = a.path_size - 1;
  for (int64_t tree = begin; tree < end; ++tree) {
    const int64_t first = tree * a.size;
    int32_t* const path = a.accept_index + tree * a.path_size;
    const auto position = [&](int64_t node) {
      const int64_t found = a.retrive_index[first + node];
      return is_inside(found, a.num_positions) ? found : int64_t(-1);
    };
    const auto predict = [&](int64_t node, int64_t token) {
      if (position(node) >= 0) a.predicts[position(node)] = int32_t(token);
    };
    int64_t current = 0, accepted = 0, node = a.retrive_next_token[first];
    float coin = a.uniforms[first], acc = 0.0f;
    path[0] = int32_t(position(0));
    for (int64_t visited = 1; visited < a.size && is_inside(node, a.size) && accepted < limit; ++visited) {
      const int64_t token = a.candidates[first + node];
      const float p = probability_of(a.target_probs + (first + current) * vocab, token, vocab);
      acc += p;
      if (p > 0.0f && (coin < acc / a.threshold_acc || p >= a.threshold_single)) {
        predict(current, token);
        path[++accepted] = int32_t(position(node));
        current = node;
        coin = a.uniforms[first + node];
        acc = 0.0f;
        node = a.retrive_next_token[first + node];
      } else {
        if (is_inside(token, vocab)) a.draft_probs[(first + current) * vocab + token] = p;
        node = a.retrive_next_sibling[first + node];
      }
    }
    for (int64_t i = accepted + 1; i <= limit; ++i) path[i] = -1;
    a.accept_token_num[tree] = int32_t(accepted);
    const float* const target = a.target_probs + (first + current) * vocab;
    const Difference left(target, accepted < limit ? a.draft_probs + (first + current) * vocab : nullptr);
    predict(current, draw_residual(left, target, vocab, a.final_uniforms[tree], scratch));
  }
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
