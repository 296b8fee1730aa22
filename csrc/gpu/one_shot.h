// One-shot: every rank sends its whole message to all and sums for itself. One hop, (W - 1) times the message.
#pragma once

#include "gpu/exchange.h"
#include "gpu/rms_norm.h"

namespace fusedcomm::gpu {

// Elements [index * kPerVec, …) of a flat message; what lies past its end reads as +0 and is not written.
template <class T>
__device__ inline Vec load_flat(const void* base, int64_t index, int64_t count) {
  const int64_t begin = index * Io<T>::kPerVec;
  if (begin + Io<T>::kPerVec <= count) return static_cast<const Vec*>(base)[index];
  union {
    Vec v;
    T t[Io<T>::kPerVec];
  } u = {};
  for (int i = 0; i < Io<T>::kPerVec; ++i) {
    if (begin + i < count) u.t[i] = static_cast<const T*>(base)[begin + i];
  }
  return u.v;
}

template <class T>
__device__ inline void store_flat(void* base, int64_t index, int64_t count, const Vec& v) {
  const int64_t begin = index * Io<T>::kPerVec;
  if (begin + Io<T>::kPerVec <= count) {
    static_cast<Vec*>(base)[index] = v;
    return;
  }
  union {
    Vec v;
    T t[Io<T>::kPerVec];
  } u = {v};
  for (int i = 0; i < Io<T>::kPerVec; ++i) {
    if (begin + i < count) static_cast<T*>(base)[begin + i] = u.t[i];
  }
}

// A thread a Vec; blocks hold whole slots.
template <class T, int kMaxWorld>
__global__ void __launch_bounds__(512, 1)
    one_shot_sum(const __grid_constant__ Group group, const __grid_constant__ SumArguments a,
                 const __grid_constant__ TraceRecord facts) {
  prefetch_arguments(group);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t slot = index / kVecsPerSlot, in_slot = index % kVecsPerSlot;
  const bool active = int64_t(index) * Io<T>::kPerVec < a.count;
  uint32_t* const counter = group.one_shot_counters() + slot;
  uint32_t generation = 0;
  if (active) {
    generation = load_counter(counter);
    const Vec own = as_message(load_flat<T>(a.x, index, a.count));
    send_to_peers<kMaxWorld>(group, group.one_shot(generation, group.rank, slot, in_slot), own);
    Waiter waiter(group);
    const Vec sum = receive_sum<T, kMaxWorld>(group, waiter, own, group.one_shot(generation, 0, slot, in_slot),
                                              group.layout.one_shot_stride, slot, generation);
    store_flat<T>(a.out, index, a.count, sum);
  }
  __syncthreads();
  if (active && in_slot == 0) *counter = generation + 1;
  tracer.finish();
}

// A row a block, or a row a cluster; pack j of a thread is j * blockDim.x + threadIdx.x (of the cluster: no j).
template <class T, int kMaxWorld, int kPacks, bool kCluster>
__global__ void __launch_bounds__(512, 1)
    one_shot_norm(const __grid_constant__ Group group, const void* x, const __grid_constant__ NormArguments a,
                  const __grid_constant__ TraceRecord facts) {
  static_assert(!kCluster || kPacks == 1, "a cluster has a block for each stretch of the row");
  constexpr int kVecs = kPack / Io<T>::kPerVec;
  __shared__ Partials partials;
  if (kCluster) prepare_flagged_sums(partials);
  prefetch_arguments(group);
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);

  const int64_t row = kCluster ? blockIdx.x / blocks_in_cluster() : blockIdx.x;
  const int first = (kCluster ? rank_in_cluster() * int(blockDim.x) : 0) + int(threadIdx.x);
  const int packs = a.hidden / kPack;
  const int vecs = packs * kVecs;
  const uint32_t first_slot = uint32_t(row) * uint32_t((vecs + kVecsPerSlot - 1) / kVecsPerSlot);
  uint32_t* const counters = group.one_shot_counters() + first_slot;

  Waiter waiter(group);
  // Operands of one or two packs fit the registers and are on their way while the data is.
  constexpr bool kEarly = kPacks <= 2;
  float residual[kPacks][kPack], weight[kPacks][kPack] = {}, squares[kPacks] = {};
  Pack<T> own[kPacks], r[kPacks] = {};
  uint32_t generation[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * int(blockDim.x) + first;
    if (pack >= packs) continue;
    generation[j] = load_counter(counters + pack * kVecs / kVecsPerSlot);
    own[j] = Pack<T>::load(x, row * packs + pack);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) own[j].v[i] = as_message(own[j].v[i]);
  }
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * int(blockDim.x) + first;
    if (pack >= packs) continue;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const uint32_t vec = uint32_t(pack * kVecs + i);
      const uint32_t slot = first_slot + vec / kVecsPerSlot;
      send_to_peers<kMaxWorld>(group, group.one_shot(generation[j], group.rank, slot, vec % kVecsPerSlot), own[j].v[i]);
    }
    if (kEarly) {
      load_residual<T>(a, row * packs + pack, residual[j]);
      load_weight<T>(a, pack, weight[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * int(blockDim.x) + first;
    if (pack >= packs) continue;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const uint32_t vec = uint32_t(pack * kVecs + i);
      const uint32_t slot = first_slot + vec / kVecsPerSlot;
      r[j].v[i] = receive_sum<T, kMaxWorld>(group, waiter, own[j].v[i],
                                            group.one_shot(generation[j], 0, slot, vec % kVecsPerSlot),
                                            group.layout.one_shot_stride, slot, generation[j]);
    }
    if (!kEarly) load_residual<T>(a, row * packs + pack, residual[j]);
    squares[j] = add_residual<T>(a, row * packs + pack, residual[j], r[j]);
  }
  const float total =
      kCluster ? flagged_cluster_row_sum(squares[0], partials) : block_row_sum<kPacks>(squares, partials, 0);
  const float inv = inverse_root(total, a);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * int(blockDim.x) + first;
    if (!kEarly && pack < packs) load_weight<T>(a, pack, weight[j]);
    finish_pack<T>(a, row, pack, inv, weight[j], r[j], pack < packs);
    // all threads have read it: the row sum has a barrier
    if (pack < packs && pack * kVecs % kVecsPerSlot == 0) counters[pack * kVecs / kVecsPerSlot] = generation[j] + 1;
  }
  tracer.finish();
}

}  // namespace fusedcomm::gpu
