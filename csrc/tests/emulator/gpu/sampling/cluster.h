// csrc/gpu/sampling/cluster.h for the emulated GPU.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu::sampling {

constexpr int kFewBlocks = 8, kManyBlocks = 16;

#if EMULATED_CLUSTERS

constexpr bool kHasClusters = true;

struct Signal {
  uint64_t word;

  void init() { machine().set_signal(this); }
  void expect(int bytes) { machine().expect(this, bytes); }
  void wait(uint32_t phase) const { machine().wait(this, phase); }
};

template <int kMost>
class TeamOf {
 public:
  static constexpr int kMostBlocks = kMost;
  static constexpr bool kIsServed = true;

  int64_t row() const { return machine().cluster(); }
  int rank() const { return machine().rank(); }
  int size() const { return machine().size(); }
  bool is_alone() const { return size() == 1; }

  void arrive() const { machine().arrive(); }
  void meet() const { machine().meet(); }

  void send(uint32_t* place, uint32_t v, Signal* signal, int block) const { send_value(place, v, signal, block); }
  void send(uint64_t* place, uint64_t v, Signal* signal, int block) const { send_value(place, v, signal, block); }
  void deliver() const {
    if (is_alone()) __syncthreads();
  }

 private:
  template <class V>
  void send_value(V* place, V v, Signal* signal, int block) const {
    if (is_alone()) {
      *place = v;
    } else {
      machine().send(place, v, int(sizeof(V)), signal, block);
    }
  }
};

#else

constexpr bool kHasClusters = false;

struct Signal {
  void init() {}
  void expect(int) {}
  void wait(uint32_t) const {}
};

template <int kMost>
class TeamOf {
 public:
  static constexpr int kMostBlocks = 1;
  static constexpr bool kIsServed = kMost == kFewBlocks;

  int64_t row() const { return blockIdx.x; }
  int rank() const { return 0; }
  int size() const { return 1; }
  bool is_alone() const { return true; }

  void arrive() const {}
  void meet() const {}
  template <class V>
  void send(V* place, V v, Signal*, int) const {
    *place = v;
  }
  void deliver() const { __syncthreads(); }
};

#endif

using NarrowTeam = TeamOf<kFewBlocks>;
using WideTeam = TeamOf<kManyBlocks>;

}  // namespace fusedcomm::gpu::sampling
