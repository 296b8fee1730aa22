// Speculative verification.
#include "gpu/sampling/chain.h"
#include "gpu/sampling/launch.h"
#include "gpu/sampling/tree.h"

namespace fusedcomm::gpu::sampling {

namespace {

__global__ void __launch_bounds__(kGreedyThreads)
    greedy_chain_verify_kernel(const __grid_constant__ GreedyArguments arguments) {
  verify_greedily(arguments);
}

constexpr int kMostNodes = 1024;  // whose room is less than that of a slice, or little more

}  // namespace

int chain_speculative_sampling(const ChainArguments& arguments, int device, void* stream) {
  return launch_rows<VerifyChain>(arguments, arguments.batch, arguments.vocab, device, stream);
}

int dflash_chain_verify(const BlockArguments& arguments, int device, void* stream) {
  return launch_rows<VerifyBlock>(arguments, arguments.batch, arguments.vocab, device, stream);
}

int greedy_chain_verify(const GreedyArguments& arguments, int device, void* stream) {
  if (arguments.batch == 0) return kOk;
  const Device* const facts = device_of(device);
  if (facts == nullptr) return FUSEDCOMM_RT(ErrorInvalidDevice);
  LaunchShape shape;
  shape.blocks = arguments.batch;
  shape.threads = kGreedyThreads;
  shape.overlaps = facts->overlaps;
  return launch(greedy_chain_verify_kernel, shape, static_cast<Stream>(stream), arguments);
}

int tree_speculative_sampling(const TreeArguments& arguments, int device, void* stream) {
  // Positions are those of any row, so nothing but a launch of its own is sure to come before them all.
  const Status status = FUSEDCOMM_RT(MemsetAsync)(
      arguments.predicts, 0xff, size_t(arguments.num_positions) * sizeof(int32_t), static_cast<Stream>(stream));
  if (status != kOk) return status;
  const bool has_room = arguments.size <= kMostNodes;
  return launch_rows<VerifyTree>({arguments, has_room}, arguments.batch, arguments.vocab, device, stream,
                                 has_room ? bytes_of_nodes(arguments.size) : 0);
}

}  // namespace fusedcomm::gpu::sampling
