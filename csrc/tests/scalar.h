// The arithmetic of the specification, one scalar at a time, without any of the kernels' headers: what tests expect.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace fusedcomm::test {

using cpu::DType;
using cpu::Fp8Format;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The two neighbours are compared exactly in fp64; ties go to the even one.
inline double round_to_quantum(double magnitude, double quantum) {
  const double steps = std::floor(magnitude / quantum);  // exact: both are dyadic and far from the limits
  const double below = magnitude - steps * quantum, above = (steps + 1) * quantum - magnitude;
  const bool up = above < below || (above == below && std::fmod(steps, 2.0) != 0.0);
  return (steps + (up ? 1 : 0)) * quantum;
}

// A binary format with `precision` bits of significand and this range of exponents, by its definition.
inline float round_to_format(float x, int precision, int min_exponent, double largest) {
  if (std::isnan(x) || std::isinf(x) || x == 0.0f) return x;
  const double magnitude = std::fabs(double(x));
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = m * 2^exponent, m in [0.5, 1)
  const int last_bit = std::max(exponent, min_exponent + 1) - precision;
  double rounded = round_to_quantum(magnitude, std::ldexp(1.0, last_bit));
  if (rounded > largest) rounded = std::numeric_limits<double>::infinity();
  return float(std::copysign(rounded, double(x)));
}

inline float round_to(float x, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return round_to_format(x, 8, -126, std::ldexp(255.0, 120));
    case DType::kHalf:
      return round_to_format(x, 11, -14, 65504.0);
    case DType::kFloat:
      break;
  }
  return x;
}

inline float load(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat) return static_cast<const float*>(p)[i];
  const uint32_t bits = static_cast<const uint16_t*>(p)[i];
  if (dtype == DType::kBFloat16) return float_of(bits << 16);
  const int exponent = int(bits >> 10 & 31u);
  const double fraction = double(bits & 1023u) / 1024.0;
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == 31) return float(fraction == 0.0 ? sign * INFINITY : NAN);
  return float(sign * (exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1.0 + fraction, exponent - 15)));
}

// x is a value of the type (rounded already).
inline void store(void* p, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat) {
    static_cast<float*>(p)[i] = x;
    return;
  }
  uint32_t bits = 0;
  if (dtype == DType::kBFloat16) {
    bits = std::isnan(x) ? 0x7fc0u : bits_of(x) >> 16;
  } else if (std::isnan(x)) {
    bits = 0x7e00u;
  } else {
    const double magnitude = std::fabs(double(x));
    if (std::isinf(x)) {
      bits = 0x7c00u;
    } else if (magnitude < std::ldexp(1.0, -14)) {
      bits = uint32_t(magnitude * std::ldexp(1.0, 24));
    } else {
      int exponent;
      const double m = std::frexp(magnitude, &exponent);  // [0.5, 1)
      bits = uint32_t(exponent + 14) << 10 | (uint32_t(m * 2048.0) & 1023u);
    }
    bits |= std::signbit(x) ? 0x8000u : 0u;
  }
  static_cast<uint16_t*>(p)[i] = uint16_t(bits);
}

inline float rank_order_sum(const std::vector<const void*>& sources, DType dtype, int64_t i) {
  float sum = 0.0f;
  for (const void* source : sources) sum += load(source, dtype, i);
  return round_to(sum, dtype);
}

// s[i] = s[2i] + s[2i+1] over the row padded with zeros to a power of two.
inline float tree_sum(std::vector<float> s) {
  size_t size = 1;
  while (size < s.size()) size *= 2;
  s.resize(size, 0.0f);
  for (; size > 1; size /= 2) {
    for (size_t i = 0; i < size / 2; ++i) s[i] = s[2 * i] + s[2 * i + 1];
  }
  return s[0];
}

// r' is given; the normed row, rounded.
inline std::vector<float> norm_row(const std::vector<float>& r, const float* weight, float eps, DType dtype) {
  std::vector<float> squares(r.size());
  for (size_t i = 0; i < r.size(); ++i) squares[i] = r[i] * r[i];
  const float mean = tree_sum(squares) / float(r.size());
  const float root = std::sqrt(mean + eps);
  const float inv = 1.0f / root;
  std::vector<float> y(r.size());
  for (size_t i = 0; i < r.size(); ++i) {
    const float scaled = r[i] * inv;
    y[i] = round_to(scaled * weight[i], dtype);
  }
  return y;
}

inline float fp8_max(Fp8Format format) { return format == Fp8Format::kE4M3fn ? 448.0f : 240.0f; }
inline uint8_t fp8_nan(Fp8Format format) { return format == Fp8Format::kE4M3fn ? 0x7f : 0x80; }
inline bool is_fp8_nan(uint8_t code, Fp8Format format) {
  return format == Fp8Format::kE4M3fn ? (code & 0x7f) == 0x7f : code == 0x80;
}

inline uint8_t to_fp8(float x, Fp8Format format) {
  if (std::isnan(x)) return fp8_nan(format);
  const int bias = format == Fp8Format::kE4M3fn ? 7 : 8;
  const double magnitude = std::fmin(std::fabs(double(x)), double(fp8_max(format)));
  int exponent = 1 - bias;
  if (magnitude > 0.0) {
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent - 1, 1 - bias);
  }
  const double quantum = std::ldexp(1.0, exponent - 3);
  const uint32_t steps = uint32_t(round_to_quantum(magnitude, quantum) / quantum);  // 0 … 16
  // a normal number has 8 … 15 steps of its binade; 16 carry into the next, which the addition does by itself
  const uint32_t code = steps < 8 && exponent == 1 - bias ? steps : (uint32_t(exponent + bias - 1) << 3) + steps;
  const bool negative = std::signbit(x) && (code != 0 || format == Fp8Format::kE4M3fn);
  return uint8_t(code | (negative ? 0x80u : 0u));
}

struct QuantizedGroup {
  float scale;       // what the values are divided by
  uint8_t exponent;  // biased, for UE8M0
  std::vector<uint8_t> codes;
};

inline QuantizedGroup quantize(const float* y, int64_t size, Fp8Format format, bool ue8m0) {
  float amax = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    if (std::isnan(y[i])) amax = NAN;
    if (!(std::fabs(y[i]) <= amax) && !std::isnan(amax)) amax = std::fabs(y[i]);
  }
  QuantizedGroup group;
  group.scale = (amax < 1e-10f ? 1e-10f : amax) / fp8_max(format);
  group.exponent = 0;
  if (ue8m0) {
    if (!std::isfinite(group.scale)) {
      group.exponent = 255;
      group.scale = NAN;
    } else {
      int exponent;
      const float mantissa = std::frexp(group.scale, &exponent);
      if (mantissa == 0.5f) --exponent;
      group.exponent = uint8_t(exponent + 127);
      group.scale = std::ldexp(1.0f, exponent);
    }
  }
  for (int64_t i = 0; i < size; ++i) group.codes.push_back(to_fp8(y[i] / group.scale, format));
  return group;
}

// The same bits, or NaN and NaN.
inline bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || bits_of(a) == bits_of(b); }

}  // namespace fusedcomm::test
