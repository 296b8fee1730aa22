// Two-shot: each slot of the message goes to its owner, which sums it and sends the sum to all. Two hops, 2 (W - 1) / W
// times the message. Rows are normed where they are needed, on every rank: the residual is each rank's own.
//
// Some blocks send and sum, the others receive and norm, so links and memory are busy at the same time. The blocks that
// send come first and wait only for the block of their own number on other ranks (a launch has one grid on all ranks);
// the others wait for those. Blocks start in the order of their numbers, so whatever else occupies a GPU, the lowest
// unfinished block always gets on.
#pragma once

#include "gpu/one_shot.h"

namespace fusedcomm::gpu {

// How a launch divides its work.
struct Pace {
  int senders;     // blocks that send and sum
  int lead;        // units between sending and summing
  uint32_t pause;  // between polls, in nanoseconds
};

struct Range {
  int begin, end;
};

// Stretches of one length for each of `workers`.
__device__ inline Range range_of(int count, int worker, int workers) {
  const int each = (count + workers - 1) / workers;
  const int begin = min(worker * each, count);
  return {begin, min(begin + each, count)};
}

// Step one for a Vec: to its owner, unless that is this rank.
__device__ inline void send_to_owner(const Group& group, uint32_t slot, uint32_t in_slot, const Vec& addend) {
  const int owner = int(slot % uint32_t(group.world_size));
  if (owner == group.rank) return;
  const uint32_t offset = group.to_make(load_counter(group.two_shot_counters() + slot), group.rank, slot, in_slot);
  store_flagged(group.at(owner, offset), as_message(addend));
}

__device__ inline bool is_owner(const Group& group, uint32_t slot) {
  return int(slot % uint32_t(group.world_size)) == group.rank;
}

// Step two, by the owner: the sum, to all.
template <class T, int kMaxWorld>
__device__ inline void make_sum(const Group& group, Waiter& waiter, uint32_t slot, uint32_t in_slot,
                                const Vec& addend) {
  const uint32_t generation = load_counter(group.two_shot_counters() + slot);
  const Vec sum = as_message(receive_sum<T, kMaxWorld>(group, waiter, as_message(addend),
                                                       group.to_make(generation, 0, slot, in_slot),
                                                       group.layout.to_make_stride, slot, generation));
  const uint32_t offset = group.made(generation, slot, in_slot);
  send_to_peers<kMaxWorld>(group, offset, sum);
  store_flagged(group.at(group.rank, offset), sum);
}

// Step three: the sum, from its owner.
__device__ inline Vec receive_made(const Group& group, Waiter& waiter, uint32_t slot, uint32_t in_slot) {
  const uint32_t generation = load_counter(group.two_shot_counters() + slot);
  Vec* const place = group.at(group.rank, group.made(generation, slot, in_slot));
  Vec v = load_flagged(place);
  waiter.begin();
  while (!has_arrived(v) && waiter.go_on(int(slot % uint32_t(group.world_size)), slot, generation, true)) {
    v = load_flagged(place);
  }
  store_flagged(place, free_slot());
  return v;
}

// Where Vec `index` of a message lies; a row begins a slot.
struct RowSlots {
  uint32_t vecs;   // of a row
  uint32_t slots;  // of a row

  __device__ explicit RowSlots(int vecs_of_row)
      : vecs(uint32_t(vecs_of_row)), slots((uint32_t(vecs_of_row) + kVecsPerSlot - 1) / kVecsPerSlot) {}
  __device__ uint32_t slot(uint32_t row, uint32_t vec) const { return row * slots + vec / kVecsPerSlot; }
};

// The blocks that send: units of a Vec a thread. load(index) gives this rank's addend.
template <class T, int kMaxWorld, class Load>
__device__ inline void send_and_sum(const Group& group, Pace pace, RowSlots shape, int vecs, const Load& load) {
  Waiter waiter(group, pace.pause);
  const int unit = int(blockDim.x);
  const Range range = range_of((vecs + unit - 1) / unit, int(blockIdx.x), pace.senders);
  for (int step = range.begin; step < range.end + pace.lead; ++step) {
    const int sent = step * unit + int(threadIdx.x);
    if (step < range.end && sent < vecs) {
      const uint32_t row = uint32_t(sent) / shape.vecs, vec = uint32_t(sent) - row * shape.vecs;
      send_to_owner(group, shape.slot(row, vec), vec % kVecsPerSlot, load(sent));
    }
    const int summed = sent - pace.lead * unit;
    if (step - pace.lead >= range.begin && summed < vecs) {
      const uint32_t row = uint32_t(summed) / shape.vecs, vec = uint32_t(summed) - row * shape.vecs;
      const uint32_t slot = shape.slot(row, vec);
      if (is_owner(group, slot)) make_sum<T, kMaxWorld>(group, waiter, slot, vec % kVecsPerSlot, load(summed));
    }
  }
}

// After a barrier of the block that received all of a slot: who sent and summed it has read its counter.
__device__ inline void advance(const Group& group, uint32_t slot) {
  uint32_t* const counter = group.two_shot_counters() + slot;
  *counter = load_counter(counter) + 1;
}

// A flat message: one row. Blocks hold whole slots.
template <class T, int kMaxWorld>
__global__ void __launch_bounds__(512, 2)
    two_shot_sum(const __grid_constant__ Group group, const __grid_constant__ SumArguments a, Pace pace,
                 const __grid_constant__ TraceRecord facts) {
  prefetch_arguments(group);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  const int vecs = int((a.count + Io<T>::kPerVec - 1) / Io<T>::kPerVec);
  if (int(blockIdx.x) < pace.senders) {
    send_and_sum<T, kMaxWorld>(group, pace, RowSlots(vecs), vecs,
                               [&](int index) { return load_flat<T>(a.x, index, a.count); });
    return tracer.finish();
  }
  Waiter waiter(group, pace.pause);
  const int unit = int(blockDim.x);
  const Range range = range_of((vecs + unit - 1) / unit, int(blockIdx.x) - pace.senders, int(gridDim.x) - pace.senders);
  const uint32_t in_slot = threadIdx.x % kVecsPerSlot;
  for (int step = range.begin; step < range.end; ++step) {
    const int index = step * unit + int(threadIdx.x);
    if (index >= vecs) break;
    store_flat<T>(a.out, index, a.count, receive_made(group, waiter, uint32_t(index / kVecsPerSlot), in_slot));
  }
  __syncthreads();
  if (in_slot != 0) return;
  for (int step = range.begin; step < range.end; ++step) {
    const int index = step * unit + int(threadIdx.x);
    if (index < vecs) advance(group, uint32_t(index / kVecsPerSlot));
  }
}

// Packs of a row are dealt to the threads that norm it as in one_shot_norm.
template <class T, int kMaxWorld, int kPacks, bool kCluster>
__global__ void __launch_bounds__(512, kPacks == 1 ? 2 : 1)
    two_shot_norm(const __grid_constant__ Group group, const void* x, const __grid_constant__ NormArguments a,
                  int num_rows, Pace pace, const __grid_constant__ TraceRecord facts) {
  static_assert(!kCluster || kPacks == 1, "a cluster has a block for each stretch of the row");
  constexpr int kVecs = kPack / Io<T>::kPerVec;
  __shared__ Partials partials;
  if (kCluster) cluster_barrier();  // no block writes to one that has not started
  prefetch_arguments(group);
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  const int packs = a.hidden / kPack;
  const RowSlots shape(packs * kVecs);
  if (int(blockIdx.x) < pace.senders) {
    send_and_sum<T, kMaxWorld>(group, pace, shape, num_rows * packs * kVecs,
                               [&](int index) { return static_cast<const Vec*>(x)[index]; });
    return tracer.finish();
  }
  Waiter waiter(group, pace.pause);
  const int blocks_per_row = kCluster ? blocks_in_cluster() : 1;
  const int first = (kCluster ? rank_in_cluster() * int(blockDim.x) : 0) + int(threadIdx.x);
  const Range range = range_of(num_rows, (int(blockIdx.x) - pace.senders) / blocks_per_row,
                               (int(gridDim.x) - pace.senders) / blocks_per_row);
  constexpr bool kEarly = kPacks <= 2;  // see one_shot_norm
  float weight[kPacks][kPack] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * int(blockDim.x) + first;
    if (kEarly && pack < packs) load_weight<T>(a, pack, weight[j]);
  }
  for (int row = range.begin; row < range.end; ++row) {
    Pack<T> r[kPacks] = {};
    float squares[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = j * int(blockDim.x) + first;
      if (pack >= packs) continue;
      float residual[kPack];
      load_residual<T>(a, int64_t(row) * packs + pack, residual);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const uint32_t vec = uint32_t(pack * kVecs + i);
        r[j].v[i] = receive_made(group, waiter, shape.slot(uint32_t(row), vec), vec % kVecsPerSlot);
      }
      squares[j] = add_residual<T>(a, int64_t(row) * packs + pack, residual, r[j]);
    }
    const int parity = row & 1;
    const float total =
        kCluster ? cluster_row_sum(squares[0], partials, parity) : block_row_sum<kPacks>(squares, partials, parity);
    const float inv = inverse_root(total, a);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = j * int(blockDim.x) + first;
      if (!kEarly && pack < packs) load_weight<T>(a, pack, weight[j]);
      finish_pack<T>(a, row, pack, inv, weight[j], r[j], pack < packs);
      if (pack >= packs) continue;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const uint32_t vec = uint32_t(pack * kVecs + i);
        if (vec % kVecsPerSlot == 0) advance(group, shape.slot(uint32_t(row), vec));
      }
    }
  }
}

}  // namespace fusedcomm::gpu
