// The torch operators on GPUs: the schemas of ops.cpp under the CUDA key, which is ROCm's as well.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "bind/arguments.h"
#include "bind/gpu_control.h"

namespace fusedcomm {

namespace {

using gpu::NormArguments;

constexpr uintptr_t kAlignment = 16;  // of what a thread moves

// torch's current stream of a device. The function is in torch's GPU library, which a build machine need not have.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    for (const char* name : {"libtorch_cuda.so", "libtorch_hip.so"}) {
      void* const library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
      if (library == nullptr) continue;
      void* const symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
      if (symbol != nullptr) return reinterpret_cast<Function>(symbol);
    }
    return Function(nullptr);
  }();
  STD_TORCH_CHECK(function != nullptr, "no GPU build of torch is loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment == 0; }

// Contiguous and aligned: x itself where it is, a copy where not. Alignment is this rank's own affair.
Tensor ready(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return is_aligned(t.const_data_ptr()) ? t : torch::stable::clone(t);
}

std::optional<Tensor> ready(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(ready(*t)) : t; }

NormArguments norm_arguments(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps,
                             double weight_bias, const std::optional<Tensor>& norm,
                             const std::optional<Tensor>& residual_out) {
  const NormTensors t = norm_tensors(x, residual, weight, eps, weight_bias, norm, residual_out);
  STD_TORCH_CHECK(is_aligned(t.norm) && is_aligned(t.residual_out), "out: expected memory aligned to 16 bytes");
  NormArguments a;
  a.residual = t.residual;
  a.residual_out = t.residual_out;
  a.norm = t.norm;
  a.weight = t.weight;
  a.weight_is_fp32 = t.weight_dtype == DType::kFloat;
  a.weight_bias = float(weight_bias);
  a.eps = float(eps);
  a.hidden = int32_t(t.shape.hidden);
  return a;
}

QuantTarget gpu_quant_target(const Tensor& x, int64_t group_size, const Tensor& fp8, const Tensor& scale) {
  const QuantTarget target = quant_target(x, group_size, fp8, scale);
  STD_TORCH_CHECK(is_aligned(target.fp8), "fp8: expected memory aligned to 16 bytes");
  STD_TORCH_CHECK(target.format == gpu::native_fp8_format(x.get_device_index()),
                  "fp8: expected the FP8 format of this GPU");
  return target;
}

void launch_norm(const Tensor& x, const NormArguments& a) {
  const int32_t device = x.get_device_index();
  const gpu::DeviceGuard guard(device);
  gpu::local_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, a, device, current_stream(device));
}

// ---- local ops ----

void rms_norm_out(Tensor x, Tensor weight, double eps, double weight_bias, Tensor out) {
  x = ready(x), weight = ready(weight);
  launch_norm(x, norm_arguments(x, std::nullopt, weight, eps, weight_bias, out, std::nullopt));
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_bias) {
  Tensor out = new_like(x);
  rms_norm_out(x, weight, eps, weight_bias, out);
  return out;
}

void fused_add_rms_norm_out(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps, double weight_bias,
                            Tensor norm, Tensor residual_out) {
  x = ready(x), residual = ready(residual), weight = ready(weight);
  launch_norm(x, norm_arguments(x, residual, weight, eps, weight_bias, norm, residual_out));
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
  x = ready(x), residual = ready(residual), weight = ready(weight);
  NormArguments a = norm_arguments(x, residual, weight, eps, weight_bias, norm, residual_out);
  a.quant = gpu_quant_target(x, group_size, fp8, scale);
  launch_norm(x, a);
}

std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_quant(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                                            double eps, double weight_bias, int64_t group_size,
                                                            bool column_major, bool packed, bool fnuz) {
  x = ready(x);
  Quantized q = empty_quant(x, group_size, column_major, packed, fnuz);
  Tensor residual_out = new_like(x);
  fused_add_rms_norm_quant_out(x, residual, weight, eps, weight_bias, group_size, q.fp8, q.scale, residual_out,
                               std::nullopt);
  return {q.fp8, q.scale, residual_out};
}

void per_group_quant_fp8_out(Tensor x, int64_t group_size, Tensor fp8, Tensor scale) {
  x = ready(x);
  const Shape shape = shape_of(x);
  const QuantTarget target = gpu_quant_target(x, group_size, fp8, scale);
  const int32_t device = x.get_device_index();
  const gpu::DeviceGuard guard(device);
  gpu::local_quant(dtype_of(x), x.const_data_ptr(), shape.rows, shape.hidden, target, device, current_stream(device));
}

std::tuple<Tensor, Tensor> per_group_quant_fp8(Tensor x, int64_t group_size, bool column_major, bool packed,
                                               bool fnuz) {
  x = ready(x);
  Quantized q = empty_quant(x, group_size, column_major, packed, fnuz);
  per_group_quant_fp8_out(x, group_size, q.fp8, q.scale);
  return {q.fp8, q.scale};
}

// ---- collectives: always done when they return, as far as the host is concerned ----

gpu::Communicator& communicator_for(int64_t handle, const Tensor& x) {
  STD_TORCH_CHECK(gpu::is_gpu_handle(handle) && x.is_cuda(), "x: expected a tensor on the device of the group");
  gpu::Communicator& comm = gpu::communicator(handle);
  STD_TORCH_CHECK(x.get_device_index() == comm.config().device, "x: expected a tensor on the device of the group");
  return comm;
}

bool comm_all_reduce_out(int64_t handle, Tensor x, Tensor out) {
  gpu::Communicator& comm = communicator_for(handle, x);
  x = ready(x);
  check_like("out", out, x);
  check_overlap("out", out, x);
  Tensor target = is_aligned(out.const_data_ptr()) ? out : new_like(x);
  comm.all_reduce(dtype_of(x), x.const_data_ptr(), target.mutable_data_ptr(), x.numel(),
                  current_stream(comm.config().device));
  if (target.get() != out.get()) torch::stable::copy_(out, target);
  return true;
}

std::tuple<Tensor, bool> comm_all_reduce(int64_t handle, Tensor x) {
  Tensor out = new_like(x);
  comm_all_reduce_out(handle, x, out);
  return {out, true};
}

bool comm_allreduce_rmsnorm_out(int64_t handle, Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                double weight_bias, Tensor norm, Tensor residual_out) {
  gpu::Communicator& comm = communicator_for(handle, x);
  x = ready(x), residual = ready(residual), weight = ready(weight);
  const NormArguments a = norm_arguments(x, residual, weight, eps, weight_bias, norm, residual_out);
  comm.all_reduce_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, a, current_stream(comm.config().device));
  return true;
}

std::tuple<Tensor, Tensor, bool> comm_allreduce_rmsnorm(int64_t handle, Tensor x, std::optional<Tensor> residual,
                                                        Tensor weight, double eps, double weight_bias) {
  Tensor norm = new_like(x), residual_out = new_like(x);
  comm_allreduce_rmsnorm_out(handle, x, residual, weight, eps, weight_bias, norm, residual_out);
  return {norm, residual_out, true};
}

bool comm_allreduce_rmsnorm_quant_out(int64_t handle, Tensor x, std::optional<Tensor> residual, Tensor weight,
                                      double eps, double weight_bias, int64_t group_size, Tensor fp8, Tensor scale,
                                      Tensor residual_out, std::optional<Tensor> norm) {
  gpu::Communicator& comm = communicator_for(handle, x);
  x = ready(x), residual = ready(residual), weight = ready(weight);
  NormArguments a = norm_arguments(x, residual, weight, eps, weight_bias, norm, residual_out);
  a.quant = gpu_quant_target(x, group_size, fp8, scale);
  comm.all_reduce_norm(dtype_of(x), x.const_data_ptr(), shape_of(x).rows, a, current_stream(comm.config().device));
  return true;
}

std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, bool> comm_allreduce_rmsnorm_quant(
    int64_t handle, Tensor x, std::optional<Tensor> residual, Tensor weight, double eps, double weight_bias,
    int64_t group_size, bool emit_norm, bool column_major, bool packed) {
  x = ready(x);
  const bool fnuz = gpu::native_fp8_format(x.get_device_index()) == Fp8Format::kE4M3fnuz;
  Quantized q = empty_quant(x, group_size, column_major, packed, fnuz);
  Tensor residual_out = new_like(x);
  std::optional<Tensor> norm;
  if (emit_norm) norm = new_like(x);
  comm_allreduce_rmsnorm_quant_out(handle, x, residual, weight, eps, weight_bias, group_size, q.fp8, q.scale,
                                   residual_out, norm);
  return {q.fp8, q.scale, residual_out, norm, true};
}

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CUDA, m) {
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
}

}  // namespace
}  // namespace fusedcomm
