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
  const Links<kMaxWorld, true> links(group);
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t slot = index / kVecsPerSlot, in_slot = index % kVecsPerSlot;
  const bool active = int64_t(index) * Io<T>::kPerVec < a.count;
  uint32_t* const counter = group.one_shot_counters() + slot;
  prefetch_arguments(group);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  uint32_t generation = 0;
  if (active) {
    generation = load_counter(counter);
    const Vec own = as_message(load_flat<T>(a.x, index, a.count));
    const uint32_t stride = group.layout.one_shot_stride;
    const uint32_t offset = group.one_shot(slot, in_slot) + group.one_shot_generation(generation);
    links.send(offset + uint32_t(group.rank) * stride, own);
    Waiter waiter(group);
    Vec received[kMaxWorld];
    links.template receive<T>(waiter, own, offset, stride, slot, generation, received);
    store_flat<T>(a.out, index, a.count, sum_of<T>(received));
    links.release(offset, stride);
  }
  __syncthreads();
  if (active && in_slot == 0) *counter = generation + 1;
  tracer.finish();
}

// Pack j of a thread is j * threads() + thread() of its row (in a cluster: no j).
template <class T, int kMaxWorld, int kPacks, bool kCluster>
__global__ void __launch_bounds__(512, 1)
    one_shot_norm(const __grid_constant__ Group group, const void* x, const __grid_constant__ NormArguments a,
                  const __grid_constant__ TraceRecord facts) {
  static_assert(!kCluster || kPacks == 1, "a cluster has a block for each stretch of the row");
  constexpr uint32_t kVecs = kPack / Io<T>::kPerVec;
  __shared__ typename RowSum<kCluster>::Shared shared;
  RowSum<kCluster> row_sum(shared);
  const Links<kMaxWorld, true> links(group);
  const uint32_t row = uint32_t(row_sum.worker());
  const uint32_t packs = uint32_t(a.hidden) / kPack;
  const uint32_t first_slot = row * ((packs * kVecs + kVecsPerSlot - 1) / kVecsPerSlot);
  uint32_t* const counters = group.one_shot_counters() + first_slot;
  const uint32_t stride = group.layout.one_shot_stride;
  uint32_t pack[kPacks], place[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    pack[j] = uint32_t(j * row_sum.threads() + row_sum.thread());
    place[j] = group.one_shot(first_slot, 0) + pack[j] * kVecs * uint32_t(sizeof(Vec));  // a row's slots are one piece
  }
  const auto slot_of = [&](uint32_t pack_of_row) { return pack_of_row * kVecs / kVecsPerSlot; };
  prefetch_arguments(group);
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);

  // Operands of one or two packs fit the registers and are on their way while the data is.
  constexpr bool kEarly = kPacks <= 2;
  Pack<T> own[kPacks], r[kPacks] = {}, residual[kPacks] = {};
  Weight<T> weight[kPacks] = {};
  uint32_t generation[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (pack[j] >= packs) continue;
    generation[j] = load_counter(counters + slot_of(pack[j]));
    own[j] = Pack<T>::load(x, row * packs + pack[j]);
#pragma unroll
    for (uint32_t i = 0; i < kVecs; ++i) own[j].v[i] = as_message(own[j].v[i]);
  }
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (pack[j] >= packs) continue;
    place[j] += group.one_shot_generation(generation[j]);
#pragma unroll
    for (uint32_t i = 0; i < kVecs; ++i) {
      links.send(place[j] + i * uint32_t(sizeof(Vec)) + uint32_t(group.rank) * stride, own[j].v[i]);
    }
    if (kEarly) {
      residual[j] = load_residual<T>(a, row * packs + pack[j]);
      weight[j] = Weight<T>::load(a, pack[j]);
    }
  }
  row_sum.meet();

  Waiter waiter(group);
  float squares[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (pack[j] >= packs) continue;
#pragma unroll
    for (uint32_t i = 0; i < kVecs; ++i) {
      Vec received[kMaxWorld];
      links.template receive<T>(waiter, own[j].v[i], place[j] + i * uint32_t(sizeof(Vec)), stride,
                                first_slot + slot_of(pack[j]), generation[j], received);
      r[j].v[i] = sum_of<T>(received);
    }
    if (!kEarly) residual[j] = load_residual<T>(a, row * packs + pack[j]);
    squares[j] = add_residual<T>(a, residual[j], r[j]);
  }
  row_sum.send(squares);
  // While the sums are on their way:
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (pack[j] >= packs) continue;
#pragma unroll
    for (uint32_t i = 0; i < kVecs; ++i) links.release(place[j] + i * uint32_t(sizeof(Vec)), stride);
    if (a.residual_out != nullptr) r[j].store(a.residual_out, row * packs + pack[j]);
    if (!kEarly) weight[j] = Weight<T>::load(a, pack[j]);
  }
  const float inv = inverse_root(row_sum.receive(), a);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const bool active = pack[j] < packs;
    finish_pack<T>(a, row, pack[j], inv, weight[j], r[j], active);
    // all threads have read it: those of the row have sent their sums
    if (active && pack[j] * kVecs % kVecsPerSlot == 0) counters[slot_of(pack[j])] = generation[j] + 1;
  }
  tracer.finish();
}

}  // namespace fusedcomm::gpu
