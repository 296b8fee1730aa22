// The bytes of a token in a sparse MLA cache, and its values as bf16.
#pragma once

#include <cstdint>

#include "gpu/sparse_mla.h"

namespace fusedcomm::gpu {

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

__device__ inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Two values as bf16, the first in the low half.
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

}  // namespace fusedcomm::gpu
