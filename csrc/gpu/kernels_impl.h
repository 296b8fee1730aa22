// Picks and launches the kernels of one dtype.
#pragma once

#include <algorithm>

#include "gpu/kernels.h"
#include "gpu/local.h"
#include "gpu/two_shot.h"

namespace fusedcomm::gpu {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int kMaxCluster = 8;  // blocks: what every GPU with clusters allows

// How many blocks (or clusters) of so many threads there are with so many threads on every multiprocessor.
inline int64_t fill(const Geometry& g, int threads_of_multiprocessor, int threads) {
  return std::max<int64_t>(1, int64_t(g.num_sms) * threads_of_multiprocessor / threads);
}

constexpr int64_t kFewBytes = int64_t(1) << 20;  // of a message that does not fill the GPU

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
  shape.threads = a.count * int64_t(sizeof(T)) > kFewBytes ? 512 : g.sum_threads;
  shape.blocks = divide_up(vecs, shape.threads);
  if (algorithm == Algorithm::kOneShot) {
    return launch(one_shot_sum<T, kMaxWorld>, shape, stream, group, a, facts);
  }
  const int64_t senders = std::min(divide_up(vecs, shape.threads), fill(g, g.sender_threads, shape.threads));
  shape.blocks = senders + std::min(shape.blocks, fill(g, g.receiver_threads, shape.threads));
  return launch(two_shot_sum<T, kMaxWorld>, shape, stream, group, a, Pace{int(senders), g.lead}, facts);
}

template <class T, int kMaxWorld>
Status launch_norm(const Group& group, Algorithm algorithm, const Geometry& g, const void* x, int64_t rows,
                   const NormArguments& a, Stream stream) {
  const uint32_t op = a.quant.fp8 == nullptr ? 2 : 3;
  const TraceRecord facts = {0, op, uint32_t(algorithm), uint32_t(dtype_code<T>()), uint32_t(rows), uint32_t(a.hidden)};
  const int64_t packs = a.hidden / kPack;
  LaunchShape shape;
  shape.overlaps = g.overlaps;
  const bool one_shot = algorithm == Algorithm::kOneShot;
  const int64_t vecs = rows * packs * (kPack / Io<T>::kPerVec);
#if !defined(FUSEDCOMM_HIP)
  // A row on one multiprocessor takes long to norm; a cluster costs a barrier. Two-shot hides the first until a thread
  // has more than one pack.
  if (g.cluster_threads > 0 && packs > (one_shot ? 256 : 512)) {
    shape.threads = g.cluster_threads;
    while (packs > int64_t(kMaxCluster) * shape.threads) shape.threads *= 2;
    shape.blocks_in_cluster = int(divide_up(packs, shape.threads));
    if (one_shot) {
      shape.blocks = rows * shape.blocks_in_cluster;
      return launch(one_shot_norm<T, kMaxWorld, 1, true>, shape, stream, group, x, a, facts);
    }
    const int cluster = shape.threads * shape.blocks_in_cluster;
    // half as many send: the rows of clusters are longer, and are not to start late
    const int64_t senders =
        std::min(divide_up(vecs, cluster), fill(g, g.sender_threads / 2, cluster)) * shape.blocks_in_cluster;
    shape.blocks = senders + std::min(rows, fill(g, g.receiver_threads, cluster)) * shape.blocks_in_cluster;
    return launch(two_shot_norm<T, kMaxWorld, 1, true>, shape, stream, group, x, a, int(rows),
                  Pace{int(senders), g.lead}, facts);
  }
#endif
  shape.threads = packs <= 512 ? threads_for(packs) : 512;
  if (one_shot) {
    shape.blocks = rows;
    const auto kernel = packs <= 512    ? one_shot_norm<T, kMaxWorld, 1, false>
                        : packs <= 1024 ? one_shot_norm<T, kMaxWorld, 2, false>
                                        : one_shot_norm<T, kMaxWorld, 4, false>;
    return launch(kernel, shape, stream, group, x, a, facts);
  }
  const int64_t senders = std::min(divide_up(vecs, shape.threads), fill(g, g.sender_threads, shape.threads));
  shape.blocks = senders + std::min(rows, fill(g, g.receiver_threads, shape.threads));
  const auto kernel = packs <= 512    ? two_shot_norm<T, kMaxWorld, 1, false>
                      : packs <= 1024 ? two_shot_norm<T, kMaxWorld, 2, false>
                                      : two_shot_norm<T, kMaxWorld, 4, false>;
  return launch(kernel, shape, stream, group, x, a, int(rows), Pace{int(senders), g.lead}, facts);
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
  const auto kernel = packs <= 512 ? local_norm<T, 1> : packs <= 1024 ? local_norm<T, 2> : local_norm<T, 4>;
  return launch(kernel, shape, stream, x, a);
}

template <class T>
Status launch_local_quant(const Geometry& g, const void* x, int64_t rows, int64_t hidden, const QuantTarget& target,
                          Stream stream) {
  LaunchShape shape;
  shape.overlaps = g.overlaps;
  const int64_t packs = hidden / kPack;
  shape.blocks = rows;
  shape.parts = int(std::min<int64_t>(divide_up(packs, 256), 1024));
  shape.threads = std::min(256, threads_for(divide_up(packs, shape.parts)));
  return launch(local_quant<T>, shape, stream, x, int32_t(hidden), target);
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
