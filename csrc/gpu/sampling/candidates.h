// The few values of a row among which a threshold is, in every block of the team: what is left to do with them needs no
// other block.
#pragma once

#include "gpu/sampling/tally.h"

namespace fusedcomm::gpu::sampling {

constexpr int kMostCandidates = 1024;

// In shared memory, cleared at the start. It is used once, by all threads: collect(), exchange().
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
      __syncthreads();
      return;
    }
    if (warp() == 0) counts_.send(team, 0, uint32_t(num_own));
    counts_.wait(team, 0);
    int before = 0, all = 0;
#pragma unroll
    for (int block = 0; block < kMaxTeam; ++block) {
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
      for (int block = 0; block < kMaxTeam; ++block) {
        if (block < team.size()) team.send(reinterpret_cast<uint32_t*>(&values_[before + i]), bits, &arrivals_, block);
      }
    }
    arrivals_.wait(0);
  }

  __device__ int size() const { return size_; }
  __device__ float operator[](int i) const { return values_[i]; }
  __device__ float& operator[](int i) { return values_[i]; }

 private:
  float values_[kMostCandidates];
  Inbox<uint32_t, 1> counts_;
  Signal arrivals_;
  int num_own_, size_;
};

}  // namespace fusedcomm::gpu::sampling
