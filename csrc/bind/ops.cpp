// The schemas of the torch operators, through the stable ABI, and the operators on CPUs.
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
#include "bind/operators.h"
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
NormTarget norm_target(const NormTensors& t) {
  NormTarget target;
  target.residual = t.residual;
  target.residual_out = t.residual_out;
  target.norm = t.norm;
  target.weight = biased_weight(t.weight_dtype, t.weight, t.weight_bias, t.shape.hidden);
  target.eps = float(t.eps);
  target.hidden = t.shape.hidden;
  target.quant = t.quant;
  return target;
}

cpu::Communicator& cpu_communicator(int64_t handle) {
  STD_TORCH_CHECK(is_cpu_handle(handle), "x: expected a tensor on the device of the group");
  return communicator(handle);
}

struct Cpu {
  static constexpr uintptr_t kAlignment = 1;
  using Communicator = cpu::Communicator;

  static Communicator& communicator(int64_t handle, const View&) { return cpu_communicator(handle); }
  static bool makes_fnuz(const View&) { return false; }

  static void local_norm(const View& x, const NormTensors& tensors) {
    const NormTarget target = norm_target(tensors);
    const DType dtype = dtype_of(x);
    const Kernels& kernels = *cpu::find_kernels(dtype);
    const auto norm = target.quant.fp8 == nullptr ? kernels.norm : kernels.norm_quant[int(target.quant.format)];
    const char* const rows = static_cast<const char*>(x.data);
    const int64_t row_bytes = target.hidden * cpu::element_bytes(dtype);
    for_rows(tensors.shape, [&](int64_t begin, int64_t end) {
      Sources source;
      source.count = 1;
      source.rows[0] = rows + begin * row_bytes;
      norm(source, target, begin, end - begin);
    });
  }

  static void local_quant(const View& x, const QuantTarget& target) {
    const Shape shape = shape_of(x);
    const auto quant = cpu::find_kernels(dtype_of(x))->quant[int(target.format)];
    for_rows(shape, [&](int64_t begin, int64_t end) { quant(x.data, shape.hidden, target, begin, end - begin); });
  }

  static bool all_reduce(Communicator& comm, const View& x, void* out) {
    return comm.all_reduce(dtype_of(x), x.data, out, x.numel);
  }

  static bool all_reduce_norm(Communicator& comm, const View& x, const NormTensors& tensors) {
    return comm.all_reduce_norm(dtype_of(x), x.data, tensors.shape.rows, norm_target(tensors));
  }
};

// ---- collectives that GPUs leave to the process group; done, or call again, as in operators.h ----

bool comm_all_gather(int64_t comm, const Tensor& x, const Tensor& out) {
  const Input<Cpu> in(x.get());
  const int64_t bytes = x.numel() * int64_t(x.element_size());
  STD_TORCH_CHECK(x.is_cpu() && out.is_cpu() && out.is_contiguous() &&
                      out.numel() * int64_t(out.element_size()) == bytes * cpu_communicator(comm).config().world_size,
                  "out: expected a contiguous CPU tensor of world_size times x");
  return cpu_communicator(comm).all_gather(in.view().data, out.mutable_data_ptr(), bytes);
}

bool comm_reduce_scatter(int64_t comm, const Tensor& x, const Tensor& out) {
  const Input<Cpu> in(x.get());
  STD_TORCH_CHECK(x.is_cpu() && out.is_cpu() && out.is_contiguous() && x.scalar_type() == out.scalar_type() &&
                      x.numel() == out.numel() * cpu_communicator(comm).config().world_size,
                  "out: expected a contiguous CPU tensor of 1/world_size of x");
  return cpu_communicator(comm).reduce_scatter(dtype_of(in.view()), in.view().data, out.mutable_data_ptr(),
                                               out.numel());
}

bool comm_broadcast(int64_t comm, const Tensor& x, int64_t src) {
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

  // on Hopper GPUs alone
  m.def(
      "sparse_mla_decode_out(Tensor q, Tensor main_cache, Tensor main_indices, Tensor? main_lens, Tensor? main_indptr, "
      "Tensor? extra_cache, Tensor? extra_indices, Tensor? extra_lens, Tensor? extra_indptr, Tensor? attn_sink, "
      "float scale, int block_heads, int num_splits, Tensor(a!) out, Tensor(b!)? partial, Tensor(c!)? lse) -> ()");
  m.def("sparse_mla_active_clusters(int device, int dim, int block_heads, int num_splits) -> int");

  m.def("comm_all_reduce(int comm, Tensor x) -> (Tensor out, bool done)");
  m.def("comm_all_reduce_out(int comm, Tensor x, Tensor(a!) out) -> bool");
  // call is the address of a NormCall
  m.def(
      "comm_allreduce_rmsnorm(int call, Tensor x, Tensor? residual, Tensor weight) "
      "-> (Tensor norm, Tensor residual_out, bool done)");
  m.def(
      "comm_allreduce_rmsnorm_out(int call, Tensor x, Tensor? residual, Tensor weight, "
      "Tensor(a!) norm, Tensor(b!) residual_out) -> bool");
  m.def(
      "comm_allreduce_rmsnorm_quant(int call, Tensor x, Tensor? residual, Tensor weight) "
      "-> (Tensor fp8, Tensor scale, Tensor residual_out, Tensor? norm, bool done)");
  m.def(
      "comm_allreduce_rmsnorm_quant_out(int call, Tensor x, Tensor? residual, Tensor weight, "
      "Tensor(a!) fp8, Tensor(b!) scale, Tensor(c!) residual_out, Tensor(d!)? norm) -> bool");
  m.def("comm_all_gather(int comm, Tensor x, Tensor(a!) out) -> bool");
  m.def("comm_reduce_scatter(int comm, Tensor x, Tensor(a!) out) -> bool");
  m.def("comm_broadcast(int comm, Tensor(a!) x, int src) -> bool");
  m.def("comm_barrier(int comm) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CPU, m) {
  implement_operators<Cpu>(m);
  m.impl("comm_all_gather", TORCH_BOX(&comm_all_gather));
  m.impl("comm_reduce_scatter", TORCH_BOX(&comm_reduce_scatter));
  m.impl("comm_broadcast", TORCH_BOX(&comm_broadcast));
}

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CompositeExplicitAutograd, m) { m.impl("comm_barrier", TORCH_BOX(&comm_barrier)); }

}  // namespace
}  // namespace fusedcomm
