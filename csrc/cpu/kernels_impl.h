// The row kernels, written once and compiled for each instruction set by kernels_*.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "fusedcomm/group_quant.h"
#include "fusedcomm/tree_sum.h"
#include "fusedcomm/vec.h"

namespace fusedcomm::FUSEDCOMM_ISA {

using cpu::kMaxNormHidden;
using cpu::NormTarget;
using cpu::QuantTarget;
using cpu::Sources;

// `count` lanes of p from i on; count < kLanes only at the end of a row.
template <class T>
FUSEDCOMM_INLINE F32 load_lanes(const T* p, int64_t count) {
  return count >= kLanes ? Io<T>::load(p) : load_partial(p, count);
}

template <class T>
FUSEDCOMM_INLINE void store_lanes(T* p, F32 x, int64_t count) {
  if (count >= kLanes) {
    Io<T>::store(p, x);
  } else {
    store_partial(p, x, count);
  }
}

template <class T>
FUSEDCOMM_INLINE F32 sum_lanes(const Sources& sources, int64_t i, int64_t count) {
  F32 sum = {};
  for (int r = 0; r < sources.count; ++r) sum += load_lanes(static_cast<const T*>(sources.rows[r]) + i, count);
  return Io<T>::round(sum);
}

// As sum_lanes for kTreeBlock whole vectors: the ranks are the outer loop, so the loads are independent.
template <class T>
FUSEDCOMM_INLINE void sum_block(const Sources& sources, int64_t i, F32 (&sum)[kTreeBlock]) {
  for (F32& s : sum) s = F32{};
  for (int r = 0; r < sources.count; ++r) {
    const T* p = static_cast<const T*>(sources.rows[r]) + i;
    for (int j = 0; j < kTreeBlock; ++j) sum[j] += Io<T>::load(p + j * kLanes);
  }
  for (F32& s : sum) s = Io<T>::round(s);
}

template <class T>
void sum(const Sources& sources, void* out, int64_t begin, int64_t end) {
  T* const o = static_cast<T*>(out);
  int64_t i = begin;
  for (; i + kTreeBlock * kLanes <= end; i += kTreeBlock * kLanes) {
    F32 s[kTreeBlock];
    sum_block<T>(sources, i, s);
    for (int j = 0; j < kTreeBlock; ++j) Io<T>::store(o + i + j * kLanes, s[j]);
  }
  for (; i < end; i += kLanes) store_lanes(o + i, sum_lanes<T>(sources, i, end - i), end - i);
}

// r' of a row: written to residual_out where there is one; returns the tree sum of its squares.
template <class T>
FUSEDCOMM_INLINE float add_and_square(const Sources& sources, const T* residual, T* residual_out, int64_t hidden) {
  const bool is_sum = sources.count > 1;
  const T* const single = static_cast<const T*>(sources.rows[0]);
  TreeSum squares;
  for (int64_t i = 0; i < hidden; i += kTreeBlock * kLanes) {
    F32 r[kTreeBlock];
    if (i + kTreeBlock * kLanes <= hidden) {
      if (is_sum) {
        sum_block<T>(sources, i, r);
      } else {
        for (int j = 0; j < kTreeBlock; ++j) r[j] = Io<T>::load(single + i + j * kLanes);
      }
      for (int j = 0; j < kTreeBlock; ++j) {
        if (residual != nullptr) r[j] = Io<T>::round(r[j] + Io<T>::load(residual + i + j * kLanes));
        if (residual_out != nullptr) Io<T>::store(residual_out + i + j * kLanes, r[j]);
        r[j] *= r[j];
      }
    } else {
      for (int j = 0; j < kTreeBlock; ++j) {
        const int64_t at = i + j * kLanes, left = hidden - at;
        r[j] = F32{};
        if (left <= 0) continue;
        r[j] = is_sum ? sum_lanes<T>(sources, at, left) : load_lanes(single + at, left);
        if (residual != nullptr) r[j] = Io<T>::round(r[j] + load_lanes(residual + at, left));
        if (residual_out != nullptr) store_lanes(residual_out + at, r[j], left);
        r[j] *= r[j];
      }
    }
    squares.append(r);
  }
  return squares.finish();
}

template <class Format>
FUSEDCOMM_INLINE void finish_group(const float* y, I32 magnitude, const QuantTarget& quant, int64_t hidden, int64_t row,
                                   int64_t group) {
  float scale = group_scale(magnitude, Format::kMax);
  if (quant.packed_scale != nullptr) {
    const uint32_t exponent = ceil_exponent(scale);
    // 255 is E8M0's NaN: the values of such a group are NaN as well
    scale = bit_cast<float>(exponent == 255u ? 0x7fc00000u : exponent << 23);
    int32_t* const word = quant.packed_scale + row * quant.row_stride + group / 4 * quant.group_stride;
    reinterpret_cast<uint8_t*>(word)[group % 4] = uint8_t(exponent);
  } else {
    quant.scale[row * quant.row_stride + group * quant.group_stride] = scale;
  }
  quantize_group<Format>(y, quant.group_size, scale, quant.fp8 + row * hidden + group * quant.group_size);
}

// The bytes of the last packed word that no group owns.
inline void clear_packed_tail(const QuantTarget& quant, int64_t hidden, int64_t row) {
  if (quant.packed_scale == nullptr) return;
  const int64_t groups = hidden / quant.group_size;
  if (groups % 4 == 0) return;
  int32_t* const word = quant.packed_scale + row * quant.row_stride + groups / 4 * quant.group_stride;
  for (int64_t b = groups % 4; b < 4; ++b) reinterpret_cast<uint8_t*>(word)[b] = 0;
}

template <class T>
FUSEDCOMM_INLINE F32 normalize(F32 r, F32 inv, F32 weight) {
  return Io<T>::round(r * inv * weight);
}

// One row: r' and its mean of squares, then the normed (and quantised) values. Format void: no quantisation.
template <class T, class Format>
FUSEDCOMM_INLINE void norm_row(const Sources& row_sources, const NormTarget& target, int64_t row) {
  const int64_t hidden = target.hidden;
  const T* const residual =
      target.residual == nullptr ? nullptr : static_cast<const T*>(target.residual) + row * hidden;
  T* const residual_out =
      target.residual_out == nullptr ? nullptr : static_cast<T*>(target.residual_out) + row * hidden;
  T* const norm = target.norm == nullptr ? nullptr : static_cast<T*>(target.norm) + row * hidden;

  const float squares = add_and_square<T>(row_sources, residual, residual_out, hidden);
  const F32 inv = splat(1.0f / std::sqrt(squares / float(hidden) + target.eps));
  // r' comes back from the first-level cache: the row has just been written there.
  const T* const r = residual_out != nullptr ? residual_out : static_cast<const T*>(row_sources.rows[0]);

  if constexpr (std::is_void_v<Format>) {
    for (int64_t i = 0; i < hidden; i += kLanes) {
      const int64_t left = hidden - i;
      store_lanes(norm + i, normalize<T>(load_lanes(r + i, left), inv, load_lanes(target.weight + i, left)), left);
    }
  } else {
    const QuantTarget& quant = target.quant;
    float y[kMaxGroupSize];
    for (int64_t group = 0, i = 0; i < hidden; ++group) {
      I32 magnitude = {};
      for (int64_t j = 0; j < quant.group_size; j += kLanes, i += kLanes) {
        const F32 v = normalize<T>(Io<T>::load(r + i), inv, load_bits<F32>(target.weight + i));
        magnitude = max_magnitude(magnitude, v);
        store_bits(y + j, v);
        if (norm != nullptr) Io<T>::store(norm + i, v);
      }
      finish_group<Format>(y, magnitude, quant, hidden, row, group);
    }
    clear_packed_tail(quant, hidden, row);
  }
}

template <class T, class Format>
void norm(const Sources& sources, const NormTarget& target, int64_t first_row, int64_t num_rows) {
  Sources row = sources;
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int r = 0; r < sources.count; ++r) row.rows[r] = static_cast<const T*>(sources.rows[r]) + i * target.hidden;
    norm_row<T, Format>(row, target, first_row + i);
  }
}

template <class T, class Format>
void quant(const void* x, int64_t hidden, const QuantTarget& target, int64_t first_row, int64_t num_rows) {
  float y[kMaxGroupSize];
  for (int64_t row = first_row; row < first_row + num_rows; ++row) {
    const T* p = static_cast<const T*>(x) + row * hidden;
    for (int64_t group = 0; group * target.group_size < hidden; ++group) {
      I32 magnitude = {};
      for (int64_t j = 0; j < target.group_size; j += kLanes, p += kLanes) {
        const F32 v = Io<T>::load(p);
        magnitude = max_magnitude(magnitude, v);
        store_bits(y + j, v);
      }
      finish_group<Format>(y, magnitude, target, hidden, row, group);
    }
    clear_packed_tail(target, hidden, row);
  }
}

template <class T>
constexpr cpu::Kernels make_kernels(const char* isa) {
  return {
      isa, &sum<T>, &norm<T, void>, {&norm<T, E4M3fn>, &norm<T, E4M3fnuz>}, {&quant<T, E4M3fn>, &quant<T, E4M3fnuz>}};
}

#define FUSEDCOMM_STRINGIZE_(x) #x
#define FUSEDCOMM_STRINGIZE(x) FUSEDCOMM_STRINGIZE_(x)

extern const cpu::Kernels kKernels[cpu::kNumDTypes];
const cpu::Kernels kKernels[cpu::kNumDTypes] = {
    make_kernels<BFloat16>(FUSEDCOMM_STRINGIZE(FUSEDCOMM_ISA)),
    make_kernels<Half>(FUSEDCOMM_STRINGIZE(FUSEDCOMM_ISA)),
    make_kernels<float>(FUSEDCOMM_STRINGIZE(FUSEDCOMM_ISA)),
};

}  // namespace fusedcomm::FUSEDCOMM_ISA
