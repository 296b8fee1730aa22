// What host code hands to the kernels. Pointers are to device memory.
#pragma once

#include <cstdint>

#include "fusedcomm/types.h"

namespace fusedcomm::gpu {

struct SumArguments {
  const void* x = nullptr;
  void* out = nullptr;
  int64_t count = 0;  // elements
};

// Everything that follows the sum. Pointers are to row 0 of the call; rows are contiguous. 16-byte aligned where H is a
// multiple of 8.
struct NormArguments {
  const void* residual = nullptr;  // may be null
  void* residual_out = nullptr;    // may be null
  void* norm = nullptr;            // may be null
  const void* weight = nullptr;
  float weight_bias = 0.0f;
  float eps = 0.0f;
  int32_t hidden = 0;
  float inverse_hidden = 0.0f;  // round(1 / hidden)
  bool weight_is_fp32 = false;
  QuantTarget quant;  // quant.fp8 null: not wanted
};

}  // namespace fusedcomm::gpu
