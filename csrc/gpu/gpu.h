// Everything in which CUDA and HIP differ. The rest of csrc/gpu is written once.
#pragma once

#include <cstdint>
#include <string>

#if defined(__HIP__)

#include <hip/hip_runtime.h>
#define FUSEDCOMM_HIP 1
#define FUSEDCOMM_RT(name) hip##name  // the runtime's functions and types
#define __grid_constant__

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#define FUSEDCOMM_RT(name) cuda##name

#endif

namespace fusedcomm::gpu {

// What a thread moves at a time.
struct alignas(16) Vec {
  uint32_t w[4];
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(FUSEDCOMM_HIP)

#if defined(__gfx942__)
constexpr bool kFp8IsFnuz = true;
#else
constexpr bool kFp8IsFnuz = false;
#endif
constexpr int kWarpSize = 64;
constexpr bool kFp8Saturates = false;

// System scope: past the caches that other GPUs do not see (sc0 sc1). The memory is fine-grained or uncached.
__device__ inline Vec load_flagged(const Vec* p) {
  const uint64_t* q = reinterpret_cast<const uint64_t*>(p);
  const uint64_t a = __hip_atomic_load(q, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
  const uint64_t b = __hip_atomic_load(q + 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
  return {{uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)}};
}

// One 16-byte store: two of 8 bytes would send each 64-byte line over the link twice.
__device__ inline void store_flagged(Vec* p, const Vec& v) {
  typedef uint32_t Words __attribute__((ext_vector_type(4)));
  const Words words = {v.w[0], v.w[1], v.w[2], v.w[3]};
  asm volatile("global_store_dwordx4 %0, %1, off sc0 sc1" ::"v"(p), "v"(words) : "memory");
}

// Past the caches of one multiprocessor, which may hold what an earlier kernel saw.
__device__ inline uint32_t load_counter(const uint32_t* p) {
  return __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

__device__ inline uint32_t load_host(const uint32_t* p) {
  return __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
__device__ inline void store_host(uint32_t* p, uint32_t v) {
  __hip_atomic_store(p, v, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
}

template <class V>
__device__ inline V shuffle_xor(V v, int mask) {
  return __shfl_xor(v, mask, kWarpSize);
}
template <class V>
__device__ inline V shuffle_up(V v, int by) {
  return __shfl_up(v, unsigned(by), kWarpSize);
}
template <class V>
__device__ inline V shuffle(V v, int lane) {
  return __shfl(v, lane, kWarpSize);
}

// In all lanes.
constexpr bool kReducesLanes = false;  // 32 bits in one instruction
template <class V>
__device__ inline V sum_of_lanes(V v) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}
__device__ inline uint32_t largest_of_lanes(uint32_t v) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    const uint32_t other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

// A bit for each lane, and the first lane that has one.
__device__ inline uint64_t ballot(bool holds) { return __ballot(holds); }
__device__ inline int first_lane(uint64_t lanes) { return __builtin_ctzll(lanes); }  // lanes > 0

// Of numbers.
__device__ inline float larger(float a, float b) { return __builtin_fmaxf(a, b); }
__device__ inline float smaller(float a, float b) { return __builtin_fminf(a, b); }

// Constant frequency: see ticks_per_second().
__device__ inline uint64_t ticks() { return __builtin_amdgcn_s_memrealtime(); }

// The compiler takes v for used.
__device__ inline void keep(uint32_t v) { asm volatile("" ::"s"(v)); }

__device__ inline void wait_for_previous_kernel() {}
__device__ inline void let_next_kernel_start() {}

__device__ inline void pin(char*&) {}

__device__ inline int leading_zeros(uint32_t v) { return __builtin_clz(v); }  // v > 0

__device__ inline float divide(float a, float b) { return a / b; }  // correctly rounded: clang's default for HIP
__device__ inline float reciprocal(float a) { return 1.0f / a; }
__device__ inline float square_root(float a) { return __builtin_sqrtf(a); }
__device__ inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__device__ inline uint32_t round_to_integer(float a) { return uint32_t(__builtin_rintf(a)); }  // half to even

// NaN as on other devices, whatever its sign and payload were.
__device__ inline float plain_nan(float x) { return x != x ? __uint_as_float(0x7fff0000u) : x; }

__device__ inline uint32_t pack_bf16(float a, float b) {
  typedef float Floats __attribute__((ext_vector_type(2)));
  typedef __bf16 BFloats __attribute__((ext_vector_type(2)));
  const Floats pair = {plain_nan(a), plain_nan(b)};
  return __builtin_bit_cast(uint32_t, __builtin_convertvector(pair, BFloats));
}

__device__ inline uint32_t pack_half(float a, float b) {
  const _Float16 h[2] = {_Float16(a), _Float16(b)};
  return __builtin_bit_cast(uint32_t, h);
}
__device__ inline void unpack_half(uint32_t w, float& a, float& b) {
  struct Pair {
    _Float16 a, b;
  };
  const Pair pair = __builtin_bit_cast(Pair, w);
  a = float(pair.a);
  b = float(pair.b);
}

// Four values in [-max, max] or NaN: the instruction need not saturate. It rounds to nearest even in the format of its
// chip: FNUZ on gfx942, OCP on gfx950.
__device__ inline uint32_t pack_fp8(float a, float b, float c, float d) {
  int word = __builtin_amdgcn_cvt_pk_fp8_f32(plain_nan(a), plain_nan(b), 0, false);
  word = __builtin_amdgcn_cvt_pk_fp8_f32(plain_nan(c), plain_nan(d), word, true);
  return uint32_t(word);
}

#else  // CUDA

constexpr bool kFp8IsFnuz = false;
constexpr int kWarpSize = 32;
constexpr bool kFp8Saturates = true;

// Each 32-bit word arrives whole; nothing is assumed of the order of the four.
__device__ inline Vec load_flagged(const Vec* p) {
  Vec v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
}

__device__ inline void store_flagged(Vec* p, const Vec& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3]));
}

// Past the caches of one multiprocessor, which may hold what an earlier kernel saw.
__device__ inline uint32_t load_counter(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ inline uint32_t load_host(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ inline void store_host(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

template <class V>
__device__ inline V shuffle_xor(V v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class V>
__device__ inline V shuffle_up(V v, int by) {
  return __shfl_up_sync(0xffffffffu, v, unsigned(by));
}
template <class V>
__device__ inline V shuffle(V v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

// In all lanes.
constexpr bool kReducesLanes = true;  // 32 bits in one instruction
__device__ inline uint32_t sum_of_lanes(uint32_t v) { return __reduce_add_sync(0xffffffffu, v); }
__device__ inline uint32_t largest_of_lanes(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }

// A bit for each lane, and the first lane that has one.
__device__ inline uint64_t ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }
__device__ inline int first_lane(uint64_t lanes) { return __ffsll(static_cast<long long>(lanes)) - 1; }  // lanes > 0

// Of numbers.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline float smaller(float a, float b) { return fminf(a, b); }

__device__ inline uint64_t ticks() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// The compiler takes v for used.
__device__ inline void keep(uint32_t v) { asm volatile("" ::"r"(v)); }

__device__ inline int leading_zeros(uint32_t v) { return __clz(int(v)); }

// Programmatic dependent launch: a kernel may be on the chip before the one ahead of it has ended. It touches nothing
// until that one has ended and its writes are visible, so letting the next one start early is safe at any point.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The compiler holds p in a register instead of reading it from constant memory at each use.
__device__ inline void pin(char*& p) { asm volatile("" : "+l"(p)); }

__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float reciprocal(float a) { return __frcp_rn(a); }
__device__ inline float square_root(float a) { return __fsqrt_rn(a); }
__device__ inline float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline uint32_t round_to_integer(float a) { return __float2uint_rn(a); }  // half to even

__device__ inline uint32_t pack_bf16(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t pack_half(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline void unpack_half(uint32_t w, float& a, float& b) {
  const float2 pair = __half22float2(reinterpret_cast<const __half2&>(w));
  a = pair.x;
  b = pair.y;
}

__device__ inline uint32_t pack_fp8(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return high << 16 | low;
}

#endif

// Time in units that fit a register for days: 2^kCoarse ticks.
constexpr int kCoarse = 16;
__device__ inline uint32_t coarse_ticks() { return uint32_t(ticks() >> kCoarse); }

// The shared memory that a launch asks for (LaunchShape.shared_bytes).
__device__ inline void* shared_memory() {
  extern __shared__ Vec dynamic_memory[];
  return dynamic_memory;
}

// Reads a kernel's arguments, which are constant, into the constant cache. Done while the kernel ahead still runs: a
// first read misses, and the misses of several lines add up.
template <class Arguments>
__device__ inline void prefetch_arguments(const Arguments& arguments) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(&arguments);
#pragma unroll
  for (size_t i = 0; i < sizeof(Arguments) / 4; i += 16) keep(words[i]);
  keep(words[sizeof(Arguments) / 4 - 1]);
}

__device__ inline void unpack_bf16(uint32_t w, float& a, float& b) {
  a = __uint_as_float(w << 16);
  b = __uint_as_float(w & 0xffff0000u);
}

// Elements of type T in a Vec, as fp32. pack() rounds to nearest even.
template <class T>
struct Io;

template <>
struct Io<BFloat16> {
  static constexpr int kPerVec = 8;
  __device__ static Vec minus_zero() { return {{0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u}}; }
  __device__ static void unpack(const Vec& v, float* f) {
    for (int i = 0; i < 4; ++i) unpack_bf16(v.w[i], f[2 * i], f[2 * i + 1]);
  }
  __device__ static Vec pack(const float* f) {
    Vec v;
    for (int i = 0; i < 4; ++i) v.w[i] = pack_bf16(f[2 * i], f[2 * i + 1]);
    return v;
  }
};

template <>
struct Io<Half> {
  static constexpr int kPerVec = 8;
  __device__ static Vec minus_zero() { return Io<BFloat16>::minus_zero(); }
  __device__ static void unpack(const Vec& v, float* f) {
    for (int i = 0; i < 4; ++i) unpack_half(v.w[i], f[2 * i], f[2 * i + 1]);
  }
  __device__ static Vec pack(const float* f) {
    Vec v;
    for (int i = 0; i < 4; ++i) v.w[i] = pack_half(f[2 * i], f[2 * i + 1]);
    return v;
  }
};

template <>
struct Io<float> {
  static constexpr int kPerVec = 4;
  __device__ static Vec minus_zero() { return {{0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u}}; }
  __device__ static void unpack(const Vec& v, float* f) {
    for (int i = 0; i < 4; ++i) f[i] = __uint_as_float(v.w[i]);
  }
  __device__ static Vec pack(const float* f) {
    Vec v;
    for (int i = 0; i < 4; ++i) v.w[i] = __float_as_uint(f[i]);
    return v;
  }
};

// ---- host ----

using Stream = FUSEDCOMM_RT(Stream_t);
using Status = FUSEDCOMM_RT(Error_t);
constexpr Status kOk = FUSEDCOMM_RT(Success);

struct LaunchShape {
  int64_t blocks = 0;
  int parts = 1;  // the grid's second dimension
  int threads = 0;
  int blocks_in_cluster = 1;
  int shared_bytes = 0;   // of a block, beside what the kernel declares; allow_shared_memory() first
  bool overlaps = false;  // behind another that overlaps, it may start before that one ends: it waits by itself
};

#if defined(FUSEDCOMM_HIP)

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  (void)hipGetLastError();  // of another call, and not this launch's
  kernel<<<dim3(unsigned(shape.blocks), unsigned(shape.parts)), dim3(unsigned(shape.threads)),
           unsigned(shape.shared_bytes), stream>>>(arguments...);
  return hipGetLastError();
}

// Uncached, so that peers' stores and this GPU's loads meet in memory.
inline Status allocate_slab(void** address, int64_t bytes) {
  return hipExtMallocWithFlags(address, size_t(bytes), hipDeviceMallocUncached);
}

inline Status allocate_host_page(void** address, size_t bytes) {
  return hipHostMalloc(address, bytes, hipHostMallocMapped | hipHostMallocCoherent);
}
inline void free_host_page(void* address) { (void)hipHostFree(address); }

#define FUSEDCOMM_PROPERTIES hipDeviceProp_t
inline bool can_overlap(const hipDeviceProp_t&) { return false; }
inline int largest_shared_memory(const hipDeviceProp_t& p) { return int(p.sharedMemPerBlock); }
inline Status allow_shared_memory(const void*, int) { return hipSuccess; }
inline Status allow_large_clusters(const void*) { return hipSuccess; }
inline int clusters_at_once(const void*, int, int, int) { return 0; }
inline bool has_clusters(const hipDeviceProp_t&) { return false; }
// Without the features: "gfx942" of "gfx942:sramecc+:xnack-".
inline std::string architecture(const hipDeviceProp_t& p) {
  const std::string name = p.gcnArchName;
  return name.substr(0, name.find(':'));
}

inline uint64_t ticks_per_second(int device) {
  int khz = 0;
  if (hipDeviceGetAttribute(&khz, hipDeviceAttributeWallClockRate, device) != hipSuccess || khz <= 0) khz = 100000;
  return uint64_t(khz) * 1000;
}

#else

// Of a call whose error is the caller's to tell: it does not stay for the next one to find.
inline Status told(Status status) {
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status;
}

// What the next work of a stream that is being captured depends on.
struct CapturedTail {
  unsigned long long capture = 0;  // 0: nothing is being captured
  cudaGraphNode_t node = nullptr;  // null: none, or several
};

inline CapturedTail captured_tail(Stream stream) {
  CapturedTail tail;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaGraphEdgeData* edges = nullptr;
  const Status error = cudaStreamGetCaptureInfo(stream, &status, &tail.capture, nullptr, &nodes, &edges, &count);
#else
  const Status error = cudaStreamGetCaptureInfo_v2(stream, &status, &tail.capture, nullptr, &nodes, &count);
#endif
  if (error != cudaSuccess) (void)cudaGetLastError();
  if (error != cudaSuccess || status != cudaStreamCaptureStatusActive) return {};
  if (count == 1) tail.node = nodes[0];
  return tail;
}

// The last kernel that this thread captured and that lets the next one start.
inline thread_local CapturedTail last_captured;

// Programmatic dependent launch takes 0.7 us off the way from a kernel of this library to the next, and adds 0.2 us
// behind any other (docs/tuning.md). Only in a graph is it known what is ahead, and does it count: elsewhere the host
// takes longer to launch than most kernels to run.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.blocks), unsigned(shape.parts));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  const CapturedTail ahead = shape.overlaps ? captured_tail(stream) : CapturedTail();
  if (ahead.node != nullptr && ahead.node == last_captured.node && ahead.capture == last_captured.capture) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.blocks_in_cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = unsigned(shape.blocks_in_cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  config.attrs = attributes;
  const Status status = told(cudaLaunchKernelEx(&config, kernel, arguments...));
  if (ahead.capture != 0) last_captured = captured_tail(stream);
  return status;
}

inline Status allocate_slab(void** address, int64_t bytes) { return cudaMalloc(address, size_t(bytes)); }

inline Status allocate_host_page(void** address, size_t bytes) {
  return cudaHostAlloc(address, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
}
inline void free_host_page(void* address) { (void)cudaFreeHost(address); }

#define FUSEDCOMM_PROPERTIES cudaDeviceProp
inline bool can_overlap(const cudaDeviceProp& p) { return p.major >= 9; }
inline int largest_shared_memory(const cudaDeviceProp& p) { return int(p.sharedMemPerBlockOptin); }
// On the current device, once for a kernel that takes more than 48 KiB.
inline Status allow_shared_memory(const void* kernel, int bytes) {
  return told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}
inline bool has_clusters(const cudaDeviceProp& p) { return p.major >= 9; }
// Of more than 8 blocks, which not every GPU has. On the current device, once for a kernel.
inline Status allow_large_clusters(const void* kernel) {
  return told(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}
// 0: the current device has none so large.
inline int clusters_at_once(const void* kernel, int threads, int shared_bytes, int blocks) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  return told(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) == cudaSuccess ? clusters : 0;
}
inline std::string architecture(const cudaDeviceProp& p) { return "sm_" + std::to_string(p.major * 10 + p.minor); }

inline uint64_t ticks_per_second(int) { return 1000000000u; }

#endif

}  // namespace fusedcomm::gpu
