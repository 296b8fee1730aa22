// Sparse MLA decode for 64 heads a block: gather, dequantise, QK, online softmax and PV in one launch.
//
// A block has one row (a query token), 64 of its heads and one split of its keys, which it takes 64 at a time:
//
//   warpgroup 2  gathers 64 tokens of the cache, dequantises them into a bf16 tile, of which there are two
//   warpgroup 0  S = Q K^T, softmax, P to shared memory, O[:, :256] += P K[:, :256]
//   warpgroup 1                                          O[:, 256:] += P K[:, 256:512]
//
// K is V, so one tile is both operands (wgmma.h). While warpgroup 0 is at the softmax, the matrix units work for 1.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "gpu/gpu.h"
#include "gpu/hopper/wgmma.h"
#include "gpu/sparse_mla.h"

namespace fusedcomm::gpu {

namespace {

namespace h = hopper;

constexpr int kHeads = 64;  // of a block
constexpr int kKeys = 64;   // of a tile
constexpr int kValue = 512;
constexpr int kThreads = 3 * h::kWarpgroup;
// Registers of a thread of each warpgroup. A block starts with what a third of a multiprocessor has for each, in steps
// of eight; a warpgroup that asks for more than the others have given back waits for ever.
constexpr int kFirstRegisters = 208, kSecondRegisters = 160, kProducerRegisters = 136;
static_assert(kFirstRegisters + kSecondRegisters + kProducerRegisters <= 3 * (65536 / kThreads / 8 * 8));
constexpr float kLog2E = 1.44269504088896340736f;

constexpr int kTileStretchBytes = 64 * h::kStretchBytes;  // 64 rows

template <MlaLayout kLayout>
struct Format;

template <>
struct Format<MlaLayout::kV4> {
  static constexpr int kDim = 512;
  static constexpr int kFp8Stretches = 7;
  static constexpr int kTokenBytes = 576;
  static constexpr int kRopeByte = 448;
  static constexpr int kScaleBytes = 8;
};

template <>
struct Format<MlaLayout::kV32> {
  static constexpr int kDim = 576;
  static constexpr int kFp8Stretches = 8;
  static constexpr int kTokenBytes = 656;
  static constexpr int kRopeByte = 528;
  static constexpr int kScaleBytes = 16;
};

template <MlaLayout kLayout>
struct Shared {
  static constexpr int kStretches = Format<kLayout>::kDim / h::kStretch;
  alignas(1024) uint8_t q[kStretches * kTileStretchBytes];
  alignas(1024) uint8_t k[2][kStretches * kTileStretchBytes];
  alignas(1024) uint8_t p[kTileStretchBytes];
  float bias[2][kKeys];  // 0, or -inf where there is no key
  float factor[kHeads];  // by which a row of O is multiplied before the next tile; at the end 1 / its sum
  h::Barrier full[2], empty[2];
};

// What a block computes.
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
  r.begin = min(split * share, tiles);
  r.end = min(r.begin + share, tiles);
  return r;
}

// ---- the producer ----

// Not .nc: the assembler moves such a load past any barrier, down to where its registers are used.
__device__ inline uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ inline uint32_t pack_pair(float a, float b) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}

// Four e4m3fn codes, exactly.
__device__ inline float4 decode(uint32_t codes) {
  float4 v;
  asm("{\n\t.reg .b16 low, high, a, b, c, d;\n\t.reg .b32 ab, cd;\n\t"
      "mov.b32 {low, high}, %4;\n\t"
      "cvt.rn.f16x2.e4m3x2 ab, low;\n\tcvt.rn.f16x2.e4m3x2 cd, high;\n\t"
      "mov.b32 {a, b}, ab;\n\tmov.b32 {c, d}, cd;\n\t"
      "cvt.f32.f16 %0, a;\n\tcvt.f32.f16 %1, b;\n\tcvt.f32.f16 %2, c;\n\tcvt.f32.f16 %3, d;\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(codes));
  return v;
}

// The scale of a stretch, ready to multiply with.
template <MlaLayout kLayout>
struct Scale;

// 2^(b - 127), which is a bf16: 255 is NaN, and 0 a subnormal.
template <>
struct Scale<MlaLayout::kV4> {
  uint32_t twice;

  __device__ static Scale of(const uint32_t (&words)[2], int stretch) {
    const uint32_t b = words[stretch / 4] >> (stretch % 4 * 8) & 0xffu;
    const uint32_t bits = b << 7 | (b == 0 || b == 255 ? 0x40u : 0u);
    return {bits << 16 | bits};
  }
  // Rounded once: a code is a bf16 as it is.
  __device__ uint32_t apply(float a, float b) const { return multiply_bf16x2(pack_pair(a, b), twice); }
};

template <>
struct Scale<MlaLayout::kV32> {
  float value;

  __device__ static Scale of(const uint32_t (&words)[4], int stretch) { return {__uint_as_float(words[stretch / 2])}; }
  __device__ uint32_t apply(float a, float b) const { return pack_pair(__fmul_rn(a, value), __fmul_rn(b, value)); }
};

// Eight codes as bf16.
template <class S>
__device__ inline uint4 unpack(uint32_t first, uint32_t second, const S& scale) {
  const float4 a = decode(first), b = decode(second);
  return {scale.apply(a.x, a.y), scale.apply(a.z, a.w), scale.apply(b.x, b.y), scale.apply(b.z, b.w)};
}

// Read in place of a key that is not there: a load under a condition is moved down to its use as well.
__device__ const uint4 kNoToken[656 / 16] = {};

// One token of the cache, as the four threads see it that copy it.
template <MlaLayout kLayout>
struct Token {
  using F = Format<kLayout>;
  const uint8_t* data;
  uint32_t scale[F::kScaleBytes / 4];
  bool is_key;

  __device__ static Token at(const MlaKeys& keys, int32_t index) {
    Token t;
    t.data = reinterpret_cast<const uint8_t*>(kNoToken);
    const uint8_t* scales = t.data;
    t.is_key = index >= 0 && index < keys.num_slots;
    if (t.is_key) {
      const uint32_t size = uint32_t(keys.block_size), block = uint32_t(index) / size, offset = uint32_t(index) % size;
      const uint8_t* const base = keys.cache + int64_t(block) * keys.block_stride;
      t.data = base + int64_t(offset) * F::kTokenBytes;
      scales = kLayout == MlaLayout::kV4 ? base + int64_t(size) * F::kTokenBytes + int64_t(offset) * F::kScaleBytes
                                         : t.data + 512;
    }
    if constexpr (kLayout == MlaLayout::kV4) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(scales));
      t.scale[0] = two.x, t.scale[1] = two.y;
    } else {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(scales));
      t.scale[0] = four.x, t.scale[1] = four.y, t.scale[2] = four.z, t.scale[3] = four.w;
    }
    return t;
  }

  // 16 bytes of a stretch: of its 64 codes, or of its bf16 values (two such for each thread).
  __device__ uint4 codes(int stretch, int lane) const { return load_once(data + stretch * h::kStretch + lane * 16); }
  __device__ uint4 rope(int half, int lane) const { return load_once(data + F::kRopeByte + half * 64 + lane * 16); }
};

// Four threads copy a token; a warp has eight tokens at a time, in each half of a tile. While one half is unpacked, the
// next is on its way, the one behind it is looked up, and the index of a third is read.
template <MlaLayout kLayout>
__device__ inline void produce(const SparseMlaArguments& a, const Range& range, Shared<kLayout>& shared) {
  using F = Format<kLayout>;
  constexpr int kFp8 = F::kFp8Stretches;
  const int thread = int(threadIdx.x) % h::kWarpgroup, lane = thread % 4;
  const int tiles = range.end - range.begin;
  const auto row_of = [&](int half) { return thread / 32 * 16 + half * 8 + thread % 32 / 4; };
  const auto index_of = [&](int tile, int half) {
    if (tile >= tiles) return -1;
    const bool extra = range.begin + tile >= range.main_tiles;
    const int position = (range.begin + tile - (extra ? range.main_tiles : 0)) * kKeys + row_of(half);
    if (position >= (extra ? range.len[1] : range.len[0])) return -1;
    const int32_t* const first = extra ? a.keys[1].indices + range.first[1] : a.keys[0].indices + range.first[0];
    return __ldg(first + position);
  };
  const auto token_at = [&](int tile, int32_t index) {
    const bool extra = range.begin + tile >= range.main_tiles;
    return Token<kLayout>::at(extra ? a.keys[1] : a.keys[0], index);
  };

  Token<kLayout> tokens[2], next = token_at(0, index_of(0, 0));
  uint4 codes[2][kFp8], rope[2][2];
  const auto load = [&](int half) {
    tokens[half] = next;
#pragma unroll
    for (int j = 0; j < kFp8; ++j) codes[half][j] = next.codes(j, lane);
#pragma unroll
    for (int j = 0; j < 2; ++j) rope[half][j] = next.rope(j, lane);
    __syncwarp();  // what follows stays behind the loads
  };

  load(0);
  next = token_at(0, index_of(0, 1));
  int32_t next_index[2] = {index_of(1, 0), index_of(1, 1)};
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = tile % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load(1 - half);
      next = token_at(tile + 1, next_index[half]);
      next_index[half] = index_of(tile + 2, half);
      if (half == 0 && tile >= 2) shared.empty[buffer].wait(uint32_t(tile / 2 - 1) % 2);
      const uint32_t row = uint32_t(row_of(half));
      const auto put = [&](int stretch, int chunk, const uint4& v) {
        uint8_t* const target = shared.k[buffer] + stretch * kTileStretchBytes;
        *reinterpret_cast<uint4*>(target + h::swizzled(row, uint32_t(chunk))) = v;
      };
#pragma unroll
      for (int j = 0; j < kFp8; ++j) {
        const auto scale = Scale<kLayout>::of(tokens[half].scale, j);
        const uint4& v = codes[half][j];
        put(j, 2 * lane, unpack(v.x, v.y, scale));
        put(j, 2 * lane + 1, unpack(v.z, v.w, scale));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) put(kFp8, 4 * j + lane, rope[half][j]);
      if (lane == 0) shared.bias[buffer][row] = tokens[half].is_key ? 0.0f : -INFINITY;
    }
    h::fence_stores();
    shared.full[buffer].arrive();
  }
}

// ---- the consumers ----

constexpr int kConsumers = 2 * h::kWarpgroup;
constexpr int kPReady = 1, kPFree = 2, kFactorsRead = 3, kDone = 4, kQueries = 5;  // barriers among them

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four threads that share a row of a product.
template <class Op>
__device__ inline float over_row(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Of a product [64 x N], a thread has columns 8 c + 2 (lane % 4) and the next one of row(0) and row(1): d[4 c + 2 i +
// …].
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
  if (a.splits > 1) {
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
__device__ inline void multiply_queries(Shared<kLayout>& shared, const uint8_t* tile, float (&s)[32]) {
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
                                     Shared<kLayout>& shared) {
  float o[128] = {}, s[32];
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const int tiles = range.end - range.begin, pair = int(threadIdx.x) % 4 * 2;
  const float scale = a.scale * kLog2E;
  constexpr int kStretches = Shared<kLayout>::kStretches;

  const auto take = [&](auto buffer, int tile) {
    constexpr int kBuffer = decltype(buffer)::value;
    h::wait<0>();
    h::hold(s);
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float2 two = *reinterpret_cast<const float2*>(shared.bias[kBuffer] + 8 * c + pair);
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
    h::meet<kPFree, kConsumers>();
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
    h::arrive<kPReady, kConsumers>();
    rescale(o, factor);
    h::fence_registers();
    const uint32_t values = h::part_address(shared.k[kBuffer]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t piece[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      h::multiply_add(o, piece, values_of(values, step));
    }
    h::commit();
    if (tile + 1 < tiles) {
      // The next scores come right behind. The tile is given back when their first are on their way: all of them are
      // accepted only as they are worked off, and the producer would wait as long.
      const uint8_t* const next = shared.k[kBuffer ^ 1];
      shared.full[kBuffer ^ 1].wait(uint32_t((tile + 1) / 2) % 2);
      h::fence_registers();
      multiply_queries<0, 2>(shared, next, s);
      h::wait<1>();
      h::hold(o);
      if (threadIdx.x % 32 == 0) shared.empty[kBuffer].arrive();
      multiply_queries<2, kStretches>(shared, next, s);
    } else {
      h::wait<0>();
      h::hold(o);
    }
  };

  shared.full[0].wait(0);
  h::fence_registers();
  multiply_queries<0, kStretches>(shared, shared.k[0], s);
  for_each_tile(tiles, take);

  h::meet<kFactorsRead, kConsumers>();
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = place.first_head + row_of_product(i);
    float total = over_row(sum[i], [](float x, float y) { return x + y; });
    if (a.splits > 1) {
      if (pair == 0 && head < a.heads) {
        a.lse[place.of_head(a, head)] = largest[i] == -INFINITY ? -INFINITY : largest[i] + log2f(total);
      }
    } else if (a.sink != nullptr && head < a.heads && largest[i] != -INFINITY) {
      total += exp2_of(a.sink[head] * kLog2E - largest[i]);
    }
    inverse[i] = largest[i] == -INFINITY ? 0.0f : 1.0f / total;
    if (pair == 0) shared.factor[row_of_product(i)] = inverse[i];
  }
  h::arrive<kDone, kConsumers>();
  store_result(a, place, 0, o, inverse);
}

template <MlaLayout kLayout>
__device__ inline void consume_second(const SparseMlaArguments& a, const Range& range, const Place& place,
                                      Shared<kLayout>& shared) {
  float o[128] = {};
  const auto factor_of = [&](int i) { return shared.factor[row_of_product(i)]; };
  const auto take = [&](auto buffer, int tile) {
    constexpr int kBuffer = decltype(buffer)::value;
    h::arrive<kPFree, kConsumers>();
    h::meet<kPReady, kConsumers>();
    shared.full[kBuffer].wait(uint32_t(tile / 2) % 2);
    const float factor[2] = {factor_of(0), factor_of(1)};
    rescale(o, factor);
    h::fence_registers();
    const uint32_t p = h::part_address(shared.p);
    const uint32_t values = h::part_address(shared.k[kBuffer] + 4 * kTileStretchBytes);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      h::multiply_add(o, h::describe(p + uint32_t(step * 32 >> 4)), values_of(values, step));
    }
    h::commit();
    h::wait<0>();
    h::hold(o);
    if (threadIdx.x % 32 == 0) shared.empty[kBuffer].arrive();
  };
  for_each_tile(range.end - range.begin, take);
  h::arrive<kFactorsRead, kConsumers>();
  h::meet<kDone, kConsumers>();
  const float inverse[2] = {factor_of(0), factor_of(1)};
  store_result(a, place, kValue / 2, o, inverse);
}

// ---- the kernel ----

// By the consumers: the producer is at the first keys meanwhile. All loads of a thread are on their way at once.
template <MlaLayout kLayout>
__device__ inline void load_queries(const SparseMlaArguments& a, const Place& place, uint8_t* target) {
  constexpr int kChunks = Format<kLayout>::kDim / 8, kLoads = kHeads * kChunks / kConsumers;
  static_assert(kLoads * kConsumers == kHeads * kChunks);
  uint4 values[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = i * kConsumers + int(threadIdx.x), head = min(place.first_head + at / kChunks, a.heads - 1);
    const int64_t row = int64_t(place.row) * a.heads + head;
    values[i] = load_once(static_cast<const uint4*>(a.q) + row * kChunks + at % kChunks);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = i * kConsumers + int(threadIdx.x), head = at / kChunks, chunk = at % kChunks;
    *reinterpret_cast<uint4*>(target + chunk / 8 * kTileStretchBytes +
                              h::swizzled(uint32_t(head), uint32_t(chunk % 8))) = values[i];
  }
}

// A row without a key in this split.
__device__ inline void store_nothing(const SparseMlaArguments& a, const Place& place) {
  const int heads = min(kHeads, a.heads - place.first_head);
  const int64_t first = place.of_head(a, place.first_head);
  for (int i = int(threadIdx.x); i < heads * kValue / 8; i += kThreads) {
    const int64_t at = first * kValue / 8 + i;
    if (a.splits > 1) {
      reinterpret_cast<uint4*>(a.partial)[2 * at] = reinterpret_cast<uint4*>(a.partial)[2 * at + 1] = {0, 0, 0, 0};
    } else {
      static_cast<uint4*>(a.out)[at] = {0, 0, 0, 0};
    }
  }
  if (a.splits == 1) return;
  for (int i = int(threadIdx.x); i < heads; i += kThreads) a.lse[first + i] = -INFINITY;
}

template <MlaLayout kLayout>
__global__ void __launch_bounds__(kThreads, 1) sparse_mla(const __grid_constant__ SparseMlaArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];  // the swizzle wants it
  Shared<kLayout>& shared = *reinterpret_cast<Shared<kLayout>*>(memory);
  const Place place = {int(blockIdx.y), int(blockIdx.z), int(blockIdx.x) * kHeads};
  const Range range = range_of(a, place.row, place.split);
  if (range.begin == range.end) return store_nothing(a, place);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      shared.full[i].init(h::kWarpgroup);
      shared.empty[i].init(kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    h::give_registers<kProducerRegisters>();
    produce<kLayout>(a, range, shared);
  } else {
    load_queries<kLayout>(a, place, shared.q);
    h::fence_stores();
    h::meet<kQueries, kConsumers>();
    if (threadIdx.x < h::kWarpgroup) {
      h::take_registers<kFirstRegisters>();
      consume_first<kLayout>(a, range, place, shared);
    } else {
      h::give_registers<kSecondRegisters>();
      consume_second<kLayout>(a, range, place, shared);
    }
  }
#endif
}

template <MlaLayout kLayout>
cudaError_t launch(const SparseMlaArguments& a, cudaStream_t stream) {
  constexpr int kBytes = int(sizeof(Shared<kLayout>));
  static_assert(kBytes <= 227 * 1024, "what a block can have");
  const auto kernel = sparse_mla<kLayout>;
  // of this device and for good; it costs next to nothing again
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((a.heads + kHeads - 1) / kHeads), unsigned(a.rows), unsigned(a.splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, a);  // the status of this launch, and not of a call before
}

}  // namespace

int sparse_mla_decode(MlaLayout layout, const SparseMlaArguments& a, void* stream) {
  if (a.rows == 0 || a.heads == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  return int(layout == MlaLayout::kV4 ? launch<MlaLayout::kV4>(a, s) : launch<MlaLayout::kV32>(a, s));
}

}  // namespace fusedcomm::gpu
