// What the operators take and make: checking it, and turning it into the kernels' terms.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "fusedcomm/types.h"

namespace fusedcomm {

using torch::stable::Tensor;

// A tensor as it crosses between torch and an operator: whoever receives it is its owner. (Not the bare pointer:
// torch's conversions of that are ambiguous. Not Tensor: it counts its owners, which costs an allocation each way.)
struct Handle {
  AtenTensorHandle value;
};

// The one owner of a tensor that came from torch, or that an operator made; moved at no cost.
class Owned {
 public:
  explicit Owned(AtenTensorHandle handle) : handle_(handle) {}
  explicit Owned(Handle handle) : handle_(handle.value) {}
  AtenTensorHandle get() const { return handle_.get(); }
  void* data() const;
  Handle release() { return {handle_.release()}; }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

inline std::optional<Owned> owned(const std::optional<Handle>& handle) {
  return handle ? std::optional<Owned>(*handle) : std::nullopt;
}

// What the operators ask about a tensor, asked once: each answer is a call through torch's stable ABI. Valid as long as
// the tensor is.
struct View {
  explicit View(AtenTensorHandle t);
  explicit View(const Owned& t) : View(t.get()) {}

  const void* data = nullptr;
  const int64_t* sizes = nullptr;
  int64_t dim = 0;
  int64_t numel = 0;
  int32_t dtype = 0;  // as the shim numbers it
  int32_t device_type = 0;
  int32_t device = 0;
  bool is_contiguous = false;
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
Owned new_like(const View& x);

// What a quantising operator is asked for; the flags are those of ScaleLayout in fusedcomm/ops/types.py.
struct QuantFormat {
  int64_t group_size;
  bool column_major, packed, fnuz;
};

struct Quantized {
  Owned fp8, scale;
  QuantTarget target;  // their memory
};

// Uninitialised outputs. Where scales lie in columns, the memory of both goes on to a multiple of four rows: products
// (cuBLAS) take them as they are, and nothing has to be copied to pad them.
Quantized new_quant(const View& x, const QuantFormat& format);

// The memory of outputs that the caller gives, which have to be as new_quant makes them.
QuantTarget given_quant(const View& x, const QuantFormat& format, const Owned& fp8, const Owned& scale);

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
QuantTarget quant_target(const View& x, int64_t group_size, const Owned& fp8, const Owned& scale);

// Raises if a result would overwrite what is still to be read or another result: it may be in the place of x or of the
// residual where it is like them, and overlaps nothing else.
void check_apart(const View& x, const NormTensors& tensors);

}  // namespace fusedcomm
