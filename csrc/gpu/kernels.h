// The kernels of one dtype, as the host launches them. One file each compiles kernels_impl.h.
#pragma once

#include "gpu/arguments.h"
#include "gpu/slab.h"

namespace fusedcomm::gpu {

enum class Algorithm : uint32_t { kOneShot = 1, kTwoShot = 2 };

// How a launch is laid out; which is fastest was measured (docs/tuning.md).
struct Geometry {
  int num_sms = 1;
  bool overlaps = false;       // programmatic dependent launch
  int cluster_threads = 0;     // norms of long rows: threads of a block in a cluster of blocks a row; 0: a block a row
  int sum_threads = 128;       // bare sum of a small message
  int sender_threads = 1024;   // two-shot: of a multiprocessor, that send and sum
  int receiver_threads = 512;  // two-shot: of a multiprocessor, that receive
  int lead = 2;                // two-shot: units between sending and summing
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

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Slots that a row takes.
inline int64_t slots_of(int64_t row_bytes) { return (row_bytes + kSlotBytes - 1) / kSlotBytes; }

}  // namespace fusedcomm::gpu
