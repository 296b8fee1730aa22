// The blocks that share a row: a cluster, whose blocks read each other's shared memory (Hopper and later), elsewhere
// one block.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu::sampling {

// Of a team, at most: what every GPU with clusters allows, and what most do. Kernels are compiled for both: what blocks
// send takes room in all of them. Without clusters there is one kind of team.
constexpr int kFewBlocks = 8, kManyBlocks = 16;

// Blocks only ever write to each other: what is sent is counted by a barrier in the receiver's shared memory (Signal),
// which costs no fence of the whole GPU, as a barrier of the cluster or a read of another block's memory behind one
// would.
#if defined(FUSEDCOMM_HIP) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)

constexpr bool kHasClusters = false;

struct Signal {
  __device__ void init() {}
  __device__ void expect(int) {}
  __device__ void wait(uint32_t) const {}
};

template <int kMost>
class TeamOf {
 public:
  static constexpr int kMostBlocks = 1;
  static constexpr bool kIsServed = kMost == kFewBlocks;

  __device__ int64_t row() const { return blockIdx.x; }
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ bool is_alone() const { return true; }

  __device__ void arrive() const {}
  __device__ void meet() const {}
  template <class V>
  __device__ void send(V* place, V v, Signal*, int) const {
    *place = v;
  }
  __device__ void deliver() const { __syncthreads(); }
};

#else

constexpr bool kHasClusters = true;

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Counts the bytes that come to a block, phase by phase.
struct Signal {
  uint64_t word;

  __device__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&word)) : "memory");
  }
  // How many bytes make up the phase; once for each.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }
  // Until all of them are there, phases being 0 and 1 in turn.
  __device__ void wait(uint32_t phase) const {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(shared_address(&word)), "r"(phase)
          : "memory");
    }
  }
};

template <int kMost>
class TeamOf {
 public:
  static constexpr int kMostBlocks = kMost;
  static constexpr bool kIsServed = true;

  __device__ TeamOf() {
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size_));
  }

  // Which row of the launch they share, which of them this block is, and how many they are.
  __device__ int64_t row() const { return blockIdx.x / size_; }
  __device__ int rank() const { return int(rank_); }
  __device__ int size() const { return int(size_); }
  // A block without others sends nothing: it stores, and meets itself.
  __device__ bool is_alone() const { return size_ == 1; }

  // All threads call both, once: arrive() when the signals of the block are set, meet() before the first send().
  __device__ void arrive() const {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  __device__ void meet() const { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

  // To the same place in a block of the team, which may be this one; its signal there counts it.
  __device__ void send(uint32_t* place, uint32_t v, Signal* signal, int block) const {
    if (is_alone()) {
      *place = v;
      return;
    }
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(there(place, block)),
                 "r"(v), "r"(there(&signal->word, block))
                 : "memory");
  }
  __device__ void send(uint64_t* place, uint64_t v, Signal* signal, int block) const {
    if (is_alone()) {
      *place = v;
      return;
    }
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(there(place, block)),
                 "l"(v), "r"(there(&signal->word, block))
                 : "memory");
  }
  // Between send() and wait(), by all threads: a block that is alone waits for nothing else.
  __device__ void deliver() const {
    if (is_alone()) __syncthreads();
  }

 private:
  __device__ static uint32_t there(const void* p, int block) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(block));
    return address;
  }

  uint32_t rank_, size_;
};

#endif

using NarrowTeam = TeamOf<kFewBlocks>;
using WideTeam = TeamOf<kManyBlocks>;

}  // namespace fusedcomm::gpu::sampling
