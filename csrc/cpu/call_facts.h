// What a call is, for comparing it over ranks and for saying it in an error.
#pragma once

#include <cstdint>
#include <string>

#include "fusedcomm/layout.h"

namespace fusedcomm::cpu {

constexpr int32_t kBytes = 3;  // CallFacts::dtype of calls that move bytes; the others have a DType

std::string describe(const CallFacts& facts);
bool same(const CallFacts& a, const CallFacts& b);
uint32_t hash(const CallFacts& facts);

}  // namespace fusedcomm::cpu
