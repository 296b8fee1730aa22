// What stays the same from call to call of a fused collective.
#pragma once

#include <cstdint>

namespace fusedcomm {

// Python makes one for each combination that it meets and hands its address on: every number that crosses torch's
// dispatcher costs a third of a microsecond, and these would be seven.
struct NormCall {  // mirrored in fusedcomm/comm/native_collectives.py
  int64_t comm;
  double eps;
  double weight_bias;
  int64_t group_size;    // 0: nothing is quantised
  int64_t emit_norm;     // also return the rows that are quantised
  int64_t column_major;  // these two are those of ScaleLayout in fusedcomm/ops/types.py
  int64_t packed;
};

inline const NormCall& norm_call(int64_t address) { return *reinterpret_cast<const NormCall*>(address); }

}  // namespace fusedcomm
