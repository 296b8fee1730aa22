// The same arithmetic without communication: what the staged path and the layers call.
#pragma once

#include "gpu/rms_norm.h"

namespace fusedcomm::gpu {

// A row a block, in registers; H a multiple of 8.
template <class T, int kPacks>
__global__ void __launch_bounds__(512, 1) local_norm(const void* x, const __grid_constant__ NormArguments a) {
  __shared__ RowSum<false>::Shared shared;
  RowSum<false> row_sum(shared);
  const int64_t row = blockIdx.x;
  const uint32_t packs = uint32_t(a.hidden) / kPack;
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Pack<T> r[kPacks] = {}, residual[kPacks] = {};
  Weight<T> weight[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const uint32_t pack = uint32_t(j) * blockDim.x + threadIdx.x;
    if (pack >= packs) continue;
    r[j] = Pack<T>::load(x, row * packs + pack);
    residual[j] = load_residual<T>(a, row * packs + pack);
    weight[j] = Weight<T>::load(a, pack);
  }
  float squares[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) squares[j] = add_residual<T>(a, residual[j], r[j]);
  row_sum.send(squares);
  if (a.residual_out != nullptr) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const uint32_t pack = uint32_t(j) * blockDim.x + threadIdx.x;
      if (pack < packs) r[j].store(a.residual_out, row * packs + pack);
    }
  }
  const float inv = inverse_root(row_sum.receive(), a);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const uint32_t pack = uint32_t(j) * blockDim.x + threadIdx.x;
    finish_pack<T>(a, row, pack, inv, weight[j], r[j], pack < packs);
  }
}

// Elements [pack * 8, …) of a row of any length and alignment; what lies past its end is +0 and not written.
template <class T>
__device__ inline void load_ragged(const void* base, int64_t row, int pack, int hidden, float (&f)[kPack]) {
  constexpr int kPer = Io<T>::kPerVec;
  union {
    Vec v[kPack / kPer];
    T t[kPack];
  } u = {};
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (pack * kPack + i < hidden) u.t[i] = static_cast<const T*>(base)[row * hidden + pack * kPack + i];
  }
#pragma unroll
  for (int i = 0; i < kPack / kPer; ++i) Io<T>::unpack(u.v[i], f + i * kPer);
}

template <class T>
__device__ inline void store_ragged(void* base, int64_t row, int pack, int hidden, const float (&f)[kPack]) {
  constexpr int kPer = Io<T>::kPerVec;
  union {
    Vec v[kPack / kPer];
    T t[kPack];
  } u;
#pragma unroll
  for (int i = 0; i < kPack / kPer; ++i) u.v[i] = Io<T>::pack(f + i * kPer);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (pack * kPack + i < hidden) static_cast<T*>(base)[row * hidden + pack * kPack + i] = u.t[i];
  }
}

// r' of a pack, computed again where it is needed: a row of any length fits no register file.
template <class T>
__device__ inline void load_sum_ragged(const void* x, const NormArguments& a, int64_t row, int pack,
                                       float (&r)[kPack]) {
  load_ragged<T>(x, row, pack, a.hidden, r);
  if (a.residual == nullptr) return;
  float residual[kPack];
  load_ragged<T>(a.residual, row, pack, a.hidden, residual);
#pragma unroll
  for (int i = 0; i < kPack; ++i) r[i] += residual[i];
  Pack<T>::of(r).unpack(r);
}

constexpr int kRaggedThreads = 512;
constexpr int kRaggedPacks = 8;  // 32,768 elements

// Any H up to 32,768. A thread writes over x or the residual only where it has read them for the last time.
template <class T>
__global__ void __launch_bounds__(kRaggedThreads, 1)
    local_norm_ragged(const void* x, const __grid_constant__ NormArguments a) {
  __shared__ float sums[kRaggedPacks * kRaggedThreads / kWarpSize];
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  const int packs = (a.hidden + kPack - 1) / kPack;
  constexpr int kWarps = kRaggedThreads / kWarpSize;
  for (int j = 0; j < kRaggedPacks; ++j) {
    const int pack = j * kRaggedThreads + int(threadIdx.x);
    float r[kPack] = {};
    if (pack < packs) load_sum_ragged<T>(x, a, row, pack, r);
    const float sum = butterfly_sum(sum_of_squares(r));
    if (threadIdx.x % kWarpSize == 0) sums[j * kWarps + threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  float s = 0.0f;  // the tree over 128 (or 64) sums: the same in every thread
  {
    constexpr int kSums = kRaggedPacks * kWarps;
    constexpr int kEach = kSums / kWarpSize > 0 ? kSums / kWarpSize : 1;
    const int lane = int(threadIdx.x) % kWarpSize;
    float v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] = lane * kEach + i < kSums ? sums[lane * kEach + i] : 0.0f;
#pragma unroll
    for (int n = kEach / 2; n > 0; n /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = v[2 * i] + v[2 * i + 1];
    }
    s = butterfly_sum(v[0]);
  }
  const float inv = inverse_root(s, a);
  for (int j = 0; j < kRaggedPacks; ++j) {
    const int pack = j * kRaggedThreads + int(threadIdx.x);
    if (j * kRaggedThreads >= packs) break;
    float r[kPack] = {}, w[kPack] = {}, y[kPack];
    if (pack < packs) {
      load_sum_ragged<T>(x, a, row, pack, r);
      if (a.weight_is_fp32) {
        load_ragged<float>(a.weight, 0, pack, a.hidden, w);
      } else {
        load_ragged<T>(a.weight, 0, pack, a.hidden, w);
      }
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) y[i] = r[i] * inv * (w[i] + a.weight_bias);
    Pack<T>::of(y).unpack(y);
    if (pack < packs) {
      if (a.residual_out != nullptr) store_ragged<T>(a.residual_out, row, pack, a.hidden, r);
      if (a.norm != nullptr) store_ragged<T>(a.norm, row, pack, a.hidden, y);
    }
    if (a.quant.fp8 != nullptr) quantize_pack<T>(a.quant, row, uint32_t(pack), a.hidden, y, pack < packs);
  }
}

// Row blockIdx.x, a pack a thread. Groups lie in neighbouring lanes because H is a multiple of them.
template <class T>
__global__ void __launch_bounds__(256)
    local_quant(const void* x, int32_t hidden, const __grid_constant__ QuantTarget target) {
  const int64_t row = blockIdx.x;
  const uint32_t packs = uint32_t(hidden) / kPack;
  prefetch_arguments(target);
  wait_for_previous_kernel();
  let_next_kernel_start();
#pragma unroll 1
  for (uint32_t first = blockIdx.y * blockDim.x; first < packs; first += gridDim.y * blockDim.x) {
    const uint32_t pack = first + threadIdx.x;
    const bool active = pack < packs;
    float y[kPack] = {};
    if (active) Pack<T>::load(x, row * packs + pack).unpack(y);
    quantize_pack<T>(target, row, pack, hidden, y, active);
  }
}

}  // namespace fusedcomm::gpu
