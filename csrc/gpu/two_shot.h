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
  int senders;  // blocks that send and sum
  int lead;     // turns of a thread between sending and summing
};

__device__ inline bool is_owner(const Group& group, uint32_t slot) {
  return int(slot % uint32_t(group.world_size)) == group.rank;
}

// Step two, by the owner: the sum of all addends, to all.
template <class T, int kMaxWorld>
__device__ inline void make_sum(const Group& group, const Links<kMaxWorld, false>& links, Waiter& waiter, uint32_t slot,
                                uint32_t in_slot, uint32_t generation, const Vec& addend) {
  const uint32_t from = group.to_make(generation, 0, slot, in_slot), stride = group.layout.to_make_stride;
  Vec received[kMaxWorld];
  links.template receive<T>(waiter, as_message(addend), from, stride, slot, generation, received);
  const Vec sum = as_message(sum_of<T>(received));
  const uint32_t to = group.made(generation, slot, in_slot);
  links.send(to, sum);
  store_flagged(links.own(to), sum);
  links.release(from, stride);
}

// Step three: the sum, from its owner.
__device__ inline Vec receive_made(const Group& group, Vec* place, Waiter& waiter, uint32_t slot, uint32_t generation) {
  Vec v = load_flagged(place);
  waiter.begin();
  while (!has_arrived(v)) {
    if (!waiter.go_on() && !waiter.look(int(slot % uint32_t(group.world_size)), slot, generation, true)) break;
    v = load_flagged(place);
  }
  store_flagged(place, free_slot());
  return v;
}

// Where Vecs of a message lie; a row begins a slot.
struct RowSlots {
  struct Place {
    uint32_t slot, in_slot;
  };

  uint32_t vecs;   // of a row
  uint32_t slots;  // of a row

  __device__ explicit RowSlots(int vecs_of_row)
      : vecs(uint32_t(vecs_of_row)), slots((uint32_t(vecs_of_row) + kVecsPerSlot - 1) / kVecsPerSlot) {}
  __device__ uint32_t slot(uint32_t row, uint32_t vec) const { return row * slots + vec / kVecsPerSlot; }
  __device__ Place place(uint32_t vec_of_message) const {
    const uint32_t row = vec_of_message / vecs, vec = vec_of_message - row * vecs;
    return {slot(row, vec), vec % kVecsPerSlot};
  }
};

// The blocks that send: Vecs are dealt to their threads in turn, so that all work on the same part of the message and
// the blocks that receive, dealt to in the same order, find it there. load(index) gives this rank's addend.
template <class T, int kMaxWorld, class Load>
__device__ inline void send_and_sum(const Group& group, const Links<kMaxWorld, false>& links, Pace pace, RowSlots shape,
                                    int vecs, const Load& load) {
  Waiter waiter(group);
  const uint32_t* const counters = group.two_shot_counters();
  const int stride = pace.senders * int(blockDim.x), lead = pace.lead * stride;
  for (int next = int(blockIdx.x * blockDim.x + threadIdx.x); next - lead < vecs; next += stride) {
    if (next < vecs) {
      const RowSlots::Place p = shape.place(uint32_t(next));
      const int owner = int(p.slot % uint32_t(group.world_size));
      if (owner != group.rank) {
        const uint32_t offset = group.to_make(load_counter(counters + p.slot), group.rank, p.slot, p.in_slot);
        store_flagged(group.at(owner, offset), as_message(load(next)));
      }
    }
    if (next >= lead) {
      const RowSlots::Place p = shape.place(uint32_t(next - lead));
      if (is_owner(group, p.slot)) {
        make_sum<T>(group, links, waiter, p.slot, p.in_slot, load_counter(counters + p.slot), load(next - lead));
      }
    }
  }
}

// A flat message: one row. Blocks hold whole slots.
template <class T, int kMaxWorld>
__global__ void __launch_bounds__(512, kMaxWorld <= 4 ? 3 : 2)
    two_shot_sum(const __grid_constant__ Group group, const __grid_constant__ SumArguments a, Pace pace,
                 const __grid_constant__ TraceRecord facts) {
  const Links<kMaxWorld, false> links(group);
  prefetch_arguments(group);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  const int vecs = int((a.count + Io<T>::kPerVec - 1) / Io<T>::kPerVec);
  if (int(blockIdx.x) < pace.senders) {
    send_and_sum<T>(group, links, pace, RowSlots(vecs), vecs,
                    [&](int index) { return load_flat<T>(a.x, index, a.count); });
    return tracer.finish();
  }
  Waiter waiter(group);
  const int stride = (int(gridDim.x) - pace.senders) * int(blockDim.x);
  const int first = (int(blockIdx.x) - pace.senders) * int(blockDim.x) + int(threadIdx.x);
  const uint32_t in_slot = threadIdx.x % kVecsPerSlot;
  uint32_t* const counters = group.two_shot_counters();
  for (int index = first; index < vecs; index += stride) {
    const uint32_t slot = uint32_t(index / kVecsPerSlot), generation = load_counter(counters + slot);
    Vec* const place = links.own(group.made(generation, slot, in_slot));
    store_flat<T>(a.out, index, a.count, receive_made(group, place, waiter, slot, generation));
  }
  // A block that received all of a slot advances its counter: who sent and summed it has read that.
  __syncthreads();
  if (in_slot != 0) return;
  for (int index = first; index < vecs; index += stride) {
    uint32_t* const counter = counters + index / kVecsPerSlot;
    *counter = load_counter(counter) + 1;
  }
}

// Packs of a row are dealt to the threads that norm it as in one_shot_norm.
template <class T, int kMaxWorld, int kPacks, bool kCluster>
__global__ void __launch_bounds__(512, kPacks > 1       ? 1
                                       : kMaxWorld <= 4 ? 3
                                                        : 2)
    two_shot_norm(const __grid_constant__ Group group, const void* x, const __grid_constant__ NormArguments a,
                  int num_rows, Pace pace, const __grid_constant__ TraceRecord facts) {
  static_assert(!kCluster || kPacks == 1, "a cluster has a block for each stretch of the row");
  constexpr uint32_t kVecs = kPack / Io<T>::kPerVec;
  __shared__ typename RowSum<kCluster>::Shared shared;
  RowSum<kCluster> row_sum(shared);
  row_sum.meet();
  const Links<kMaxWorld, false> links(group);
  prefetch_arguments(group);
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  const uint32_t packs = uint32_t(a.hidden) / kPack;
  const RowSlots shape(int(packs * kVecs));
  if (int(blockIdx.x) < pace.senders) {
    send_and_sum<T>(group, links, pace, shape, num_rows * int(packs * kVecs),
                    [&](int index) { return static_cast<const Vec*>(x)[index]; });
    return tracer.finish();
  }
  Waiter waiter(group);
  const int senders = pace.senders / row_sum.blocks();
  uint32_t* const counters = group.two_shot_counters();
  constexpr bool kEarly = kPacks <= 2;  // see one_shot_norm
  uint32_t pack[kPacks];
  Weight<T> weight[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    pack[j] = uint32_t(j * row_sum.threads() + row_sum.thread());
    if (kEarly && pack[j] < packs) weight[j] = Weight<T>::load(a, pack[j]);
  }
  for (int row = row_sum.worker() - senders; row < num_rows; row += row_sum.workers() - senders) {
    const uint32_t first_pack = uint32_t(row) * packs;
    Pack<T> r[kPacks] = {};
    float squares[kPacks] = {};
    uint32_t generation[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      if (pack[j] >= packs) continue;
      const Pack<T> residual = load_residual<T>(a, first_pack + pack[j]);
      const uint32_t slot = shape.slot(uint32_t(row), pack[j] * kVecs);
      generation[j] = load_counter(counters + slot);
#pragma unroll
      for (uint32_t i = 0; i < kVecs; ++i) {
        Vec* const place = links.own(group.made(generation[j], slot, (pack[j] * kVecs + i) % kVecsPerSlot));
        r[j].v[i] = receive_made(group, place, waiter, slot, generation[j]);
      }
      squares[j] = add_residual<T>(a, residual, r[j]);
    }
    row_sum.send(squares);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      if (pack[j] >= packs) continue;
      if (a.residual_out != nullptr) r[j].store(a.residual_out, first_pack + pack[j]);
      if (!kEarly) weight[j] = Weight<T>::load(a, pack[j]);
    }
    const float inv = inverse_root(row_sum.receive(), a);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      finish_pack<T>(a, row, pack[j], inv, weight[j], r[j], pack[j] < packs);
      // who sent and summed the slot has read its counter, and so have all threads of the row
      if (pack[j] < packs && pack[j] * kVecs % kVecsPerSlot == 0) {
        counters[shape.slot(uint32_t(row), pack[j] * kVecs)] = generation[j] + 1;
      }
    }
  }
}

}  // namespace fusedcomm::gpu
