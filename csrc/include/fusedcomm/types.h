// What the kernels of every device are told in the same terms.
#pragma once

#include <cstdint>

namespace fusedcomm {

enum class DType : int32_t { kBFloat16 = 0, kHalf = 1, kFloat = 2 };
enum class Fp8Format : int32_t { kE4M3fn = 0, kE4M3fnuz = 1 };

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

}  // namespace fusedcomm
