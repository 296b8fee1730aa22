// How rows are spread over the GPU.
#pragma once

#include "gpu/sampling/slice.h"

namespace fusedcomm::gpu::sampling {

constexpr int kMaxDevices = 64;
constexpr int kTeamSizes = 5;  // 1, 2, 4 … blocks
static_assert(1 << (kTeamSizes - 1) == kManyBlocks);

struct Device {
  int shared_bytes = 0;  // that a block can have
  bool overlaps = false;
  bool has_clusters = false;
  // Teams of each size that are on the GPU at once, if a multiprocessor has one block, or two; 0: there are none.
  int teams_apart[kTeamSizes] = {}, teams_in_pairs[kTeamSizes] = {};
  int blocks = 0, threads = 0;  // asked for by set_team(); 0: by the rule
};

// Facts of a device, asked for once; null: there is no such device.
Device* device_of(int index);

// The blocks of a row, and what each of them has.
struct Layout {
  int blocks = 1;
  int threads = 0;
  int shared_bytes = 0;

  bool is_wide() const { return blocks > kFewBlocks; }
};

// What a block needs of shared memory.
struct Needs {
  int64_t narrow_bytes, wide_bytes;  // beside its slice, in teams of each kind
  int64_t least_bytes;               // of the room for the slice
};

Layout layout_of(const Device& device, int64_t rows, int32_t vocab, const Needs& needs);

// A row of an operation by a team. Op has
//
//   Arguments          of the launch
//   Memory<Team>       what run() prepares of shared memory
//   run<Team>(a)       by all threads of the team
//   kBlocksOfSm        of kThreads threads that have to find room on a multiprocessor: fewer registers, more of them
template <class Op, class Team>
__global__ void __launch_bounds__(kMaxThreads, kHasClusters ? Op::kBlocksOfSm : 1)
    row_kernel(const __grid_constant__ typename Op::Arguments arguments) {
  if constexpr (Team::kIsServed) Op::template run<Team>(arguments);
}

template <class Op, class Team>
int launch_team(const typename Op::Arguments& arguments, int64_t rows, const Layout& layout, const Device& facts,
                int device, void* stream) {
  static bool is_prepared[kMaxDevices];
  const auto kernel = row_kernel<Op, Team>;
  if (!is_prepared[device]) {
    Status status = allow_shared_memory(reinterpret_cast<const void*>(kernel), facts.shared_bytes);
    if (status == kOk && layout.is_wide()) status = allow_large_clusters(reinterpret_cast<const void*>(kernel));
    if (status != kOk) return status;
    is_prepared[device] = true;
  }
  LaunchShape shape;
  shape.blocks = rows * layout.blocks;
  shape.threads = layout.threads;
  shape.blocks_in_cluster = layout.blocks;
  shape.shared_bytes = layout.shared_bytes;
  shape.overlaps = facts.overlaps;
  return launch(kernel, shape, static_cast<Stream>(stream), arguments);
}

// A team a row. least_bytes: of the room for the slice.
template <class Op>
int launch_rows(const typename Op::Arguments& arguments, int64_t rows, int32_t vocab, int device, void* stream,
                int64_t least_bytes = 0) {
  if (rows == 0) return kOk;
  const Device* const facts = device_of(device);
  if (facts == nullptr) return FUSEDCOMM_RT(ErrorInvalidDevice);
  using Narrow = typename Op::template Memory<NarrowTeam>;
  using Wide = typename Op::template Memory<WideTeam>;
  const Layout layout = layout_of(*facts, rows, vocab, {sizeof(Narrow), sizeof(Wide), least_bytes});
  if (layout.is_wide()) return launch_team<Op, WideTeam>(arguments, rows, layout, *facts, device, stream);
  return launch_team<Op, NarrowTeam>(arguments, rows, layout, *facts, device, stream);
}

// One operation for each type of the rows.
template <template <class> class Op, class... Arguments>
int launch_typed(int device, void* stream, const Rows& rows, const Arguments&... arguments) {
  const auto launch_op = [&](auto op) {
    return launch_rows<decltype(op)>({rows, arguments...}, rows.count, rows.vocab, device, stream);
  };
  switch (rows.dtype) {
    case DType::kBFloat16:
      return launch_op(Op<BFloat16>());
    case DType::kHalf:
      return launch_op(Op<Half>());
    default:
      return launch_op(Op<float>());
  }
}

}  // namespace fusedcomm::gpu::sampling
