// SIMD vectors of fp32 at the native width of the instruction set a file is compiled for, and exact conversions
// between them and the storage types.
//
// The GCC/Clang vector extension serves SSE2, AVX2, AVX-512 and NEON from one source; intrinsics appear only where it
// has no word for the instruction (fp16). Everything lives in a namespace named after the instruction set, because
// several copies are linked into one library and picked at run time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FUSEDCOMM_ISA avx512
#define FUSEDCOMM_LANES 16
#elif defined(__AVX2__)
#define FUSEDCOMM_ISA avx2
#define FUSEDCOMM_LANES 8
#else
#define FUSEDCOMM_ISA generic
#define FUSEDCOMM_LANES 4
#endif

#define FUSEDCOMM_INLINE inline __attribute__((always_inline))

namespace fusedcomm {

// Storage types: only their size and identity matter here, the bits are converted below.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace FUSEDCOMM_ISA {

constexpr int kLanes = FUSEDCOMM_LANES;

typedef float F32 __attribute__((vector_size(4 * FUSEDCOMM_LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * FUSEDCOMM_LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * FUSEDCOMM_LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * FUSEDCOMM_LANES)));
typedef uint8_t U8 __attribute__((vector_size(FUSEDCOMM_LANES)));

template <class To, class From>
FUSEDCOMM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class P>
FUSEDCOMM_INLINE V load_bits(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V, class P>
FUSEDCOMM_INLINE void store_bits(P* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

FUSEDCOMM_INLINE F32 splat(float x) { return x - F32{}; }  // x - (+0) is x for every x, -0 and NaN too
FUSEDCOMM_INLINE F32 select(I32 mask, F32 a, F32 b) { return mask ? a : b; }
FUSEDCOMM_INLINE U32 select(I32 mask, U32 a, U32 b) { return mask ? a : b; }

// Sums of neighbours, in order: (a0+a1, a2+a3, …, b0+b1, …). One level of the tree of `tree_sum.h`.
FUSEDCOMM_INLINE F32 add_neighbours(F32 a, F32 b) {
#if FUSEDCOMM_LANES == 16
#define FUSEDCOMM_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FUSEDCOMM_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif FUSEDCOMM_LANES == 8
#define FUSEDCOMM_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FUSEDCOMM_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define FUSEDCOMM_EVEN 0, 2, 4, 6
#define FUSEDCOMM_ODD 1, 3, 5, 7
#endif
#if defined(__clang__)
  return __builtin_shufflevector(a, b, FUSEDCOMM_EVEN) + __builtin_shufflevector(a, b, FUSEDCOMM_ODD);
#else
  return __builtin_shuffle(a, b, I32{FUSEDCOMM_EVEN}) + __builtin_shuffle(a, b, I32{FUSEDCOMM_ODD});
#endif
}

// ---- scalar fp16, for targets without a conversion instruction ----

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shift the exponent into place, then let one exact multiplication re-bias it: subnormals come out right too.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);  // 2^112
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the value rounded to 2^-24 in the low bits
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000u));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

// ---- Io<T>: load, store, and rounding to T kept in fp32 ----

template <class T>
struct Io;

template <>
struct Io<float> {
  static FUSEDCOMM_INLINE F32 load(const float* p) { return load_bits<F32>(p); }
  static FUSEDCOMM_INLINE void store(float* p, F32 x) { store_bits(p, x); }
  static FUSEDCOMM_INLINE F32 round(F32 x) { return x; }
};

template <>
struct Io<BFloat16> {
  static FUSEDCOMM_INLINE F32 load(const BFloat16* p) {
    return bit_cast<F32>(__builtin_convertvector(load_bits<U16>(p), U32) << 16);
  }
  // x already rounded
  static FUSEDCOMM_INLINE void store(BFloat16* p, F32 x) {
    store_bits(p, __builtin_convertvector(bit_cast<U32>(x) >> 16, U16));
  }
  static FUSEDCOMM_INLINE F32 round(F32 x) {
    const U32 bits = bit_cast<U32>(x);
    const U32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    const U32 quiet_nan = U32{} + 0x7fc00000u;
    return bit_cast<F32>(select(x != x, quiet_nan, rounded));
  }
};

template <>
struct Io<Half> {
  static FUSEDCOMM_INLINE F32 load(const Half* p) {
#if FUSEDCOMM_LANES == 16
    // The masked forms: GCC 12 warns about its own headers' undefined operand in the plain ones.
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bit_cast<F32>(_mm512_maskz_cvtph_ps(0xffff, h));
#elif FUSEDCOMM_LANES == 8 && defined(__F16C__)
    return bit_cast<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    F32 x;
    for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i].bits);
    return x;
#endif
  }
  static FUSEDCOMM_INLINE void store(Half* p, F32 x) {
#if FUSEDCOMM_LANES == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif FUSEDCOMM_LANES == 8 && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(x[i]);
#endif
  }
  static FUSEDCOMM_INLINE F32 round(F32 x) {
    Half h[kLanes];
    store(h, x);
    return load(h);
  }
};

// The last vector of a row whose length is no multiple of the width: missing lanes read as +0 and are not written.
template <class T>
FUSEDCOMM_INLINE F32 load_partial(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, size_t(n) * sizeof(T));
  return Io<T>::load(padded);
}

template <class T>
FUSEDCOMM_INLINE void store_partial(T* p, F32 x, int64_t n) {
  T padded[kLanes];
  Io<T>::store(padded, x);
  std::memcpy(p, padded, size_t(n) * sizeof(T));
}

}  // namespace FUSEDCOMM_ISA
}  // namespace fusedcomm
