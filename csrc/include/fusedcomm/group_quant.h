// Per-group FP8 quantisation: scale = max(amax, 1e-10) / FP8_MAX, q = fp8(clamp(y / scale)), round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

#include "fusedcomm/vec.h"

namespace fusedcomm {

constexpr int kMaxGroupSize = 256;
constexpr float kMinAmax = 1e-10f;

// OCP E4M3: bias 7, NaN 0x7f (NVIDIA, gfx950, CPU).
struct E4M3fn {
  static constexpr float kMax = 448.0f;
  static constexpr int kBias = 7;
  static constexpr uint32_t kNan = 0x7fu;
  static constexpr bool kNegativeZero = true;
};

// E4M3 FNUZ: bias 8, no negative zero, NaN 0x80 (gfx942).
struct E4M3fnuz {
  static constexpr float kMax = 240.0f;
  static constexpr int kBias = 8;
  static constexpr uint32_t kNan = 0x80u;
  static constexpr bool kNegativeZero = false;
};

namespace FUSEDCOMM_ISA {

// |x| <= Format::kMax or NaN; the code stands in the low byte of each lane.
template <class Format>
FUSEDCOMM_INLINE U32 encode_fp8(F32 x) {
  constexpr uint32_t kMinNormal = uint32_t(127 + 1 - Format::kBias) << 23;
  constexpr uint32_t kRebias = uint32_t(127 - Format::kBias) << 3;
  // Adding 2^(23 + quantum exponent) leaves |x| / quantum, rounded to nearest even, in the low bits.
  constexpr uint32_t kSubnormalMagic = uint32_t(127 + 23 - 2 - Format::kBias) << 23;

  const U32 bits = bit_cast<U32>(x);
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - kRebias;
  const U32 magic = U32{} + kSubnormalMagic;
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + bit_cast<F32>(magic)) - magic;
  const U32 code = select(bit_cast<I32>(magnitude) < int32_t(kMinNormal), subnormal, normal);
  U32 sign = bits >> 24 & 0x80u;
  if (!Format::kNegativeZero) sign = select(code == 0u, U32{}, sign);
  const U32 nan = U32{} + Format::kNan;
  return select(x != x, nan, code | sign);
}

// The larger magnitude, compared as integers: a NaN is larger than everything, so it survives.
FUSEDCOMM_INLINE I32 max_magnitude(I32 a, F32 x) {
  const I32 b = bit_cast<I32>(x) & 0x7fffffff;
  return a > b ? a : b;
}

inline float group_scale(I32 magnitude, float fp8_max) {
  int32_t m[kLanes];
  store_bits(m, magnitude);
  int32_t largest = m[0];
  for (int i = 1; i < kLanes; ++i) largest = m[i] > largest ? m[i] : largest;
  const float amax = bit_cast<float>(largest);
  return (amax < kMinAmax ? kMinAmax : amax) / fp8_max;
}

// The smallest power of two >= scale, as a biased exponent. NaN and inf give 255, which is E8M0's NaN.
inline uint32_t ceil_exponent(float scale) {
  const uint32_t bits = bit_cast<uint32_t>(scale);
  const uint32_t exponent = (bits + 0x7fffffu) >> 23;
  return exponent > 255u ? 255u : exponent;
}

// Quantises `size` fp32 values (a multiple of kLanes) by dividing them by `scale`.
template <class Format>
FUSEDCOMM_INLINE void quantize_group(const float* y, int64_t size, float scale, uint8_t* fp8) {
  const F32 divisor = splat(scale);
  const F32 top = splat(Format::kMax), bottom = splat(-Format::kMax);
  for (int64_t i = 0; i < size; i += kLanes) {
    F32 q = load_bits<F32>(y + i) / divisor;
    q = select(q > top, top, q);  // NaN compares false and stays
    q = select(q < bottom, bottom, q);
    store_bits(fp8 + i, __builtin_convertvector(encode_fp8<Format>(q), U8));
  }
}

}  // namespace FUSEDCOMM_ISA
}  // namespace fusedcomm
