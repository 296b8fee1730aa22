// Probabilities as integers: the arithmetic of fusedcomm/ops/sampling/fixed_point.py, to the bit.
#pragma once

#include <cmath>

#include "gpu/gpu.h"

namespace fusedcomm::gpu::sampling {

constexpr float kLargestProbability = 0x1.fffffep+126f;  // the largest fp32 whose unit, 2^-126, is a normal number
constexpr float kLargestFloat = 0x1.fffffep+127f;
constexpr int kSmallestExponent = -20;
constexpr int kExponentBias = 127;
constexpr int kMantissaBits = 23;
constexpr uint64_t kOutOfReach = (uint64_t(1) << 63) - 1;

// Values as they count, but for their unit. A probability that is NaN or not above 0 is 0.
struct Probability {
  __device__ static float of(float x) { return x > 0.0f ? x : 0.0f; }
  __device__ static float in_unit(float x, float unit) { return smaller(x, kLargestProbability) * unit; }
};

// A logit that is NaN is -inf.
struct Logit {
  __device__ static float of(float x) {
    const float known = x > -INFINITY ? x : -INFINITY;
    return known < kLargestFloat ? known : kLargestFloat;
  }
  __device__ static float in_unit(float x, float) { return x; }
};

// c of a row whose largest value this is.
__device__ inline float unit_of(float largest) {
  const int biased = int(__float_as_uint(smaller(largest, kLargestProbability)) >> kMantissaBits);
  const int exponent = (biased > 1 ? biased : 1) - kExponentBias;
  const bool ordinary = exponent >= kSmallestExponent && exponent <= 0;
  return ordinary ? 1.0f : __uint_as_float(uint32_t(kExponentBias - exponent) << kMantissaBits);
}

// q = rint(y * 2^44), at least 1 if y is above 0. From 2^-20 on that is the mantissa, shifted; what is not below 2 has
// not been brought to its unit yet, and gives anything. Both ways are gone at once: lanes would go one after the other.
__device__ inline uint64_t mass_of(float y) {
  constexpr uint32_t kShifted = uint32_t(kExponentBias + kSmallestExponent) << kMantissaBits;
  constexpr uint32_t kImplicit = 1u << kMantissaBits;
  const uint32_t bits = __float_as_uint(y);
  const uint32_t shift = (bits >> kMantissaBits) - uint32_t(kExponentBias + kSmallestExponent - 1);
  const uint64_t shifted = uint64_t((bits & (kImplicit - 1)) | kImplicit) << (shift < 31 ? shift : 31);
  const uint32_t q = round_to_integer(smaller(y, 0x1p-20f) * 0x1p44f), least = uint32_t(y > 0.0f);
  return bits >= kShifted ? shifted : uint64_t(q > least ? q : least);
}

struct MassOf {
  __device__ uint64_t operator()(float y) const { return mass_of(y); }
};

// m of a sum of masses; 1 where there is none, which turns 0 / m to 0.
__device__ inline float divisor(uint64_t mass) { return mass > 0 ? float(mass) * 0x1p-44f : 1.0f; }

// The sum of masses that reaches this share.
__device__ inline uint64_t goal(float share, float unit) {
  const float reach = ceilf(share * 0x1p44f * unit);
  if (!(share < 1.0f && reach < 0x1p63f)) return kOutOfReach;
  return reach > 1.0f ? uint64_t(reach) : 1;
}

// floor(total * n / 2^31) for u = n / 2^31, rounded down.
__device__ inline uint64_t part_of(uint64_t total, float u) {
  const float positive = u > 0.0f ? u : 0.0f;
  const float below_one = positive < 1.0f - 0x1p-24f ? positive : 1.0f - 0x1p-24f;
  return __umul64hi(total, uint64_t(uint32_t(below_one * 0x1p31f)) << 33);
}

}  // namespace fusedcomm::gpu::sampling
