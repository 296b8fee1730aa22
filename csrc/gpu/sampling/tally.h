// The largest value of a row and sums of masses, over the threads that share it.
#pragma once

#include "gpu/sampling/fixed_point.h"
#include "gpu/sampling/team.h"

namespace fusedcomm::gpu::sampling {

// Sums in shared memory are two words: NVIDIA has no 64-bit addition there, only a compare-and-swap loop. Most masses
// fit the lower word, so the upper one is seldom touched. This is what goes there for a value whose lower word has been
// added to `before`.
__device__ inline uint32_t carry_of(uint32_t before, uint64_t value) {
  return uint32_t(value >> 32) + uint32_t(before + uint32_t(value) < before);
}

__device__ inline uint64_t join(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }

// What follows lies in shared memory, cleared at the start and opened by one thread before the team meets. It is used
// once, by all threads: note(), share(), then of(team).

// The largest of some keys, all of them above 0.
template <class Team>
class LargestKey {
 public:
  __device__ void open(const Team& team) { inbox_.open(team); }
  __device__ void note(uint32_t key) { atomicMax(&of_block_, key); }

  // After a barrier of the block.
  __device__ void send(const Team& team) {
    if (warp() == 0) inbox_.send(team, 0, of_block_);
  }
  __device__ uint32_t of(const Team& team) const {
    inbox_.wait(team, 0);
    uint32_t key = 0;
#pragma unroll
    for (int block = 0; block < Team::kMostBlocks; ++block) {
      if (block < team.size()) key = max(key, inbox_.from(block, 0));
    }
    return key;
  }

 private:
  Inbox<Team, uint32_t, 1> inbox_;
  uint32_t of_block_;
};

// The largest value of the row, whatever its sign.
template <class Team>
class Largest {
 public:
  __device__ void open(const Team& team) { key_.open(team); }
  __device__ void note(float of_thread) {
    const uint32_t bits = __float_as_uint(of_thread);
    const uint32_t key = largest_of_lanes(bits >> 31 != 0 ? ~bits : bits | 0x80000000u);  // in the order of the values
    if (lane() == 0) key_.note(key);
  }
  __device__ void send(const Team& team) { key_.send(team); }
  __device__ float of(const Team& team) const {
    const uint32_t key = key_.of(team);
    return __uint_as_float(key >> 31 != 0 ? key ^ 0x80000000u : ~key);
  }

 private:
  LargestKey<Team> key_;
};

// A sum over the row.
template <class Team>
class Total {
 public:
  __device__ void open(const Team& team) { inbox_.open(team); }
  __device__ void note(uint64_t of_thread) {
    const uint64_t sum = sum_of_warp(of_thread);
    if (lane() != 0) return;
    of_warps_[warp()] = sum;
    const uint32_t carried = carry_of(atomicAdd(&low_, uint32_t(sum)), sum);
    if (carried != 0) atomicAdd(&high_, carried);
  }
  __device__ void send(const Team& team) {
    if (warp() == 0) inbox_.send(team, 0, of_block());
  }

  struct Sums {
    uint64_t before = 0, all = 0;  // of the blocks in front of this one, and of all
  };

  __device__ Sums of(const Team& team) const {
    inbox_.wait(team, 0);
    Sums sums;
#pragma unroll
    for (int block = 0; block < Team::kMostBlocks; ++block) {
      if (block >= team.size()) continue;
      const uint64_t sum = inbox_.from(block, 0);
      sums.all += sum;
      if (block < team.rank()) sums.before += sum;
    }
    return sums;
  }

  // After share(), before or behind of(team).
  __device__ uint64_t of_block() const { return join(low_, high_); }
  __device__ uint64_t of_warp(int of) const { return of_warps_[of]; }

 private:
  Inbox<Team, uint64_t, 1> inbox_;
  uint64_t of_warps_[kMaxWarps];
  uint32_t low_, high_;
};

// By all threads, after the team has met and they have noted what is shared: what each block has goes to all.
template <class Team, class... Shared>
__device__ inline void share(const Team& team, Shared&... shared) {
  __syncthreads();
  (shared.send(team), ...);
  team.deliver();
}

// Zeros, 16 bytes a thread at a time.
template <class Memory>
__device__ inline void clear(Memory& memory) {
  static_assert(sizeof(Memory) % sizeof(Vec) == 0 && alignof(Memory) >= alignof(Vec), "whole vectors");
  for (uint32_t i = threadIdx.x; i < sizeof(Memory) / sizeof(Vec); i += blockDim.x) {
    reinterpret_cast<Vec*>(&memory)[i] = {};
  }
}

}  // namespace fusedcomm::gpu::sampling
