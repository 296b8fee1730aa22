// The blocks that share a row: a cluster, whose blocks read each other's shared memory (Hopper and later), elsewhere
// one block.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu::sampling {

// Blocks only ever write to each other: what is sent is counted by a barrier in the receiver's shared memory (Signal),
// which costs no fence of the whole GPU, as a barrier of the cluster or a read of another block's memory behind one
// would.
#if defined(FUSEDCOMM_HIP) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)

constexpr bool kHasClusters = false;
constexpr int kMaxTeam = 1;

struct Signal {
  __device__ void init() {}
  __device__ void expect(int) {}
  __device__ void wait(uint32_t) const {}
};

class Team {
 public:
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
constexpr int kMaxTeam = 8;  // blocks: what every GPU with clusters allows

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

class Team {
 public:
  __device__ Team() {
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

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

__device__ inline int lane() { return int(threadIdx.x) % kWarpSize; }
__device__ inline int warp() { return int(threadIdx.x) / kWarpSize; }
__device__ inline int num_warps() { return int(blockDim.x) / kWarpSize; }

// ---- of a warp ----

template <class V>
__device__ inline V sum_of_warp(V v) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}

// Of this lane and all before it.
template <class V>
__device__ inline V sum_up_to_lane(V v) {
#pragma unroll
  for (int by = 1; by < kWarpSize; by *= 2) {
    const V before = shuffle_up(v, by);
    if (lane() >= by) v += before;
  }
  return v;
}

template <class V>
__device__ inline V max_of_warp(V v) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    const V other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

// ---- what blocks of a team tell each other ----

// A value of each slot from every block of the team. A block leaves only when it has all that it is sent.
template <class V, int kSlots>
class Inbox {
 public:
  // By one thread, before the team meets.
  __device__ void open(const Team& team) {
    signal_.init();
    expect(team);
  }

  // By a warp, for this block alone.
  __device__ void keep(const Team& team, int slot, V v) {
    if (lane() == 0) slots_[team.rank()][slot] = v;
  }
  // By a warp; v is the same in all of its lanes.
  __device__ void send(const Team& team, int slot, V v) {
    if (lane() < team.size()) team.send(&slots_[team.rank()][slot], v, &signal_, lane());
  }
  // By a warp, each lane to the slot of its own.
  __device__ void send_lanes(const Team& team, V v) {
    static_assert(kSlots == kWarpSize, "a slot a lane");
#pragma unroll
    for (int block = 0; block < kMaxTeam; ++block) {
      if (block < team.size()) team.send(&slots_[team.rank()][lane()], v, &signal_, block);
    }
  }

  __device__ void wait(const Team& team, uint32_t phase) const {
    if (!team.is_alone()) signal_.wait(phase);
  }
  // By one thread after wait(), before this block sends anything that lets others go on to the next phase.
  __device__ void expect(const Team& team) {
    if (!team.is_alone()) signal_.expect(team.size() * kSlots * int(sizeof(V)));
  }

  __device__ V from(int block, int slot) const { return slots_[block][slot]; }

 private:
  V slots_[kMaxTeam][kSlots];
  Signal signal_;
};

}  // namespace fusedcomm::gpu::sampling
