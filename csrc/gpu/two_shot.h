// Two-shot: each slot of the message goes to its owner, which sums it and sends the sum to all. Two hops, 2 (W - 1) / W
// times the message. Rows are normed where they are needed, on every rank: the residual is each rank's own.
//
// A worker (a block, or a cluster of blocks) takes a stretch of rows and walks it in steps: send row s, sum what this
// rank owns of row s - lead, receive row s - 2 lead; so links and memory are busy at the same time. It waits only for
// the worker of its own number on other ranks (a launch has one grid on all ranks), and workers start in the order of
// their numbers, so whatever else occupies a GPU, the lowest unfinished worker always gets on.
#pragma once

#include "gpu/one_shot.h"

namespace fusedcomm::gpu {

// How a worker goes through its rows.
struct Pace {
  int lead;        // rows between sending, summing and receiving
  uint32_t pause;  // between polls, in nanoseconds
};

struct RowRange {
  int begin, end;
};

__device__ inline RowRange rows_of_worker(int rows, int worker, int workers) {
  const int each = (rows + workers - 1) / workers;
  const int begin = min(worker * each, rows);
  return {begin, min(begin + each, rows)};
}

// Step one for a Vec: to its owner, unless that is this rank.
__device__ inline void send_to_owner(const Group& group, uint32_t slot, uint32_t in_slot, const Vec& addend) {
  const int owner = int(slot % uint32_t(group.world_size));
  if (owner == group.rank) return;
  const uint32_t offset = group.to_make(group.two_shot_counters()[slot], group.rank, slot, in_slot);
  store_flagged(group.at(owner, offset), as_message(addend));
}

__device__ inline bool is_owner(const Group& group, uint32_t slot) {
  return int(slot % uint32_t(group.world_size)) == group.rank;
}

// Step two, by the owner: the sum, to all.
template <class T, int kMaxWorld>
__device__ inline void make_sum(const Group& group, Waiter& waiter, uint32_t slot, uint32_t in_slot,
                                const Vec& addend) {
  const uint32_t generation = group.two_shot_counters()[slot];
  const Vec sum = as_message(receive_sum<T, kMaxWorld>(group, waiter, as_message(addend),
                                                       group.to_make(generation, 0, slot, in_slot),
                                                       group.layout.to_make_stride, slot, generation));
  const uint32_t offset = group.made(generation, slot, in_slot);
  send_to_peers<kMaxWorld>(group, offset, sum);
  store_flagged(group.at(group.rank, offset), sum);
}

// Step three: the sum, from its owner.
__device__ inline Vec receive_made(const Group& group, Waiter& waiter, uint32_t slot, uint32_t in_slot) {
  const uint32_t generation = group.two_shot_counters()[slot];
  Vec* const place = group.at(group.rank, group.made(generation, slot, in_slot));
  Vec v = load_flagged(place);
  while (!has_arrived(v) && waiter.go_on(int(slot % uint32_t(group.world_size)), slot, generation)) {
    v = load_flagged(place);
  }
  store_flagged(place, free_slot());
  return v;
}

// A flat message in rows of a Vec a thread. Blocks hold whole slots.
template <class T, int kMaxWorld>
__global__ void __launch_bounds__(512, 1)
    two_shot_sum(const __grid_constant__ Group group, const __grid_constant__ SumArguments a, Pace pace,
                 const __grid_constant__ TraceRecord facts) {
  prefetch_arguments(group);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  Waiter waiter(group, pace.pause);
  const int row_vecs = int(blockDim.x);
  const int vecs = int((a.count + Io<T>::kPerVec - 1) / Io<T>::kPerVec);
  const RowRange range = rows_of_worker((vecs + row_vecs - 1) / row_vecs, int(blockIdx.x), int(gridDim.x));
  const auto vec_of = [&](int row) { return row * row_vecs + int(threadIdx.x); };
  const uint32_t in_slot = threadIdx.x % kVecsPerSlot;
  for (int step = range.begin; step < range.end + 2 * pace.lead; ++step) {
    const int sent = vec_of(step), summed = vec_of(step - pace.lead), received = vec_of(step - 2 * pace.lead);
    if (step < range.end && sent < vecs) {
      send_to_owner(group, uint32_t(sent / kVecsPerSlot), in_slot, load_flat<T>(a.x, sent, a.count));
    }
    if (step - pace.lead >= range.begin && step - pace.lead < range.end && summed < vecs) {
      const uint32_t slot = uint32_t(summed / kVecsPerSlot);
      if (is_owner(group, slot)) {
        make_sum<T, kMaxWorld>(group, waiter, slot, in_slot, load_flat<T>(a.x, summed, a.count));
      }
    }
    if (step - 2 * pace.lead >= range.begin && received < vecs) {
      const Vec sum = receive_made(group, waiter, uint32_t(received / kVecsPerSlot), in_slot);
      store_flat<T>(a.out, received, a.count, sum);
    }
  }
  __syncthreads();  // all threads have read the counters
  if (in_slot != 0) return tracer.finish();
  for (int row = range.begin; row < range.end && vec_of(row) < vecs; ++row) {
    ++group.two_shot_counters()[vec_of(row) / kVecsPerSlot];
  }
  tracer.finish();
}

// Packs of a row are dealt to threads as in one_shot_norm.
template <class T, int kMaxWorld, int kPacks, bool kCluster>
__global__ void __launch_bounds__(512, 1)
    two_shot_norm(const __grid_constant__ Group group, const void* x, const __grid_constant__ NormArguments a,
                  int num_rows, Pace pace, const __grid_constant__ TraceRecord facts) {
  static_assert(!kCluster || kPacks == 1, "a cluster has a block for each stretch of the row");
  constexpr int kVecs = kPack / Io<T>::kPerVec;
  __shared__ Partials partials;
  prefetch_arguments(group);
  prefetch_arguments(a);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  Waiter waiter(group, pace.pause);
  const int blocks_per_row = kCluster ? blocks_in_cluster() : 1;
  const int first = (kCluster ? rank_in_cluster() * int(blockDim.x) : 0) + int(threadIdx.x);
  const int packs = a.hidden / kPack;
  const int slots_per_row = (packs * kVecs + kVecsPerSlot - 1) / kVecsPerSlot;
  const RowRange range = rows_of_worker(num_rows, int(blockIdx.x) / blocks_per_row, int(gridDim.x) / blocks_per_row);
  const auto slot_of = [&](int row, int vec) { return uint32_t(row * slots_per_row + vec / kVecsPerSlot); };
  const auto addend = [&](int row, int pack, int i) {
    return static_cast<const Vec*>(x)[(int64_t(row) * packs + pack) * kVecs + i];
  };

  constexpr bool kEarly = kPacks <= 2;  // see one_shot_norm
  float weight[kPacks][kPack] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * int(blockDim.x) + first;
    if (kEarly && pack < packs) load_weight<T>(a, pack, weight[j]);
  }
  for (int step = range.begin; step < range.end + 2 * pace.lead; ++step) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = j * int(blockDim.x) + first;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int vec = pack * kVecs + i;
        if (step >= range.end || pack >= packs) continue;
        send_to_owner(group, slot_of(step, vec), uint32_t(vec % kVecsPerSlot), addend(step, pack, i));
      }
    }
    const int summed = step - pace.lead;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = j * int(blockDim.x) + first;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int vec = pack * kVecs + i;
        if (summed < range.begin || summed >= range.end || pack >= packs) continue;
        const uint32_t slot = slot_of(summed, vec);
        if (!is_owner(group, slot)) continue;
        make_sum<T, kMaxWorld>(group, waiter, slot, uint32_t(vec % kVecsPerSlot), addend(summed, pack, i));
      }
    }
    const int row = step - 2 * pace.lead;
    if (row < range.begin) continue;
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
        const int vec = pack * kVecs + i;
        r[j].v[i] = receive_made(group, waiter, slot_of(row, vec), uint32_t(vec % kVecsPerSlot));
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
    }
  }
  __syncthreads();  // all threads have read the counters
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int vec = (j * int(blockDim.x) + first) * kVecs + i;
      if (vec >= packs * kVecs || vec % kVecsPerSlot != 0) continue;
      for (int row = range.begin; row < range.end; ++row) ++group.two_shot_counters()[slot_of(row, vec)];
    }
  }
  tracer.finish();
}

}  // namespace fusedcomm::gpu
