// The producer of sparse MLA decode: gathers the tokens of a block's tiles and dequantises them into shared memory.
#pragma once

#include "gpu/hopper/sparse_mla_block.h"

namespace fusedcomm::gpu {

// Read in place of a key that is not there: a load under a condition is moved down to its use.
__device__ const uint4 kNoToken[656 / 16] = {};

// An int32 if it is there, -1 otherwise; see kNoToken.
__device__ inline int32_t load_index(const int32_t* p, bool is_there) {
  int32_t v;
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %2, 0;\n\tmov.b32 %0, -1;\n\t@p ld.global.u32 %0, [%1];\n\t}"
               : "=r"(v)
               : "l"(p), "r"(int(is_there))
               : "memory");
  return v;
}

__device__ inline void load_scales(const void* p, uint32_t (&v)[2]) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p) : "memory");
}
__device__ inline void load_scales(const void* p, uint32_t (&v)[4]) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p)
               : "memory");
}

// Where a token of the cache is.
template <MlaLayout kLayout>
struct Token {
  const uint8_t* data;
  const uint8_t* scales;  // kV4: they are not at the token
  float bias;

  __device__ static Token at(const MlaKeys& keys, int32_t index) {
    using F = Format<kLayout>;
    Token t = {reinterpret_cast<const uint8_t*>(kNoToken), reinterpret_cast<const uint8_t*>(kNoToken), -INFINITY};
    if (index >= 0 && index < keys.num_slots) {
      const uint32_t size = uint32_t(keys.block_size), block = uint32_t(index) / size, offset = uint32_t(index) % size;
      const uint8_t* const base = keys.cache + int64_t(block) * keys.block_stride;
      t.data = base + int64_t(offset) * F::kTokenBytes;
      t.scales = base + int64_t(size) * F::kTokenBytes + int64_t(offset) * F::kScaleBytes;
      t.bias = 0.0f;
    }
    return t;
  }

  __device__ const uint8_t* first_scale() const { return kLayout == MlaLayout::kV4 ? scales : data + 512; }
};

// A token into L2.
template <MlaLayout kLayout>
__device__ inline void prefetch(const Token<kLayout>& token) {
  constexpr int kBytes = Format<kLayout>::kTokenBytes;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(token.data), "n"(kBytes) : "memory");
  if constexpr (kLayout == MlaLayout::kV4) asm volatile("prefetch.global.L2 [%0];" ::"l"(token.scales) : "memory");
}

// What a thread has of a token: 16 of the 64 codes of each stretch, and 2 x 8 of its bf16 values.
template <MlaLayout kLayout>
struct Quarter {
  using F = Format<kLayout>;
  static constexpr int kCodes = F::kFp8Stretches, kPieces = kCodes + 2;
  uint4 pieces[kPieces];
  uint32_t scales[F::kScaleBytes / 4];
  float bias;

  __device__ void load(const Token<kLayout>& token, int lane, uint32_t offset) {
    const uint8_t* const first = token.data + lane * 16 + offset;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = i < kCodes ? i * h::kStretch : F::kRopeByte + (i - kCodes) * 64;
      pieces[i] = load_once(first + at);
    }
    load_scales(token.first_scale() + offset, scales);
    bias = token.bias;
  }

  // Needs a register of every load.
  __device__ uint32_t mix() const {
    uint32_t bits = scales[0];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) bits ^= pieces[i].x;
    return bits;
  }

  // As bf16 into row `row` of a tile, of which the thread has quarter `lane`.
  __device__ void store(uint8_t* tile, uint32_t row, int lane) const {
    const auto put = [&](int stretch, int chunk, const uint4& v) {
      *reinterpret_cast<uint4*>(tile + stretch * kTileStretchBytes + h::swizzled(row, uint32_t(chunk))) = v;
    };
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      const auto scale = Scale<kLayout>::of(scales, i);
      put(i, 2 * lane, unpack(pieces[i].x, pieces[i].y, scale));
      put(i, 2 * lane + 1, unpack(pieces[i].z, pieces[i].w, scale));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) put(kCodes, 4 * i + lane, pieces[kCodes + i]);
  }
};

// By kThreads threads, of which this is number `thread`. Four of them copy a token; they fill a tile in one pass or
// two.
//
// While a pass is unpacked, the tokens of the next are on their way, and the index of the one behind it, where the
// token is found, and prefetched if that is wanted. All of these are waited for at one point, before the next loads set
// out: the assembler has few scoreboards, and gives loads of several passes the same one, so that to wait for the older
// is to wait for the newer as well.
template <int kThreads, bool kPrefetches, class Tiles, MlaLayout kLayout>
__device__ inline void produce(const SparseMlaArguments& a, Tiles& tiles, int thread) {
  const Range& range = tiles.range;
  constexpr int kTokens = kThreads / 4, kPasses = kKeys / kTokens;
  static_assert(kPasses == 1 || kPasses == 2);
  const int lane = thread % 4, first_row = thread / 4;
  const int passes = range.tiles() * kPasses;
  const auto is_extra = [&](int tile) { return range.begin + tile >= range.main_tiles; };
  const auto index_of = [&](int pass, uint32_t offset) {
    const int tile = pass / kPasses, i = is_extra(tile) ? 1 : 0;
    const int position =
        (range.begin + tile - (i == 1 ? range.main_tiles : 0)) * kKeys + pass % kPasses * kTokens + first_row;
    const int len = i == 1 ? range.len[1] : range.len[0];
    const int32_t* const first = i == 1 ? a.keys[1].indices + range.first[1] : a.keys[0].indices + range.first[0];
    return load_index(first + position + offset, pass < passes && position < len);
  };
  const auto token_at = [&](int pass, int32_t index) {
    return Token<kLayout>::at(is_extra(pass / kPasses) ? a.keys[1] : a.keys[0], index);
  };

  const uint32_t zero = uint32_t(a.rows) >> 31;  // which only we know
  Quarter<kLayout> quarters[2];
  Token<kLayout> next = token_at(0, index_of(0, 0));
  int32_t index = index_of(1, 0);
  quarters[0].load(next, lane, 0);
  next = token_at(1, index);
  index = index_of(2, 0);
  Turn<Tiles::kBuffers> turn;

  const auto take = [&](int pass, const Quarter<kLayout>& current, Quarter<kLayout>& following) {
    const uint32_t offset = (current.mix() ^ uint32_t(index)) & zero;
    following.load(next, lane, offset);
    __syncwarp();  // what follows stays behind the loads
    next = token_at(pass + 2, index);
    if (kPrefetches && lane == 0 && next.bias == 0.0f) prefetch(next);
    index = index_of(pass + 3, offset);
    if (pass % kPasses == 0) tiles.empty[turn.buffer].wait(turn.parity ^ 1);
    const uint32_t row = uint32_t(pass % kPasses * kTokens + first_row);
    current.store(tiles.k[turn.buffer], row, lane);
    if (lane == 0) tiles.bias[turn.buffer][row] = current.bias;
    if (pass % kPasses == kPasses - 1) {
      tiles.full[turn.buffer].arrive();
      turn.next();
    }
  };
  for (int pass = 0; pass < passes; pass += 2) {
    take(pass, quarters[0], quarters[1]);
    if (kPasses == 1 && pass + 1 == passes) break;
    take(pass + 1, quarters[1], quarters[0]);
  }
}

}  // namespace fusedcomm::gpu
