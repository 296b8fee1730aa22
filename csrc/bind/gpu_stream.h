// torch's current stream, through the stable ABI.
#pragma once

#include <cstdint>

namespace fusedcomm {

void* current_stream(int32_t device);

}  // namespace fusedcomm
