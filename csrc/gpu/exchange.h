// Sending and receiving: data is its own flag. See slab.h for the protocol.
#pragma once

#include "gpu/failure.h"
#include "gpu/slab.h"

namespace fusedcomm::gpu {

// What is sent never looks like a free slot.
__device__ inline Vec as_message(Vec v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v.w[i] = v.w[i] == kFree ? kOtherNan : v.w[i];
  return v;
}

__device__ inline uint32_t largest_word(const Vec& v) { return max(max(v.w[0], v.w[1]), max(v.w[2], v.w[3])); }

static_assert(kFree == 0xffffffffu, "the largest word");
__device__ inline bool has_arrived(const Vec& v) { return largest_word(v) != kFree; }

__device__ inline Vec free_slot() { return {{kFree, kFree, kFree, kFree}}; }

// One thread's waits in a kernel: nearly always short, ended by the deadline or by the peer's death otherwise.
class Waiter {
 public:
  __device__ explicit Waiter(const Group& group) : group_(group) {}

  // A wait begins: the deadline is that of one wait.
  __device__ void begin() { polls_ = 0; }

  // Between polls. False if it is time to look().
  __device__ bool go_on() { return ++polls_ % kPollsBetweenLooks != 0; }

  // Whether the wait for `peer` goes on. `grace`: it may itself be waiting for another rank, which is the one to name.
  __device__ bool look(int peer, uint32_t slot, uint32_t generation, bool grace = false) {
    Control* const control = group_.control();
    if (load_host(&control->failed) != 0) return false;
    const uint32_t now = coarse_ticks();
    if (polls_ == kPollsBetweenLooks) since_ = now;
    Failure kind = Failure::kNone;
    if (now - since_ > group_.timeout_ticks + (grace ? group_.timeout_ticks / 8 : 0)) kind = Failure::kTimeout;
    const uint32_t gone = load_host(&group_.host->gone);
    // seen twice: what it sent before it went had time to come
    if ((gone & gone_before_) >> peer & 1u) kind = Failure::kPeerGone;
    gone_before_ = gone;
    if (kind == Failure::kNone) return true;
    if (atomicExch(&control->failed, 1u) == 0) {
      FailureRecord& r = group_.host->record;
      r.kind = uint32_t(kind);
      r.peer = uint32_t(peer);
      r.op = group_.op;
      r.op_number = load_counter(&control->started) - 1;
      r.block = blockIdx.x;
      r.slot = slot;
      r.generation = generation;
      __threadfence_system();
      store_host(&r.state, kRecorded);
    }
    return false;
  }

 private:
  // Looking costs a read of host memory, about a microsecond: rare enough not to slow the arrival of data.
  static constexpr uint32_t kPollsBetweenLooks = 1024;

  const Group& group_;
  uint32_t since_ = 0;
  uint32_t polls_ = 0;
  uint32_t gone_before_ = 0;
};

// The slabs as one thread uses them. kAhead: their addresses are put into registers before the kernel ahead has ended.
template <int kMaxWorld, bool kAhead>
class Links {
 public:
  __device__ explicit Links(const Group& group) : group_(group) {
    if (!kAhead) return;
    own_ = group.slabs[group.rank];
    pin(own_);
#pragma unroll
    for (int i = 1; i < kMaxWorld; ++i) {
      peers_[i - 1] = i < group.world_size ? group.slabs[peer(i)] : nullptr;
      pin(peers_[i - 1]);
    }
  }

  // Writes a message to the same place of every peer's slab, the next rank's first: at any moment each pair of GPUs
  // carries one rank's messages.
  __device__ void send(uint32_t offset, const Vec& message) const {
#pragma unroll
    for (int i = 1; i < kMaxWorld; ++i) {
      if (i >= group_.world_size) continue;
      char* const slab = kAhead ? peers_[i - 1] : group_.slabs[peer(i)];
      store_flagged(reinterpret_cast<Vec*>(slab + offset), message);
    }
  }

  // What each peer r sent to offset + r * stride of this slab, and `own`; -0 past the last rank, which changes no sum.
  template <class T>
  __device__ void receive(Waiter& waiter, const Vec& own, uint32_t offset, uint32_t stride, uint32_t slot,
                          uint32_t generation, Vec (&received)[kMaxWorld]) const {
#pragma unroll
    for (int r = 0; r < kMaxWorld; ++r) received[r] = r < group_.world_size ? own : Io<T>::minus_zero();
    waiter.begin();
    for (;;) {
#pragma unroll
      for (int r = 0; r < kMaxWorld; ++r) {
        if (is_peer(r)) received[r] = load_flagged(place(offset, r, stride));
      }
      uint32_t largest = 0;  // kFree is the largest word
#pragma unroll
      for (int r = 0; r < kMaxWorld; ++r) largest = max(largest, largest_word(received[r]));
      if (largest != kFree) return;
      if (__builtin_expect(waiter.go_on(), 1)) continue;
      int missing = -1;
#pragma unroll
      for (int r = 0; r < kMaxWorld; ++r) {
        if (!has_arrived(received[r])) missing = r;
      }
      if (!waiter.look(missing, slot, generation)) return;
    }
  }

  // Frees the places that receive() has read.
  __device__ void release(uint32_t offset, uint32_t stride) const {
#pragma unroll
    for (int r = 0; r < kMaxWorld; ++r) {
      if (is_peer(r)) store_flagged(place(offset, r, stride), free_slot());
    }
  }

  __device__ Vec* own(uint32_t offset) const {
    return reinterpret_cast<Vec*>((kAhead ? own_ : group_.slabs[group_.rank]) + offset);
  }

 private:
  __device__ int peer(int i) const {
    const int peer = group_.rank + i;
    return peer < group_.world_size ? peer : peer - group_.world_size;
  }
  __device__ bool is_peer(int r) const { return r < group_.world_size && r != group_.rank; }
  __device__ Vec* place(uint32_t offset, int r, uint32_t stride) const { return own(offset + uint32_t(r) * stride); }

  const Group& group_;
  char* own_;
  char* peers_[kMaxWorld - 1];
};

// The sum, in rank order from +0, of what receive() gave.
template <class T, int kMaxWorld>
__device__ inline Vec sum_of(const Vec (&received)[kMaxWorld]) {
  float sum[Io<T>::kPerVec] = {};
#pragma unroll
  for (int r = 0; r < kMaxWorld; ++r) {
    float f[Io<T>::kPerVec];
    Io<T>::unpack(received[r], f);
#pragma unroll
    for (int i = 0; i < Io<T>::kPerVec; ++i) sum[i] += f[i];
  }
  return Io<T>::pack(sum);
}

// One thread of a call writes down what the call was. What it reads at the start it uses at the end: nothing waits.
class Tracer {
 public:
  __device__ Tracer(const Group& group, const TraceRecord& facts) : group_(group), facts_(facts) {
    if (!writes()) return;
    Control* const control = group.control();
    atomicAdd(&control->started, 1u);
    op_number_ = load_counter(&control->op_number);
  }

  __device__ void finish() {
    if (!writes()) return;
    Control* const control = group_.control();
    TraceRecord record = facts_;
    record.op_number = op_number_;
    control->trace[op_number_ % kTraceLength] = record;
    control->op_number = op_number_ + 1;
  }

 private:
  __device__ static bool writes() { return blockIdx.x == 0 && threadIdx.x == 0; }

  const Group& group_;
  const TraceRecord& facts_;
  uint32_t op_number_ = 0;
};

}  // namespace fusedcomm::gpu
