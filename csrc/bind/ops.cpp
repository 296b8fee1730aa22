// The torch operators, through the stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "bind/arguments.h"
#include "bind/control.h"
#include "cpu/kernels.h"

namespace fusedcomm {

using cpu::Kernels;
using cpu::NormTarget;
using cpu::Sources;

void parallel_for(int64_t begin, int64_t end, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(begin, end, grain, [context, body](int64_t b, int64_t e) { body(context, b, e); });
}

namespace {

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

// fp32(weight) + bias in scratch memory of this thread, valid until its next call.
const float* biased_weight(DType dtype, const void* weight, double bias, int64_t hidden) {
  static thread_local std::vector<float> scratch;
  scratch.resize(size_t(hidden));
  switch (dtype) {
    case DType::kFloat: {
      const float* w = static_cast<const float*>(weight);
      for (int64_t i = 0; i < hidden; ++i) scratch[size_t(i)] = w[i] + float(bias);
      break;
    }
    case DType::kBFloat16: {
      const uint16_t* w = static_cast<const uint16_t*>(weight);
      for (int64_t i = 0; i < hidden; ++i) {
        const uint32_t bits = uint32_t(w[i]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        scratch[size_t(i)] = value + float(bias);
      }
      break;
    }
    case DType::kHalf: {
      const torch::headeronly::Half* w = static_cast<const torch::headeronly::Half*>(weight);
      for (int64_t i = 0; i < hidden; ++i) scratch[size_t(i)] = float(w[i]) + float(bias);
      break;
    }
  }
  return scratch.data();
}

// The weight is valid until the next call on this thread.
NormTarget norm_target(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps,
                       double weight_bias, const std::optional<Tensor>& norm,
                       const std::optional<Tensor>& residual_out) {
  const NormTensors t = norm_tensors(x, residual, weight, eps, weight_bias, norm, residual_out);
  NormTarget target;
  target.residual = t.residual;
  target.residual_out = t.residual_out;
  target.norm = t.norm;
  target.weight = biased_weight(t.weight_dtype, t.weight, weight_bias, t.shape.hidden);
  target.eps = float(eps);
  target.hidden = t.shape.hidden;
  return target;
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
  target.quant = quant_target(x, group_size, fp8, scale);
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
  const QuantTarget target = quant_target(x, group_size, fp8, scale);
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

cpu::Communicator& cpu_communicator(int64_t handle) {
  STD_TORCH_CHECK(is_cpu_handle(handle), "x: expected a tensor on the device of the group");
  return communicator(handle);
}

bool comm_all_reduce_out(int64_t comm, Tensor x, Tensor out) {
  x = dense(x);
  check_like("out", out, x);
  check_overlap("out", out, x);
  return cpu_communicator(comm).all_reduce(dtype_of(x), x.const_data_ptr(), out.mutable_data_ptr(), x.numel());
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
  return cpu_communicator(comm).all_reduce_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, target);
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
  target.quant = quant_target(x, group_size, fp8, scale);
  return cpu_communicator(comm).all_reduce_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, target);
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
                      out.numel() * int64_t(out.element_size()) == bytes * cpu_communicator(comm).config().world_size,
                  "out: expected a contiguous CPU tensor of world_size times x");
  return cpu_communicator(comm).all_gather(x.const_data_ptr(), out.mutable_data_ptr(), bytes);
}

bool comm_reduce_scatter(int64_t comm, Tensor x, Tensor out) {
  x = dense(x);
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && out.is_cpu() && out.is_contiguous() &&
                      x.scalar_type() == out.scalar_type() &&
                      x.numel() == out.numel() * cpu_communicator(comm).config().world_size,
                  "out: expected a contiguous CPU tensor of 1/world_size of x");
  return cpu_communicator(comm).reduce_scatter(dtype_of(x), x.const_data_ptr(), out.mutable_data_ptr(), out.numel());
}

bool comm_broadcast(int64_t comm, Tensor x, int64_t src) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "x: expected a contiguous CPU tensor");
  STD_TORCH_CHECK(src >= 0 && src < cpu_communicator(comm).config().world_size, "src: expected a rank of the group");
  return cpu_communicator(comm).broadcast(x.mutable_data_ptr(), x.numel() * int64_t(x.element_size()), int(src));
}

bool comm_barrier(int64_t comm) { return cpu_communicator(comm).barrier(); }

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
