// The torch operators, through the stable ABI. Every argument is checked here, before anything is sent; Python says
// what was wrong (fusedcomm/ops/checks.py), so these messages are short.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "bind/control.h"
#include "cpu/kernels.h"

namespace fusedcomm {

using cpu::DType;
using cpu::Fp8Format;
using cpu::Kernels;
using cpu::NormTarget;
using cpu::QuantTarget;
using cpu::Sources;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel_for(int64_t begin, int64_t end, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(begin, end, grain, [context, body](int64_t b, int64_t e) { body(context, b, e); });
}

namespace {

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

// Inputs may have any strides; outputs may not.
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> dense(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(dense(*t)) : t; }

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == x.scalar_type() && same_shape(t, x), name,
                  ": expected a contiguous CPU tensor like x");
}

// Uninitialised, of these sizes; strides are in elements.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

constexpr int64_t kMaxDim = 16;

// As x, contiguous; the last size and the dtype may differ.
Tensor new_like(const Tensor& x, int32_t dtype, int64_t last_size) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim, "x: expected 1 to 16 dimensions");
  int64_t sizes[kMaxDim], strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    sizes[d] = d == dim - 1 ? last_size : x.size(d);
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, dim, dtype);
}

Tensor new_like(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return new_like(x, dtype, x.dim() == 0 ? 0 : x.size(x.dim() - 1));
}

// Rows of the last dimension.
struct Shape {
  int64_t rows, hidden;
};

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() >= 1, "x: expected a contiguous CPU tensor [..., H]");
  const int64_t hidden = x.size(x.dim() - 1);
  return {hidden == 0 ? 0 : x.numel() / hidden, hidden};
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

void check_group_size(const Shape& shape, int64_t group_size) {
  STD_TORCH_CHECK((group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256) &&
                      shape.hidden % group_size == 0,
                  "group_size: expected 32, 64, 128 or 256 dividing H");
}

// The scale's dtype and strides say its layout: fp32 with any strides, or int32 words of four UE8M0 exponents.
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

struct Quantized {
  Tensor fp8, scale;
};

// fusedcomm/ops/types.py: ScaleLayout
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

template <class Body>
void for_rows(const Shape& shape, const Body& body) {
  if (shape.rows == 0 || shape.hidden == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / shape.hidden);
  if (shape.rows <= grain) {
    body(int64_t(0), shape.rows);
  } else {
    torch::stable::parallel_for(0, shape.rows, grain, body);
  }
}

// norm (and quantise) rows of x, which has been summed already
void local_norm(const Tensor& x, const NormTarget& target) {
  const DType dtype = dtype_of(x);
  const Kernels& kernels = *cpu::find_kernels(dtype);
  const auto norm = target.quant.fp8 == nullptr ? kernels.norm : kernels.norm_quant[int(target.quant.format)];
  const char* const rows = static_cast<const char*>(x.const_data_ptr());
  const int64_t row_bytes = target.hidden * cpu::element_bytes(dtype);
  for_rows(shape_of(x), [&](int64_t begin, int64_t end) {
    Sources source;
    source.count = 1;
    source.rows[0] = rows + begin * row_bytes;
    norm(source, target, begin, end - begin);
  });
}

// ---- local ops ----

void rms_norm_out(Tensor x, Tensor weight, double eps, double weight_bias, Tensor out) {
  x = dense(x), weight = dense(weight);
  local_norm(x, norm_target(x, std::nullopt, weight, eps, weight_bias, out, std::nullopt));
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_bias) {
  Tensor out = new_like(x);
  rms_norm_out(x, weight, eps, weight_bias, out);
  return out;
}

void fused_add_rms_norm_out(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps, double weight_bias,
                            Tensor norm, Tensor residual_out) {
  x = dense(x), residual = dense(residual), weight = dense(weight);
  local_norm(x, norm_target(x, residual, weight, eps, weight_bias, norm, residual_out));
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                              double weight_bias) {
  Tensor norm = new_like(x), residual_out = new_like(x);
  fused_add_rms_norm_out(x, residual, weight, eps, weight_bias, norm, residual_out);
  return {norm, residual_out};
}

void fused_add_rms_norm_quant_out(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                  double weight_bias, int64_t group_size, Tensor fp8, Tensor scale, Tensor residual_out,
                                  std::optional<Tensor> norm) {
  x = dense(x), residual = dense(residual), weight = dense(weight);
  NormTarget target = norm_target(x, residual, weight, eps, weight_bias, norm, residual_out);
  target.quant = quant_target(shape_of(x), group_size, fp8, scale);
  local_norm(x, target);
}

std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_quant(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                                            double eps, double weight_bias, int64_t group_size,
                                                            bool column_major, bool packed, bool fnuz) {
  x = dense(x);
  Quantized q = empty_quant(x, group_size, column_major, packed, fnuz);
  Tensor residual_out = new_like(x);
  fused_add_rms_norm_quant_out(x, residual, weight, eps, weight_bias, group_size, q.fp8, q.scale, residual_out,
                               std::nullopt);
  return {q.fp8, q.scale, residual_out};
}

void per_group_quant_fp8_out(Tensor x, int64_t group_size, Tensor fp8, Tensor scale) {
  x = dense(x);
  const Shape shape = shape_of(x);
  const QuantTarget target = quant_target(shape, group_size, fp8, scale);
  const auto quant = cpu::find_kernels(dtype_of(x))->quant[int(target.format)];
  const void* const rows = x.const_data_ptr();
  for_rows(shape, [&](int64_t begin, int64_t end) { quant(rows, shape.hidden, target, begin, end - begin); });
}

std::tuple<Tensor, Tensor> per_group_quant_fp8(Tensor x, int64_t group_size, bool column_major, bool packed,
                                               bool fnuz) {
  x = dense(x);
  Quantized q = empty_quant(x, group_size, column_major, packed, fnuz);
  per_group_quant_fp8_out(x, group_size, q.fp8, q.scale);
  return {q.fp8, q.scale};
}

// ---- collectives: true when done; false: call the *_out form with the same tensors until it is (communicator.h) ----
//
// The forms that allocate exist for speed: where ranks share cores, every call out of Python costs each rank
// microseconds of cold code, and four allocations would cost more than the collective.

bool comm_all_reduce_out(int64_t comm, Tensor x, Tensor out) {
  x = dense(x);
  check_like("out", out, x);
  return communicator(comm).all_reduce(dtype_of(x), x.const_data_ptr(), out.mutable_data_ptr(), x.numel());
}

std::tuple<Tensor, bool> comm_all_reduce(int64_t comm, Tensor x) {
  Tensor out = new_like(x);
  const bool done = comm_all_reduce_out(comm, x, out);
  return {out, done};
}

bool comm_allreduce_rmsnorm_out(int64_t comm, Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                double weight_bias, Tensor norm, Tensor residual_out) {
  x = dense(x), residual = dense(residual), weight = dense(weight);
  const NormTarget target = norm_target(x, residual, weight, eps, weight_bias, norm, residual_out);
  return communicator(comm).all_reduce_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, target);
}

std::tuple<Tensor, Tensor, bool> comm_allreduce_rmsnorm(int64_t comm, Tensor x, std::optional<Tensor> residual,
                                                        Tensor weight, double eps, double weight_bias) {
  Tensor norm = new_like(x), residual_out = new_like(x);
  const bool done = comm_allreduce_rmsnorm_out(comm, x, residual, weight, eps, weight_bias, norm, residual_out);
  return {norm, residual_out, done};
}

bool comm_allreduce_rmsnorm_quant_out(int64_t comm, Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                      double weight_bias, int64_t group_size, Tensor fp8, Tensor scale,
                                      Tensor residual_out, std::optional<Tensor> norm) {
  x = dense(x), residual = dense(residual), weight = dense(weight);
  NormTarget target = norm_target(x, residual, weight, eps, weight_bias, norm, residual_out);
  target.quant = quant_target(shape_of(x), group_size, fp8, scale);
  return communicator(comm).all_reduce_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, target);
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, bool> comm_allreduce_rmsnorm_quant(
    int64_t comm, Tensor x, std::optional<Tensor> residual, Tensor weight, double eps, double weight_bias,
    int64_t group_size, bool emit_norm, bool column_major, bool packed) {
  x = dense(x);
  Quantized q = empty_quant(x, group_size, column_major, packed, false);
  Tensor residual_out = new_like(x);
  std::optional<Tensor> norm;
  if (emit_norm) norm = new_like(x);
  const bool done = comm_allreduce_rmsnorm_quant_out(comm, x, residual, weight, eps, weight_bias, group_size, q.fp8,
                                                     q.scale, residual_out, norm);
  return {q.fp8, q.scale, residual_out, norm, done};
}

bool comm_all_gather(int64_t comm, Tensor x, Tensor out) {
  x = dense(x);
  const int64_t bytes = x.numel() * int64_t(x.element_size());
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && out.is_cpu() && out.is_contiguous() &&
                      out.numel() * int64_t(out.element_size()) == bytes * communicator(comm).config().world_size,
                  "out: expected a contiguous CPU tensor of world_size times x");
  return communicator(comm).all_gather(x.const_data_ptr(), out.mutable_data_ptr(), bytes);
}

bool comm_reduce_scatter(int64_t comm, Tensor x, Tensor out) {
  x = dense(x);
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && out.is_cpu() && out.is_contiguous() &&
                      x.scalar_type() == out.scalar_type() &&
                      x.numel() == out.numel() * communicator(comm).config().world_size,
                  "out: expected a contiguous CPU tensor of 1/world_size of x");
  return communicator(comm).reduce_scatter(dtype_of(x), x.const_data_ptr(), out.mutable_data_ptr(), out.numel());
}

bool comm_broadcast(int64_t comm, Tensor x, int64_t src) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "x: expected a contiguous CPU tensor");
  STD_TORCH_CHECK(src >= 0 && src < communicator(comm).config().world_size, "src: expected a rank of the group");
  return communicator(comm).broadcast(x.mutable_data_ptr(), x.numel() * int64_t(x.element_size()), int(src));
}

bool comm_barrier(int64_t comm) { return communicator(comm).barrier(); }

STABLE_TORCH_LIBRARY(fusedcomm, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_bias) -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor weight, float eps, float weight_bias, Tensor(a!) out) -> ()");
  m.def(
      "fused_add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias) "
      "-> (Tensor norm, Tensor residual_out)");
  m.def(
      "fused_add_rms_norm_out(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, "
      "Tensor(a!) norm, Tensor(b!) residual_out) -> ()");
  m.def(
      "fused_add_rms_norm_quant(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, "
      "int group_size, bool column_major, bool packed, bool fnuz) -> (Tensor fp8, Tensor scale, Tensor residual_out)");
  m.def(
      "fused_add_rms_norm_quant_out(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, "
      "int group_size, Tensor(a!) fp8, Tensor(b!) scale, Tensor(c!) residual_out, Tensor(d!)? norm) -> ()");
  m.def(
      "per_group_quant_fp8(Tensor x, int group_size, bool column_major, bool packed, bool fnuz) "
      "-> (Tensor fp8, Tensor scale)");
  m.def("per_group_quant_fp8_out(Tensor x, int group_size, Tensor(a!) fp8, Tensor(b!) scale) -> ()");

  m.def("comm_all_reduce(int comm, Tensor x) -> (Tensor out, bool done)");
  m.def("comm_all_reduce_out(int comm, Tensor x, Tensor(a!) out) -> bool");
  m.def(
      "comm_allreduce_rmsnorm(int comm, Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias) "
      "-> (Tensor norm, Tensor residual_out, bool done)");
  m.def(
      "comm_allreduce_rmsnorm_out(int comm, Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, "
      "Tensor(a!) norm, Tensor(b!) residual_out) -> bool");
  m.def(
      "comm_allreduce_rmsnorm_quant(int comm, Tensor x, Tensor? residual, Tensor weight, float eps, "
      "float weight_bias, int group_size, bool emit_norm, bool column_major, bool packed) "
      "-> (Tensor fp8, Tensor scale, Tensor residual_out, Tensor? norm, bool done)");
  m.def(
      "comm_allreduce_rmsnorm_quant_out(int comm, Tensor x, Tensor? residual, Tensor weight, float eps, "
      "float weight_bias, int group_size, Tensor(a!) fp8, Tensor(b!) scale, Tensor(c!) residual_out, "
      "Tensor(d!)? norm) -> bool");
  m.def("comm_all_gather(int comm, Tensor x, Tensor(a!) out) -> bool");
  m.def("comm_reduce_scatter(int comm, Tensor x, Tensor(a!) out) -> bool");
  m.def("comm_broadcast(int comm, Tensor(a!) x, int src) -> bool");
  m.def("comm_barrier(int comm) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("fused_add_rms_norm_out", TORCH_BOX(&fused_add_rms_norm_out));
  m.impl("fused_add_rms_norm_quant", TORCH_BOX(&fused_add_rms_norm_quant));
  m.impl("fused_add_rms_norm_quant_out", TORCH_BOX(&fused_add_rms_norm_quant_out));
  m.impl("per_group_quant_fp8", TORCH_BOX(&per_group_quant_fp8));
  m.impl("per_group_quant_fp8_out", TORCH_BOX(&per_group_quant_fp8_out));
  m.impl("comm_all_reduce", TORCH_BOX(&comm_all_reduce));
  m.impl("comm_all_reduce_out", TORCH_BOX(&comm_all_reduce_out));
  m.impl("comm_allreduce_rmsnorm", TORCH_BOX(&comm_allreduce_rmsnorm));
  m.impl("comm_allreduce_rmsnorm_out", TORCH_BOX(&comm_allreduce_rmsnorm_out));
  m.impl("comm_allreduce_rmsnorm_quant", TORCH_BOX(&comm_allreduce_rmsnorm_quant));
  m.impl("comm_allreduce_rmsnorm_quant_out", TORCH_BOX(&comm_allreduce_rmsnorm_quant_out));
  m.impl("comm_all_gather", TORCH_BOX(&comm_all_gather));
  m.impl("comm_reduce_scatter", TORCH_BOX(&comm_reduce_scatter));
  m.impl("comm_broadcast", TORCH_BOX(&comm_broadcast));
}

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CompositeExplicitAutograd, m) { m.impl("comm_barrier", TORCH_BOX(&comm_barrier)); }

}  // namespace
}  // namespace fusedcomm
