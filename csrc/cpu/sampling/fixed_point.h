// Probabilities as integers: the arithmetic of fusedcomm/ops/sampling/fixed_point.py, to the bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/sampling/kernels.h"
#include "fusedcomm/vec.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

using namespace fusedcomm::cpu::sampling;

constexpr float kInfinity = __builtin_inff();
constexpr float kLargestProbability = 0x1.fffffep+126f;  // the largest fp32 whose unit, 2^-126, is a normal number
constexpr float kLargestFloat = 0x1.fffffep+127f;
constexpr float kSmallestFloat = 0x1p-149f;
constexpr int kSmallestExponent = -20;
constexpr int kExponentBias = 127;
constexpr int kMantissaBits = 23;
constexpr uint64_t kOutOfReach = (uint64_t(1) << 63) - 1;

// ---- vectors ----

// a > b ? a : b, and a < b ? a : b: b where one is NaN. Compilers do not find the instruction by themselves.
FUSEDCOMM_INLINE F32 larger_of(F32 a, F32 b) {
#if FUSEDCOMM_LANES == 16
  return bit_cast<F32>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif FUSEDCOMM_LANES == 8
  return bit_cast<F32>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return select(a > b, a, b);
#endif
}

FUSEDCOMM_INLINE F32 smaller_of(F32 a, F32 b) {
#if FUSEDCOMM_LANES == 16
  return bit_cast<F32>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif FUSEDCOMM_LANES == 8
  return bit_cast<F32>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return select(a < b, a, b);
#endif
}

// A bit for each lane of a mask.
FUSEDCOMM_INLINE uint32_t lanes_of(I32 mask) {
#if FUSEDCOMM_LANES == 16
  return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
#elif FUSEDCOMM_LANES == 8
  return uint32_t(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#else
  uint32_t lanes = 0;
  for (int l = 0; l < kLanes; ++l) lanes |= uint32_t(mask[l] & 1) << l;
  return lanes;
#endif
}

FUSEDCOMM_INLINE uint32_t first_lanes(int64_t count) { return count >= kLanes ? ~0u : (1u << count) - 1u; }

// Appends the lanes of x whose bits are set; memory behind them is overwritten up to a whole vector.
FUSEDCOMM_INLINE int64_t append(float* to, int64_t count, F32 x, uint32_t lanes) {
#if FUSEDCOMM_LANES == 16
  store_bits(to + count, _mm512_maskz_compress_ps(__mmask16(lanes), bit_cast<__m512>(x)));
  return count + __builtin_popcount(lanes & 0xffffu);
#else
  for (int l = 0; l < kLanes; ++l) {
    to[count] = x[l];
    count += lanes >> l & 1u;
  }
  return count;
#endif
}

FUSEDCOMM_INLINE float largest_lane(F32 x) {
  float largest = x[0];
  for (int l = 1; l < kLanes; ++l) largest = x[l] > largest ? x[l] : largest;
  return largest;
}

// ---- values ----

// Probabilities as they count: NaN and what is not above 0 is 0.
struct Probability {
  static constexpr float kLeast = 0.0f;
  static FUSEDCOMM_INLINE F32 of(F32 x) { return smaller_of(larger_of(x, F32{}), splat(kLargestProbability)); }
};

// Logits: NaN is -inf.
struct Logit {
  static constexpr float kLeast = -kInfinity;
  static FUSEDCOMM_INLINE F32 of(F32 x) { return smaller_of(larger_of(x, splat(-kInfinity)), splat(kLargestFloat)); }
};

// c of a row whose largest value this is.
inline float unit_of(float largest) {
  const int biased = int(bit_cast<uint32_t>(largest) >> kMantissaBits);
  const int exponent = (biased > 1 ? biased : 1) - kExponentBias;
  const bool ordinary = exponent >= kSmallestExponent && exponent <= 0;
  return ordinary ? 1.0f : bit_cast<float>(uint32_t(kExponentBias - exponent) << kMantissaBits);
}

// ---- masses ----

// y * 2^44, at least 1 if y is above 0.
FUSEDCOMM_INLINE F32 steps_of(F32 y) {
  const F32 least = bit_cast<F32>((y > 0.0f) & bit_cast<I32>(splat(1.0f)));
  return larger_of(y * 0x1p44f, least);
}

// q, the steps rounded to nearest even, still in fp32, which holds it exactly.
FUSEDCOMM_INLINE F32 mass_of(F32 y) {
  const F32 steps = steps_of(y), magic = splat(0x1p23f);  // from here on all fp32 are integers
  return select(steps < magic, (steps + magic) - magic, steps);
}

// The sum of the masses of up to kRunVectors vectors. What is not below 2 has not been brought to its unit yet, and
// gives anything.
class MassSum {
#if FUSEDCOMM_LANES == 16
  // the one instruction set that rounds to integers of 64 bits
 public:
  FUSEDCOMM_INLINE void add(F32 y) {
    const __m512 steps = bit_cast<__m512>(steps_of(y));
    const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, steps, 0),
                 high = _mm512_maskz_extractf32x8_ps(0xff, steps, 1);
    low_ += bit_cast<U64>(_mm512_maskz_cvtps_epi64(0xff, low));
    high_ += bit_cast<U64>(_mm512_maskz_cvtps_epi64(0xff, high));
  }
  FUSEDCOMM_INLINE uint64_t total() const {
    const U64 sum = low_ + high_;
    uint64_t total = 0;
    for (int l = 0; l < kLanes / 2; ++l) total += sum[l];
    return total;
  }

 private:
  typedef uint64_t U64 __attribute__((vector_size(64)));
  U64 low_ = {}, high_ = {};
#else
  // in two halves of 32-bit lanes
 public:
  FUSEDCOMM_INLINE void add(F32 y) {
    const F32 q = mass_of(y);
    const I32 high = __builtin_convertvector(q * 0x1p-23f, I32);
    const F32 low = q - __builtin_convertvector(high, F32) * 0x1p23f;
    high_ += bit_cast<U32>(high);
    low_ += bit_cast<U32>(__builtin_convertvector(low, I32));
  }
  FUSEDCOMM_INLINE uint64_t total() const {
    static_assert(kRunVectors <= 1 << 8, "lanes of 32 bits, masses below 2^45 in halves of 22 and 23 bits");
    uint64_t high = 0, low = 0;
    for (int l = 0; l < kLanes; ++l) {
      high += high_[l];
      low += low_[l];
    }
    return (high << 23) + low;
  }

 private:
  U32 high_ = {}, low_ = {};
#endif
};

// m of a sum of masses; 1 where there is none, which turns 0 / m to 0.
inline float divisor(uint64_t mass) { return mass > 0 ? float(int64_t(mass)) * 0x1p-44f : 1.0f; }

// The sum of masses that reaches this share.
inline uint64_t goal(float share, float unit) {
  const float reach = share * 0x1p44f * unit;
  if (!(share < 1.0f && reach < 0x1p63f)) return kOutOfReach;
  return reach > 1.0f ? uint64_t(reach) : 1;
}

// floor(total * n / 2^31) for u = n / 2^31, rounded down.
inline uint64_t part_of(uint64_t total, float u) {
  const float positive = u > 0.0f ? u : 0.0f;
  const float below_one = positive < 1.0f - 0x1p-24f ? positive : 1.0f - 0x1p-24f;
  const uint64_t fraction = uint64_t(uint32_t(below_one * 0x1p31f)) << 33;
  return uint64_t((unsigned __int128)(total)*fraction >> 64);
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
