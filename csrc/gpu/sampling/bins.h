// What a block has of values by their size: how many, or how much they weigh.
#pragma once

#include "gpu/sampling/slice.h"
#include "gpu/sampling/tally.h"

namespace fusedcomm::gpu::sampling {

constexpr int kBins = 1024;
constexpr int kGroups = kBins / kWarpSize;
static_assert(kGroups <= kWarpSize, "a group a lane");

// Bins of values. Bin 0 has the largest.
class alignas(16) Counts {
 public:
  // Values whose bin is below kBins.
  template <int kCount>
  __device__ void add(const uint32_t (&bins)[kCount], const Values<kCount>&) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (bins[i] < kBins) atomicAdd(&counts_[bins[i]], 1u);
    }
  }
  __device__ uint64_t in_bin(int bin) const { return counts_[bin]; }

  // Whether everything in a bin is needed to reach what is left of the aim.
  __device__ static bool takes_all(uint64_t in_bin, uint64_t left, uint32_t) { return in_bin == left; }

 private:
  uint32_t counts_[kBins];
};

class alignas(16) Masses {
 public:
  template <int kCount>
  __device__ void add(const uint32_t (&bins)[kCount], const Values<kCount>& y) {
    uint64_t mass[kCount];
    uint32_t before[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) mass[i] = mass_of(y.v[i]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (bins[i] < kBins) before[i] = atomicAdd(&low_[bins[i]], uint32_t(mass[i]));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t carried = carry_of(before[i], mass[i]);
      if (bins[i] < kBins && carried != 0) atomicAdd(&high_[bins[i]], carried);
    }
  }
  __device__ uint64_t in_bin(int bin) const { return join(low_[bin], high_[bin]); }

  // So it is where the bin has one value: two weigh at least twice its lower end.
  __device__ static bool takes_all(uint64_t in_bin, uint64_t, uint32_t lower_end) {
    return in_bin < 2 * mass_of(__uint_as_float(lower_end));
  }

 private:
  uint32_t low_[kBins], high_[kBins];
};

}  // namespace fusedcomm::gpu::sampling
