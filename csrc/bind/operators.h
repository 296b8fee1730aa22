// The operators that CPUs and GPUs have in common, over what a device says of itself:
//
//   kAlignment                     of the memory that its kernels take, in bytes
//   Communicator                   and communicator(handle, x), which raises if x is not on the group's device
//   makes_fnuz(x)                  whether FP8 on x's device is float8_e4m3fnuz
//   local_norm(x, tensors), local_quant(x, target)
//   all_reduce(comm, x, out), all_reduce_norm(comm, x, tensors)
//
// Collectives return true when they are done; false: call the *_out form with the same tensors until it is (only on
// CPU, cpu/communicator.h). The forms that allocate exist for speed: every call out of Python costs a microsecond or
// more, where ranks share cores several, and four allocations would cost more than the collective.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "bind/arguments.h"
#include "bind/norm_call.h"

namespace fusedcomm {

template <class Device>
bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % Device::kAlignment == 0;
}

// An input as the kernels take it, contiguous and aligned: the tensor itself where it is, a copy where not. Both are
// this rank's own affair.
template <class Device>
class Input {
 public:
  explicit Input(const Tensor& t) : view_(t) {
    if (!view_.is_contiguous) {
      copy_ = torch::stable::contiguous(t);
    } else if (!is_aligned<Device>(view_.data)) {
      copy_ = torch::stable::clone(t);
    }
    if (copy_) view_ = View(*copy_);
  }
  const View& view() const { return view_; }
  const Tensor& tensor_of(const Tensor& given) const { return copy_ ? *copy_ : given; }

 private:
  View view_;
  std::optional<Tensor> copy_;
};

// The memory of an output that the caller gives, which has to be like x.
template <class Device>
void* output(const char* name, const Tensor& t, const View& x) {
  check_like(name, View(t), x);
  void* const data = t.mutable_data_ptr();
  STD_TORCH_CHECK(is_aligned<Device>(data), "out: expected memory aligned to 16 bytes");
  return data;
}

// The inputs of a norm, checked; outputs are still to be set.
template <class Device>
struct NormInputs {
  NormInputs(const Tensor& x_given, const std::optional<Tensor>& residual_given, const Tensor& weight_given, double eps,
             double weight_bias)
      : x(x_given), weight(weight_given) {
    if (residual_given) residual.emplace(*residual_given);
    tensors = norm_tensors(x.view(), residual ? &residual->view() : nullptr, weight.view(), eps, weight_bias);
  }

  Input<Device> x;
  std::optional<Input<Device>> residual;
  Input<Device> weight;
  NormTensors tensors;
};

template <class Device>
struct Operators {
  static QuantTarget quant(const View& x, int64_t group_size, const Tensor& fp8, const Tensor& scale) {
    const QuantTarget target = quant_target(x, group_size, fp8, scale);
    STD_TORCH_CHECK(is_aligned<Device>(target.fp8), "fp8: expected memory aligned to 16 bytes");
    return target;
  }

  // ---- local ops ----

  static void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, double weight_bias, const Tensor& out) {
    NormInputs<Device> in(x, std::nullopt, weight, eps, weight_bias);
    in.tensors.norm = output<Device>("norm", out, in.x.view());
    Device::local_norm(in.x.view(), in.tensors);
  }

  static Handle rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_bias) {
    NormInputs<Device> in(x, std::nullopt, weight, eps, weight_bias);
    Result norm = new_like(in.x.view());
    in.tensors.norm = norm.data();
    Device::local_norm(in.x.view(), in.tensors);
    return norm.release();
  }

  static void fused_add_rms_norm_out(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                                     double eps, double weight_bias, const Tensor& norm, const Tensor& residual_out) {
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    in.tensors.norm = output<Device>("norm", norm, in.x.view());
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x.view());
    Device::local_norm(in.x.view(), in.tensors);
  }

  static std::tuple<Handle, Handle> fused_add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                       const Tensor& weight, double eps, double weight_bias) {
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    Result norm = new_like(in.x.view()), residual_out = new_like(in.x.view());
    in.tensors.norm = norm.data();
    in.tensors.residual_out = residual_out.data();
    Device::local_norm(in.x.view(), in.tensors);
    return {norm.release(), residual_out.release()};
  }

  static void fused_add_rms_norm_quant_out(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                                           double eps, double weight_bias, int64_t group_size, const Tensor& fp8,
                                           const Tensor& scale, const Tensor& residual_out,
                                           const std::optional<Tensor>& norm) {
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x.view());
    if (norm) in.tensors.norm = output<Device>("norm", *norm, in.x.view());
    in.tensors.quant = quant(in.x.view(), group_size, fp8, scale);
    Device::local_norm(in.x.view(), in.tensors);
  }

  static std::tuple<Handle, Handle, Handle> fused_add_rms_norm_quant(const Tensor& x,
                                                                     const std::optional<Tensor>& residual,
                                                                     const Tensor& weight, double eps,
                                                                     double weight_bias, int64_t group_size,
                                                                     bool column_major, bool packed, bool fnuz) {
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    const Quantized q = empty_quant(in.x.tensor_of(x), group_size, column_major, packed, fnuz);
    Result residual_out = new_like(in.x.view());
    in.tensors.residual_out = residual_out.data();
    in.tensors.quant = quant(in.x.view(), group_size, q.fp8, q.scale);
    Device::local_norm(in.x.view(), in.tensors);
    return {Result(q.fp8).release(), Result(q.scale).release(), residual_out.release()};
  }

  static void per_group_quant_fp8_out(const Tensor& x, int64_t group_size, const Tensor& fp8, const Tensor& scale) {
    const Input<Device> in(x);
    Device::local_quant(in.view(), quant(in.view(), group_size, fp8, scale));
  }

  static std::tuple<Handle, Handle> per_group_quant_fp8(const Tensor& x, int64_t group_size, bool column_major,
                                                        bool packed, bool fnuz) {
    const Input<Device> in(x);
    const Quantized q = empty_quant(in.tensor_of(x), group_size, column_major, packed, fnuz);
    Device::local_quant(in.view(), quant(in.view(), group_size, q.fp8, q.scale));
    return {Result(q.fp8).release(), Result(q.scale).release()};
  }

  // ---- collectives ----

  static bool comm_all_reduce_out(int64_t comm, const Tensor& x, const Tensor& out) {
    const Input<Device> in(x);
    const View target(out);
    check_like("out", target, in.view());
    check_overlap("out", target, in.view());
    auto& communicator = Device::communicator(comm, in.view());
    if (is_aligned<Device>(target.data)) return Device::all_reduce(communicator, in.view(), out.mutable_data_ptr());
    Tensor aligned(new_like(in.view()).release().value), given(out);
    const bool done = Device::all_reduce(communicator, in.view(), aligned.mutable_data_ptr());
    torch::stable::copy_(given, aligned);
    return done;
  }

  static std::tuple<Handle, bool> comm_all_reduce(int64_t comm, const Tensor& x) {
    const Input<Device> in(x);
    auto& communicator = Device::communicator(comm, in.view());
    Result out = new_like(in.view());
    const bool done = Device::all_reduce(communicator, in.view(), out.data());
    return {out.release(), done};
  }

  static bool comm_allreduce_rmsnorm_out(int64_t call, const Tensor& x, const std::optional<Tensor>& residual,
                                         const Tensor& weight, const Tensor& norm, const Tensor& residual_out) {
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(x, residual, weight, c.eps, c.weight_bias);
    auto& communicator = Device::communicator(c.comm, in.x.view());
    in.tensors.norm = output<Device>("norm", norm, in.x.view());
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x.view());
    return Device::all_reduce_norm(communicator, in.x.view(), in.tensors);
  }

  static std::tuple<Handle, Handle, bool> comm_allreduce_rmsnorm(int64_t call, const Tensor& x,
                                                                 const std::optional<Tensor>& residual,
                                                                 const Tensor& weight) {
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(x, residual, weight, c.eps, c.weight_bias);
    auto& communicator = Device::communicator(c.comm, in.x.view());
    Result norm = new_like(in.x.view()), residual_out = new_like(in.x.view());
    in.tensors.norm = norm.data();
    in.tensors.residual_out = residual_out.data();
    const bool done = Device::all_reduce_norm(communicator, in.x.view(), in.tensors);
    return {norm.release(), residual_out.release(), done};
  }

  static bool comm_allreduce_rmsnorm_quant_out(int64_t call, const Tensor& x, const std::optional<Tensor>& residual,
                                               const Tensor& weight, const Tensor& fp8, const Tensor& scale,
                                               const Tensor& residual_out, const std::optional<Tensor>& norm) {
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(x, residual, weight, c.eps, c.weight_bias);
    auto& communicator = Device::communicator(c.comm, in.x.view());
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x.view());
    if (norm) in.tensors.norm = output<Device>("norm", *norm, in.x.view());
    in.tensors.quant = quant(in.x.view(), c.group_size, fp8, scale);
    return Device::all_reduce_norm(communicator, in.x.view(), in.tensors);
  }

  static std::tuple<Handle, Handle, Handle, std::optional<Handle>, bool> comm_allreduce_rmsnorm_quant(
      int64_t call, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight) {
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(x, residual, weight, c.eps, c.weight_bias);
    auto& communicator = Device::communicator(c.comm, in.x.view());
    const Quantized q = empty_quant(in.x.tensor_of(x), c.group_size, c.column_major != 0, c.packed != 0,
                                    Device::makes_fnuz(in.x.view()));
    Result residual_out = new_like(in.x.view());
    std::optional<Result> norm;
    if (c.emit_norm != 0) norm = new_like(in.x.view());
    in.tensors.residual_out = residual_out.data();
    if (norm) in.tensors.norm = norm->data();
    in.tensors.quant = quant(in.x.view(), c.group_size, q.fp8, q.scale);
    const bool done = Device::all_reduce_norm(communicator, in.x.view(), in.tensors);
    Result fp8(q.fp8), scale(q.scale);
    return {fp8.release(), scale.release(), residual_out.release(),
            norm ? std::optional<Handle>(norm->release()) : std::nullopt, done};
  }
};

// Registers them for the dispatch key of m.
template <class Device>
void implement_operators(torch::stable::detail::StableLibrary& m) {
  using Ops = Operators<Device>;
  m.impl("rms_norm", TORCH_BOX(&Ops::rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&Ops::rms_norm_out));
  m.impl("fused_add_rms_norm", TORCH_BOX(&Ops::fused_add_rms_norm));
  m.impl("fused_add_rms_norm_out", TORCH_BOX(&Ops::fused_add_rms_norm_out));
  m.impl("fused_add_rms_norm_quant", TORCH_BOX(&Ops::fused_add_rms_norm_quant));
  m.impl("fused_add_rms_norm_quant_out", TORCH_BOX(&Ops::fused_add_rms_norm_quant_out));
  m.impl("per_group_quant_fp8", TORCH_BOX(&Ops::per_group_quant_fp8));
  m.impl("per_group_quant_fp8_out", TORCH_BOX(&Ops::per_group_quant_fp8_out));
  m.impl("comm_all_reduce", TORCH_BOX(&Ops::comm_all_reduce));
  m.impl("comm_all_reduce_out", TORCH_BOX(&Ops::comm_all_reduce_out));
  m.impl("comm_allreduce_rmsnorm", TORCH_BOX(&Ops::comm_allreduce_rmsnorm));
  m.impl("comm_allreduce_rmsnorm_out", TORCH_BOX(&Ops::comm_allreduce_rmsnorm_out));
  m.impl("comm_allreduce_rmsnorm_quant", TORCH_BOX(&Ops::comm_allreduce_rmsnorm_quant));
  m.impl("comm_allreduce_rmsnorm_quant_out", TORCH_BOX(&Ops::comm_allreduce_rmsnorm_quant_out));
}

}  // namespace fusedcomm
