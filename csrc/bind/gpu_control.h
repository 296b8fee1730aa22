// The handle that torch operators take for a GPU communicator.
#pragma once

#include <cstdint>

#include "gpu/communicator.h"

namespace fusedcomm::gpu {

inline Communicator& communicator(int64_t handle) { return *reinterpret_cast<Communicator*>(handle); }

}  // namespace fusedcomm::gpu
