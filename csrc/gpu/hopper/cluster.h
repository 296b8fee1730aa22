// Thread block clusters: blocks that run at the same time and read each other's shared memory. For sm_90 on.
#pragma once

#include "gpu/hopper/wgmma.h"

namespace fusedcomm::gpu::hopper {

// Until all threads of the cluster are here. What each wrote before, all see behind it.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same, of what was read alone: nothing written before is waited for, nor seen behind it.
__device__ inline void leave_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// Where that which this block has at `address` is of another block: the address of shared_address, and a rank.
__device__ inline uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address), "r"(rank));
  return theirs;
}

__device__ inline float2 load_pair_of_cluster(uint32_t address) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ inline float4 load_four_of_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace fusedcomm::gpu::hopper
