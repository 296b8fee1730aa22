// The torch operators on GPUs: the schemas of ops.cpp under the CUDA key, which is ROCm's as well.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "bind/arguments.h"
#include "bind/gpu_control.h"
#include "bind/gpu_stream.h"
#include "bind/operators.h"

namespace fusedcomm {

namespace {

using gpu::NormArguments;

NormArguments norm_arguments(const NormTensors& t) {
  NormArguments a;
  a.residual = t.residual;
  a.residual_out = t.residual_out;
  a.norm = t.norm;
  a.weight = t.weight;
  a.weight_is_fp32 = t.weight_dtype == DType::kFloat;
  a.weight_bias = float(t.weight_bias);
  a.eps = float(t.eps);
  a.hidden = int32_t(t.shape.hidden);
  a.quant = t.quant;
  return a;
}

void check_format(const View& x, const QuantTarget& target) {
  STD_TORCH_CHECK(target.format == gpu::native_fp8_format(x.device), "fp8: expected the FP8 format of this GPU");
}

struct Gpu {
  static constexpr uintptr_t kAlignment = 16;  // of what a thread moves
  using Communicator = gpu::Communicator;

  static Communicator& communicator(int64_t handle, const View& x) {
    STD_TORCH_CHECK(gpu::is_gpu_handle(handle) && x.device_type == aoti_torch_device_type_cuda() &&
                        x.device == gpu::communicator(handle).config().device,
                    "x: expected a tensor on the device of the group");
    return gpu::communicator(handle);
  }

  static bool makes_fnuz(const View& x) { return gpu::native_fp8_format(x.device) == Fp8Format::kE4M3fnuz; }

  static void local_norm(const View& x, const NormTensors& tensors) {
    if (tensors.quant.fp8 != nullptr) check_format(x, tensors.quant);
    const gpu::DeviceGuard guard(x.device);
    gpu::local_norm(dtype_of(x), x.data, tensors.shape.rows, norm_arguments(tensors), x.device,
                    current_stream(x.device));
  }

  static void local_quant(const View& x, const QuantTarget& target) {
    check_format(x, target);
    const Shape shape = shape_of(x);
    const gpu::DeviceGuard guard(x.device);
    gpu::local_quant(dtype_of(x), x.data, shape.rows, shape.hidden, target, x.device, current_stream(x.device));
  }

  // A collective is done when it is launched, as far as the host is concerned. It is not where the streams have to be
  // put in order first.

  static bool all_reduce(Communicator& comm, const View& x, void* out) {
    void* const stream = current_stream(x.device);
    if (!comm.gate().admits(stream)) return false;
    comm.all_reduce(dtype_of(x), x.data, out, x.numel, stream);
    return true;
  }

  static bool all_reduce_norm(Communicator& comm, const View& x, const NormTensors& tensors) {
    if (tensors.quant.fp8 != nullptr) check_format(x, tensors.quant);
    void* const stream = current_stream(x.device);
    if (!comm.gate().admits(stream)) return false;
    comm.all_reduce_norm(dtype_of(x), x.data, tensors.shape.rows, norm_arguments(tensors), stream);
    return true;
  }
};

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CUDA, m) { implement_operators<Gpu>(m); }

}  // namespace
}  // namespace fusedcomm
