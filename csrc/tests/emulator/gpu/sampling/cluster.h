// csrc/gpu/sampling/cluster.h for the emulated GPU.
#pragma once

#include "gpu/gpu.h"

namespace fusedcomm::gpu::sampling {

#if EMULATED_CLUSTERS

constexpr bool kHasClusters = true;
constexpr int kMaxTeam = 8;

struct Signal {
  uint64_t word;

  void init() { machine().set_signal(this); }
  void expect(int bytes) { machine().expect(this, bytes); }
  void wait(uint32_t phase) const { machine().wait(this, phase); }
};

class Team {
 public:
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
constexpr int kMaxTeam = 1;

struct Signal {
  void init() {}
  void expect(int) {}
  void wait(uint32_t) const {}
};

class Team {
 public:
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

}  // namespace fusedcomm::gpu::sampling
