// Division by the same number many times.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu {

// a / b, correctly rounded, from r = round(1 / b), by Markstein's theorem: the remainder is exact in fp32 and the step
// rounds once. A fraction of the instructions of a division. One step is exact for every a and b that come from values
// of 16 bits, and for every a over 448 and 240 (tried); fp32 takes two. Neither overflow nor underflow may occur.
template <int kSteps>
__device__ inline float quotient(float a, float b, float r) {
  float q = a * r;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) q = fused_multiply_add(fused_multiply_add(-b, q, a), r, q);
  return q;
}

}  // namespace fusedcomm::gpu
