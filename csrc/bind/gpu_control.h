// The handle that torch operators take for a GPU communicator.
#pragma once

#include <cstdint>

#include "gpu/communicator.h"

namespace fusedcomm::gpu {

// The lowest bit is set: see control.h.
inline int64_t handle_of(Communicator* communicator) { return reinterpret_cast<int64_t>(communicator) | 1; }
inline bool is_gpu_handle(int64_t handle) { return (handle & 1) != 0; }
inline Communicator& communicator(int64_t handle) { return *reinterpret_cast<Communicator*>(handle & ~int64_t(1)); }

}  // namespace fusedcomm::gpu
