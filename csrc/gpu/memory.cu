#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "gpu/communicator.h"
#include "gpu/memory.h"
#include "gpu/slab.h"

namespace fusedcomm::gpu {

namespace {

using Properties = FUSEDCOMM_PROPERTIES;

void check(Status status, const char* what) {
  if (status != kOk) throw std::runtime_error(std::string(what) + ": " + FUSEDCOMM_RT(GetErrorString)(status));
}

Properties properties(int device) {
  Properties p;
  check(FUSEDCOMM_RT(GetDeviceProperties)(&p, device), "device properties");
  return p;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  if (FUSEDCOMM_RT(GetDevice)(&current) == kOk && current == device) return;
  previous_ = current;
  (void)FUSEDCOMM_RT(SetDevice)(device);
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) (void)FUSEDCOMM_RT(SetDevice)(previous_);
}

DeviceFacts device_facts(int device) {
  const Properties p = properties(device);
  DeviceFacts facts = {};
  static_assert(sizeof(p.uuid.bytes) == sizeof(facts.uuid), "a UUID has 16 bytes");
  std::memcpy(facts.uuid, p.uuid.bytes, sizeof(facts.uuid));
  facts.major = p.major;
  facts.minor = p.minor;
  facts.num_sms = p.multiProcessorCount;
  facts.warp_size = p.warpSize;
  std::snprintf(facts.arch, sizeof(facts.arch), "%s", architecture(p).c_str());
  std::memcpy(facts.name, p.name, sizeof(facts.name) - 1);
  return facts;
}

int64_t slab_bytes(int world_size, int64_t buffer_bytes) { return slab_layout(world_size, buffer_bytes).bytes; }

void* allocate(int device, int64_t bytes, uint8_t (&handle)[kHandleBytes]) {
  const DeviceGuard guard(device);
  void* address = nullptr;
  check(allocate_slab(&address, bytes), "allocating the slab");
  try {
    // Free words everywhere; who makes the communicator clears counters and control.
    check(FUSEDCOMM_RT(Memset)(address, 0xff, size_t(bytes)), "clearing the slab");
    check(FUSEDCOMM_RT(DeviceSynchronize)(), "clearing the slab");
    FUSEDCOMM_RT(IpcMemHandle_t) exported;
    static_assert(sizeof(exported) == kHandleBytes, "an IPC handle has 64 bytes");
    check(FUSEDCOMM_RT(IpcGetMemHandle)(&exported, address), "exporting the slab");
    std::memcpy(handle, &exported, sizeof(exported));
  } catch (...) {
    (void)FUSEDCOMM_RT(Free)(address);
    throw;
  }
  return address;
}

void* open(int device, const uint8_t (&handle)[kHandleBytes]) {
  const DeviceGuard guard(device);
  FUSEDCOMM_RT(IpcMemHandle_t) exported;
  std::memcpy(&exported, handle, sizeof(exported));
  void* address = nullptr;
  check(FUSEDCOMM_RT(IpcOpenMemHandle)(&address, exported, FUSEDCOMM_RT(IpcMemLazyEnablePeerAccess)),
        "mapping a peer's slab");
  return address;
}

void close(int device, void* address) {
  const DeviceGuard guard(device);
  (void)FUSEDCOMM_RT(IpcCloseMemHandle)(address);
}

void free(int device, void* address) {
  const DeviceGuard guard(device);
  (void)FUSEDCOMM_RT(Free)(address);
}

int peer_access(int device, const uint8_t (&uuid)[16]) {
  int count = 0;
  if (FUSEDCOMM_RT(GetDeviceCount)(&count) != kOk) return -1;
  for (int other = 0; other < count; ++other) {
    if (std::memcmp(properties(other).uuid.bytes, uuid, 16) != 0) continue;
    if (other == device) return 1;
    int can = 0;
    check(FUSEDCOMM_RT(DeviceCanAccessPeer)(&can, device, other), "peer access");
    return can;
  }
  return -1;
}

}  // namespace fusedcomm::gpu
