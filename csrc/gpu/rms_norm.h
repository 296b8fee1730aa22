// What follows the sum: residual addition, RMSNorm and per-group FP8 quantisation of a row in registers, with the
// rounding points of the unfused sequence.
#pragma once

#include "gpu/arguments.h"
#include "gpu/cluster.h"
#include "gpu/quotient.h"

namespace fusedcomm::gpu {

constexpr float kMinAmax = 1e-10f;
constexpr float kFp8Max = kFp8IsFnuz ? 240.0f : 448.0f;

// 8 elements of T as they lie in memory; 16-byte aligned.
template <class T>
struct Pack {
  static constexpr int kVecs = kPack / Io<T>::kPerVec;
  Vec v[kVecs];

  __device__ static Pack load(const void* base, int64_t pack) {
    Pack p;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) p.v[i] = (static_cast<const Vec*>(base) + pack * kVecs)[i];
    return p;
  }
  __device__ static Pack of(const float (&f)[kPack]) {
    Pack p;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) p.v[i] = Io<T>::pack(f + i * Io<T>::kPerVec);
    return p;
  }
  __device__ void store(void* base, int64_t pack) const {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) (static_cast<Vec*>(base) + pack * kVecs)[i] = v[i];
  }
  __device__ void unpack(float (&f)[kPack]) const {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) Io<T>::unpack(v[i], f + i * Io<T>::kPerVec);
  }
};

// A pack of the weight as it lies in memory, in T or fp32.
template <class T>
struct Weight {
  Vec v[kPack * sizeof(float) / sizeof(Vec)];

  __device__ static Weight load(const NormArguments& a, uint32_t pack) {
    Weight w;
    if (a.weight_is_fp32) {
      fill(w, Pack<float>::load(a.weight, pack));
    } else {
      fill(w, Pack<T>::load(a.weight, pack));
    }
    return w;
  }

  // fp32(weight) + weight_bias
  __device__ void values(const NormArguments& a, float (&f)[kPack]) const {
    if (a.weight_is_fp32) {
      as<float>().unpack(f);
    } else {
      as<T>().unpack(f);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) f[i] += a.weight_bias;
  }

 private:
  template <class U>
  __device__ static void fill(Weight& w, const Pack<U>& p) {
#pragma unroll
    for (int i = 0; i < Pack<U>::kVecs; ++i) w.v[i] = p.v[i];
  }
  template <class U>
  __device__ Pack<U> as() const {
    Pack<U> p;
#pragma unroll
    for (int i = 0; i < Pack<U>::kVecs; ++i) p.v[i] = v[i];
    return p;
  }
};

template <class T>
__device__ inline Pack<T> load_residual(const NormArguments& a, int64_t pack_of_call) {
  return a.residual != nullptr ? Pack<T>::load(a.residual, pack_of_call) : Pack<T>{};
}

constexpr float kInfinity = __builtin_huge_valf();

__device__ inline float inverse_root(float sum_of_squares, const NormArguments& a) {
  const float hidden = float(a.hidden);
  const bool is_plain = sum_of_squares > 1e-24f && sum_of_squares < kInfinity;
  const float mean = is_plain ? quotient<2>(sum_of_squares, hidden, a.inverse_hidden) : divide(sum_of_squares, hidden);
  return reciprocal(square_root(mean + a.eps));
}

__device__ inline float clamp_fp8(float q) {
  if (kFp8Saturates) return q;
  q = q > kFp8Max ? kFp8Max : q;  // NaN compares false and stays
  return q < -kFp8Max ? -kFp8Max : q;
}

// The largest over `lanes` neighbouring lanes, a power of two.
__device__ inline uint32_t largest_of(uint32_t v, int lanes) {
  if (lanes == 16) {  // a group of 128
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) v = max(v, shuffle_xor(v, mask));
    return v;
  }
#pragma unroll 1
  for (int mask = 1; mask < lanes; mask *= 2) v = max(v, shuffle_xor(v, mask));
  return v;
}

__device__ inline void store_packed_scale(const QuantTarget& q, int64_t row, uint32_t group, uint32_t groups,
                                          uint32_t exponent) {
  uint8_t* const word = reinterpret_cast<uint8_t*>(q.packed_scale + row * q.row_stride + group / 4 * q.group_stride);
  word[group % 4] = uint8_t(exponent);
  if (group != groups - 1) return;
#pragma unroll 1
  for (uint32_t i = group % 4 + 1; i < 4; ++i) word[i] = 0;
}

// Quantises pack `pack` of a row of T; the group's other packs are in the neighbouring lanes, which all call it.
template <class T>
__device__ inline void quantize_pack(const QuantTarget& q, int64_t row, uint32_t pack, int hidden,
                                     const float (&y)[kPack], bool active) {
  const int log_lanes = 28 - leading_zeros(uint32_t(q.group_size));  // 31 - … is the logarithm, and a pack is 8
  // Compared as integers, a NaN is larger than everything and so survives.
  uint32_t magnitude = 0;
#pragma unroll
  for (int i = 0; i < kPack; ++i) magnitude = max(magnitude, __float_as_uint(y[i]) & 0x7fffffffu);
  magnitude = largest_of(magnitude, 1 << log_lanes);
  if (!active) return;

  float amax = __uint_as_float(magnitude);
  amax = amax < kMinAmax ? kMinAmax : amax;
  float scale = amax < kInfinity ? quotient<1>(amax, kFp8Max, 1.0f / kFp8Max) : amax;
  const uint32_t group = pack >> log_lanes;
  const bool is_first = group << log_lanes == pack;
  if (q.packed_scale != nullptr) {
    uint32_t exponent = (__float_as_uint(scale) + 0x7fffffu) >> 23;
    exponent = exponent > 255u ? 255u : exponent;
    scale = __uint_as_float(exponent == 255u ? 0x7fc00000u : exponent << 23);
    if (is_first) store_packed_scale(q, row, group, uint32_t(hidden / kPack) >> log_lanes, exponent);
  } else if (is_first) {
    q.scale[row * q.row_stride + int64_t(group) * q.group_stride] = scale;
  }

  float v[kPack];
  if (scale < kInfinity) {
    const float r = reciprocal(scale);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float q = quotient<sizeof(T) == 2 ? 1 : 2>(y[i], scale, r);
      v[i] = clamp_fp8(copysignf(q, y[i]));  // the last step makes +0 of -0
    }
  } else {
    const float r = scale == kInfinity ? 0.0f : scale;  // 1 / scale, or NaN
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = clamp_fp8(y[i] * r);
  }
  uint2 codes;
  codes.x = pack_fp8(v[0], v[1], v[2], v[3]);
  codes.y = pack_fp8(v[4], v[5], v[6], v[7]);
  *reinterpret_cast<uint2*>(q.fp8 + row * hidden + int64_t(pack) * kPack) = codes;
}

// r' of a pack: the sum plus the residual, rounded. Returns its squares' sum.
template <class T>
__device__ inline float add_residual(const NormArguments& a, const Pack<T>& residual, Pack<T>& r) {
  float f[kPack];
  r.unpack(f);
  if (a.residual != nullptr) {
    float addend[kPack];
    residual.unpack(addend);
#pragma unroll
    for (int i = 0; i < kPack; ++i) f[i] += addend[i];
    r = Pack<T>::of(f);
    r.unpack(f);
  }
  return sum_of_squares(f);
}

// y of a pack, and what is wanted of it. All lanes of the warp call it; inactive ones write nothing.
template <class T>
__device__ inline void finish_pack(const NormArguments& a, int64_t row, uint32_t pack, float inv,
                                   const Weight<T>& weight, const Pack<T>& r, bool active) {
  float w[kPack], y[kPack];
  weight.values(a, w);
  r.unpack(y);
#pragma unroll
  for (int i = 0; i < kPack; ++i) y[i] = y[i] * inv * w[i];
  const Pack<T> rounded = Pack<T>::of(y);
  if (a.norm != nullptr && active) rounded.store(a.norm, row * (a.hidden / kPack) + pack);
  if (a.quant.fp8 != nullptr) {
    rounded.unpack(y);
    quantize_pack<T>(a.quant, row, pack, a.hidden, y, active);
  }
}

}  // namespace fusedcomm::gpu
