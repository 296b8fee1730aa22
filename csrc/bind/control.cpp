// Set-up and tear-down of communicators: a C interface that fusedcomm/native.py calls through ctypes.
#include "bind/control.h"

#include <cstring>
#include <new>

#define FUSEDCOMM_EXPORT extern "C" __attribute__((visibility("default")))

using fusedcomm::communicator;
using fusedcomm::cpu::Config;
using fusedcomm::cpu::Failure;
using fusedcomm::cpu::SegmentHeader;

FUSEDCOMM_EXPORT const char* fusedcomm_build_id() { return FUSEDCOMM_BUILD_ID; }

FUSEDCOMM_EXPORT const char* fusedcomm_isa() {
  return fusedcomm::cpu::find_kernels(fusedcomm::cpu::DType::kFloat)->isa;
}

FUSEDCOMM_EXPORT int64_t fusedcomm_segment_bytes(int64_t slot_bytes) {
  return fusedcomm::cpu::segment_bytes(slot_bytes);
}

// Prepares a freshly mapped segment of this rank, before its peers map it.
FUSEDCOMM_EXPORT void fusedcomm_segment_init(void* segment) { new (segment) SegmentHeader(); }

FUSEDCOMM_EXPORT int32_t fusedcomm_segment_is_valid(const void* segment) {
  return static_cast<const SegmentHeader*>(segment)->magic == fusedcomm::cpu::kSegmentMagic;
}

struct FusedcommConfig {  // mirrored in native.py
  int64_t rank;
  int64_t world_size;
  int64_t slot_bytes;
  int64_t piece_bytes;
  int64_t one_shot_max_bytes;
  int64_t min_chunk_bytes;
  int64_t max_chunk_bytes;
  int64_t spins;
  int64_t yield_ns;
  int64_t timeout_ns;
};

FUSEDCOMM_EXPORT int64_t fusedcomm_comm_create(const FusedcommConfig* c, void* const* segments, const int32_t* pidfds) {
  Config config;
  config.rank = int(c->rank);
  config.world_size = int(c->world_size);
  config.slot_bytes = c->slot_bytes;
  config.piece_bytes = c->piece_bytes;
  config.one_shot_max_bytes = c->one_shot_max_bytes;
  config.min_chunk_bytes = c->min_chunk_bytes;
  config.max_chunk_bytes = c->max_chunk_bytes;
  config.wait = {int(c->spins), c->yield_ns};
  config.timeout_ns = c->timeout_ns;
  config.parallel = &fusedcomm::parallel_for;
  auto* comm = new (std::nothrow) fusedcomm::cpu::Communicator(
      config, std::vector<void*>(segments, segments + c->world_size), std::vector<int>(pidfds, pidfds + c->world_size));
  return reinterpret_cast<int64_t>(comm);
}

FUSEDCOMM_EXPORT void fusedcomm_comm_close(int64_t handle) { communicator(handle).close(); }
FUSEDCOMM_EXPORT void fusedcomm_comm_destroy(int64_t handle) { delete &communicator(handle); }

FUSEDCOMM_EXPORT int32_t fusedcomm_comm_in_call(int64_t handle) { return communicator(handle).in_call(); }
FUSEDCOMM_EXPORT int32_t fusedcomm_comm_failure(int64_t handle) { return int32_t(communicator(handle).failure()); }

FUSEDCOMM_EXPORT void fusedcomm_comm_fail(int64_t handle, const char* message) {
  communicator(handle).fail(Failure::kInterrupted, message);
}

// How many calls took one-shot and two-shot.
FUSEDCOMM_EXPORT void fusedcomm_comm_counts(int64_t handle, uint64_t counts[2]) {
  counts[0] = communicator(handle).num_one_shot();
  counts[1] = communicator(handle).num_two_shot();
}
