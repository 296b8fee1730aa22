// The token after the last draft that was accepted, as fusedcomm/ops/speculative/residual.py defines it.
#pragma once

#include "gpu/sampling/draw.h"

namespace fusedcomm::gpu::sampling {

__device__ inline bool is_inside(int64_t index, int64_t size) { return index >= 0 && index < size; }

// What the target has over the draft: Probability::of(target - draft).
class Difference {
 public:
  using Meaning = Probability;

  // draft may be null.
  __device__ Difference(const float* target, const float* draft) : target_(target), draft_(draft) {}

  __device__ bool leaves_out() const { return draft_ != nullptr; }
  __device__ void take_all() { draft_ = nullptr; }

  __device__ bool has_quads() const {
    return sampling::has_quads(target_) && (draft_ == nullptr || sampling::has_quads(draft_));
  }
  __device__ float one(int i) const { return Probability::of(draft_ != nullptr ? target_[i] - draft_[i] : target_[i]); }
  __device__ void quad(int i, float (&x)[kQuad]) const {
    load_quad(target_ + i, x);
    if (draft_ != nullptr) {
      float draft[kQuad];
      load_quad(draft_ + i, draft);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) x[e] -= draft[e];
    }
#pragma unroll
    for (int e = 0; e < kQuad; ++e) x[e] = Probability::of(x[e]);
  }

 private:
  const float* target_;
  const float* draft_;
};

// The target without one token.
class Without {
 public:
  using Meaning = Probability;

  // Any token; one outside of the row leaves all in.
  __device__ Without(const float* target, int64_t token, int vocab)
      : target_(target), token_(is_inside(token, vocab) ? int(token) : -1) {}

  __device__ bool leaves_out() const { return token_ >= 0; }
  __device__ void take_all() { token_ = -1; }

  __device__ bool has_quads() const { return sampling::has_quads(target_); }
  __device__ float one(int i) const { return i == token_ ? 0.0f : Probability::of(target_[i]); }
  __device__ void quad(int i, float (&x)[kQuad]) const {
    load_quad(target_ + i, x);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      const float p = Probability::of(x[e]);
      x[e] = i + e == token_ ? 0.0f : p;
    }
  }

 private:
  const float* target_;
  int token_;
};

template <class Team>
struct alignas(16) ResidualMemory {
  DrawMemory<Team> residual, target;

  __device__ void open(const Team& team) { residual.open(team), target.open(team); }
};

// A token of what the reader leaves, or of all of the target where that is nothing. One thread of the team calls
// emit(token).
template <class Team, class Reader, class Emit>
__device__ inline void draw_residual(const Team& team, ResidualMemory<Team>& memory, Slice<Reader>& slice, float u,
                                     const Emit& emit) {
  load_and_weigh(memory.residual, slice);
  team.meet();
  share(team, memory.residual.largest, memory.residual.as_they_are);
  float largest = memory.residual.largest.of(team);
  if (largest > 0.0f || !slice.reader().leaves_out()) {
    return draw_in_unit(team, memory.residual, slice, largest, u, emit);
  }
  (void)memory.residual.as_they_are.of(team);  // no block leaves before it has what it is sent
  slice.reader().take_all();
  load_and_weigh(memory.target, slice);
  share(team, memory.target.largest, memory.target.as_they_are);
  largest = memory.target.largest.of(team);
  draw_in_unit(team, memory.target, slice, largest, u, emit);
}

}  // namespace fusedcomm::gpu::sampling
