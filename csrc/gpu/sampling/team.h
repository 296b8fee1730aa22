// What the lanes of a warp, and the blocks that share a row, tell each other.
#pragma once

#include "gpu/sampling/cluster.h"

namespace fusedcomm::gpu::sampling {

constexpr int kThreads = 512;  // of a block, at most; without clusters it has twice as many
constexpr int kMaxThreads = kHasClusters ? kThreads : 2 * kThreads;
constexpr int kMaxWarps = 2 * kThreads / kWarpSize;  // for the host, too, which does not know for what it allocates

__device__ inline int lane() { return int(threadIdx.x) % kWarpSize; }
__device__ inline int warp() { return int(threadIdx.x) / kWarpSize; }
__device__ inline int num_warps() { return int(blockDim.x) / kWarpSize; }

// ---- of a warp ----

template <class V>
__device__ inline V sum_of_warp(V v) {
  if constexpr (kReducesLanes && sizeof(V) > sizeof(uint32_t)) {
    constexpr int kBits = 26;  // of which the sum has 32 at most
    constexpr uint32_t kMask = (1u << kBits) - 1;
    const uint64_t low = sum_of_lanes(uint32_t(v) & kMask), middle = sum_of_lanes(uint32_t(v >> kBits) & kMask);
    return low + (middle << kBits) + (uint64_t(sum_of_lanes(uint32_t(v >> 2 * kBits))) << 2 * kBits);
  } else {
    return sum_of_lanes(v);
  }
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

// ---- of a team ----

// A value of each slot from every block of the team. A block leaves only when it has all that it is sent.
template <class Team, class V, int kSlots>
class Inbox {
 public:
  // By one thread, before the team meets.
  __device__ void open(const Team& team) {
    signal_.init();
    expect(team);
  }

  // By a warp; v is the same in all of its lanes.
  __device__ void send(const Team& team, int slot, V v) {
    if (lane() < team.size()) team.send(&slots_[team.rank()][slot], v, &signal_, lane());
  }
  // By a warp, each lane to the slot of its own.
  __device__ void send_lanes(const Team& team, V v) {
    static_assert(kSlots == kWarpSize, "a slot a lane");
#pragma unroll
    for (int block = 0; block < Team::kMostBlocks; ++block) {
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
  V slots_[Team::kMostBlocks][kSlots];
  Signal signal_;
};

}  // namespace fusedcomm::gpu::sampling
