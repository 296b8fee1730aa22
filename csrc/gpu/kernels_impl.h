// Picks and launches the kernels of one dtype.
#pragma once

#include <algorithm>

#include "gpu/kernels.h"
#include "gpu/local.h"
#include "gpu/two_shot.h"

namespace fusedcomm::gpu {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Threads of a block that holds `packs` with one pack a thread.
inline int threads_for(int64_t packs) { return int(round_up(packs, kWarpSize)); }

template <class T>
constexpr DType dtype_code();
template <>
constexpr DType dtype_code<BFloat16>() {
  return DType::kBFloat16;
}
template <>
constexpr DType dtype_code<Half>() {
  return DType::kHalf;
}
template <>
constexpr DType dtype_code<float>() {
  return DType::kFloat;
}

template <class T, int kMaxWorld>
Status launch_sum(const Group& group, Algorithm algorithm, const Geometry& g, const SumArguments& a, Stream stream) {
  const TraceRecord facts = {0, 1, uint32_t(algorithm), uint32_t(dtype_code<T>()), 1, uint32_t(a.count)};
  const int64_t vecs = divide_up(a.count, Io<T>::kPerVec);
  LaunchShape shape;
  shape.overlaps = g.overlaps;
  if (algorithm == Algorithm::kOneShot) {
    shape.threads = g.sum_threads;
    shape.blocks = divide_up(vecs, shape.threads);
    return launch(one_shot_sum<T, kMaxWorld>, shape, stream, group, a, facts);
  }
  shape.threads = kTwoShotThreads;
  shape.blocks = std::min<int64_t>(divide_up(vecs, kFlatRowVecs), int64_t(g.num_sms) * g.two_shot_blocks);
  return launch(two_shot_sum<T, kMaxWorld>, shape, stream, group, a, facts);
}

template <class T, int kMaxWorld>
Status launch_norm(const Group& group, Algorithm algorithm, const Geometry& g, const void* x, int64_t rows,
                   const NormArguments& a, Stream stream) {
  const uint32_t op = a.quant.fp8 == nullptr ? 2 : 3;
  const TraceRecord facts = {0,  op, uint32_t(algorithm), uint32_t(dtype_code<T>()), uint32_t(rows), uint32_t(a.hidden)};
  const int64_t packs = a.hidden / kPack;
  LaunchShape shape;
  shape.overlaps = g.overlaps;
  if (algorithm == Algorithm::kOneShot) {
    shape.blocks = rows;
#if !defined(FUSEDCOMM_HIP)
    if (g.cluster_threads > 0 && packs > g.cluster_threads) {
      shape.threads = g.cluster_threads;
      shape.blocks_in_cluster = int(divide_up(packs, g.cluster_threads));
      shape.blocks = rows * shape.blocks_in_cluster;
      return launch(one_shot_norm<T, kMaxWorld, 1, 512, true>, shape, stream, group, x, a, facts);
    }
    if (packs > 512 && packs <= 1024) {
      shape.threads = threads_for(packs);
      return launch(one_shot_norm<T, kMaxWorld, 1, 1024, false>, shape, stream, group, x, a, facts);
    }
#endif
    shape.threads = packs <= 512 ? threads_for(packs) : 512;
    const auto kernel = packs <= 512    ? one_shot_norm<T, kMaxWorld, 1, 512, false>
                        : packs <= 1024 ? one_shot_norm<T, kMaxWorld, 2, 512, false>
                                        : one_shot_norm<T, kMaxWorld, 4, 512, false>;
    return launch(kernel, shape, stream, group, x, a, facts);
  }
  shape.threads = kTwoShotThreads;
  shape.blocks = std::min(rows, int64_t(g.num_sms) * g.two_shot_blocks);
  const auto kernel = packs <= 512    ? two_shot_norm<T, kMaxWorld, 1>
                      : packs <= 1024 ? two_shot_norm<T, kMaxWorld, 2>
                                      : two_shot_norm<T, kMaxWorld, 4>;
  return launch(kernel, shape, stream, group, x, a, int(rows), facts);
}

template <class T>
Status launch_local_norm(const Geometry& g, const void* x, int64_t rows, const NormArguments& a, Stream stream) {
  const int64_t packs = a.hidden / kPack;
  LaunchShape shape;
  shape.overlaps = g.overlaps;
  shape.blocks = rows;
  if (a.hidden % kPack != 0 || a.hidden > kMaxFusedHidden) {
    shape.threads = kRaggedThreads;
    return launch(local_norm_ragged<T>, shape, stream, x, a);
  }
  shape.threads = packs <= 512 ? threads_for(packs) : 512;
  const auto kernel = packs <= 512    ? local_norm<T, 1, 512>
                      : packs <= 1024 ? local_norm<T, 2, 512>
                                      : local_norm<T, 4, 512>;
  return launch(kernel, shape, stream, x, a);
}

template <class T>
Status launch_local_quant(const Geometry& g, const void* x, int64_t rows, int64_t hidden, const QuantTarget& target,
                          Stream stream) {
  LaunchShape shape;
  shape.overlaps = g.overlaps;
  shape.threads = 256;
  shape.blocks = divide_up(rows * (hidden / kPack), shape.threads);
  return launch(local_quant<T>, shape, stream, x, rows, int32_t(hidden), target);
}

// Up to four ranks, or up to eight: loops over ranks are unrolled that far.
template <class T>
Status sum(const Group& group, Algorithm algorithm, const Geometry& g, const SumArguments& a, Stream stream) {
  return group.world_size <= 4 ? launch_sum<T, 4>(group, algorithm, g, a, stream)
                               : launch_sum<T, 8>(group, algorithm, g, a, stream);
}

template <class T>
Status norm(const Group& group, Algorithm algorithm, const Geometry& g, const void* x, int64_t rows,
            const NormArguments& a, Stream stream) {
  return group.world_size <= 4 ? launch_norm<T, 4>(group, algorithm, g, x, rows, a, stream)
                               : launch_norm<T, 8>(group, algorithm, g, x, rows, a, stream);
}

template <class T>
inline const Kernels kKernels = {sum<T>, norm<T>, launch_local_norm<T>, launch_local_quant<T>};

}  // namespace fusedcomm::gpu
