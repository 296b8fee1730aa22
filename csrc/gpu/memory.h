// Slabs: allocating, exporting and mapping device memory, and what a device can do.
#pragma once

#include <cstdint>
#include <string>

namespace fusedcomm::gpu {

constexpr int kHandleBytes = 64;

struct DeviceFacts {
  uint8_t uuid[16];
  int32_t major;
  int32_t minor;
  int32_t num_sms;
  int32_t warp_size;
  char arch[32];  // "sm_90", "gfx942"
  char name[64];
};

// These throw std::runtime_error with the runtime's words.
DeviceFacts device_facts(int device);
void* allocate(int device, int64_t bytes, uint8_t (&handle)[kHandleBytes]);
void* open(int device, const uint8_t (&handle)[kHandleBytes]);

void close(int device, void* address);
void free(int device, void* address);

// 1: yes, or the same device; 0: no; -1: that device is not visible to this process.
int peer_access(int device, const uint8_t (&uuid)[16]);

int64_t slab_bytes(int world_size, int64_t buffer_bytes);

}  // namespace fusedcomm::gpu
