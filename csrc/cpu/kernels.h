// The row kernels, one table of them an instruction set.
#pragma once

#include <cstdint>

#include "fusedcomm/types.h"

namespace fusedcomm::cpu {

using fusedcomm::DType;
using fusedcomm::element_bytes;
using fusedcomm::Fp8Format;
using fusedcomm::kMaxNormHidden;
using fusedcomm::QuantTarget;

constexpr int kNumDTypes = 3;
constexpr int kNumFp8Formats = 2;
constexpr int kMaxWorldSize = 16;

// Everything that follows the sum. Pointers are to row 0 of the call; rows are contiguous.
struct NormTarget {
  const void* residual = nullptr;  // may be null
  void* residual_out = nullptr;    // null only where there is one source and no residual
  const float* weight = nullptr;   // fp32(weight) + weight_bias
  float eps = 0.0f;
  int64_t hidden = 0;
  void* norm = nullptr;  // null: not wanted
  QuantTarget quant;     // quant.fp8 null: not wanted
};

// The partial sums of a stretch of rows, in rank order; each pointer is to `first_row`.
struct Sources {
  const void* rows[kMaxWorldSize];
  int count;
};

struct Kernels {
  const char* isa;
  // out[i] = round(sum over ranks of source[i]), from +0 in rank order. `out` may be one of the sources.
  void (*sum)(const Sources& sources, void* out, int64_t begin, int64_t end);
  // Rows first_row … first_row + num_rows of `target` from sources that start at first_row.
  void (*norm)(const Sources& sources, const NormTarget& target, int64_t first_row, int64_t num_rows);
  void (*norm_quant[kNumFp8Formats])(const Sources&, const NormTarget&, int64_t first_row, int64_t num_rows);
  void (*quant[kNumFp8Formats])(const void* x, int64_t hidden, const QuantTarget&, int64_t first_row, int64_t num_rows);
};

// The fastest table this machine runs; `isa` (nullptr: automatic) asks for one by name, nullptr comes back without it.
const Kernels* find_kernels(DType dtype, const char* isa = nullptr);

}  // namespace fusedcomm::cpu
