// What a test asks of the host's part of a launch, which is a GPU's own.
#include "gpu/sampling/launch.h"

// Blocks of a row, threads and bytes of shared memory of a block.
extern "C" __attribute__((visibility("default"))) void emulated_layout(int64_t rows, int32_t vocab,
                                                                       int64_t narrow_bytes, int64_t wide_bytes,
                                                                       int32_t* found) {
  namespace s = fusedcomm::gpu::sampling;
  const s::Layout layout = s::layout_of(*s::device_of(0), rows, vocab, {narrow_bytes, wide_bytes, 0});
  found[0] = layout.blocks;
  found[1] = layout.threads;
  found[2] = layout.shared_bytes;
}
