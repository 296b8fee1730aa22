// Every argument is checked here, before anything is sent. Python says what was wrong (fusedcomm/ops/checks.py), so
// these messages are short.
#include "bind/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace fusedcomm {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::Float:
      return DType::kFloat;
    default:
      STD_TORCH_CHECK(false, "dtype: expected bfloat16, float16 or float32");
  }
  return DType::kFloat;
}

namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2] = {}, indices[2] = {};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(a.get(), &indices[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(b.get(), &indices[1]));
  return types[0] == types[1] && indices[0] == indices[1];
}

// Uninitialised, of these sizes, on x's device; strides are in elements.
Tensor empty_strided(const Tensor& x, const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype) {
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, type, index, &handle));
  return Tensor(handle);
}

// As empty_strided, in memory for this many elements, which are more than the sizes need.
Tensor empty_with_room(const Tensor& x, const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype,
                       int64_t elements) {
  const int64_t one = 1;
  const Tensor memory = empty_strided(x, &elements, &one, 1, dtype);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), dim, sizes, strides, 0, &handle));
  return Tensor(handle);
}

constexpr int64_t kMaxDim = 64;  // what torch itself allows

// As x, contiguous; the last size and the dtype may differ. Where it has room, rows more fit into its memory behind it.
Tensor new_like(const Tensor& x, int32_t dtype, int64_t last_size, int64_t room = 0) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim, "x: expected 1 to 64 dimensions");
  int64_t sizes[kMaxDim], strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    sizes[d] = d == dim - 1 ? last_size : x.size(d);
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  if (room == 0) return empty_strided(x, sizes, strides, dim, dtype);
  return empty_with_room(x, sizes, strides, dim, dtype, stride + room * last_size);
}

void check_group_size(const Shape& shape, int64_t group_size) {
  STD_TORCH_CHECK((group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256) &&
                      shape.hidden % group_size == 0,
                  "group_size: expected 32, 64, 128 or 256 dividing H");
}

}  // namespace

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> dense(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(dense(*t)) : t; }

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(same_device(t, x) && t.is_contiguous() && t.scalar_type() == x.scalar_type() && same_shape(t, x),
                  name, ": expected a contiguous tensor like x");
}

Tensor new_like(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return new_like(x, dtype, x.dim() == 0 ? 0 : x.size(x.dim() - 1));
}

void check_overlap(const char* name, const Tensor& t, const Tensor& x) {
  const char* const a = static_cast<const char*>(t.const_data_ptr());
  const char* const b = static_cast<const char*>(x.const_data_ptr());
  const int64_t bytes = x.numel() * int64_t(x.element_size());
  STD_TORCH_CHECK(a == b || a + bytes <= b || b + bytes <= a, name, ": expected x itself, or memory apart from it");
}

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() >= 1, "x: expected a contiguous tensor [..., H]");
  const int64_t hidden = x.size(x.dim() - 1);
  return {hidden == 0 ? 0 : x.numel() / hidden, hidden};
}

NormTensors norm_tensors(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps,
                         double weight_bias, const std::optional<Tensor>& norm,
                         const std::optional<Tensor>& residual_out) {
  NormTensors t;
  t.shape = shape_of(x);
  STD_TORCH_CHECK(t.shape.hidden >= 1 && t.shape.hidden <= kMaxNormHidden, "x: expected H between 1 and 32768");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float,
                  "weight: expected the dtype of x or float32");
  STD_TORCH_CHECK(
      same_device(weight, x) && weight.is_contiguous() && weight.dim() == 1 && weight.size(0) == t.shape.hidden,
      "weight: expected [H]");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0.0 && std::isfinite(weight_bias), "eps: expected a number >= 0");
  if (residual) {
    check_like("residual", *residual, x);
    t.residual = residual->const_data_ptr();
  }
  if (residual_out) {
    check_like("residual_out", *residual_out, x);
    t.residual_out = residual_out->mutable_data_ptr();
  }
  if (norm) {
    check_like("norm", *norm, x);
    t.norm = norm->mutable_data_ptr();
  }
  t.weight = weight.const_data_ptr();
  t.weight_dtype = dtype_of(weight);
  return t;
}

QuantTarget quant_target(const Tensor& x, int64_t group_size, const Tensor& fp8, const Tensor& scale) {
  const Shape shape = shape_of(x);
  check_group_size(shape, group_size);
  STD_TORCH_CHECK(same_device(fp8, x) && fp8.is_contiguous() && fp8.numel() == shape.rows * shape.hidden,
                  "fp8: expected a contiguous tensor of x's shape");
  const bool packed = scale.scalar_type() == ScalarType::Int;
  const int64_t groups = shape.hidden / group_size;
  const int64_t columns = packed ? (groups + 3) / 4 : groups;
  STD_TORCH_CHECK(same_device(scale, x) && (packed || scale.scalar_type() == ScalarType::Float) && scale.dim() >= 1 &&
                      scale.numel() == shape.rows * columns && scale.size(scale.dim() - 1) == columns,
                  "scale: expected one fp32 value a group, or one int32 word for four");
  QuantTarget target;
  target.fp8 = static_cast<uint8_t*>(fp8.mutable_data_ptr());
  if (packed) {
    target.packed_scale = static_cast<int32_t*>(scale.mutable_data_ptr());
  } else {
    target.scale = static_cast<float*>(scale.mutable_data_ptr());
  }
  target.group_stride = scale.stride(scale.dim() - 1);
  target.row_stride = scale.dim() == 1 ? 0 : scale.stride(scale.dim() - 2);
  STD_TORCH_CHECK(scale.dim() <= 2 || scale.is_contiguous(), "scale: expected [T, G] or a contiguous [..., G]");
  target.group_size = group_size;
  switch (fp8.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
      target.format = Fp8Format::kE4M3fn;
      break;
    case ScalarType::Float8_e4m3fnuz:
      target.format = Fp8Format::kE4M3fnuz;
      break;
    default:
      STD_TORCH_CHECK(false, "fp8: expected float8_e4m3fn or float8_e4m3fnuz");
  }
  return target;
}

Quantized empty_quant(const Tensor& x, int64_t group_size, bool column_major, bool packed, bool fnuz) {
  const Shape shape = shape_of(x);
  check_group_size(shape, group_size);
  const int64_t groups = shape.hidden / group_size;
  const int32_t fp8_dtype = fnuz ? aoti_torch_dtype_float8_e4m3fnuz() : aoti_torch_dtype_float8_e4m3fn();
  if (!column_major && !packed) {
    return {new_like(x, fp8_dtype, shape.hidden), new_like(x, aoti_torch_dtype_float32(), groups)};
  }
  const int64_t padded = (shape.rows + 3) / 4 * 4;
  const int64_t sizes[] = {shape.rows, packed ? (groups + 3) / 4 : groups};
  const int64_t strides[] = {1, padded};
  const int32_t scale_dtype = packed ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32();
  // A second tensor over the same memory costs a call of the shim, so only what needs room pays for it.
  if (padded == shape.rows) {
    return {new_like(x, fp8_dtype, shape.hidden), empty_strided(x, sizes, strides, 2, scale_dtype)};
  }
  return {new_like(x, fp8_dtype, shape.hidden, padded - shape.rows),
          empty_with_room(x, sizes, strides, 2, scale_dtype, padded * sizes[1])};
}

}  // namespace fusedcomm
