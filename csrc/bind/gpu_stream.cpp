#include "bind/gpu_stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

namespace fusedcomm {

// The function is in torch's GPU library, which a build machine need not have.
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

}  // namespace fusedcomm
