// The sum of a row as one fixed balanced tree over neighbours, s[i] = s[2i] + s[2i+1], padded with +0: the tree of
// tree_sum.h, so every kernel of every device gets the same bits. Packs of 8 elements are summed in registers, packs by
// a butterfly over lanes, lanes' sums by a tree over warps.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu {

constexpr int kPack = 8;  // elements a thread holds of a row at a time
constexpr int kMaxPartials = 64;

// Of a number of values that is a power of two.
template <int kCount>
__device__ inline float tree_sum(const float* s) {
  if constexpr (kCount == 1) {
    return s[0];
  } else {
    return tree_sum<kCount / 2>(s) + tree_sum<kCount / 2>(s + kCount / 2);
  }
}

__device__ inline float sum_of_squares(const float (&v)[kPack]) {
  float s[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) s[i] = v[i] * v[i];
  return tree_sum<kPack>(s);
}

__device__ inline float butterfly_sum(float s) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) s += shuffle_xor(s, mask);
  return s;
}

// The tree over the `count` partial sums of a block's warps; every lane gets the result.
__device__ inline float sum_partials(const float* sums, int count) {
  const int lane = int(threadIdx.x) % kWarpSize;
  if (kWarpSize < kMaxPartials && count > kWarpSize) {
    const float a = 2 * lane < count ? sums[2 * lane] : 0.0f;
    const float b = 2 * lane + 1 < count ? sums[2 * lane + 1] : 0.0f;
    return butterfly_sum(a + b);
  }
  return butterfly_sum(lane < count ? sums[lane] : 0.0f);
}

// How the threads that share a row sum over it: those of a block, or of a cluster of blocks (cluster.h). A kernel makes
// one first of all. Then, for each row: send() of the sums of a thread's packs, where pack j * threads() + thread() of
// the row has sum j, and receive() of the total. All threads call both; what a thread did before send() is done before
// receive() returns in another.
template <bool kCluster>
class RowSum;

// A row is a block's. With several packs a thread, the block has a power of two of threads.
template <>
class RowSum<false> {
 public:
  // Two sets: a block that walks rows may write those of the next row while a slow warp still reads.
  struct Shared {
    float sums[2][kMaxPartials];
  };

  __device__ explicit RowSum(Shared& shared) : shared_(shared) {}

  // Of those that have a row each at a time: the number of this one, and how many there are.
  __device__ static int worker() { return int(blockIdx.x); }
  __device__ static int workers() { return int(gridDim.x); }
  __device__ static int blocks() { return 1; }
  __device__ static int thread() { return int(threadIdx.x); }
  __device__ static int threads() { return int(blockDim.x); }

  // Before the first send(): whoever it sends to has started.
  __device__ void meet() {}

  template <int kPacks>
  __device__ void send(const float (&s)[kPacks]) {
    const int warp = int(threadIdx.x) / kWarpSize, warps = int(blockDim.x) / kWarpSize;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const float sum = butterfly_sum(s[j]);
      if (int(threadIdx.x) % kWarpSize == 0) shared_.sums[parity_][j * warps + warp] = sum;
    }
    count_ = kPacks * warps;
  }

  __device__ float receive() {
    __syncthreads();
    const float total = sum_partials(shared_.sums[parity_], count_);
    parity_ ^= 1;
    return total;
  }

 private:
  Shared& shared_;
  int parity_ = 0;
  int count_ = 0;
};

}  // namespace fusedcomm::gpu
