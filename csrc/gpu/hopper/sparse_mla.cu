// Sparse MLA decode: gather, dequantise, QK, online softmax and PV in one launch.
//
// A block has one row (a query token), 16, 32 or 64 of its heads and one split of its keys, which it takes 64 at a
// time. Its last threads, the producer, fill tiles (sparse_mla_producer.h); the others multiply: sparse_mla_narrow.h
// has up to 32 heads, sparse_mla_wide.h 64.
#include "gpu/gpu.h"
#include "gpu/hopper/sparse_mla_narrow.h"
#include "gpu/hopper/sparse_mla_producer.h"
#include "gpu/hopper/sparse_mla_wide.h"
#include "gpu/sparse_mla.h"

namespace fusedcomm::gpu {

namespace {

// Form: Wide or Narrow.
template <class Form, class Shared, MlaLayout kLayout>
__global__ void __launch_bounds__(Form::kThreads, 1) sparse_mla(const __grid_constant__ SparseMlaArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];  // the swizzle wants it
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Place place = {int(blockIdx.y), int(blockIdx.z), int(blockIdx.x) * Form::kHeads};
  const Range range = range_of(a, place.row, place.split);
  if (range.tiles() == 0) return store_nothing<Form::kHeads, Form::kThreads>(a, place);
  if (threadIdx.x == 0) shared.tiles.init(range, Form::kProducers, Form::kConsumers / 32);
  __syncthreads();
  if (threadIdx.x >= Form::kConsumers) {
    h::set_registers<Form::kProducerRegisters, Form::kShare>();
    produce<Form::kProducers, decltype(shared.tiles), kLayout>(a, shared.tiles, int(threadIdx.x) - Form::kConsumers);
  } else {
    consume<kLayout>(a, range, place, shared);
  }
#endif
}

template <class Form, class Shared, MlaLayout kLayout>
cudaError_t launch(const SparseMlaArguments& a, cudaStream_t stream) {
  constexpr int kBytes = int(sizeof(Shared));
  static_assert(kBytes <= kMaxSharedBytes);
  const auto kernel = sparse_mla<Form, Shared, kLayout>;
  // of this device and for good; it costs next to nothing again
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((a.heads + Form::kHeads - 1) / Form::kHeads), unsigned(a.rows), unsigned(a.splits));
  config.blockDim = dim3(Form::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, a);  // the status of this launch, and not of a call before
}

template <MlaLayout kLayout>
cudaError_t launch_form(const SparseMlaArguments& a, cudaStream_t stream) {
  if (a.heads <= 16) return launch<Narrow<16>, NarrowShared<kLayout, 16>, kLayout>(a, stream);
  if (a.heads <= 32) return launch<Narrow<32>, NarrowShared<kLayout, 32>, kLayout>(a, stream);
  return launch<Wide, WideShared<kLayout>, kLayout>(a, stream);
}

}  // namespace

int sparse_mla_decode(MlaLayout layout, const SparseMlaArguments& a, void* stream) {
  if (a.rows == 0 || a.heads == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  return int(layout == MlaLayout::kV4 ? launch_form<MlaLayout::kV4>(a, s) : launch_form<MlaLayout::kV32>(a, s));
}

}  // namespace fusedcomm::gpu
