// Every argument is checked here, before anything is sent. Python says what was wrong (fusedcomm/ops/checks.py), so
// these messages are short.
#include "bind/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace fusedcomm {

View::View(const Tensor& t) : data(t.const_data_ptr()) {
  const AtenTensorHandle handle = t.get();
  int64_t *sizes_of = nullptr, *strides_of = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_of));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_of));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &numel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &is_contiguous));
  sizes = sizes_of;
  strides = strides_of;
}

Result::Result(const Tensor& t) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &handle));
  handle_.reset(handle);
}

void* Result::data() const {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &data));
  return data;
}

DType dtype_of(const View& t) {
  if (t.dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (t.dtype == aoti_torch_dtype_float16()) return DType::kHalf;
  STD_TORCH_CHECK(t.dtype == aoti_torch_dtype_float32(), "dtype: expected bfloat16, float16 or float32");
  return DType::kFloat;
}

namespace {

bool same_shape(const View& a, const View& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

bool same_device(const View& a, const View& b) { return a.device_type == b.device_type && a.device == b.device; }

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

void check_like(const char* name, const View& t, const View& x) {
  STD_TORCH_CHECK(same_device(t, x) && t.is_contiguous && t.dtype == x.dtype && same_shape(t, x), name,
                  ": expected a contiguous tensor like x");
}

Result new_like(const View& x) {
  STD_TORCH_CHECK(x.dim >= 1 && x.dim <= kMaxDim, "x: expected 1 to 64 dimensions");
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t d = x.dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(x.sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim, x.sizes, strides, x.dtype, x.device_type, x.device, &handle));
  return Result(handle);
}

void check_overlap(const char* name, const View& t, const View& x) {
  const char* const a = static_cast<const char*>(t.data);
  const char* const b = static_cast<const char*>(x.data);
  const int64_t bytes = x.numel * element_bytes(dtype_of(x));
  STD_TORCH_CHECK(a == b || a + bytes <= b || b + bytes <= a, name, ": expected x itself, or memory apart from it");
}

Shape shape_of(const View& x) {
  STD_TORCH_CHECK(x.is_contiguous && x.dim >= 1, "x: expected a contiguous tensor [..., H]");
  const int64_t hidden = x.sizes[x.dim - 1];
  return {hidden == 0 ? 0 : x.numel / hidden, hidden};
}

NormTensors norm_tensors(const View& x, const View* residual, const View& weight, double eps, double weight_bias) {
  NormTensors t;
  t.shape = shape_of(x);
  STD_TORCH_CHECK(t.shape.hidden >= 1 && t.shape.hidden <= kMaxNormHidden, "x: expected H between 1 and 32768");
  STD_TORCH_CHECK(weight.dtype == x.dtype || weight.dtype == aoti_torch_dtype_float32(),
                  "weight: expected the dtype of x or float32");
  STD_TORCH_CHECK(
      same_device(weight, x) && weight.is_contiguous && weight.dim == 1 && weight.sizes[0] == t.shape.hidden,
      "weight: expected [H]");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0.0 && std::isfinite(weight_bias), "eps: expected a number >= 0");
  if (residual != nullptr) {
    check_like("residual", *residual, x);
    t.residual = residual->data;
  }
  t.weight = weight.data;
  t.weight_dtype = dtype_of(weight);
  t.weight_bias = weight_bias;
  t.eps = eps;
  return t;
}

QuantTarget quant_target(const View& x, int64_t group_size, const Tensor& fp8, const Tensor& scale) {
  const View fp8_view(fp8), scale_view(scale);
  const Shape shape = shape_of(x);
  check_group_size(shape, group_size);
  STD_TORCH_CHECK(same_device(fp8_view, x) && fp8_view.is_contiguous && fp8_view.numel == shape.rows * shape.hidden,
                  "fp8: expected a contiguous tensor of x's shape");
  const bool packed = scale_view.dtype == aoti_torch_dtype_int32();
  const int64_t groups = shape.hidden / group_size;
  const int64_t columns = packed ? (groups + 3) / 4 : groups;
  const int64_t last = scale_view.dim - 1;
  STD_TORCH_CHECK(same_device(scale_view, x) && (packed || scale_view.dtype == aoti_torch_dtype_float32()) &&
                      last >= 0 && scale_view.numel == shape.rows * columns && scale_view.sizes[last] == columns,
                  "scale: expected one fp32 value a group, or one int32 word for four");
  STD_TORCH_CHECK(last <= 1 || scale_view.is_contiguous, "scale: expected [T, G] or a contiguous [..., G]");
  QuantTarget target;
  target.fp8 = static_cast<uint8_t*>(fp8.mutable_data_ptr());
  if (packed) {
    target.packed_scale = static_cast<int32_t*>(scale.mutable_data_ptr());
  } else {
    target.scale = static_cast<float*>(scale.mutable_data_ptr());
  }
  target.group_stride = scale_view.strides[last];
  target.row_stride = last == 0 ? 0 : scale_view.strides[last - 1];
  target.group_size = group_size;
  if (fp8_view.dtype == aoti_torch_dtype_float8_e4m3fn()) {
    target.format = Fp8Format::kE4M3fn;
  } else {
    STD_TORCH_CHECK(fp8_view.dtype == aoti_torch_dtype_float8_e4m3fnuz(),
                    "fp8: expected float8_e4m3fn or float8_e4m3fnuz");
    target.format = Fp8Format::kE4M3fnuz;
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
