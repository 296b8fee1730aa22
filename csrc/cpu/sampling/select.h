// The largest value such that what is not below it reaches an aim, a count (top-k) or a mass (top-p).
//
// A radix select over the bits of the values: 12 of them, then 9 of those that fell into the bin where the aim is
// reached, then the last 9. Before it, most of a row is left out: the largest values of the groups (a lane of a run
// each) are values of the row too, so where they reach the aim by themselves is a lower bound. That takes one pass
// over the row, which finds its largest value anyway, and one over the runs that matter.
#pragma once

#include "cpu/sampling/row.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

struct Count {
  static FUSEDCOMM_INLINE F32 of(F32) { return splat(1.0f); }
};

struct Mass {
  static FUSEDCOMM_INLINE F32 of(F32 y) { return mass_of(y); }
};

// Values have 30 bits: they are below 2.
constexpr int kShifts[] = {18, 9, 0};
constexpr int kFirstBins = kNumBins, kLaterBins = 1 << 9;
static_assert(kFirstBins == 1 << (30 - kShifts[0]), "a bin for each of the first 12 bits");

// Sums by those bits from shift on that choose one of num_bins.
template <class Measure, class Map>
inline void fill(const float* values, int64_t count, int shift, int num_bins, uint64_t* bins, const Map& map) {
  __builtin_memset(bins, 0, size_t(num_bins) * sizeof(uint64_t));
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 y = map(load_bits<F32>(values + i));
    uint32_t bin[kLanes];
    float amount[kLanes];
    store_bits(bin, bit_cast<U32>(y) >> shift & uint32_t(num_bins - 1));
    store_bits(amount, Measure::of(y));
    const int lanes = count - i < kLanes ? int(count - i) : kLanes;
    for (int l = 0; l < lanes; ++l) bins[bin[l]] += uint64_t(int64_t(amount[l]));
  }
}

// The bin in which the aim is reached, from the last one down; -1: it is not. Adds what is above it to `above`.
inline int locate(const uint64_t* bins, int num_bins, uint64_t aim, uint64_t& above) {
  for (int bin = num_bins - 1; bin >= 0; --bin) {
    if (above + bins[bin] >= aim) return bin;
    above += bins[bin];
  }
  return -1;
}

// Not above the threshold, and not far below it; 0 where the values do not reach the aim.
template <class Measure, class Map>
float lower_bound(const float* values, int64_t count, uint64_t aim, uint64_t* bins, const Map& map) {
  fill<Measure>(values, count, kShifts[0], kFirstBins, bins, map);
  uint64_t above = 0;
  const int bin = locate(bins, kFirstBins, aim, above);
  return bin < 0 ? 0.0f : bit_cast<float>(uint32_t(bin) << kShifts[0]);
}

struct Threshold {
  float value;       // 0 where the aim is not reached
  uint64_t reached;  // by what is not below it
};

// Among the candidates, which are above 0.
template <class Measure>
Threshold select_threshold(Scratch& scratch, int64_t count, uint64_t aim) {
  const float* from = scratch.candidates;
  uint64_t above = 0;
  uint32_t prefix = 0;
  int num_bins = kFirstBins;
  for (const int shift : kShifts) {
    fill<Measure>(from, count, shift, num_bins, scratch.bins, [](F32 y) FUSEDCOMM_INLINED { return y; });
    const int bin = locate(scratch.bins, num_bins, aim, above);
    if (bin < 0) return {0.0f, above};
    prefix |= uint32_t(bin) << shift;
    if (shift == 0) break;
    int64_t remaining = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
      const F32 y = load_bits<F32>(from + i);
      const uint32_t lanes = lanes_of(bit_cast<I32>(y) >> shift == int32_t(prefix >> shift)) & first_lanes(count - i);
      if (lanes != 0) remaining = append(scratch.remaining, remaining, y, lanes);
    }
    from = scratch.remaining;
    count = remaining;
    num_bins = kLaterBins;
  }
  return {bit_cast<float>(prefix), above + scratch.bins[prefix & (kLaterBins - 1)]};
}

// ---- what is done with candidates ----

// Leaves out those below the threshold; returns how many stay.
inline int64_t drop_below(float* values, int64_t count, float threshold) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 y = load_bits<F32>(values + i);
    kept = append(values, kept, y, lanes_of(y >= threshold) & first_lanes(count - i));
  }
  return kept;
}

inline void divide(float* values, int64_t count, float divisor) {
  for (int64_t i = 0; i < count; i += kLanes) store_bits(values + i, load_bits<F32>(values + i) / divisor);
}

inline uint64_t total_mass(const float* values, int64_t count) {
  uint64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    MassSum sum;
    const int64_t end = end_of_run(begin, count);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sum.add(load_bits<F32>(values + i));
    if (i < end) sum.add(load_partial(values + i, end - i));
    total += sum.total();
  }
  return total;
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
