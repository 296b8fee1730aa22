// What the operators take and make: checking it, and turning it into the kernels' terms.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>

#include "fusedcomm/types.h"

namespace fusedcomm {

using torch::stable::Tensor;

// What the operators ask about a tensor, asked once: each answer is a call through torch's stable ABI. Valid as long as
// the tensor is.
struct View {
  View(const Tensor& t);

  const void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  int64_t numel = 0;
  int32_t dtype = 0;  // as the shim numbers it
  int32_t device_type = 0;
  int32_t device = 0;
  bool is_contiguous = false;
};

// A tensor that goes to torch, which becomes its owner. (Not the bare pointer: torch's conversions of that are
// ambiguous.)
struct Handle {
  AtenTensorHandle value;
};

// A tensor that an operator made, until it goes to torch. Unlike Tensor it has one owner, and changes hands at no cost.
class Result {
 public:
  explicit Result(AtenTensorHandle handle) : handle_(handle) {}
  explicit Result(const Tensor& t);
  void* data() const;
  Handle release() { return {handle_.release()}; }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

DType dtype_of(const View& t);

// Raises unless t is a contiguous tensor of x's shape and dtype on its device.
void check_like(const char* name, const View& t, const View& x);

// Rows of the last dimension.
struct Shape {
  int64_t rows, hidden;
};

Shape shape_of(const View& x);

// Raises if t, which is like x, begins elsewhere and still shares memory with it: pieces of x would be overwritten
// before they are read.
void check_overlap(const char* name, const View& t, const View& x);

// Uninitialised, contiguous, as x.
Result new_like(const View& x);

struct Quantized {
  Tensor fp8, scale;
};

// Uninitialised outputs of a quantising operator; the flags are those of ScaleLayout in fusedcomm/ops/types.py. Where
// scales lie in columns, the memory of both goes on to a multiple of four rows: products (cuBLAS) take them as they
// are, and nothing has to be copied to pad them.
Quantized empty_quant(const Tensor& x, int64_t group_size, bool column_major, bool packed, bool fnuz);

// A norm: its inputs, which are checked against x, and where its results go. Valid as long as the tensors are.
struct NormTensors {
  const void* residual = nullptr;
  void* residual_out = nullptr;
  void* norm = nullptr;
  const void* weight = nullptr;
  DType weight_dtype = DType::kFloat;
  double weight_bias = 0.0;
  double eps = 0.0;
  Shape shape = {0, 0};
  QuantTarget quant;
};

// Results are not set yet; residual may be null.
NormTensors norm_tensors(const View& x, const View* residual, const View& weight, double eps, double weight_bias);

// The scale's dtype and strides say its layout: fp32 with any strides, or int32 words of four UE8M0 exponents.
QuantTarget quant_target(const View& x, int64_t group_size, const Tensor& fp8, const Tensor& scale);

}  // namespace fusedcomm
