// What a block has of values by their size: how many, or how much they weigh.
#pragma once

#include <type_traits>

#include "gpu/sampling/slice.h"
#include "gpu/sampling/tally.h"

namespace fusedcomm::gpu::sampling {

constexpr int kBins = 1024;
constexpr int kGroups = kBins / kWarpSize;
constexpr int kAllBins = kBins + kWarpSize;  // with one for what a lane has outside of the range
static_assert(kGroups <= kWarpSize, "a group a lane");

// The part of the row that is put into bins: bit patterns [top - size + 1, top], a bin for 2^shift of them, which all
// have the same exponent. Bin 0 has the largest.
struct Range {
  uint32_t top, size;
  int shift;

  __device__ uint32_t below_top(float y) const { return top - __float_as_uint(y); }  // not below size: not in the range
  // kAllBins of them. What is outside has one too: an addition that is not made would be a branch.
  __device__ uint32_t bin_of(float y) const {
    const uint32_t below = below_top(y);
    return below < size ? below >> shift : kBins + lane();
  }
  __device__ uint32_t lower_end() const { return top - (size - 1); }
  __device__ uint32_t upper_end_of(int bin) const { return top - (uint32_t(bin) << shift); }
};

class alignas(16) Counts {
 public:
  template <int kCount>
  __device__ void add(const Range& range, const Values<kCount>& y) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t below = range.below_top(y.v[i]);
      if (below < range.size) atomicAdd(&counts_[below >> range.shift], 1u);
    }
  }
  __device__ uint64_t in_bin(const Range&, int bin) const { return counts_[bin]; }

  // Whether everything in a bin is needed to reach what is left of the aim.
  __device__ static bool takes_all(uint64_t in_bin, uint64_t left, float) { return in_bin == left; }
  // At most so many values are in a bin and in those above it.
  __device__ static bool are_few(uint64_t above, uint64_t in_bin, float, int most) {
    return above + in_bin <= uint64_t(most);
  }
  static constexpr bool kTakesAbove = true;      // candidates are what counts as few
  static constexpr uint32_t kLow = 0x30000000u;  // 2^-31

 private:
  uint32_t counts_[kBins];
};

// What both kinds of masses have.
struct MassBins {
  // So it is where the bin has one value: two weigh at least twice its lower end.
  __device__ static bool takes_all(uint64_t in_bin, uint64_t, float lower_end) {
    return in_bin < 2 * mass_of(lower_end);
  }
  // At most so many values are in a bin.
  __device__ static bool are_few(uint64_t, uint64_t in_bin, float lower_end, int most) {
    return in_bin <= uint64_t(most) * mass_of(lower_end);
  }
  static constexpr bool kTakesAbove = false;
  // 2^-21. From here on a mass is a mantissa, shifted; below, there are fewer masses than bit patterns.
  static constexpr uint32_t kLow = uint32_t(kExponentBias + kSmallestExponent - 1) << kMantissaBits;
};

// Of a slice that a block keeps, as how many values a bin has and how far they are below its upper end: additions of 32
// bits, for which nobody waits.
class alignas(16) SliceMasses : public MassBins {
 public:
  template <int kCount>
  __device__ void add(const Range& range, const Values<kCount>& y) {
    if (range.lower_end() >= kLow) {
      add_rests(range, y, [&](float v) { return range.below_top(v) & ((1u << range.shift) - 1); });
    } else {
      add_rests(range, y, [&](float v) {
        const uint32_t rest = range.below_top(v) & ((1u << range.shift) - 1), bits = __float_as_uint(v);
        return bits < kLow ? uint32_t(mass_of(__uint_as_float(bits + rest)) - mass_of(v)) : rest;
      });
    }
  }
  __device__ uint64_t in_bin(const Range& range, int bin) const {
    const uint32_t upper_end = range.upper_end_of(bin);
    const uint64_t rest = uint64_t(rests_[0][bin]) + rests_[1][bin];
    const uint32_t shift = upper_end < kLow ? 0 : (upper_end - kLow) >> kMantissaBits;
    return counts_[bin] * mass_of(__uint_as_float(upper_end)) - (rest << shift);
  }

 private:
  static_assert((int64_t(kMostElements / 2) << 18) - 1 <= UINT32_MAX, "rests, of 18 bits, add up to less than 2^32");

  template <int kCount, class RestOf>
  __device__ void add_rests(const Range& range, const Values<kCount>& y, const RestOf& rest_of) {
    uint32_t* const rests = rests_[warp() % 2];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bin = range.bin_of(y.v[i]);
      atomicAdd(&counts_[bin], 1u);
      atomicAdd(&rests[bin], rest_of(y.v[i]));
    }
  }

  uint32_t counts_[kAllBins];
  uint32_t rests_[2][kAllBins];  // of every other warp: see above
};

// Of a row of any length, in two words.
class alignas(16) RowMasses : public MassBins {
 public:
  template <int kCount>
  __device__ void add(const Range& range, const Values<kCount>& y) {
    uint64_t mass[kCount];
    uint32_t bin[kCount], before[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t below = range.below_top(y.v[i]);
      bin[i] = below < range.size ? below >> range.shift : kBins;
      mass[i] = mass_of(y.v[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (bin[i] < kBins) before[i] = atomicAdd(&low_[bin[i]], uint32_t(mass[i]));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t carried = carry_of(before[i], mass[i]);
      if (bin[i] < kBins && carried != 0) atomicAdd(&high_[bin[i]], carried);
    }
  }
  __device__ uint64_t in_bin(const Range&, int bin) const { return join(low_[bin], high_[bin]); }

 private:
  uint32_t low_[kBins], high_[kBins];
};

using Masses = std::conditional_t<kHasClusters, SliceMasses, RowMasses>;

}  // namespace fusedcomm::gpu::sampling
