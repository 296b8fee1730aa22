// The sum of a row as one fixed balanced tree over neighbours, s[i] = s[2i] + s[2i+1], padded with +0: the tree of
// tree_sum.h, so every kernel of every device gets the same bits. Packs of 8 elements are summed in registers, packs by
// a butterfly over lanes, lanes' sums by a butterfly over warps.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu {

constexpr int kPack = 8;  // elements a thread holds of a row at a time
constexpr int kMaxPartials = 64;
constexpr uint32_t kFreeSum = 0xffffffffu;  // NaNs, one of which no sum is
constexpr uint32_t kOtherNanSum = 0x7fffffffu;

__device__ inline float sum_of_squares(const float (&v)[kPack]) {
  float s[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) s[i] = v[i] * v[i];
#pragma unroll
  for (int n = kPack / 2; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = s[2 * i] + s[2 * i + 1];
  }
  return s[0];
}

template <int kWidth = kWarpSize>
__device__ inline float butterfly_sum(float s) {
#pragma unroll
  for (int mask = 1; mask < kWidth; mask *= 2) s += shuffle_xor(s, mask);
  return s;
}

// Where the warps of a block (or of a cluster of blocks) leave their sums. Two sets: a block that walks rows may write
// those of the next row while a slow warp still reads.
struct Partials {
  float sums[2][kMaxPartials];
};

// The tree over `count` partial sums; every lane gets the result.
__device__ inline float sum_partials(const float* sums, int count) {
  const int lane = int(threadIdx.x) % kWarpSize;
  if (kWarpSize < kMaxPartials && count > kWarpSize) {
    const float a = 2 * lane < count ? sums[2 * lane] : 0.0f;
    const float b = 2 * lane + 1 < count ? sums[2 * lane + 1] : 0.0f;
    return butterfly_sum(a + b);
  }
  return butterfly_sum(lane < count ? sums[lane] : 0.0f);
}

// The sum over a row whose pack p = j * blockDim.x + threadIdx.x has the sum s[j]. With kPacks > 1 the block has a
// power of two of threads. All threads call it; `parity` alternates from row to row.
template <int kPacks>
__device__ inline float block_row_sum(const float (&s)[kPacks], Partials& partials, int parity) {
  const int warp = int(threadIdx.x) / kWarpSize, warps = int(blockDim.x) / kWarpSize;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const float sum = butterfly_sum(s[j]);
    if (int(threadIdx.x) % kWarpSize == 0) partials.sums[parity][j * warps + warp] = sum;
  }
  __syncthreads();
  return sum_partials(partials.sums[parity], kPacks * warps);
}

// The same over a cluster of blocks, a row each: pack p = rank of the block * blockDim.x + threadIdx.x. Warps write
// their sums into the shared memory of every block of the cluster, so one barrier is enough.
__device__ inline float cluster_row_sum(float s, Partials& partials, int parity) {
  const int warps = int(blockDim.x) / kWarpSize, blocks = blocks_in_cluster();
  const int index = rank_in_cluster() * warps + int(threadIdx.x) / kWarpSize;
  const int lane = int(threadIdx.x) % kWarpSize;
  const float sum = butterfly_sum(s);
  if (lane < blocks) *in_block_of_cluster(&partials.sums[parity][index], lane) = sum;
  cluster_barrier();
  return sum_partials(partials.sums[parity], blocks * warps);
}

// The same, once in a kernel, and without a barrier on the way: the sums are their own flags. prepare_flagged_sums()
// comes first, before anything that takes time. No block leaves before it has received from every other, so none
// writes to one that has left.
__device__ inline void prepare_flagged_sums(Partials& partials) {
  for (int i = int(threadIdx.x); i < kMaxPartials; i += int(blockDim.x)) {
    partials.sums[0][i] = __uint_as_float(kFreeSum);
  }
  cluster_barrier();
}

__device__ inline float flagged_cluster_row_sum(float s, Partials& partials) {
  const int warps = int(blockDim.x) / kWarpSize, blocks = blocks_in_cluster(), count = blocks * warps;
  const int index = rank_in_cluster() * warps + int(threadIdx.x) / kWarpSize;
  const int lane = int(threadIdx.x) % kWarpSize;
  float sum = butterfly_sum(s);
  if (__float_as_uint(sum) == kFreeSum) sum = __uint_as_float(kOtherNanSum);
  if (lane < blocks) store_in_cluster(in_block_of_cluster(&partials.sums[0][index], lane), sum);
  for (int i = lane; i < count; i += kWarpSize) {
    while (__float_as_uint(load_in_cluster(&partials.sums[0][i])) == kFreeSum) {
    }
  }
  sync_warp();
  return sum_partials(partials.sums[0], count);
}

}  // namespace fusedcomm::gpu
