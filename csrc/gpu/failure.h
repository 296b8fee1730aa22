// Why a group refuses to go on; the values are those of cpu::Failure, and Python knows them.
#pragma once

#include <cstdint>

namespace fusedcomm::gpu {

enum class Failure : uint32_t { kNone = 0, kTimeout = 1, kPeerGone = 2, kMismatch = 3, kInterrupted = 4 };

}  // namespace fusedcomm::gpu
