// The splits of a row become one result: their blocks are a cluster, and each sums a share of the columns over all.
#pragma once

#include "gpu/hopper/cluster.h"
#include "gpu/hopper/sparse_mla_block.h"

namespace fusedcomm::gpu {

// What a block leaves in its shared memory for the others of its cluster; a split without keys leaves nothing.
template <int kHeads>
struct Part {
  const float* values;    // [kHeads][512], as value_at says: sums over its keys, each weighted by 2^(score - largest)
  const float2* weights;  // [kHeads]: the largest score, and the sum of the weights
  const float* sinks;     // [kHeads]
};

// Where a head's columns [column, column + 8) are: threads with neighbouring heads have banks of their own.
__device__ inline int value_at(int head, int column) { return head * kValue + (column ^ head / 2 % 4 * 8); }

// By all threads of all blocks of the cluster; what each block leaves is there when its threads come here. The sums go
// over the first `splits` splits in their order, those with keys. Four columns are taken at a time, and all their loads
// are on their way at once.
template <int kHeads, int kThreads>
__device__ inline void merge(const SparseMlaArguments& a, int splits, const Place& place, const Part<kHeads>& part) {
  constexpr int kPieces = kValue / 4;
  const int pieces = min(kHeads, a.heads - place.first_head) * kPieces;
  const int begin = pieces * place.split / a.splits, end = pieces * (place.split + 1) / a.splits;
  const uint32_t values = h::shared_address(part.values), weights = h::shared_address(part.weights);
  h::meet_cluster();
  for (int i = begin + int(threadIdx.x); i < end; i += kThreads) {
    const int head = i / kPieces, column = i % kPieces * 4;
    const uint32_t value = values + uint32_t(value_at(head, column) * sizeof(float));
    const uint32_t weight = weights + uint32_t(head * sizeof(float2));
    float2 of[kMaxMergedSplits];
    float4 x[kMaxMergedSplits];
#pragma unroll
    for (int split = 0; split < kMaxMergedSplits; ++split) {
      of[split] = {-INFINITY, 0.0f};
      x[split] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (split >= splits) continue;
      of[split] = h::load_pair_of_cluster(h::address_in_block(weight, split));
      x[split] = h::load_four_of_cluster(h::address_in_block(value, split));
    }
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (const float2& one : of) largest = fmaxf(largest, one.x);
    const float base = largest == -INFINITY ? 0.0f : largest;
    float4 all = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int split = 0; split < kMaxMergedSplits; ++split) {
      const float factor = exp2_of(of[split].x - base);
      sum = fmaf(factor, of[split].y, sum);
      all.x = fmaf(factor, x[split].x, all.x), all.y = fmaf(factor, x[split].y, all.y);
      all.z = fmaf(factor, x[split].z, all.z), all.w = fmaf(factor, x[split].w, all.w);
    }
    const float inverse = inverse_of(largest, sum, part.sinks[head]);
    const int64_t at = (int64_t(place.row) * a.heads + place.first_head) * kPieces + i;
    static_cast<uint2*>(a.out)[at] = {pack_pair(all.x * inverse, all.y * inverse),
                                      pack_pair(all.z * inverse, all.w * inverse)};
  }
  h::leave_cluster();  // a block that is gone has no memory
}

}  // namespace fusedcomm::gpu
