// Every argument is checked here, before anything is sent. Python says what was wrong (fusedcomm/ops/checks.py), so
// these messages are short.
#include "bind/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace fusedcomm {

using cpu::DType;
using cpu::Fp8Format;
using cpu::NormTarget;
using cpu::QuantTarget;
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

// Uninitialised, of these sizes; strides are in elements.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

constexpr int64_t kMaxDim = 64;  // what torch itself allows

// As x, contiguous; the last size and the dtype may differ.
Tensor new_like(const Tensor& x, int32_t dtype, int64_t last_size) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim, "x: expected 1 to 64 dimensions");
  int64_t sizes[kMaxDim], strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    sizes[d] = d == dim - 1 ? last_size : x.size(d);
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, dim, dtype);
}

// fp32(weight) + bias in scratch memory of this thread, valid until its next call.
const float* biased_weight(const Tensor& weight, double bias, int64_t hidden) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.dim() == 1 && weight.size(0) == hidden,
                  "weight: expected [H]");
  static thread_local std::vector<float> scratch;
  scratch.resize(size_t(hidden));
  const void* p = weight.const_data_ptr();
  switch (dtype_of(weight)) {
    case DType::kFloat: {
      const float* w = static_cast<const float*>(p);
      for (int64_t i = 0; i < hidden; ++i) scratch[size_t(i)] = w[i] + float(bias);
      break;
    }
    case DType::kBFloat16: {
      const uint16_t* w = static_cast<const uint16_t*>(p);
      for (int64_t i = 0; i < hidden; ++i) {
        const uint32_t bits = uint32_t(w[i]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        scratch[size_t(i)] = value + float(bias);
      }
      break;
    }
    case DType::kHalf: {
      const torch::headeronly::Half* w = static_cast<const torch::headeronly::Half*>(p);
      for (int64_t i = 0; i < hidden; ++i) scratch[size_t(i)] = float(w[i]) + float(bias);
      break;
    }
  }
  return scratch.data();
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
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == x.scalar_type() && same_shape(t, x), name,
                  ": expected a contiguous CPU tensor like x");
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
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() >= 1, "x: expected a contiguous CPU tensor [..., H]");
  const int64_t hidden = x.size(x.dim() - 1);
  return {hidden == 0 ? 0 : x.numel() / hidden, hidden};
}

NormTarget norm_target(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps,
                       double weight_bias, const std::optional<Tensor>& norm,
                       const std::optional<Tensor>& residual_out) {
  const Shape shape = shape_of(x);
  STD_TORCH_CHECK(shape.hidden >= 1 && shape.hidden <= cpu::kMaxNormHidden, "x: expected H between 1 and 32768");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float,
                  "weight: expected the dtype of x or float32");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0.0 && std::isfinite(weight_bias), "eps: expected a number >= 0");
  NormTarget target;
  if (residual) {
    check_like("residual", *residual, x);
    target.residual = residual->const_data_ptr();
  }
  if (residual_out) {
    check_like("residual_out", *residual_out, x);
    target.residual_out = residual_out->mutable_data_ptr();
  }
  if (norm) {
    check_like("norm", *norm, x);
    target.norm = norm->mutable_data_ptr();
  }
  target.weight = biased_weight(weight, weight_bias, shape.hidden);
  target.eps = float(eps);
  target.hidden = shape.hidden;
  return target;
}

QuantTarget quant_target(const Shape& shape, int64_t group_size, const Tensor& fp8, const Tensor& scale) {
  check_group_size(shape, group_size);
  STD_TORCH_CHECK(fp8.is_cpu() && fp8.is_contiguous() && fp8.numel() == shape.rows * shape.hidden,
                  "fp8: expected a contiguous CPU tensor of x's shape");
  const bool packed = scale.scalar_type() == ScalarType::Int;
  const int64_t groups = shape.hidden / group_size;
  const int64_t columns = packed ? (groups + 3) / 4 : groups;
  STD_TORCH_CHECK(scale.is_cpu() && (packed || scale.scalar_type() == ScalarType::Float) && scale.dim() >= 1 &&
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
  Tensor fp8 = new_like(x, fnuz ? aoti_torch_dtype_float8_e4m3fnuz() : aoti_torch_dtype_float8_e4m3fn(), shape.hidden);
  if (!column_major && !packed) return {fp8, new_like(x, aoti_torch_dtype_float32(), groups)};
  const int64_t sizes[] = {shape.rows, packed ? (groups + 3) / 4 : groups};
  const int64_t strides[] = {1, (shape.rows + 3) / 4 * 4};
  return {fp8, empty_strided(sizes, strides, 2, packed ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32())};
}

}  // namespace fusedcomm
