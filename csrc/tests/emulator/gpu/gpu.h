// csrc/gpu/gpu.h, as far as sampling uses it, for the emulated GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>

#include "machine.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__
#define FUSEDCOMM_RT(name) emulated##name
#define FUSEDCOMM_PROPERTIES emulatedProperties

using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }

inline void __syncthreads() { fusedcomm::emulator::Machine::the().sync_block(); }

// Not instrumented: the machine knows of them as one access each.
template <class V, class F>
__attribute__((no_sanitize("thread"))) V emulated_atomic(V* p, const F& f) {
  fusedcomm::emulator::Machine::the().access_atomically(p);
  const V before = *p;
  *p = f(before);
  return before;
}
template <class V>
V atomicAdd(V* p, std::common_type_t<V> v) {
  return emulated_atomic(p, [v](V before) { return V(before + v); });
}
template <class V>
V atomicMax(V* p, std::common_type_t<V> v) {
  return emulated_atomic(p, [v](V before) { return std::max(before, v); });
}

// ---- the runtime ----

struct emulatedProperties {
  int multiProcessorCount, shared_bytes;
  bool has_clusters;
};
constexpr int emulatedErrorInvalidDevice = 101;

inline int emulatedGetDeviceProperties(emulatedProperties* p, int device) {
  if (device != 0) return emulatedErrorInvalidDevice;
  *p = {132, fusedcomm::emulator::kMaxSharedBytes, EMULATED_CLUSTERS != 0};
  return 0;
}
inline int emulatedMemsetAsync(void* p, int value, size_t bytes, void*) {
  std::memset(p, value, bytes);
  return 0;
}

namespace fusedcomm::gpu {

struct alignas(16) Vec {
  uint32_t w[4];
};
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int kWarpSize = EMULATED_WARP_SIZE;

inline emulator::Machine& machine() { return emulator::Machine::the(); }

template <class V>
uint64_t word_of(V v) {
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof(v));
  return word;
}
template <class V>
V from_lane(V v, int lane) {
  const uint64_t word = machine().exchange(word_of(v), lane);
  std::memcpy(&v, &word, sizeof(v));
  return v;
}

template <class V>
V shuffle_xor(V v, int mask) {
  return from_lane(v, int(threadIdx.x) % kWarpSize ^ mask);
}
template <class V>
V shuffle_up(V v, int by) {
  const int own = int(threadIdx.x) % kWarpSize;
  return from_lane(v, own < by ? own : own - by);
}
template <class V>
V shuffle(V v, int lane) {
  return from_lane(v, lane);
}
constexpr bool kReducesLanes = kWarpSize == 32;
template <class V>
V sum_of_lanes(V v) {
  for (int mask = 1; mask < kWarpSize; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}
inline uint32_t largest_of_lanes(uint32_t v) {
  for (int mask = 1; mask < kWarpSize; mask *= 2) v = std::max(v, shuffle_xor(v, mask));
  return v;
}
inline uint64_t ballot(bool holds) { return machine().vote(holds); }
inline int first_lane(uint64_t lanes) { return __builtin_ctzll(lanes); }

inline uint32_t round_to_integer(float a) { return uint32_t(std::nearbyint(a)); }
inline float divide(float a, float b) { return a / b; }
inline float reciprocal(float a) { return 1.0f / a; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float smaller(float a, float b) { return std::fmin(a, b); }

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline void* shared_memory() { return machine().shared(); }

inline void unpack_bf16(uint32_t w, float& a, float& b) {
  a = __uint_as_float(w << 16);
  b = __uint_as_float(w & 0xffff0000u);
}
inline float value_of_half(uint32_t bits) {
  const int exponent = int(bits >> 10 & 31u);
  const float fraction = float(bits & 1023u);
  const float magnitude = exponent == 31  ? (fraction == 0.0f ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(fraction, -24)
                                          : std::ldexp(fraction + 1024.0f, exponent - 25);
  return bits & 0x8000u ? -magnitude : magnitude;
}
inline void unpack_half(uint32_t w, float& a, float& b) {
  a = value_of_half(w & 0xffffu);
  b = value_of_half(w >> 16);
}

template <class T>
struct Io;
template <>
struct Io<float> {
  static void unpack(const Vec& v, float* x) { std::memcpy(x, &v, sizeof(v)); }
};

using Stream = void*;
using Status = int;
constexpr Status kOk = 0;

struct LaunchShape {
  int64_t blocks = 0;
  int parts = 1;
  int threads = 0;
  int blocks_in_cluster = 1;
  int shared_bytes = 0;
  bool overlaps = false;
};

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream, const Arguments&... arguments) {
  const std::tuple<void (*)(Parameters...), std::decay_t<Parameters>...> call(kernel, arguments...);
  machine().allow(&call, sizeof(call), false);
  const auto body = [](const void* p) {
    std::apply([](auto run, const auto&... parameters) { run(parameters...); }, *static_cast<decltype(&call)>(p));
  };
  machine().run(body, &call, {shape.blocks, shape.threads, shape.blocks_in_cluster, shape.shared_bytes, kWarpSize});
  return kOk;
}

inline int largest_shared_memory(const emulatedProperties& p) { return p.shared_bytes; }
inline Status allow_shared_memory(const void*, int) { return kOk; }
inline Status allow_large_clusters(const void*) { return kOk; }
// As of a GPU of 128 multiprocessors.
inline int clusters_at_once(const void*, int, int shared_bytes, int blocks) {
  return (2 * shared_bytes > emulator::kMaxSharedBytes ? 128 : 256) / blocks;
}
inline bool can_overlap(const emulatedProperties&) { return true; }
inline bool has_clusters(const emulatedProperties& p) { return p.has_clusters; }

}  // namespace fusedcomm::gpu
