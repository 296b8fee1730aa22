// What lies where in the slab of a rank: device memory that every rank of the group has mapped.
//
//   [ one-shot | two-shot sums to make | two-shot sums made | counters | control ]
//
// Peers write the first three; counters and control are this rank's own. A message is cut into slots of 2 KiB; slot s
// of a message always lies in slot s of the slab, whatever the shape, so a slot is a small communicator of its own: its
// counter says which of the two generations its next use writes, and a kernel's grid is nobody else's business.
//
//   one-shot       [generation][source rank][slot]           every rank sends its whole message to all
//   sums to make   [generation][source rank][slot / world]   slot s goes to its owner, rank s mod world
//   sums made      [generation][slot]                        and comes back summed
//
// A free word holds kFree. Two generations suffice: no kernel uses a slot twice, and no rank ends a kernel before all
// have started it, each having ended the one before. So who writes generation n + 2 has ended the kernel of n + 1, and
// by then every rank had ended the kernel in which it freed n.
#pragma once

#include <cstdint>

#include "gpu/gpu.h"

namespace fusedcomm::gpu {

constexpr int kMaxWorldSize = 8;
constexpr int kNumGenerations = 2;
constexpr int kSlotBytes = 2048;
constexpr int kVecsPerSlot = kSlotBytes / int(sizeof(Vec));

// A NaN in every dtype, and one that no rounding here produces; a sender turns it into another NaN. (-0 would do for
// the addends but not for the sums, which must keep it, and would differ by dtype.)
constexpr uint32_t kFree = 0xffffffffu;
constexpr uint32_t kOtherNan = 0x7fff7fffu;

// The last calls of this rank, in device memory: replayed graphs write it too.
struct TraceRecord {
  uint32_t op_number;
  uint32_t op;         // 1 all_reduce, 2 allreduce_rmsnorm, 3 allreduce_rmsnorm_quant
  uint32_t algorithm;  // 1 one-shot, 2 two-shot
  uint32_t dtype;      // DType
  uint32_t rows;
  uint32_t hidden;
};

constexpr int kTraceLength = 256;

struct Control {
  uint32_t started;    // calls; counted as they start, for failures
  uint32_t op_number;  // of the call that is traced next
  uint32_t failed;
  TraceRecord trace[kTraceLength];
};

// Bytes, from the start of the slab. 32 bits: offsets are computed by every thread.
struct SlabLayout {
  uint32_t one_shot_slots;
  uint32_t two_shot_slots;   // a multiple of world_size
  uint32_t one_shot_stride;  // from the slots of one source to those of the next; the area begins at 0
  uint32_t to_make;
  uint32_t to_make_stride;
  uint32_t made;
  uint32_t made_stride;  // from one generation to the next
  uint32_t one_shot_counters;
  uint32_t two_shot_counters;
  uint32_t control;
  uint32_t bytes;
};

constexpr int64_t kMaxBufferBytes = int64_t(2047) << 20;  // more serves no message better

// An eighth of the buffer for one-shot, the rest for two-shot, which takes larger messages in pieces.
inline SlabLayout slab_layout(int world_size, int64_t buffer_bytes) {
  buffer_bytes = buffer_bytes < kMaxBufferBytes ? buffer_bytes : kMaxBufferBytes;
  const auto words = [](uint32_t n) { return (n * 4 + 255) / 256 * 256; };
  const uint32_t world = uint32_t(world_size);
  SlabLayout l;
  l.one_shot_slots = uint32_t(buffer_bytes / 8 / (kNumGenerations * world_size * kSlotBytes));
  l.two_shot_slots = uint32_t(buffer_bytes / 8 * 7 / (2 * kNumGenerations * kSlotBytes)) / world * world;
  l.one_shot_stride = l.one_shot_slots * kSlotBytes;
  l.to_make = kNumGenerations * world * l.one_shot_stride;
  l.to_make_stride = l.two_shot_slots / world * kSlotBytes;
  l.made = l.to_make + kNumGenerations * world * l.to_make_stride;
  l.made_stride = l.two_shot_slots * kSlotBytes;
  l.one_shot_counters = l.made + kNumGenerations * l.made_stride;
  l.two_shot_counters = l.one_shot_counters + words(l.one_shot_slots);
  l.control = l.two_shot_counters + words(l.two_shot_slots);
  l.bytes = l.control + uint32_t(sizeof(Control));
  return l;
}

// What went wrong on the device; in host memory, so that the host sees it without waiting for the stream.
struct FailureRecord {
  uint32_t state;  // 0, or kRecorded once the rest is there
  uint32_t kind;   // Failure of failure.h
  uint32_t peer;
  uint32_t op;  // as in TraceRecord
  uint32_t op_number;
  uint32_t block;
  uint32_t slot;
  uint32_t generation;
};

constexpr uint32_t kRecorded = 1;

// Shared by the host and the kernels of one rank.
struct HostPage {
  FailureRecord record;
  uint32_t gone;  // bit r: rank r will send nothing more (it closed, failed or died)
};

// The group as kernels see it, by value.
struct Group {
  char* slabs[kMaxWorldSize];  // slabs[rank] is this rank's own
  int rank;
  int world_size;
  SlabLayout layout;
  HostPage* host;
  uint32_t timeout_ticks;  // coarse_ticks()
  uint32_t op;             // of this launch, as in TraceRecord

  // Where Vec `in_slot` of a slot lies in a slab: for one-shot generation 0 of source 0, the others being further on.
  __device__ uint32_t one_shot(uint32_t slot, uint32_t in_slot) const {
    return slot * kSlotBytes + in_slot * uint32_t(sizeof(Vec));
  }
  __device__ uint32_t one_shot_generation(uint32_t generation) const {
    return (generation & 1u) * uint32_t(world_size) * layout.one_shot_stride;
  }
  __device__ uint32_t to_make(uint32_t generation, int source, uint32_t slot, uint32_t in_slot) const {
    return layout.to_make + ((generation & 1u) * uint32_t(world_size) + uint32_t(source)) * layout.to_make_stride +
           slot / uint32_t(world_size) * kSlotBytes + in_slot * uint32_t(sizeof(Vec));
  }
  __device__ uint32_t made(uint32_t generation, uint32_t slot, uint32_t in_slot) const {
    return layout.made + (generation & 1u) * layout.made_stride + slot * kSlotBytes + in_slot * uint32_t(sizeof(Vec));
  }
  __device__ Vec* at(int rank_of_slab, uint32_t offset) const {
    return reinterpret_cast<Vec*>(slabs[rank_of_slab] + offset);
  }
  __device__ uint32_t* one_shot_counters() const {
    return reinterpret_cast<uint32_t*>(slabs[rank] + layout.one_shot_counters);
  }
  __device__ uint32_t* two_shot_counters() const {
    return reinterpret_cast<uint32_t*>(slabs[rank] + layout.two_shot_counters);
  }
  __device__ Control* control() const { return reinterpret_cast<Control*>(slabs[rank] + layout.control); }
};

}  // namespace fusedcomm::gpu
