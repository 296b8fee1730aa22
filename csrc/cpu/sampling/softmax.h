// Probabilities from logits. Powers are made of multiplications and additions alone, each rounded: the same bits on
// every instruction set.
#pragma once

#include "cpu/sampling/row.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

constexpr float kSmallestTemperature = 0x1p-126f;
constexpr float kLargestTemperature = 0x1p126f;

// ln(2)^i / i! down from i = 7: the series of 2^r ends before (ln 2 / 2)^8 / 8! < 2^-27, r being at most 1/2.
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr float kSeries[] = {
    float(kLn2 * kLn2 * kLn2 * kLn2 * kLn2 * kLn2 * kLn2 / 5040.0),
    float(kLn2 * kLn2 * kLn2 * kLn2 * kLn2 * kLn2 / 720.0),
    float(kLn2 * kLn2 * kLn2 * kLn2 * kLn2 / 120.0),
    float(kLn2 * kLn2 * kLn2 * kLn2 / 24.0),
    float(kLn2 * kLn2 * kLn2 / 6.0),
    float(kLn2 * kLn2 / 2.0),
    float(kLn2),
    1.0f,
};

// 2^z for z up to 0, within 2^-22 relatively or 2^-126 absolutely; 0 for NaN.
FUSEDCOMM_INLINE F32 power_of_2(F32 z) {
  const F32 magic = splat(0x1.8p23f);  // what is added to it becomes an integer, in its last bits
  const F32 shifted = z + magic, n = shifted - magic, r = z - n;
  F32 power = {};
  for (const float coefficient : kSeries) power = power * r + coefficient;
  const F32 scaled = bit_cast<F32>(bit_cast<U32>(power) + (bit_cast<U32>(shifted) << kMantissaBits));
  return select(n >= -126.0f, scaled, F32{});
}

template <class R>
void write_softmax(Row<R>& row, float temperature, float* out) {
  const float t = temperature < kLargestTemperature ? temperature : kLargestTemperature, largest = row.largest;
  const float scale = float(1.0 / (kLn2 * double(t)));  // e^(x / t) is 2^(x * scale)
  uint64_t total = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kRun) {
    const int64_t end = end_of_run(begin, row.vocab);
    MassSum sum;
    each_vector(row.read, begin, end, [&](int64_t i, F32 x) FUSEDCOMM_INLINED {
      const F32 weight = power_of_2((x - largest) * scale);
      sum.add(weight);
      store(out, i, end, weight);
    });
    total += sum.total();
  }
  const float m = divisor(total);
  int64_t i = 0;
  for (; i + kLanes <= row.vocab; i += kLanes) store_bits(out + i, load_bits<F32>(out + i) / m);
  for (; i < row.vocab; ++i) out[i] /= m;
}

// 1 for the first of the largest.
template <class R>
void write_greedily(const Row<R>& row, float* out) {
  __builtin_memset(out, 0, size_t(row.vocab) * sizeof(float));
  if (!(row.largest > -kInfinity)) return;
  for (int64_t begin = 0; begin < row.vocab; begin += kRun) {
    if (!row.reaches(begin, row.largest)) continue;
    int64_t first = -1;
    each_vector(row.read, begin, end_of_run(begin, row.vocab), [&](int64_t i, F32 x) FUSEDCOMM_INLINED {
      const uint32_t lanes = lanes_of(x == row.largest);
      if (first < 0 && lanes != 0) first = i + __builtin_ctz(lanes);
    });
    out[first] = 1.0f;
    return;
  }
}

template <class T>
void softmax_temperature(const Rows& rows, const PerRow& temperature, float* out, int64_t begin, int64_t end,
                         Scratch& scratch) {
  for (int64_t i = begin; i < end; ++i) {
    Row<RowReader<T, Logit>> row = {{rows, i}, rows.vocab, scratch};
    survey<false>(row);
    row.unit = 1.0f;  // logits have none
    const float t = at(temperature, i);
    float* const to = out + i * rows.vocab;
    if (t >= kSmallestTemperature) {
      write_softmax(row, t, to);
    } else {
      write_greedily(row, to);
    }
  }
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
