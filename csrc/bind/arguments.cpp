// Every argument is checked here, before anything is sent. Python says what was wrong (fusedcomm/ops/checks.py), so
// these messages are short.
#include "bind/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace fusedcomm {

View::View(AtenTensorHandle t) {
  int64_t* sizes_of = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(t, &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes_of));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(t, &is_contiguous));
  sizes = sizes_of;
  numel = 1;
  for (int64_t d = 0; d < dim; ++d) numel *= sizes[d];
}

void* Owned::data() const {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(get(), &data));
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

constexpr int64_t kMaxDim = 64;  // what torch itself allows

// Sizes and strides in elements.
struct Extent {
  int64_t dim;
  int64_t sizes[kMaxDim], strides[kMaxDim];

  int64_t row_stride() const { return dim == 1 ? 0 : strides[dim - 2]; }
  int64_t group_stride() const { return strides[dim - 1]; }
};

// As x, contiguous; the last size may differ.
Extent contiguous_extent(const View& x, int64_t last_size) {
  STD_TORCH_CHECK(x.dim >= 1 && x.dim <= kMaxDim, "x: expected 1 to 64 dimensions");
  Extent e;
  e.dim = x.dim;
  int64_t stride = 1;
  for (int64_t d = x.dim - 1; d >= 0; --d) {
    e.sizes[d] = d == x.dim - 1 ? last_size : x.sizes[d];
    e.strides[d] = stride;
    stride *= std::max<int64_t>(e.sizes[d], 1);
  }
  return e;
}

// Of scales that lie in columns, each as long as a multiple of four rows.
int64_t padded_rows(const Shape& shape) { return (shape.rows + 3) / 4 * 4; }

Extent scale_extent(const View& x, const Shape& shape, const QuantFormat& format) {
  const int64_t groups = shape.hidden / format.group_size;
  if (!format.column_major && !format.packed) return contiguous_extent(x, groups);
  Extent e;
  e.dim = 2;
  e.sizes[0] = shape.rows, e.sizes[1] = format.packed ? (groups + 3) / 4 : groups;
  e.strides[0] = 1, e.strides[1] = padded_rows(shape);
  return e;
}

int32_t fp8_dtype(const QuantFormat& format) {
  return format.fnuz ? aoti_torch_dtype_float8_e4m3fnuz() : aoti_torch_dtype_float8_e4m3fn();
}

int32_t scale_dtype(const QuantFormat& format) {
  return format.packed ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32();
}

// Uninitialised, on x's device.
Owned new_tensor(const View& x, const Extent& e, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(e.dim, e.sizes, e.strides, dtype, x.device_type, x.device, &handle));
  return Owned(handle);
}

// As new_tensor, in memory for this many elements, which are more than the sizes need.
Owned new_with_room(const View& x, const Extent& e, int32_t dtype, int64_t elements) {
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &elements, &one, dtype, x.device_type, x.device, &handle));
  const Owned memory(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), e.dim, e.sizes, e.strides, 0, &handle));
  return Owned(handle);
}

void check_group_size(const Shape& shape, int64_t group_size) {
  STD_TORCH_CHECK((group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256) &&
                      shape.hidden % group_size == 0,
                  "group_size: expected 32, 64, 128 or 256 dividing H");
}

QuantTarget target_of(const QuantFormat& format, const Extent& scale_extent, void* fp8, void* scale) {
  QuantTarget target;
  target.fp8 = static_cast<uint8_t*>(fp8);
  if (format.packed) {
    target.packed_scale = static_cast<int32_t*>(scale);
  } else {
    target.scale = static_cast<float*>(scale);
  }
  target.group_stride = scale_extent.group_stride();
  target.row_stride = scale_extent.row_stride();
  target.group_size = format.group_size;
  target.format = format.fnuz ? Fp8Format::kE4M3fnuz : Fp8Format::kE4M3fn;
  return target;
}

struct Span {
  const char* begin;
  int64_t bytes;

  bool overlaps(const Span& o) const { return begin < o.begin + o.bytes && o.begin < begin + bytes; }
};

const int64_t* strides_of(const Owned& t) {
  int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  return strides;
}

}  // namespace

void check_like(const char* name, const View& t, const View& x) {
  STD_TORCH_CHECK(same_device(t, x) && t.is_contiguous && t.dtype == x.dtype && same_shape(t, x), name,
                  ": expected a contiguous tensor like x");
}

Owned new_like(const View& x) {
  return new_tensor(x, contiguous_extent(x, x.dim == 0 ? 0 : x.sizes[x.dim - 1]), x.dtype);
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

QuantTarget quant_target(const View& x, int64_t group_size, const Owned& fp8, const Owned& scale) {
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
  target.fp8 = static_cast<uint8_t*>(fp8.data());
  if (packed) {
    target.packed_scale = static_cast<int32_t*>(scale.data());
  } else {
    target.scale = static_cast<float*>(scale.data());
  }
  const int64_t* const strides = strides_of(scale);
  target.group_stride = strides[last];
  target.row_stride = last == 0 ? 0 : strides[last - 1];
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

Quantized new_quant(const View& x, const QuantFormat& format) {
  const Shape shape = shape_of(x);
  check_group_size(shape, format.group_size);
  const Extent fp8_extent = contiguous_extent(x, shape.hidden), extent = scale_extent(x, shape, format);
  const bool in_columns = format.column_major || format.packed;
  const int64_t padded = in_columns ? padded_rows(shape) : shape.rows;
  // A second tensor over the same memory costs a call of the shim, so only what needs room pays for it.
  const bool has_room = padded != shape.rows;
  Owned fp8 = has_room ? new_with_room(x, fp8_extent, fp8_dtype(format), padded * shape.hidden)
                       : new_tensor(x, fp8_extent, fp8_dtype(format));
  Owned scale = has_room ? new_with_room(x, extent, scale_dtype(format), padded * extent.sizes[1])
                         : new_tensor(x, extent, scale_dtype(format));
  const QuantTarget target = target_of(format, extent, fp8.data(), scale.data());
  return {std::move(fp8), std::move(scale), target};
}

QuantTarget given_quant(const View& x, const QuantFormat& format, const Owned& fp8, const Owned& scale) {
  const Shape shape = shape_of(x);
  check_group_size(shape, format.group_size);
  const View fp8_view(fp8), scale_view(scale);
  STD_TORCH_CHECK(same_device(fp8_view, x) && fp8_view.is_contiguous && same_shape(fp8_view, x) &&
                      fp8_view.dtype == fp8_dtype(format),
                  "fp8: expected a contiguous tensor of x's shape in the FP8 format of its device");
  const Extent extent = scale_extent(x, shape, format);
  STD_TORCH_CHECK(same_device(scale_view, x) && scale_view.dtype == scale_dtype(format) &&
                      scale_view.dim == extent.dim &&
                      std::equal(extent.sizes, extent.sizes + extent.dim, scale_view.sizes) &&
                      std::equal(extent.strides, extent.strides + extent.dim, strides_of(scale)),
                  "scale: expected the dtype, shape and strides of its layout");
  return target_of(format, extent, fp8.data(), scale.data());
}

void check_apart(const View& x, const NormTensors& t) {
  const int64_t element = element_bytes(dtype_of(x)), bytes = x.numel * element;
  if (bytes == 0) return;
  const auto span = [](const void* p, int64_t size) {
    return Span{static_cast<const char*>(p), p == nullptr ? 0 : size};
  };
  const Span rows = span(x.data, bytes), residual = span(t.residual, bytes);
  const Span weight = span(t.weight, t.shape.hidden * element_bytes(t.weight_dtype));
  const Span norm = span(t.norm, bytes), residual_out = span(t.residual_out, bytes);
  for (const Span& out : {norm, residual_out}) {
    STD_TORCH_CHECK((out.begin == rows.begin || !out.overlaps(rows)) &&
                        (out.begin == residual.begin || !out.overlaps(residual)) && !out.overlaps(weight),
                    "out: expected x or the residual itself, or memory apart from the inputs");
  }
  STD_TORCH_CHECK(!norm.overlaps(residual_out), "norm: expected another tensor than residual_out");
  const QuantTarget& q = t.quant;
  if (q.fp8 == nullptr) return;
  const int64_t groups = t.shape.hidden / q.group_size, columns = q.packed_scale == nullptr ? groups : (groups + 3) / 4;
  const int64_t words = (t.shape.rows - 1) * q.row_stride + (columns - 1) * q.group_stride + 1;
  const Span fp8 = span(q.fp8, x.numel);
  const Span scale = span(q.scale != nullptr ? static_cast<const void*>(q.scale) : q.packed_scale, words * 4);
  for (const Span& other : {rows, residual, weight, norm, residual_out}) {
    STD_TORCH_CHECK(!fp8.overlaps(other) && !scale.overlaps(other), "fp8: expected memory apart from all others");
  }
  STD_TORCH_CHECK(!fp8.overlaps(scale), "fp8: expected memory apart from scale");
}

}  // namespace fusedcomm
