// The operators that CPUs and GPUs have in common, over what a device says of itself:
//
//   kAlignment                     of the memory that its kernels take, in bytes
//   Communicator                   and communicator(handle, x), which raises if x is not on the group's device
//   makes_fnuz(x)                  whether FP8 on x's device is float8_e4m3fnuz
//   local_norm(x, tensors), local_quant(x, target)
//   all_reduce(comm, x, out), all_reduce_norm(comm, x, tensors)
//
// Collectives return true when they are done; false: call the *_out form with the same tensors until it is (on the CPU
// cpu/communicator.h says why, on GPUs gpu/stream_gate.h). The forms that allocate exist for speed: every call out of
// Python costs a microsecond or more, where ranks share cores several, and four allocations would cost more than the
// collective.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
  explicit Input(AtenTensorHandle t) : view_(t) {
    if (view_.is_contiguous && is_aligned<Device>(view_.data)) return;
    AtenTensorHandle shared = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t, &shared));
    const Tensor given(shared);
    copy_ = view_.is_contiguous ? torch::stable::clone(given) : torch::stable::contiguous(given);
    view_ = View(copy_->get());
  }
  const View& view() const { return view_; }

 private:
  View view_;
  std::optional<Tensor> copy_;
};

// The memory of an output that the caller gives, which has to be like x.
template <class Device>
void* output(const char* name, const Owned& t, const View& x) {
  check_like(name, View(t), x);
  void* const data = t.data();
  STD_TORCH_CHECK(is_aligned<Device>(data), "out: expected memory aligned to 16 bytes");
  return data;
}

// The inputs of a norm, checked; outputs are still to be set.
template <class Device>
class NormInputs {
 public:
  NormInputs(Handle x_given, const std::optional<Handle>& residual_given, Handle weight_given, double eps,
             double weight_bias)
      : x_owned_(x_given),
        residual_owned_(owned(residual_given)),
        weight_owned_(weight_given),
        x_(x_owned_.get()),
        weight_(weight_owned_.get()) {
    if (residual_owned_) residual_.emplace(residual_owned_->get());
    tensors = norm_tensors(x_.view(), residual_ ? &residual_->view() : nullptr, weight_.view(), eps, weight_bias);
  }
  NormInputs(const NormCall& call, Handle x_given, const std::optional<Handle>& residual_given, Handle weight_given)
      : NormInputs(x_given, residual_given, weight_given, call.eps, call.weight_bias) {}

  const View& x() const { return x_.view(); }

  NormTensors tensors;

 private:
  const Owned x_owned_;  // all of them first: what raises later must not lose one
  const std::optional<Owned> residual_owned_;
  const Owned weight_owned_;
  Input<Device> x_;
  std::optional<Input<Device>> residual_;
  Input<Device> weight_;
};

// An operator owns what it is given from its first line on.
template <class Device>
struct Operators {
  static void check_aligned(const QuantTarget& target) {
    STD_TORCH_CHECK(is_aligned<Device>(target.fp8), "fp8: expected memory aligned to 16 bytes");
  }

  static QuantTarget quant(const View& x, int64_t group_size, const Owned& fp8, const Owned& scale) {
    const QuantTarget target = quant_target(x, group_size, fp8, scale);
    check_aligned(target);
    return target;
  }

  // ---- local ops ----

  static void rms_norm_out(Handle x, Handle weight, double eps, double weight_bias, Handle out) {
    const Owned norm(out);
    NormInputs<Device> in(x, std::nullopt, weight, eps, weight_bias);
    in.tensors.norm = output<Device>("norm", norm, in.x());
    Device::local_norm(in.x(), in.tensors);
  }

  static Handle rms_norm(Handle x, Handle weight, double eps, double weight_bias) {
    NormInputs<Device> in(x, std::nullopt, weight, eps, weight_bias);
    Owned norm = new_like(in.x());
    in.tensors.norm = norm.data();
    Device::local_norm(in.x(), in.tensors);
    return norm.release();
  }

  static void fused_add_rms_norm_out(Handle x, std::optional<Handle> residual, Handle weight, double eps,
                                     double weight_bias, Handle norm_given, Handle residual_given) {
    const Owned norm(norm_given), residual_out(residual_given);
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    in.tensors.norm = output<Device>("norm", norm, in.x());
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x());
    Device::local_norm(in.x(), in.tensors);
  }

  static std::tuple<Handle, Handle> fused_add_rms_norm(Handle x, std::optional<Handle> residual, Handle weight,
                                                       double eps, double weight_bias) {
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    Owned norm = new_like(in.x()), residual_out = new_like(in.x());
    in.tensors.norm = norm.data();
    in.tensors.residual_out = residual_out.data();
    Device::local_norm(in.x(), in.tensors);
    return {norm.release(), residual_out.release()};
  }

  static void fused_add_rms_norm_quant_out(Handle x, std::optional<Handle> residual, Handle weight, double eps,
                                           double weight_bias, int64_t group_size, Handle fp8_given, Handle scale_given,
                                           Handle residual_given, std::optional<Handle> norm_given) {
    const Owned fp8(fp8_given), scale(scale_given), residual_out(residual_given);
    const std::optional<Owned> norm = owned(norm_given);
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x());
    if (norm) in.tensors.norm = output<Device>("norm", *norm, in.x());
    in.tensors.quant = quant(in.x(), group_size, fp8, scale);
    Device::local_norm(in.x(), in.tensors);
  }

  static std::tuple<Handle, Handle, Handle> fused_add_rms_norm_quant(Handle x, std::optional<Handle> residual,
                                                                     Handle weight, double eps, double weight_bias,
                                                                     int64_t group_size, bool column_major, bool packed,
                                                                     bool fnuz) {
    NormInputs<Device> in(x, residual, weight, eps, weight_bias);
    Quantized q = new_quant(in.x(), {group_size, column_major, packed, fnuz});
    Owned residual_out = new_like(in.x());
    in.tensors.residual_out = residual_out.data();
    in.tensors.quant = q.target;
    Device::local_norm(in.x(), in.tensors);
    return {q.fp8.release(), q.scale.release(), residual_out.release()};
  }

  static void per_group_quant_fp8_out(Handle x_given, int64_t group_size, Handle fp8_given, Handle scale_given) {
    const Owned x(x_given), fp8(fp8_given), scale(scale_given);
    const Input<Device> in(x.get());
    Device::local_quant(in.view(), quant(in.view(), group_size, fp8, scale));
  }

  static std::tuple<Handle, Handle> per_group_quant_fp8(Handle x_given, int64_t group_size, bool column_major,
                                                        bool packed, bool fnuz) {
    const Owned x(x_given);
    const Input<Device> in(x.get());
    Quantized q = new_quant(in.view(), {group_size, column_major, packed, fnuz});
    Device::local_quant(in.view(), q.target);
    return {q.fp8.release(), q.scale.release()};
  }

  // ---- collectives ----

  static bool comm_all_reduce_out(int64_t comm, Handle x_given, Handle out_given) {
    const Owned x(x_given), out(out_given);
    const Input<Device> in(x.get());
    const View target(out);
    check_like("out", target, in.view());
    check_overlap("out", target, in.view());
    auto& communicator = Device::communicator(comm, in.view());
    if (is_aligned<Device>(target.data)) return Device::all_reduce(communicator, in.view(), out.data());
    Owned aligned = new_like(in.view());
    const bool done = Device::all_reduce(communicator, in.view(), aligned.data());
    if (done) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out.get(), aligned.get(), 0));
    return done;
  }

  static std::tuple<Handle, bool> comm_all_reduce(int64_t comm, Handle x_given) {
    const Owned x(x_given);
    const Input<Device> in(x.get());
    auto& communicator = Device::communicator(comm, in.view());
    Owned out = new_like(in.view());
    const bool done = Device::all_reduce(communicator, in.view(), out.data());
    return {out.release(), done};
  }

  static bool comm_allreduce_rmsnorm_out(int64_t call, Handle x, std::optional<Handle> residual, Handle weight,
                                         Handle norm_given, Handle residual_given) {
    const Owned norm(norm_given), residual_out(residual_given);
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(c, x, residual, weight);
    auto& communicator = Device::communicator(c.comm, in.x());
    in.tensors.norm = output<Device>("norm", norm, in.x());
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x());
    check_apart(in.x(), in.tensors);
    return Device::all_reduce_norm(communicator, in.x(), in.tensors);
  }

  static std::tuple<Handle, Handle, bool> comm_allreduce_rmsnorm(int64_t call, Handle x, std::optional<Handle> residual,
                                                                 Handle weight) {
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(c, x, residual, weight);
    auto& communicator = Device::communicator(c.comm, in.x());
    Owned norm = new_like(in.x()), residual_out = new_like(in.x());
    in.tensors.norm = norm.data();
    in.tensors.residual_out = residual_out.data();
    const bool done = Device::all_reduce_norm(communicator, in.x(), in.tensors);
    return {norm.release(), residual_out.release(), done};
  }

  static QuantFormat format_of(const NormCall& c, const View& x) {
    return {c.group_size, c.column_major != 0, c.packed != 0, Device::makes_fnuz(x)};
  }

  static bool comm_allreduce_rmsnorm_quant_out(int64_t call, Handle x, std::optional<Handle> residual, Handle weight,
                                               Handle fp8_given, Handle scale_given, Handle residual_given,
                                               std::optional<Handle> norm_given) {
    const Owned fp8(fp8_given), scale(scale_given), residual_out(residual_given);
    const std::optional<Owned> norm = owned(norm_given);
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(c, x, residual, weight);
    auto& communicator = Device::communicator(c.comm, in.x());
    STD_TORCH_CHECK(norm.has_value() == (c.emit_norm != 0), "norm: expected a tensor exactly if it is emitted");
    in.tensors.residual_out = output<Device>("residual_out", residual_out, in.x());
    if (norm) in.tensors.norm = output<Device>("norm", *norm, in.x());
    in.tensors.quant = given_quant(in.x(), format_of(c, in.x()), fp8, scale);
    check_aligned(in.tensors.quant);
    check_apart(in.x(), in.tensors);
    return Device::all_reduce_norm(communicator, in.x(), in.tensors);
  }

  static std::tuple<Handle, Handle, Handle, std::optional<Handle>, bool> comm_allreduce_rmsnorm_quant(
      int64_t call, Handle x, std::optional<Handle> residual, Handle weight) {
    const NormCall& c = norm_call(call);
    NormInputs<Device> in(c, x, residual, weight);
    auto& communicator = Device::communicator(c.comm, in.x());
    Quantized q = new_quant(in.x(), format_of(c, in.x()));
    Owned residual_out = new_like(in.x());
    std::optional<Owned> norm;
    if (c.emit_norm != 0) norm = new_like(in.x());
    in.tensors.residual_out = residual_out.data();
    if (norm) in.tensors.norm = norm->data();
    in.tensors.quant = q.target;
    const bool done = Device::all_reduce_norm(communicator, in.x(), in.tensors);
    return {q.fp8.release(), q.scale.release(), residual_out.release(),
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
