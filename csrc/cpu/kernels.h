// The row kernels, one table of them an instruction set.
#pragma once

#include <cstdint>

namespace fusedcomm::cpu {

enum class DType : int32_t { kBFloat16 = 0, kHalf = 1, kFloat = 2 };
enum class Fp8Format : int32_t { kE4M3fn = 0, kE4M3fnuz = 1 };

constexpr int kNumDTypes = 3;
constexpr int kNumFp8Formats = 2;
constexpr int kMaxWorldSize = 16;
constexpr int64_t kMaxNormHidden = 32768;

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// Where the quantised rows go. A scale is written at row * row_stride + group * group_stride of `scale`, or, packed,
// as byte group % 4 of the word at row * row_stride + (group / 4) * group_stride of `packed_scale`.
struct QuantTarget {
  uint8_t* fp8 = nullptr;
  float* scale = nullptr;
  int32_t* packed_scale = nullptr;  // UE8M0; exactly one of the two is set
  int64_t row_stride = 0;
  int64_t group_stride = 0;
  int64_t group_size = 0;
  Fp8Format format = Fp8Format::kE4M3fn;
};

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
