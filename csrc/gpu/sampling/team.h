// What the lanes of a warp, and the blocks that share a row, tell each other.
#pragma once

#include "gpu/sampling/cluster.h"

namespace fusedcomm::gpu::sampling {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

__device__ inline int lane() { return int(threadIdx.x) % kWarpSize; }
__device__ inline int warp() { return int(threadIdx.x) / kWarpSize; }
__device__ inline int num_warps() { return int(blockDim.x) / kWarpSize; }

// ---- of a warp ----

template <class V>
__device__ inline V sum_of_warp(V v) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}

// Of this lane and all before it.
template <class V>
__device__ inline V sum_up_to_lane(V v) {
#pragma unroll
  for (int by = 1; by < kWarpSize; by *= 2) {
    const V before = shuffle_up(v, by);
    if (lane() >= by) v += before;
  }
  return v;
}

template <class V>
__device__ inline V max_of_warp(V v) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    const V other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

// ---- of a team ----

// A value of each slot from every block of the team. A block leaves only when it has all that it is sent.
template <class V, int kSlots>
class Inbox {
 public:
  // By one thread, before the team meets.
  __device__ void open(const Team& team) {
    signal_.init();
    expect(team);
  }

  // By a warp, for this block alone.
  __device__ void keep(const Team& team, int slot, V v) {
    if (lane() == 0) slots_[team.rank()][slot] = v;
  }
  // By a warp; v is the same in all of its lanes.
  __device__ void send(const Team& team, int slot, V v) {
    if (lane() < team.size()) team.send(&slots_[team.rank()][slot], v, &signal_, lane());
  }
  // By a warp, each lane to the slot of its own.
  __device__ void send_lanes(const Team& team, V v) {
    static_assert(kSlots == kWarpSize, "a slot a lane");
#pragma unroll
    for (int block = 0; block < kMaxTeam; ++block) {
      if (block < team.size()) team.send(&slots_[team.rank()][lane()], v, &signal_, block);
    }
  }

  __device__ void wait(const Team& team, uint32_t phase) const {
    if (!team.is_alone()) signal_.wait(phase);
  }
  // By one thread after wait(), before this block sends anything that lets others go on to the next phase.
  __device__ void expect(const Team& team) {
    if (!team.is_alone()) signal_.expect(team.size() * kSlots * int(sizeof(V)));
  }

  __device__ V from(int block, int slot) const { return slots_[block][slot]; }

 private:
  V slots_[kMaxTeam][kSlots];
  Signal signal_;
};

}  // namespace fusedcomm::gpu::sampling
