// Sparse MLA decode for 16 or 32 heads a block, keys as rows of the products: heads would fill a part of the 64 rows.
//
//   warpgroups 1, 2  gather 64 tokens of the cache, dequantise them into a bf16 tile, of which there are two or three
//   warpgroup 0      S^T = K Q^T, softmax over the rows, P to shared memory, O^T += K[:, :512]^T P^T
//
// K is V, so one tile is the left operand of both products (wgmma.h).
#pragma once

#include "gpu/hopper/sparse_mla_block.h"
#include "gpu/hopper/sparse_mla_merge.h"

namespace fusedcomm::gpu {

template <int kBlockHeads>
struct Narrow {
  static constexpr int kHeads = kBlockHeads;
  static constexpr bool kMerges = true;      // the splits of a row
  static constexpr bool kPrefetches = true;  // tokens, into L2
  static_assert(kHeads == 16 || kHeads == 32);
  static constexpr int kConsumers = h::kWarpgroup, kProducers = 2 * h::kWarpgroup, kThreads = kConsumers + kProducers;
  // As of Wide. O^T alone takes up to 128 registers of a consumer's thread.
  static constexpr int kShare = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = 216, kProducerRegisters = 144;
  static_assert(kConsumerRegisters * kConsumers + kProducerRegisters * kProducers <= kShare * kThreads);
};

template <MlaLayout kLayout, int kHeads>
struct NarrowShared {
  static constexpr int kQueryStretchBytes = kHeads * h::kStretchBytes;
  static constexpr int kQueryBytes = Format<kLayout>::kDim / h::kStretch * kQueryStretchBytes;
  static constexpr int kSpare = kMaxSharedBytes - kQueryBytes - kQueryStretchBytes - 3072;  // for what is small
  static constexpr int kBuffers = kSpare / (Format<kLayout>::kDim / h::kStretch * kTileStretchBytes) >= 3 ? 3 : 2;
  alignas(1024) uint8_t q[kQueryBytes];
  alignas(1024) uint8_t p[kQueryStretchBytes];
  Tiles<kLayout, kBuffers> tiles;
  float of_warps[4][kHeads];
  float sink[kHeads];
  float2 weights[kHeads];  // of a part

  // [head][512], in the memory of the tiles: there is no next one.
  __device__ float* values() { return reinterpret_cast<float*>(tiles.k[0]); }
  __device__ Part<kHeads> part() { return {values(), weights, sink}; }
};

constexpr int kMeetConsumers = 1;  // a barrier

// A thread has columns (heads) 8 c + 2 (lane % 4) and the next one, of rows lane / 4 and lane / 4 + 8 of its warp's 16:
// for element e of the columns, d[4 (e / 2) + 2 i + e % 2] of row i.
template <int kHeads>
struct Columns {
  static constexpr int kCount = kHeads / 4;
  __device__ static int head(int e) { return e / 2 * 8 + int(threadIdx.x) % 4 * 2 + e % 2; }
  __device__ static int element(int e, int i) { return 4 * (e / 2) + 2 * i + e % 2; }
  // The row of a product [64 x kHeads].
  __device__ static int row(int i) { return int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + 8 * i; }
};

// Over all rows: those of a warp's threads, then of the warpgroup's warps.
template <int kHeads, class Op>
__device__ inline void over_rows(float (&x)[kHeads / 4], float (&of_warps)[4][kHeads], Op op) {
  const int warp = int(threadIdx.x) / 32, pair = int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
    for (float& one : x) one = op(one, __shfl_xor_sync(0xffffffffu, one, lanes));
  }
  if (threadIdx.x % 32 < 4) {
#pragma unroll
    for (int c = 0; c < kHeads / 8; ++c) {
      *reinterpret_cast<float2*>(of_warps[warp] + 8 * c + pair) = float2{x[2 * c], x[2 * c + 1]};
    }
  }
  h::meet<kMeetConsumers, h::kWarpgroup>();
#pragma unroll
  for (int c = 0; c < kHeads / 8; ++c) {
    float2 all = *reinterpret_cast<const float2*>(of_warps[0] + 8 * c + pair);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      const float2 two = *reinterpret_cast<const float2*>(of_warps[w] + 8 * c + pair);
      all = float2{op(all.x, two.x), op(all.y, two.y)};
    }
    x[2 * c] = all.x, x[2 * c + 1] = all.y;
  }
}

// The part of S^T that stretches [kBegin, kEnd) of a tile and of the queries make. Two sums take turns, so that a
// product does not wait for the one before.
template <int kBegin, int kEnd, int kHeads>
__device__ inline void multiply_keys(const uint8_t* tile, const uint8_t* queries, float (&s)[2][kHeads / 2]) {
  const uint32_t k = h::part_address(tile), q = h::part_address(queries);
#pragma unroll
  for (int step = 4 * kBegin; step < 4 * kEnd; ++step) {
    const uint32_t of_k = (step / 4 * kTileStretchBytes + step % 4 * 32) >> 4;
    const uint32_t of_q = (step / 4 * kHeads * h::kStretchBytes + step % 4 * 32) >> 4;
    h::multiply_rows(s[step % 2], h::describe(k + of_k), h::describe(q + of_q), step > 1);
  }
  h::commit();
}

// O^T += V^T P^T: of each 64 columns of V, which are rows of the product.
template <int kHeads>
__device__ inline void multiply_values(const uint8_t* tile, const uint8_t* weights,
                                       float (&o)[kValueStretches][kHeads / 2]) {
  const uint32_t v = h::part_address(tile), p = h::part_address(weights);
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
    for (int j = 0; j < kValueStretches; ++j) {
      const uint32_t of_v = (j * kTileStretchBytes + step * 16 * h::kStretchBytes) >> 4;
      h::multiply_columns(o[j], h::describe(v + of_v), h::describe(p + (step * 32 >> 4)));
    }
  }
  h::commit();
}

// Stores rows of O.
template <bool kPartial, int kHeads>
__device__ inline void store_rows(const SparseMlaArguments& a, const Place& place, const float* memory) {
  constexpr int kChunks = kValue / 8;
  const int heads = min(kHeads, a.heads - place.first_head);
  for (int i = int(threadIdx.x); i < heads * kChunks; i += h::kWarpgroup) {
    const int head = i / kChunks, chunk = i % kChunks;
    const float4* const from = reinterpret_cast<const float4*>(memory + value_at(head, chunk * 8));
    const float4 x = from[0], y = from[1];
    const int64_t at = place.of_head(a, place.first_head + head) * kChunks + chunk;
    if constexpr (kPartial) {
      float4* const to = reinterpret_cast<float4*>(a.partial) + 2 * at;
      to[0] = x, to[1] = y;
    } else {
      static_cast<uint4*>(a.out)[at] = {pack_pair(x.x, x.y), pack_pair(x.z, x.w), pack_pair(y.x, y.y),
                                        pack_pair(y.z, y.w)};
    }
  }
}

// Turns O^T over in shared memory, each head's times `factor`.
template <int kHeads>
__device__ inline void turn_over(const float (&o)[kValueStretches][kHeads / 2], const float (&factor)[kHeads / 4],
                                 float* memory) {
  using C = Columns<kHeads>;
#pragma unroll
  for (int e = 0; e < C::kCount; ++e) {
    const int head = C::head(e);
#pragma unroll
    for (int j = 0; j < kValueStretches; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = j * h::kStretch + C::row(i);
        memory[value_at(head, column)] = o[j][C::element(e, i)] * factor[e];
      }
    }
  }
}

template <MlaLayout kLayout, int kHeads>
__device__ inline void consume(const SparseMlaArguments& a, const Range& range, const Place& place,
                               NarrowShared<kLayout, kHeads>& shared) {
  using C = Columns<kHeads>;
  constexpr int kStretches = Format<kLayout>::kDim / h::kStretch;
  constexpr int kBuffers = NarrowShared<kLayout, kHeads>::kBuffers;
  load_queries<kLayout, kHeads, h::kWarpgroup>(a, place, shared.q);
  load_sinks(a, place, shared.sink);
  h::meet<kMeetConsumers, h::kWarpgroup>();  // the fence behind the first tile is for the queries too
  h::set_registers<Narrow<kHeads>::kConsumerRegisters, Narrow<kHeads>::kShare>();

  float o[kValueStretches][kHeads / 2] = {}, s[2][kHeads / 2];
  float largest[C::kCount], sum[C::kCount] = {};
#pragma unroll
  for (float& x : largest) x = -INFINITY;
  const int tiles = range.tiles(), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const float scale = a.scale * kLog2E;
  Turn<kBuffers> turn;

  shared.tiles.wait_full(0, 0);
  h::fence_registers();
  multiply_keys<0, kStretches, kHeads>(shared.tiles.k[0], shared.q, s);
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = turn.buffer;
    const bool is_key[2] = {shared.tiles.bias[buffer][C::row(0)] == 0.0f, shared.tiles.bias[buffer][C::row(1)] == 0.0f};
    h::wait<0>();
    h::hold(s[0]);
    h::hold(s[1]);
    float most[C::kCount];
#pragma unroll
    for (int e = 0; e < C::kCount; ++e) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[0][C::element(e, i)];
        // not a sum with -inf: the score of a key that is not there may be NaN, if the query is
        x = is_key[i] ? (x + s[1][C::element(e, i)]) * scale : -INFINITY;
      }
      most[e] = fmaxf(s[0][C::element(e, 0)], s[0][C::element(e, 1)]);
    }
    over_rows<kHeads>(most, shared.of_warps, [](float x, float y) { return fmaxf(x, y); });
    float factor[C::kCount];
    uint32_t p[kHeads / 4];  // pairs of heads
    bool is_same = true;
#pragma unroll
    for (int e = 0; e < C::kCount; ++e) {
      const float before = largest[e];
      largest[e] = fmaxf(before, most[e]);
      const float base = largest[e] == -INFINITY ? 0.0f : largest[e];
      factor[e] = exp2_of(before - base);
      is_same = is_same && factor[e] == 1.0f;
      float& x = s[0][C::element(e, 0)];
      float& y = s[0][C::element(e, 1)];
      x = exp2_of(x - base), y = exp2_of(y - base);
      sum[e] = sum[e] * factor[e] + (x + y);
    }
#pragma unroll
    for (int j = 0; j < kHeads / 4; ++j) p[j] = pack_pair(s[0][2 * j], s[0][2 * j + 1]);
#pragma unroll
    for (int j = 0; j < kHeads / 16; ++j) {
      // matrix i of 16 heads: eight heads, i / 2, of eight keys, i % 2
      const uint32_t head = uint32_t(16 * j + lane / 16 * 8 + lane % 8), chunk = uint32_t(warp * 2 + lane / 8 % 2);
      h::store_transposed(shared.p + h::swizzled(head, chunk), p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]);
    }
    h::fence_stores();
    if (!__all_sync(0xffffffffu, is_same)) {
#pragma unroll
      for (auto& part : o) {
#pragma unroll
        for (int i = 0; i < kHeads / 2; ++i) part[i] *= factor[i / 4 * 2 + i % 2];
      }
    }
    h::meet<kMeetConsumers, h::kWarpgroup>();
    h::fence_registers();
    multiply_values<kHeads>(shared.tiles.k[buffer], shared.p, o);
    turn.next();
    if (tile + 1 < tiles) {
      // The next scores come right behind. The tile is given back when their first are on their way: all of them are
      // accepted only as they are worked off, and the producer would wait as long.
      const uint8_t* const next = shared.tiles.k[turn.buffer];
      shared.tiles.wait_full(turn.buffer, turn.parity);
      h::fence_registers();
      multiply_keys<0, 2, kHeads>(next, shared.q, s);
      h::wait<1>();
#pragma unroll
      for (auto& part : o) h::hold(part);
      if (lane == 0) shared.tiles.empty[buffer].arrive();
      multiply_keys<2, kStretches, kHeads>(next, shared.q, s);
    } else {
      h::wait<0>();
#pragma unroll
      for (auto& part : o) h::hold(part);
    }
  }

  over_rows<kHeads>(sum, shared.of_warps, [](float x, float y) { return x + y; });
  const bool is_part = merges(a);
  float factor[C::kCount];
#pragma unroll
  for (int e = 0; e < C::kCount; ++e) {
    const int head = C::head(e);
    if (threadIdx.x < 4) {
      store_lse(a, place, place.first_head + head, largest[e], sum[e]);
      shared.weights[head] = {largest[e], sum[e]};
    }
    factor[e] = is_part ? 1.0f : inverse_of(largest[e], sum[e], shared.sink[head]);
  }
  turn_over<kHeads>(o, factor, shared.values());
  if (is_part) return;
  h::meet<kMeetConsumers, h::kWarpgroup>();
  if (a.partial != nullptr) {
    store_rows<true, kHeads>(a, place, shared.values());
  } else {
    store_rows<false, kHeads>(a, place, shared.values());
  }
}

}  // namespace fusedcomm::gpu
