// The handle that torch operators take for a communicator.
#pragma once

#include <cstdint>

#include "cpu/communicator.h"

namespace fusedcomm {

// The lowest bit is set in the handles of GPU communicators (gpu_control.h): a tensor on another device than its group
// reaches the operators of that device, which refuse the handle.
inline bool is_cpu_handle(int64_t handle) { return handle != 0 && (handle & 1) == 0; }
inline cpu::Communicator& communicator(int64_t handle) { return *reinterpret_cast<cpu::Communicator*>(handle); }

// torch's intra-op threads; see cpu::ParallelFor.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t));

}  // namespace fusedcomm
