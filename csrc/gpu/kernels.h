// The kernels of one dtype, as the host launches them. One file each compiles kernels_impl.h.
#pragma once

#include "gpu/arguments.h"
#include "gpu/slab.h"

namespace fusedcomm::gpu {

enum class Algorithm : uint32_t { kOneShot = 1, kTwoShot = 2 };

// How a launch is laid out; which is fastest was measured (docs/tuning.md).
struct Geometry {
  int num_sms = 1;
  bool overlaps = false;      // programmatic dependent launch
  int cluster_threads = 0;    // one-shot: threads of a block in a cluster of blocks a row; 0: a block a row
  int sum_threads = 256;      // one-shot bare sum
  int two_shot_blocks = 2;    // a multiprocessor
};

struct Kernels {
  // A message that fits the slab.
  Status (*sum)(const Group&, Algorithm, const Geometry&, const SumArguments&, Stream);
  Status (*norm)(const Group&, Algorithm, const Geometry&, const void* x, int64_t rows, const NormArguments&, Stream);
  // Without communication.
  Status (*local_norm)(const Geometry&, const void* x, int64_t rows, const NormArguments&, Stream);
  Status (*local_quant)(const Geometry&, const void* x, int64_t rows, int64_t hidden, const QuantTarget&, Stream);
};

const Kernels& bf16_kernels();
const Kernels& half_kernels();
const Kernels& float_kernels();
const Kernels& kernels_of(DType dtype);

constexpr int64_t kMaxFusedHidden = 16384;
constexpr int kFlatRowBytes = 8192;  // two-shot walks a flat message in rows of this size

// Slots that a row takes.
inline int64_t slots_of(int64_t row_bytes) { return (row_bytes + kSlotBytes - 1) / kSlotBytes; }

}  // namespace fusedcomm::gpu
