// How rows are spread over the GPU.
#pragma once

#include "gpu/sampling/slice.h"

namespace fusedcomm::gpu::sampling {

constexpr int kMaxDevices = 64;

struct Device {
  int num_sms = 1;
  int shared_bytes = 0;  // that a block can have
  bool overlaps = false;
  bool has_clusters = false;
  int blocks = 0, threads = 0;  // asked for by set_team(); 0: by the rule
};

// Facts of a device, asked for once; null: there is no such device.
Device* device_of(int index);

// The blocks of a row, and what each of them has.
struct Layout {
  int blocks = 1;
  int threads = 0;
  int shared_bytes = 0;
};

// memory_bytes: what a block needs beside its slice; least_bytes: of the room for the slice.
Layout layout_of(const Device& device, int64_t rows, int32_t vocab, int64_t memory_bytes, int64_t least_bytes = 0);

// kKernel<<<a team a row>>>(arguments…)
template <class Memory, auto kKernel, class... Arguments>
int launch_rows(int64_t rows, int32_t vocab, int64_t least_bytes, int device, void* stream,
                const Arguments&... arguments) {
  if (rows == 0) return kOk;
  static bool allowed[kMaxDevices];  // to take all the shared memory there is
  Device* const facts = device_of(device);
  if (facts == nullptr) return FUSEDCOMM_RT(ErrorInvalidDevice);
  if (!allowed[device]) {
    const Status status = allow_shared_memory(reinterpret_cast<const void*>(kKernel), facts->shared_bytes);
    if (status != kOk) return status;
    allowed[device] = true;
  }
  const Layout layout = layout_of(*facts, rows, vocab, sizeof(Memory), least_bytes);
  LaunchShape shape;
  shape.blocks = rows * layout.blocks;
  shape.threads = layout.threads;
  shape.blocks_in_cluster = layout.blocks;
  shape.shared_bytes = layout.shared_bytes;
  shape.overlaps = facts->overlaps;
  return launch(kKernel, shape, static_cast<Stream>(stream), arguments...);
}

// One kernel for each type of the rows.
template <class Memory, auto kBFloat16, auto kHalf, auto kFloat, class... Arguments>
int launch_typed(const Rows& rows, int device, void* stream, const Arguments&... arguments) {
  switch (rows.dtype) {
    case DType::kBFloat16:
      return launch_rows<Memory, kBFloat16>(rows.count, rows.vocab, 0, device, stream, rows, arguments...);
    case DType::kHalf:
      return launch_rows<Memory, kHalf>(rows.count, rows.vocab, 0, device, stream, rows, arguments...);
    default:
      return launch_rows<Memory, kFloat>(rows.count, rows.vocab, 0, device, stream, rows, arguments...);
  }
}

}  // namespace fusedcomm::gpu::sampling
