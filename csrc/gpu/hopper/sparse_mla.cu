// Sparse MLA decode: gather, dequantise, QK, online softmax and PV in one launch.
//
// A block has one row (a query token), 16, 32 or 64 of its heads and one split of its keys, which it takes 64 at a
// time. Its last threads, the producer, fill tiles (sparse_mla_producer.h); the others multiply: sparse_mla_narrow.h
// has up to 32 heads, sparse_mla_wide.h 64. Several splits are merged by their blocks (sparse_mla_merge.h), or leave
// their results for another launch.
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
  // Tiles::range is the range again: a register less that lives on beside the work
  const auto finish = [&](int splits) {
    if constexpr (Form::kMerges) {
      if (merges(a)) merge<Form::kHeads, Form::kThreads>(a, splits, place, shared.part());
    }
  };
  if (range.tiles() == 0) {
    if (!merges(a)) return store_nothing<Form::kHeads, Form::kThreads>(a, place);
    load_sinks(a, place, shared.sink);
    return finish(range.splits);
  }
  if (threadIdx.x == 0) shared.tiles.init(range, Form::kProducers, Form::kConsumers / 32);
  __syncthreads();
  if (threadIdx.x >= Form::kConsumers) {
    h::set_registers<Form::kProducerRegisters, Form::kShare>();
    const int thread = int(threadIdx.x) - Form::kConsumers;
    produce<Form::kProducers, Form::kPrefetches, decltype(shared.tiles), kLayout>(a, shared.tiles, thread);
    finish(shared.tiles.range.splits);
  } else {
    consume<kLayout>(a, range, place, shared);
    finish(shared.tiles.range.splits);
  }
#endif
}

// How a kernel is launched.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Launch(dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
  }
  Launch(const Launch&) = delete;

  // Blocks with the same x and y are a cluster.
  void cluster_along_z() {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, 1, config.gridDim.z};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
};

// What follows is of one kernel: of a form, its shared memory and a layout.
template <class Form, class Shared, MlaLayout kLayout>
struct Kernel {
  static_assert(sizeof(Shared) <= kMaxSharedBytes);

  // Of this device and for good; it costs next to nothing again.
  static cudaError_t prepare(bool is_merged) {
    const auto kernel = sparse_mla<Form, Shared, kLayout>;
    const auto bytes = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t status = cudaFuncSetAttribute(kernel, bytes, int(sizeof(Shared)));
    if (status != cudaSuccess || !is_merged) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }

  static cudaError_t launch(const SparseMlaArguments& a, cudaStream_t stream) {
    const bool is_merged = a.splits > 1 && a.partial == nullptr;
    if (is_merged && (!Form::kMerges || a.splits > kMaxMergedSplits)) return cudaErrorInvalidValue;
    const cudaError_t status = prepare(is_merged);
    if (status != cudaSuccess) return status;
    const unsigned head_blocks = unsigned((a.heads + Form::kHeads - 1) / Form::kHeads);
    Launch how(dim3(head_blocks, unsigned(a.rows), unsigned(a.splits)), Form::kThreads, sizeof(Shared), stream);
    if (is_merged) how.cluster_along_z();
    // the status of this launch, and not of a call before
    return cudaLaunchKernelEx(&how.config, sparse_mla<Form, Shared, kLayout>, a);
  }

  static int active_clusters(int splits) {
    if (!Form::kMerges || splits < 1 || splits > kMaxMergedSplits) return 0;
    cudaError_t status = prepare(true);
    if (status != cudaSuccess) return -int(status);
    Launch how(dim3(1, 1, unsigned(splits)), Form::kThreads, sizeof(Shared), nullptr);
    how.cluster_along_z();
    int clusters = 0;
    status = cudaOccupancyMaxActiveClusters(&clusters, sparse_mla<Form, Shared, kLayout>, &how.config);
    return status == cudaSuccess ? clusters : -int(status);
  }
};

// Calls `use` with the kernel of a layout and a number of heads.
template <MlaLayout kLayout, class Use>
int with_form(int block_heads, const Use& use) {
  if (block_heads == 16) return use(Kernel<Narrow<16>, NarrowShared<kLayout, 16>, kLayout>());
  if (block_heads == 32) return use(Kernel<Narrow<32>, NarrowShared<kLayout, 32>, kLayout>());
  if (block_heads == 64) return use(Kernel<Wide, WideShared<kLayout>, kLayout>());
  return int(cudaErrorInvalidValue);
}
template <class Use>
int with_kernel(MlaLayout layout, int block_heads, const Use& use) {
  return layout == MlaLayout::kV4 ? with_form<MlaLayout::kV4>(block_heads, use)
                                  : with_form<MlaLayout::kV32>(block_heads, use);
}

}  // namespace

int sparse_mla_active_clusters(MlaLayout layout, int block_heads, int splits) {
  return with_kernel(layout, block_heads, [&](auto kernel) { return kernel.active_clusters(splits); });
}

int sparse_mla_decode(MlaLayout layout, const SparseMlaArguments& a, void* stream) {
  if (a.rows == 0 || a.heads == 0) return 0;
  return with_kernel(layout, a.block_heads,
                     [&](auto kernel) { return int(kernel.launch(a, static_cast<cudaStream_t>(stream))); });
}

}  // namespace fusedcomm::gpu
