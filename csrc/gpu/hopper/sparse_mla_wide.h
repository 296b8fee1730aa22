// Sparse MLA decode for 64 heads a block, heads as rows of the products.
//
//   warpgroup 2  gathers 64 tokens of the cache, dequantises them into a bf16 tile, of which there are two
//   warpgroup 0  S = Q K^T, softmax, P to shared memory, O[:, :256] += P K[:, :256]
//   warpgroup 1                                          O[:, 256:] += P K[:, 256:512]
//
// K is V, so one tile is both operands (wgmma.h). While warpgroup 0 is at the softmax, the matrix units work for 1.
#pragma once

#include "gpu/hopper/sparse_mla_block.h"

namespace fusedcomm::gpu {

struct Wide {
  static constexpr int kHeads = 64;
  static constexpr bool kMerges = false;
  static constexpr bool kPrefetches = false;
  static constexpr int kConsumers = 2 * h::kWarpgroup, kProducers = h::kWarpgroup, kThreads = kConsumers + kProducers;
  // Registers of a thread of each warpgroup. A block starts with what a third of a multiprocessor has for each, in
  // steps of eight; a warpgroup that asks for more than the others have given back waits for ever.
  static constexpr int kShare = 65536 / kThreads / 8 * 8;
  static constexpr int kFirstRegisters = 208, kSecondRegisters = 160, kProducerRegisters = 136;
  static_assert((kFirstRegisters + kSecondRegisters) * h::kWarpgroup + kProducerRegisters * kProducers <=
                kShare * kThreads);
};

template <MlaLayout kLayout>
struct WideShared {
  alignas(1024) uint8_t q[Format<kLayout>::kDim / h::kStretch * kTileStretchBytes];
  alignas(1024) uint8_t p[kTileStretchBytes];
  Tiles<kLayout, 2> tiles;
  float factor[Wide::kHeads];  // by which a row of O is multiplied before the next tile; at the end 1 / its sum
  float sink[Wide::kHeads];
};

constexpr int kPReady = 1, kPFree = 2, kFactorsRead = 3, kDone = 4, kQueries = 5;  // barriers among them

// Over the four threads that share a row of a product.
template <class Op>
__device__ inline float over_row(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Of a product [64 x N], a thread has columns 8 c + 2 (lane % 4) and the next one of row(0) and row(1): d[4 c +
// 2 i + …].
__device__ inline int row_of_product(int i) {
  const int thread = int(threadIdx.x) % h::kWarpgroup;
  return thread / 32 * 16 + thread % 32 / 4 + 8 * i;
}

__device__ inline void rescale(float (&o)[128], const float (&factor)[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] *= factor[i / 2 % 2];
}

// Half of the value's columns of the result: into out, or a split's part.
template <bool kPartial>
__device__ inline void store_columns(const SparseMlaArguments& a, const Place& place, int first_column,
                                     const float (&o)[128], const float (&inverse)[2]) {
  const int column = first_column + int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = place.first_head + row_of_product(i);
    if (head >= a.heads) continue;
    const int64_t at = place.of_head(a, head) * kValue + column;
#pragma unroll
    for (int c = 0; c < 32; ++c) {
      const float x = o[4 * c + 2 * i] * inverse[i], y = o[4 * c + 2 * i + 1] * inverse[i];
      if constexpr (kPartial) {
        *reinterpret_cast<float2*>(a.partial + at + 8 * c) = float2{x, y};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(a.out) + at + 8 * c) = pack_pair(x, y);
      }
    }
  }
}

__device__ inline void store_result(const SparseMlaArguments& a, const Place& place, int first_column,
                                    const float (&o)[128], const float (&inverse)[2]) {
  if (a.partial != nullptr) {
    store_columns<true>(a, place, first_column, o, inverse);
  } else {
    store_columns<false>(a, place, first_column, o, inverse);
  }
}

// Tiles take turns with two buffers. Which one a tile has is known to the compiler, and so are all addresses.
template <int kBuffer>
struct Buffer {
  static constexpr int value = kBuffer;
};

template <class Take>
__device__ inline void for_each_tile(int tiles, const Take& take) {
  int tile = 0;
  do {  // there is one
    take(Buffer<0>(), tile);
    if (tile + 1 < tiles) take(Buffer<1>(), tile + 1);
    tile += 2;
  } while (tile < tiles);
}

// The part of S that stretches [kBegin, kEnd) of the queries and of a tile make.
template <int kBegin, int kEnd, MlaLayout kLayout>
__device__ inline void multiply_queries(WideShared<kLayout>& shared, const uint8_t* tile, float (&s)[32]) {
  const uint32_t q = h::part_address(shared.q), k = h::part_address(tile);
#pragma unroll
  for (int step = 4 * kBegin; step < 4 * kEnd; ++step) {
    const uint32_t at = (step / 4 * kTileStretchBytes + step % 4 * 32) >> 4;
    h::multiply_rows(s, h::describe(q + at), h::describe(k + at), step > 0);
  }
  h::commit();
}

// 16 keys of the columns of a tile that begin at `values`, as the second operand of PV.
__device__ inline uint64_t values_of(uint32_t values, int step) {
  return h::describe(values + uint32_t(step * 16 * h::kStretchBytes >> 4), kTileStretchBytes);
}

template <MlaLayout kLayout>
__device__ inline void consume_first(const SparseMlaArguments& a, const Range& range, const Place& place,
                                     WideShared<kLayout>& shared) {
  float o[128] = {}, s[32];
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const int tiles = range.tiles(), pair = int(threadIdx.x) % 4 * 2;
  const float scale = a.scale * kLog2E;
  constexpr int kStretches = Format<kLayout>::kDim / h::kStretch;

  const auto take = [&](auto buffer, int tile) {
    constexpr int kBuffer = decltype(buffer)::value;
    h::wait<0>();
    h::hold(s);
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float2 two = *reinterpret_cast<const float2*>(shared.tiles.bias[kBuffer] + 8 * c + pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * c + i];
        // not a sum with -inf: the score of a key that is not there may be NaN, if the query is
        x = (i % 2 == 0 ? two.x : two.y) == 0.0f ? x * scale : -INFINITY;
        most[i / 2] = fmaxf(most[i / 2], x);
      }
    }
    float factor[2], base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float before = largest[i];
      largest[i] = fmaxf(before, over_row(most[i], [](float x, float y) { return fmaxf(x, y); }));
      base[i] = largest[i] == -INFINITY ? 0.0f : largest[i];
      factor[i] = exp2_of(before - base[i]);
      sum[i] *= factor[i];
    }
    uint32_t p[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float x = exp2_of(s[2 * j] - base[j % 2]), y = exp2_of(s[2 * j + 1] - base[j % 2]);
      sum[j % 2] += x + y;
      p[j] = pack_pair(x, y);
    }
    h::meet<kPFree, Wide::kConsumers>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t head = uint32_t(row_of_product(i));
      if (pair == 0) shared.factor[head] = factor[i];
#pragma unroll
      for (uint32_t c = 0; c < 8; ++c) {
        *reinterpret_cast<uint32_t*>(shared.p + h::swizzled(head, c) + pair * 2) = p[2 * c + uint32_t(i)];
      }
    }
    h::fence_stores();
    h::arrive<kPReady, Wide::kConsumers>();
    rescale(o, factor);
    h::fence_registers();
    const uint32_t values = h::part_address(shared.tiles.k[kBuffer]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t piece[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      h::multiply_add(o, piece, values_of(values, step));
    }
    h::commit();
    if (tile + 1 < tiles) {
      // The next scores come right behind. The tile is given back when their first are on their way: all of them are
      // accepted only as they are worked off, and the producer would wait as long.
      const uint8_t* const next = shared.tiles.k[kBuffer ^ 1];
      shared.tiles.wait_full(kBuffer ^ 1, uint32_t((tile + 1) / 2) % 2);
      h::fence_registers();
      multiply_queries<0, 2>(shared, next, s);
      h::wait<1>();
      h::hold(o);
      if (threadIdx.x % 32 == 0) shared.tiles.empty[kBuffer].arrive();
      multiply_queries<2, kStretches>(shared, next, s);
    } else {
      h::wait<0>();
      h::hold(o);
    }
  };

  shared.tiles.wait_full(0, 0);
  h::fence_registers();
  multiply_queries<0, kStretches>(shared, shared.tiles.k[0], s);
  for_each_tile(tiles, take);

  h::meet<kFactorsRead, Wide::kConsumers>();
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = row_of_product(i);
    const float total = over_row(sum[i], [](float x, float y) { return x + y; });
    if (pair == 0) store_lse(a, place, place.first_head + head, largest[i], total);
    inverse[i] = inverse_of(largest[i], total, shared.sink[head]);
    if (pair == 0) shared.factor[head] = inverse[i];
  }
  h::arrive<kDone, Wide::kConsumers>();
  store_result(a, place, 0, o, inverse);
}

template <MlaLayout kLayout>
__device__ inline void consume_second(const SparseMlaArguments& a, const Range& range, const Place& place,
                                      WideShared<kLayout>& shared) {
  float o[128] = {};
  const auto factor_of = [&](int i) { return shared.factor[row_of_product(i)]; };
  const auto take = [&](auto buffer, int tile) {
    constexpr int kBuffer = decltype(buffer)::value;
    h::arrive<kPFree, Wide::kConsumers>();
    h::meet<kPReady, Wide::kConsumers>();
    shared.tiles.wait_full(kBuffer, uint32_t(tile / 2) % 2);
    const float factor[2] = {factor_of(0), factor_of(1)};
    rescale(o, factor);
    h::fence_registers();
    const uint32_t p = h::part_address(shared.p);
    const uint32_t values = h::part_address(shared.tiles.k[kBuffer] + 4 * kTileStretchBytes);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      h::multiply_add(o, h::describe(p + uint32_t(step * 32 >> 4)), values_of(values, step));
    }
    h::commit();
    h::wait<0>();
    h::hold(o);
    if (threadIdx.x % 32 == 0) shared.tiles.empty[kBuffer].arrive();
  };
  for_each_tile(range.tiles(), take);
  h::arrive<kFactorsRead, Wide::kConsumers>();
  h::meet<kDone, Wide::kConsumers>();
  const float inverse[2] = {factor_of(0), factor_of(1)};
  store_result(a, place, kValue / 2, o, inverse);
}

template <MlaLayout kLayout>
__device__ inline void consume(const SparseMlaArguments& a, const Range& range, const Place& place,
                               WideShared<kLayout>& shared) {
  load_queries<kLayout, Wide::kHeads, Wide::kConsumers>(a, place, shared.q);
  load_sinks(a, place, shared.sink);
  h::meet<kQueries, Wide::kConsumers>();  // the fence behind the first tile is for the queries too
  if (threadIdx.x < h::kWarpgroup) {
    h::set_registers<Wide::kFirstRegisters, Wide::kShare>();
    consume_first<kLayout>(a, range, place, shared);
  } else {
    h::set_registers<Wide::kSecondRegisters, Wide::kShare>();
    consume_second<kLayout>(a, range, place, shared);
  }
}

}  // namespace fusedcomm::gpu
