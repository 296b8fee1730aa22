// What the blocks of sparse MLA decode have in common: which results and keys are theirs, and their shared memory.
#pragma once

#include <cuda_bf16.h>

#include <cmath>

#include "gpu/hopper/sparse_mla_format.h"
#include "gpu/hopper/wgmma.h"
#include "gpu/sparse_mla.h"

namespace fusedcomm::gpu {

namespace h = hopper;

constexpr int kKeys = 64;  // of a tile
constexpr int kValue = 512;
constexpr int kValueStretches = kValue / h::kStretch;
constexpr int kTileStretchBytes = kKeys * h::kStretchBytes;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kMaxSharedBytes = 227 * 1024;  // of a block

// Whether the splits of a row become one result within the launch.
__device__ inline bool merges(const SparseMlaArguments& a) { return a.splits > 1 && a.partial == nullptr; }

// What a block computes: results of a row (a query token) for some heads, from one split of its keys.
struct Place {
  int row, split, first_head;

  // The index of a head's result, among those of all splits.
  __device__ int64_t of_head(const SparseMlaArguments& a, int head) const {
    return (int64_t(row) * a.splits + split) * a.heads + head;
  }
};

// Which keys of a row a block has: tiles [begin, end), those of the main cache first.
struct Range {
  int len[2];
  int64_t first[2];  // index into MlaKeys::indices
  int main_tiles;
  int begin, end;
  int splits;  // that have keys: the first ones

  __device__ int tiles() const { return end - begin; }
};

__device__ inline Range range_of(const SparseMlaArguments& a, int row, int split) {
  Range r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const MlaKeys& keys = a.keys[i];
    r.len[i] = 0;
    r.first[i] = 0;
    if (keys.num_slots == 0) continue;
    if (keys.lens != nullptr) {
      r.first[i] = int64_t(row) * keys.row_stride;
      r.len[i] = min(max(keys.lens[row], 0), keys.capacity);
    } else {
      const int64_t first = max(keys.indptr[row], 0);
      r.first[i] = first;
      r.len[i] = int(max(min(int64_t(keys.indptr[row + 1]), keys.row_stride) - first, int64_t(0)));
    }
  }
  r.main_tiles = (r.len[0] + kKeys - 1) / kKeys;
  const int tiles = r.main_tiles + (r.len[1] + kKeys - 1) / kKeys;
  const int share = (tiles + a.splits - 1) / a.splits;
  r.splits = share == 0 ? 0 : (tiles + share - 1) / share;
  r.begin = min(split * share, tiles);
  r.end = min(r.begin + share, tiles);
  return r;
}

// Where tiles of keys go round: the producer fills a buffer, all consumers empty it.
template <MlaLayout kLayout, int kCount>
struct Tiles {
  static constexpr int kBuffers = kCount;
  static constexpr int kStretches = Format<kLayout>::kDim / h::kStretch;
  alignas(1024) uint8_t k[kCount][kStretches * kTileStretchBytes];
  float bias[kCount][kKeys];  // 0, or -inf where there is no key
  h::Barrier full[kCount], empty[kCount];
  Range range;  // the producer has no registers left for it

  // By one thread, before all others.
  __device__ void init(const Range& which, int fillers, int readers) {
    range = which;
    for (int i = 0; i < kCount; ++i) {
      full[i].init(fillers);
      empty[i].init(readers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // Until a tile is there, for the matrix instructions too. The fence is here and not with the producer, where it
  // would wait for the loads of the next tiles.
  __device__ void wait_full(int buffer, uint32_t parity) {
    full[buffer].wait(parity);
    h::fence_stores();
  }
};

// A place in the circle of buffers.
template <int kCount>
struct Turn {
  int buffer = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++buffer == kCount) {
      buffer = 0;
      parity ^= 1;
    }
  }
};

// Not .nc: the assembler moves such a load past any barrier, down to where its registers are used.
__device__ inline uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// The queries of kHeads heads, by kThreads threads. All loads of a thread are on their way at once. Heads past the last
// one have its queries.
template <MlaLayout kLayout, int kHeads, int kThreads>
__device__ inline void load_queries(const SparseMlaArguments& a, const Place& place, uint8_t* target) {
  constexpr int kChunks = Format<kLayout>::kDim / 8, kLoads = kHeads * kChunks / kThreads;
  static_assert(kLoads * kThreads == kHeads * kChunks);
  uint4 values[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = i * kThreads + int(threadIdx.x), head = min(place.first_head + at / kChunks, a.heads - 1);
    const int64_t row = int64_t(place.row) * a.heads + head;
    values[i] = load_once(static_cast<const uint4*>(a.q) + row * kChunks + at % kChunks);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = i * kThreads + int(threadIdx.x), head = at / kChunks, chunk = at % kChunks;
    *reinterpret_cast<uint4*>(target + chunk / 8 * (kHeads * h::kStretchBytes) +
                              h::swizzled(uint32_t(head), uint32_t(chunk % 8))) = values[i];
  }
}

// The results of a row without a key in this split, by kThreads threads.
template <int kHeads, int kThreads>
__device__ inline void store_nothing(const SparseMlaArguments& a, const Place& place) {
  const int heads = min(kHeads, a.heads - place.first_head);
  const int64_t first = place.of_head(a, place.first_head);
  for (int i = int(threadIdx.x); i < heads * kValue / 8; i += kThreads) {
    const int64_t at = first * kValue / 8 + i;
    if (a.partial != nullptr) {
      reinterpret_cast<uint4*>(a.partial)[2 * at] = reinterpret_cast<uint4*>(a.partial)[2 * at + 1] = {0, 0, 0, 0};
    } else {
      static_cast<uint4*>(a.out)[at] = {0, 0, 0, 0};
    }
  }
  if (a.partial == nullptr) return;
  for (int i = int(threadIdx.x); i < heads; i += kThreads) a.lse[first + i] = -INFINITY;
}

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What the sinks of kHeads heads are as scores, by as many threads; -inf where there are none.
template <int kHeads>
__device__ inline void load_sinks(const SparseMlaArguments& a, const Place& place, float (&target)[kHeads]) {
  if (int(threadIdx.x) >= kHeads) return;
  const int head = place.first_head + int(threadIdx.x);
  const bool has_one = a.sink != nullptr && a.partial == nullptr && head < a.heads;  // or the reduction adds it
  target[threadIdx.x] = has_one ? a.sink[head] * kLog2E : -INFINITY;
}

// 1 over the sum of a head's weights; 0 if it has no key, whose largest score is -inf.
__device__ inline float inverse_of(float largest, float sum, float sink) {
  return largest == -INFINITY ? 0.0f : 1.0f / (sum + exp2_of(sink - largest));
}

__device__ inline void store_lse(const SparseMlaArguments& a, const Place& place, int head, float largest, float sum) {
  if (a.partial == nullptr || head >= a.heads) return;
  a.lse[place.of_head(a, head)] = largest == -INFINITY ? -INFINITY : largest + log2f(sum);
}

}  // namespace fusedcomm::gpu
