// The few values of a row among which a threshold is, in every block of the team: what is left to do with them needs no
// other block.
#pragma once

#include "gpu/sampling/slice.h"
#include "gpu/sampling/tally.h"

namespace fusedcomm::gpu::sampling {

constexpr int kMostCandidates = 1024;
constexpr int kMostSorted = 128;

// In shared memory, cleared at the start. It is filled once, by all threads: collect(), exchange().
template <class Team>
class alignas(16) Candidates {
 public:
  __device__ void open(const Team& team) {
    counts_.open(team);
    arrivals_.init();
  }

  // Into the block's own list, of kMostCandidates.
  __device__ void collect(float* own, float v) { own[atomicAdd(&num_own_, 1)] = v; }

  // Every block's own list to all blocks, which have no more than kMostCandidates together. Afterwards the block's own
  // list is not needed any more; a barrier has to follow.
  __device__ void exchange(const Team& team, const float* own) {
    __syncthreads();
    const int num_own = num_own_;
    if (team.is_alone()) {
      for (int i = int(threadIdx.x); i < num_own; i += int(blockDim.x)) values_[i] = own[i];
      if (threadIdx.x == 0) size_ = num_own;
      return;
    }
    if (warp() == 0) counts_.send(team, 0, uint32_t(num_own));
    counts_.wait(team, 0);
    int before = 0, all = 0;
#pragma unroll
    for (int block = 0; block < Team::kMostBlocks; ++block) {
      if (block >= team.size()) continue;
      const int num = int(counts_.from(block, 0));
      all += num;
      if (block < team.rank()) before += num;
    }
    if (threadIdx.x == 0) {
      arrivals_.expect(all * int(sizeof(float)));
      size_ = all;
    }
    for (int i = int(threadIdx.x); i < num_own; i += int(blockDim.x)) {
      const uint32_t bits = __float_as_uint(own[i]);
#pragma unroll
      for (int block = 0; block < Team::kMostBlocks; ++block) {
        if (block < team.size()) team.send(reinterpret_cast<uint32_t*>(&values_[before + i]), bits, &arrivals_, block);
      }
    }
    arrivals_.wait(0);
  }

  // No more than kMostSorted, from the largest down: see sorted(). By all threads; a barrier has to follow.
  __device__ void sort() {
    constexpr int kThreadsEach = 4;
    const int num = size_, part = int(threadIdx.x) % kThreadsEach;
    for (int first = 0; first < num; first += int(blockDim.x) / kThreadsEach) {
      const int i = first + int(threadIdx.x) / kThreadsEach;
      const uint32_t own = i < num ? __float_as_uint(values_[i]) : 0;
      uint32_t place = 0;
      if (i < num) {
#pragma unroll 2
        for (int j = kQuad * part; j < num; j += kQuad * kThreadsEach) {  // zeros follow the last of them
          float other[kQuad];
          load_quad(values_ + j, other);
#pragma unroll
          for (int e = 0; e < kQuad; ++e) place += uint32_t(__float_as_uint(other[e]) + uint32_t(j + e < i) > own);
        }
      }
#pragma unroll
      for (int mask = 1; mask < kThreadsEach; mask *= 2) place += shuffle_xor(place, mask);
      if (i < num && part == 0) sorted_[place] = __uint_as_float(own);
    }
  }
  // 0 behind the last of them, up to kMostSorted.
  __device__ float sorted(int i) const { return sorted_[i]; }

  __device__ int size() const { return size_; }
  __device__ float operator[](int i) const { return values_[i]; }
  __device__ float& operator[](int i) { return values_[i]; }

 private:
  float values_[kMostCandidates], sorted_[kMostSorted];
  Inbox<Team, uint32_t, 1> counts_;
  Signal arrivals_;
  int num_own_, size_;
};

}  // namespace fusedcomm::gpu::sampling
