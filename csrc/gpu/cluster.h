// Rows spread over a cluster: blocks that run at the same time on neighbouring multiprocessors and write to each
// other's shared memory (Hopper and later; HIP has none).
#pragma once

#include "gpu/row_sum.h"

#if !defined(FUSEDCOMM_HIP)

namespace fusedcomm::gpu {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

template <>
class RowSum<true> : public RowSum<false> {  // never launched
 public:
  using RowSum<false>::RowSum;
};

#else

// A row is a cluster's, a pack a thread. Warps write their sums to every block of the cluster; a barrier in the
// receiver's shared memory counts the bytes that have come, so nobody waits for anything but sums.
//
// Two sets, as for a block. A block sends the sums of row n + 2 when it has all of row n + 1, hence after all warps of
// the cluster have read those of row n and every block's barrier of that set has moved on. It leaves when it has all
// sums of its last row, so nobody writes to one that has left.
template <>
class RowSum<true> {
 public:
  struct alignas(16) Shared {
    float sums[2][kMaxPartials];
    uint64_t arrived[2];
  };

  __device__ explicit RowSum(Shared& shared)
      : shared_(shared),
        count_(blocks() * int(blockDim.x) / kWarpSize),
        to_(in_block(int(threadIdx.x) % kWarpSize, &shared.sums[0][thread() / kWarpSize])),
        signal_(in_block(int(threadIdx.x) % kWarpSize, &shared.arrived[0])) {
    static_assert(sizeof(shared.sums) == kWarpSize * sizeof(float4), "a store for each lane of the first warp");
    if (threadIdx.x < kWarpSize) reinterpret_cast<float4*>(shared.sums)[threadIdx.x] = {};
    if (threadIdx.x == 0) {
      for (int set = 0; set < 2; ++set) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(&shared.arrived[set])) : "memory");
        expect(set);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }

  __device__ static int worker() {
    uint32_t v;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(v));
    return int(v);
  }
  __device__ static int workers() {
    uint32_t v;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(v));
    return int(v);
  }
  __device__ static int blocks() {
    uint32_t v;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
    return int(v);
  }
  __device__ static int thread() { return rank() * int(blockDim.x) + int(threadIdx.x); }
  __device__ static int threads() { return blocks() * int(blockDim.x); }

  __device__ void meet() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

  __device__ void send(const float (&s)[1]) {
    const float sum = butterfly_sum(s[0]);
    if (int(threadIdx.x) % kWarpSize >= blocks()) return;
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                     to_ + uint32_t(parity_) * uint32_t(sizeof(shared_.sums[0]))),
                 "f"(sum), "r"(signal_ + uint32_t(parity_) * uint32_t(sizeof(uint64_t)))
                 : "memory");
  }

  __device__ float receive() {
    const uint32_t arrived = address_of(&shared_.arrived[parity_]);
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(arrived), "r"(phase_)
          : "memory");
    }
    // In registers: fewer steps than a butterfly, where a multiprocessor holds few warps.
    const float* const sums = shared_.sums[parity_];
    float total = count_ <= 16 ? sum_first<16>(sums) : sum_first<32>(sums);
    if (count_ > 32) total += sum_first<32>(sums + 32);
    if (threadIdx.x == 0) expect(parity_);
    phase_ ^= uint32_t(parity_);
    parity_ ^= 1;
    return total;
  }

 private:
  __device__ static int rank() {
    uint32_t v;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
    return int(v);
  }
  __device__ static uint32_t address_of(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

  // The same place in another block of the cluster.
  __device__ static uint32_t in_block(int block, const void* shared) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address_of(shared)), "r"(block));
    return there;
  }

  __device__ void expect(int set) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&shared_.arrived[set])),
                 "r"(count_ * int(sizeof(float)))
                 : "memory");
  }

  template <int kCount>
  __device__ static float sum_first(const float* sums) {
    float s[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(sums + i);
      s[i] = four.x, s[i + 1] = four.y, s[i + 2] = four.z, s[i + 3] = four.w;
    }
    return tree_sum<kCount>(s);
  }

  Shared& shared_;
  int count_;             // of the cluster's warps; sums past them are +0
  uint32_t to_, signal_;  // where lane i sends: block i's place for the sum of this warp, and its barrier
  int parity_ = 0;
  uint32_t phase_ = 0;
};

#endif

}  // namespace fusedcomm::gpu

#endif
