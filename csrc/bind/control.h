// The handle that torch operators take for a communicator.
#pragma once

#include <cstdint>

#include "cpu/communicator.h"

namespace fusedcomm {

inline cpu::Communicator& communicator(int64_t handle) { return *reinterpret_cast<cpu::Communicator*>(handle); }

// torch's intra-op threads; see cpu::ParallelFor.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t));

}  // namespace fusedcomm
