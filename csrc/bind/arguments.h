// What the operators take and make: checking it, and turning it into the kernels' terms.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "fusedcomm/types.h"

namespace fusedcomm {

using torch::stable::Tensor;

DType dtype_of(const Tensor& t);

// Inputs may have any strides; outputs may not.
Tensor dense(const Tensor& t);
std::optional<Tensor> dense(const std::optional<Tensor>& t);

// Raises unless t is a contiguous tensor of x's shape and dtype on its device.
void check_like(const char* name, const Tensor& t, const Tensor& x);

// Rows of the last dimension.
struct Shape {
  int64_t rows, hidden;
};

Shape shape_of(const Tensor& x);

// Raises if t, which is like x, begins elsewhere and still shares memory with it: pieces of x would be overwritten
// before they are read.
void check_overlap(const char* name, const Tensor& t, const Tensor& x);

// Uninitialised, contiguous, as x.
Tensor new_like(const Tensor& x);

struct Quantized {
  Tensor fp8, scale;
};

// Uninitialised outputs of a quantising operator; the flags are those of ScaleLayout in fusedcomm/ops/types.py. Where
// scales lie in columns, the memory of both goes on to a multiple of four rows: products (cuBLAS) take them as they
// are, and nothing has to be copied to pad them.
Quantized empty_quant(const Tensor& x, int64_t group_size, bool column_major, bool packed, bool fnuz);

// The memory of a norm's tensors, which are checked against x; valid as long as they are.
struct NormTensors {
  const void* residual = nullptr;
  void* residual_out = nullptr;
  void* norm = nullptr;
  const void* weight = nullptr;
  DType weight_dtype = DType::kFloat;
  Shape shape = {0, 0};
};

NormTensors norm_tensors(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps,
                         double weight_bias, const std::optional<Tensor>& norm,
                         const std::optional<Tensor>& residual_out);

// The scale's dtype and strides say its layout: fp32 with any strides, or int32 words of four UE8M0 exponents.
QuantTarget quant_target(const Tensor& x, int64_t group_size, const Tensor& fp8, const Tensor& scale);

}  // namespace fusedcomm
