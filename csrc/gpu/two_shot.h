// Two-shot: each slot of the message goes to its owner, which sums it and sends the sum to all. Two hops, 2 (W - 1) / W
// times the message. Rows are normed where they are needed, on every rank: the residual is each rank's own.
//
// A block takes a stretch of rows and goes over it three times: send, sum what it owns, receive. It waits only for the
// blocks of its own number on other ranks (launches of a call have one grid on all ranks), and blocks start in the
// order of their numbers, so whatever else occupies a GPU, the lowest unfinished block always gets on.
#pragma once

#include "gpu/one_shot.h"

namespace fusedcomm::gpu {

constexpr int kTwoShotThreads = 512;

struct RowRange {
  int begin, end;
};

__device__ inline RowRange rows_of_block(int rows) {
  const int each = (rows + int(gridDim.x) - 1) / int(gridDim.x);
  const int begin = min(int(blockIdx.x) * each, rows);
  return {begin, min(begin + each, rows)};
}

// The shape of a message in Vecs and slots. A row begins a slot.
struct Rows {
  int vecs;   // of a row
  int slots;  // of a row

  __device__ explicit Rows(int vecs_of_row)
      : vecs(vecs_of_row), slots((vecs_of_row + kVecsPerSlot - 1) / kVecsPerSlot) {}
};

// Passes one and two over the block's rows; load(row, vec) gives this rank's addend, exists(row, vec) says whether the
// message has that Vec.
template <class T, int kMaxWorld, class Load, class Exists>
__device__ inline void send_and_sum(const Group& group, Waiter& waiter, RowRange range, Rows rows, const Load& load,
                                    const Exists& exists) {
  const uint32_t* const counters = group.two_shot_counters();
  const uint32_t world = uint32_t(group.world_size), rank = uint32_t(group.rank);
  for (int row = range.begin; row < range.end; ++row) {
    for (int vec = int(threadIdx.x); vec < rows.vecs; vec += kTwoShotThreads) {
      if (!exists(row, vec)) continue;
      const uint32_t slot = uint32_t(row * rows.slots + vec / kVecsPerSlot);
      const uint32_t owner = slot % world;
      if (owner == rank) continue;
      const uint32_t offset = group.to_make(counters[slot], group.rank, slot, uint32_t(vec % kVecsPerSlot));
      store_flagged(group.at(int(owner), offset), as_message(load(row, vec)));
    }
  }

  constexpr uint32_t kSlotsAtOnce = kTwoShotThreads / kVecsPerSlot;
  const uint32_t in_slot = threadIdx.x % kVecsPerSlot;
  const uint32_t begin = uint32_t(range.begin * rows.slots), end = uint32_t(range.end * rows.slots);
  uint32_t slot = begin + (rank + world - begin % world) % world + threadIdx.x / kVecsPerSlot * world;
  for (; slot < end; slot += kSlotsAtOnce * world) {
    const int row = int(slot) / rows.slots;
    const int vec = (int(slot) - row * rows.slots) * kVecsPerSlot + int(in_slot);
    if (vec >= rows.vecs || !exists(row, vec)) continue;
    const uint32_t generation = counters[slot];
    const Vec sum = as_message(receive_sum<T, kMaxWorld>(group, waiter, as_message(load(row, vec)),
                                                         group.to_make(generation, 0, slot, in_slot),
                                                         group.layout.to_make_stride, slot, generation));
    const uint32_t offset = group.made(generation, slot, in_slot);
    send_to_peers<kMaxWorld>(group, offset, sum);
    store_flagged(group.at(group.rank, offset), sum);
  }
}

// Pass three for one Vec: the sum, from its owner.
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

// After the last pass: all threads have read the counters.
__device__ inline void advance_counters(const Group& group, RowRange range, int slots_per_row) {
  __syncthreads();
  uint32_t* const counters = group.two_shot_counters();
  const int end = range.end * slots_per_row;
  for (int slot = range.begin * slots_per_row + int(threadIdx.x); slot < end; slot += kTwoShotThreads) {
    ++counters[slot];
  }
}

constexpr int kFlatRowVecs = kTwoShotThreads;  // a flat message is walked in rows of 8 KiB

template <class T, int kMaxWorld>
__global__ void __launch_bounds__(kTwoShotThreads, 1)
    two_shot_sum(const __grid_constant__ Group group, const SumArguments a, const __grid_constant__ TraceRecord facts) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  Waiter waiter(group);
  const Rows rows(kFlatRowVecs);
  const int vecs = int((a.count + Io<T>::kPerVec - 1) / Io<T>::kPerVec);
  const RowRange range = rows_of_block((vecs + kFlatRowVecs - 1) / kFlatRowVecs);
  const auto exists = [&](int row, int vec) { return row * kFlatRowVecs + vec < vecs; };
  send_and_sum<T, kMaxWorld>(
      group, waiter, range, rows,
      [&](int row, int vec) { return load_flat<T>(a.x, row * kFlatRowVecs + vec, a.count); }, exists);

  const int vec = int(threadIdx.x);
  for (int row = range.begin; row < range.end; ++row) {
    if (!exists(row, vec)) continue;
    const uint32_t slot = uint32_t(row * rows.slots + vec / kVecsPerSlot);
    const Vec sum = receive_made(group, waiter, slot, uint32_t(vec % kVecsPerSlot));
    store_flat<T>(a.out, row * kFlatRowVecs + vec, a.count, sum);
  }
  advance_counters(group, range, rows.slots);
  tracer.finish();
}

template <class T, int kMaxWorld, int kPacks>
__global__ void __launch_bounds__(kTwoShotThreads, 1)
    two_shot_norm(const __grid_constant__ Group group, const void* x, const __grid_constant__ NormArguments a,
                  int num_rows, const __grid_constant__ TraceRecord facts) {
  constexpr int kVecs = kPack / Io<T>::kPerVec;
  __shared__ Partials partials;
  wait_for_previous_kernel();
  let_next_kernel_start();
  Tracer tracer(group, facts);
  Waiter waiter(group);
  const int packs = a.hidden / kPack;
  const Rows rows(packs * kVecs);
  const RowRange range = rows_of_block(num_rows);
  const Vec* const own = static_cast<const Vec*>(x);
  send_and_sum<T, kMaxWorld>(
      group, waiter, range, rows, [&](int row, int vec) { return own[int64_t(row) * rows.vecs + vec]; },
      [](int, int) { return true; });

  Pack<T> weight[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * kTwoShotThreads + int(threadIdx.x);
    if (pack < packs) weight[j] = load_weight<T>(a, pack);
  }
  for (int row = range.begin; row < range.end; ++row) {
    Pack<T> r[kPacks] = {};
    float squares[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = j * kTwoShotThreads + int(threadIdx.x);
      if (pack >= packs) continue;
      Pack<T> residual = {};
      if (a.residual != nullptr) residual = Pack<T>::load(a.residual, int64_t(row) * packs + pack);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int vec = pack * kVecs + i;
        r[j].v[i] = receive_made(group, waiter, uint32_t(row * rows.slots + vec / kVecsPerSlot),
                                 uint32_t(vec % kVecsPerSlot));
      }
      squares[j] = add_residual<T>(a, int64_t(row) * packs + pack, residual, r[j]);
    }
    const float inv = inverse_root(block_row_sum<kPacks>(squares, partials, int(row & 1)), a);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int pack = j * kTwoShotThreads + int(threadIdx.x);
      finish_pack<T>(a, row, pack, inv, weight[j], r[j], pack < packs);
    }
  }
  advance_counters(group, range, rows.slots);
  tracer.finish();
}

}  // namespace fusedcomm::gpu
