#include <algorithm>
#include <mutex>

#include "gpu/sampling/launch.h"

namespace fusedcomm::gpu::sampling {

namespace {

constexpr int kElementsOfThread = 8;
// Of a block's slice, at least: fewer are not worth meeting for. Two blocks that share a multiprocessor compute in
// turn.
constexpr int kLeastOfFew = 1024, kLeastOfMany = 6144, kLeastInPairs = 8192;

// For two blocks on a multiprocessor; the system takes 1 KiB of each.
int half_of(int shared_bytes) { return shared_bytes / 2 - 1024; }

// What a GPU has at once depends on where its multiprocessors are: those of a cluster have to be neighbours.
__global__ void nothing() {}

Status count_teams(Device& device) {
  const void* const kernel = reinterpret_cast<const void*>(nothing);
  Status status = allow_shared_memory(kernel, device.shared_bytes);
  if (status == kOk) status = allow_large_clusters(kernel);
  if (status != kOk) return status;
  for (int i = 1; i < kTeamSizes; ++i) {
    device.teams_apart[i] = clusters_at_once(kernel, kThreads, device.shared_bytes, 1 << i);
    device.teams_in_pairs[i] = clusters_at_once(kernel, kThreads, half_of(device.shared_bytes), 1 << i);
  }
  return kOk;
}

}  // namespace

Device* device_of(int index) {
  static Device known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  if (index < 0 || index >= kMaxDevices) return nullptr;
  std::call_once(once[index], [index] {
    FUSEDCOMM_PROPERTIES p;
    if (FUSEDCOMM_RT(GetDeviceProperties)(&p, index) != kOk) return;
    Device device;
    device.shared_bytes = largest_shared_memory(p);
    device.overlaps = can_overlap(p);
    device.has_clusters = has_clusters(p);
    if (!device.has_clusters || count_teams(device) == kOk) known[index] = device;
  });
  return known[index].shared_bytes > 0 ? &known[index] : nullptr;
}

void set_team(int device, int blocks, int threads) {
  Device* const facts = device_of(device);
  if (facts == nullptr) return;
  facts->blocks = blocks;
  facts->threads = threads;
}

static_assert(!kHasClusters || elements_of_block(fusedcomm::sampling::kMaxVocab, kFewBlocks) <= kMostElements,
              "every row can be kept");

// A row is spread over as many blocks as find room on the GPU at once, as long as each has enough to do; and over as
// many as let each keep its slice, two on a multiprocessor: one computes while the other waits.
Layout layout_of(const Device& device, int64_t rows, int32_t vocab, const Needs& needs) {
  Layout layout;
  const auto bytes = [&](int blocks) {
    return (blocks > kFewBlocks ? needs.wide_bytes : needs.narrow_bytes) +
           std::max(needs.least_bytes, 4 * int64_t(elements_of_block(vocab, blocks)));
  };
  if (!device.has_clusters) {  // slices stay in memory
    layout.threads = 2 * kThreads;
    layout.shared_bytes = int(needs.narrow_bytes + needs.least_bytes);
    return layout;
  }
  for (int i = 1; i < kTeamSizes; ++i) {
    const int blocks = 1 << i, elements = vocab / blocks;
    const bool is_large = blocks > kFewBlocks;
    const bool apart = rows <= device.teams_apart[i] && elements >= (is_large ? kLeastOfMany : kLeastOfFew);
    const bool in_pairs = rows <= device.teams_in_pairs[i] && elements >= kLeastInPairs;
    if (apart || (in_pairs && !is_large)) layout.blocks = blocks;
  }
  const auto is_too_long = [&](int blocks) {
    return bytes(blocks) > half_of(device.shared_bytes) || elements_of_block(vocab, blocks) > kMostElements;
  };
  while (layout.blocks < kFewBlocks && is_too_long(layout.blocks)) layout.blocks *= 2;
  if (device.blocks > 0 && device.blocks <= kManyBlocks && elements_of_block(vocab, device.blocks) <= kMostElements) {
    layout.blocks = device.blocks;
  }
  const int wanted = elements_of_block(vocab, layout.blocks) / kElementsOfThread;
  layout.threads = std::clamp((wanted + kWarpSize - 1) / kWarpSize * kWarpSize, 2 * kWarpSize, kThreads);
  if (device.threads > 0 && device.threads <= kThreads) layout.threads = device.threads;
  layout.shared_bytes = int(bytes(layout.blocks));
  return layout;
}

}  // namespace fusedcomm::gpu::sampling
