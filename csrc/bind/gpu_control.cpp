// Set-up and tear-down of GPU communicators: a C interface that fusedcomm/native.py calls through ctypes. What fails
// leaves its words in `error` and returns 0 (or not 0, where 0 means success).
#include "bind/gpu_control.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <exception>

#include "gpu/memory.h"

#define FUSEDCOMM_EXPORT extern "C" __attribute__((visibility("default")))

namespace gpu = fusedcomm::gpu;

namespace {

constexpr size_t kErrorBytes = 256;

void copy_text(const std::string& text, char* out, size_t size) {
  const size_t length = std::min(text.size(), size - 1);
  std::memcpy(out, text.data(), length);
  out[length] = 0;
}

// Runs body; its exception becomes text.
template <class Body>
int64_t attempt(char* error, int64_t failed, const Body& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    copy_text(e.what(), error, kErrorBytes);
    return failed;
  }
}

uint32_t scalar_type(fusedcomm::DType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case fusedcomm::DType::kBFloat16:
      return uint32_t(ScalarType::BFloat16);
    case fusedcomm::DType::kHalf:
      return uint32_t(ScalarType::Half);
    default:
      return uint32_t(ScalarType::Float);
  }
}

}  // namespace

struct FusedcommGpuConfig {  // mirrored in native.py
  int64_t rank;
  int64_t world_size;
  int64_t device;
  int64_t slab_bytes;
  int64_t buffer_bytes;
  int64_t one_shot_max_bytes;
  int64_t timeout_ns;
};

FUSEDCOMM_EXPORT const char* fusedcomm_gpu_build_id() { return FUSEDCOMM_BUILD_ID; }

FUSEDCOMM_EXPORT int32_t fusedcomm_gpu_device_facts(int32_t device, gpu::DeviceFacts* out, char* error) {
  return int32_t(attempt(error, 1, [&] {
    *out = gpu::device_facts(device);
    return 0;
  }));
}

FUSEDCOMM_EXPORT int32_t fusedcomm_gpu_peer_access(int32_t device, const uint8_t* uuid) {
  char error[kErrorBytes];
  uint8_t id[16];
  std::memcpy(id, uuid, sizeof(id));
  return int32_t(attempt(error, 0, [&] { return gpu::peer_access(device, id); }));
}

FUSEDCOMM_EXPORT int64_t fusedcomm_gpu_slab_bytes(int32_t world_size, int64_t buffer_bytes) {
  return gpu::slab_bytes(world_size, buffer_bytes);
}

FUSEDCOMM_EXPORT int64_t fusedcomm_gpu_slab_allocate(int32_t device, int64_t bytes, uint8_t* handle, char* error) {
  return attempt(error, 0, [&] {
    uint8_t exported[gpu::kHandleBytes];
    void* const address = gpu::allocate(device, bytes, exported);
    std::memcpy(handle, exported, sizeof(exported));
    return reinterpret_cast<int64_t>(address);
  });
}

FUSEDCOMM_EXPORT int64_t fusedcomm_gpu_slab_open(int32_t device, const uint8_t* handle, char* error) {
  return attempt(error, 0, [&] {
    uint8_t exported[gpu::kHandleBytes];
    std::memcpy(exported, handle, sizeof(exported));
    return reinterpret_cast<int64_t>(gpu::open(device, exported));
  });
}

FUSEDCOMM_EXPORT void fusedcomm_gpu_slab_close(int32_t device, int64_t address) {
  gpu::close(device, reinterpret_cast<void*>(address));
}

FUSEDCOMM_EXPORT void fusedcomm_gpu_slab_free(int32_t device, int64_t address) {
  gpu::free(device, reinterpret_cast<void*>(address));
}

FUSEDCOMM_EXPORT int64_t fusedcomm_gpu_comm_create(const FusedcommGpuConfig* c, const int64_t* slabs,
                                                   const int64_t* segments, const int32_t* pidfds, char* error) {
  return attempt(error, 0, [&] {
    gpu::Config config;
    config.rank = int(c->rank);
    config.world_size = int(c->world_size);
    config.device = int(c->device);
    config.slab_bytes = c->slab_bytes;
    config.buffer_bytes = c->buffer_bytes;
    config.one_shot_max_bytes = c->one_shot_max_bytes;
    config.timeout_ns = c->timeout_ns;
    std::vector<void*> mapped;
    std::vector<fusedcomm::cpu::SegmentHeader*> headers;
    for (int64_t r = 0; r < c->world_size; ++r) {
      mapped.push_back(reinterpret_cast<void*>(slabs[r]));
      headers.push_back(reinterpret_cast<fusedcomm::cpu::SegmentHeader*>(segments[r]));
    }
    return gpu::handle_of(
        new gpu::Communicator(config, mapped, headers, std::vector<int>(pidfds, pidfds + c->world_size)));
  });
}

FUSEDCOMM_EXPORT void fusedcomm_gpu_comm_close(int64_t handle) { gpu::communicator(handle).close(); }
FUSEDCOMM_EXPORT void fusedcomm_gpu_comm_destroy(int64_t handle) { delete &gpu::communicator(handle); }

// A call is over for the host as soon as it is launched.
FUSEDCOMM_EXPORT int32_t fusedcomm_gpu_comm_in_call(int64_t) { return 0; }

// Looks at what the device found; 0 if nothing failed.
FUSEDCOMM_EXPORT int32_t fusedcomm_gpu_comm_failure(int64_t handle) {
  gpu::Communicator& comm = gpu::communicator(handle);
  char error[kErrorBytes];
  attempt(error, 0, [&] {
    comm.check();
    return 0;
  });
  return int32_t(comm.failure());
}

FUSEDCOMM_EXPORT void fusedcomm_gpu_comm_failure_text(int64_t handle, char* text, int32_t size) {
  copy_text(gpu::communicator(handle).message(), text, size_t(size));
}

FUSEDCOMM_EXPORT void fusedcomm_gpu_comm_fail(int64_t handle, const char* why) { gpu::communicator(handle).fail(why); }

FUSEDCOMM_EXPORT void fusedcomm_gpu_comm_counts(int64_t handle, uint64_t counts[2]) {
  counts[0] = gpu::communicator(handle).num_one_shot();
  counts[1] = gpu::communicator(handle).num_two_shot();
}

// Lets calls on this stream through: all that follow, or one. See stream_gate.h.
FUSEDCOMM_EXPORT void fusedcomm_gpu_comm_admit(int64_t handle, int64_t stream, int32_t once) {
  gpu::communicator(handle).gate().open(reinterpret_cast<void*>(stream), once != 0);
}

struct FusedcommGpuTraceRecord {  // mirrored in native.py
  uint32_t op_number;
  uint32_t op;
  uint32_t algorithm;
  uint32_t dtype;  // torch's ScalarType
  uint32_t rows;
  uint32_t hidden;
};

// The last calls on the device, oldest first; returns how many. Waits for the device.
FUSEDCOMM_EXPORT int32_t fusedcomm_gpu_comm_trace(int64_t handle, FusedcommGpuTraceRecord* out, int32_t max) {
  char error[kErrorBytes];
  return int32_t(attempt(error, 0, [&] {
    const std::vector<gpu::CallRecord> calls = gpu::communicator(handle).trace();
    const size_t count = std::min(calls.size(), size_t(max));
    std::transform(calls.end() - int64_t(count), calls.end(), out, [](const gpu::CallRecord& c) {
      return FusedcommGpuTraceRecord{c.op_number, c.op, c.algorithm, scalar_type(c.dtype), c.rows, c.hidden};
    });
    return int64_t(count);
  }));
}

// For measurements: how kernels are laid out on a device from now on; -1 keeps a value. See Geometry in gpu/kernels.h.
FUSEDCOMM_EXPORT void fusedcomm_gpu_set_geometry(int32_t device, int32_t overlaps, int32_t cluster_threads,
                                                 int32_t sum_threads, int32_t sender_threads, int32_t receiver_threads,
                                                 int32_t lead) {
  gpu::set_geometry(device, overlaps, cluster_threads, sum_threads, sender_threads, receiver_threads, lead);
}
