#include <algorithm>
#include <mutex>

#include "gpu/sampling/launch.h"

namespace fusedcomm::gpu::sampling {

namespace {

constexpr int kFewestElements = 2048;  // of a block that shares a row: fewer are not worth meeting for
constexpr int kElementsOfThread = 8;   // where a multiprocessor has one block
constexpr int kThreads = 512;          // of a block, where a multiprocessor has several
constexpr int kBlocksOfSm = 2;
constexpr double kUsable = 0.9;  // of the multiprocessors, where those of a cluster have to be neighbours

}  // namespace

Device* device_of(int index) {
  static Device known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  if (index < 0 || index >= kMaxDevices) return nullptr;
  std::call_once(once[index], [index] {
    FUSEDCOMM_PROPERTIES p;
    if (FUSEDCOMM_RT(GetDeviceProperties)(&p, index) != kOk) return;
    known[index].num_sms = p.multiProcessorCount;
    known[index].shared_bytes = largest_shared_memory(p);
    known[index].overlaps = can_overlap(p);
    known[index].has_clusters = has_clusters(p);
  });
  return known[index].shared_bytes > 0 ? &known[index] : nullptr;
}

void set_team(int device, int blocks, int threads) {
  Device* const facts = device_of(device);
  if (facts == nullptr) return;
  facts->blocks = blocks;
  facts->threads = threads;
}

static_assert(!kHasClusters || elements_of_block(fusedcomm::sampling::kMaxVocab, kMaxTeam) <= kMostElements,
              "every row can be kept");

// A row is spread over as many blocks as find room on the GPU at once, and over as many as let each keep its slice. A
// multiprocessor that has several rows has two blocks, so that one computes while the other waits.
Layout layout_of(const Device& device, int64_t rows, int32_t vocab, int64_t memory_bytes, int64_t least_bytes) {
  Layout layout;
  if (!device.has_clusters) {  // slices stay in memory
    layout.threads = kMaxThreads;
    layout.shared_bytes = int(memory_bytes + least_bytes);
    return layout;
  }
  const auto bytes = [&] {
    return memory_bytes + std::max(least_bytes, 4 * int64_t(elements_of_block(vocab, layout.blocks)));
  };
  while (layout.blocks < kMaxTeam) {
    const bool finds_room =
        rows * layout.blocks * 2 <= int64_t(device.num_sms) * kBlocksOfSm && vocab > layout.blocks * kFewestElements;
    const bool is_too_long = bytes() > device.shared_bytes / kBlocksOfSm - 1024 ||  // of which the system takes 1 KiB
                             elements_of_block(vocab, layout.blocks) > kMostElements;
    if (!finds_room && !is_too_long) break;
    layout.blocks *= 2;
  }
  if (device.blocks > 0 && elements_of_block(vocab, device.blocks) <= kMostElements) layout.blocks = device.blocks;
  const bool is_alone = double(rows * layout.blocks) <= kUsable * device.num_sms;
  const int wanted = elements_of_block(vocab, layout.blocks) / kElementsOfThread;
  const int most = is_alone ? kMaxThreads : kThreads;
  layout.threads = std::clamp((wanted + kWarpSize - 1) / kWarpSize * kWarpSize, 2 * kWarpSize, most);
  if (device.threads > 0) layout.threads = device.threads;
  layout.shared_bytes = int(bytes());
  return layout;
}

}  // namespace fusedcomm::gpu::sampling
