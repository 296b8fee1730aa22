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

__device__ inline bool has_arrived(const Vec& v) {
  return v.w[0] != kFree && v.w[1] != kFree && v.w[2] != kFree && v.w[3] != kFree;
}

__device__ inline Vec free_slot() { return {{kFree, kFree, kFree, kFree}}; }

// One thread's waits in a kernel: nearly always short, ended by the deadline or by the peer's death otherwise.
class Waiter {
 public:
  // `pause`: nanoseconds between polls; a GPU full of polling threads slows the data that they wait for.
  __device__ explicit Waiter(const Group& group, uint32_t pause = 0) : group_(group), pause_(pause) {}

  // A wait begins: the deadline is that of one wait.
  __device__ void begin() { polls_ = 0; }

  // True if the wait for `peer` goes on. `grace`: it may itself be waiting for another rank, which is the one to name.
  __device__ bool go_on(int peer, uint32_t slot, uint32_t generation, bool grace = false) {
    if (pause_ != 0) pause(pause_);
    if (++polls_ % kPollsBetweenLooks != 0) return true;
    return look(peer, slot, generation, grace);
  }

 private:
  // Looking costs a read of host memory, about a microsecond: rare enough not to slow the arrival of data.
  static constexpr uint32_t kPollsBetweenLooks = 1024;

  __device__ bool look(int peer, uint32_t slot, uint32_t generation, bool grace) {
    Control* const control = group_.control();
    if (load_host(&control->failed) != 0) return false;
    const uint64_t now = ticks();
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

  const Group& group_;
  uint32_t pause_;
  uint64_t since_ = 0;
  uint32_t polls_ = 0;
  uint32_t gone_before_ = 0;
};

// Writes a message to the same place of every peer's slab, the next rank first: at any moment each pair of GPUs carries
// one rank's.
template <int kMaxWorld>
__device__ inline void send_to_peers(const Group& group, uint32_t offset, const Vec& message) {
#pragma unroll
  for (int i = 1; i < kMaxWorld; ++i) {
    if (i < group.world_size) {
      int peer = group.rank + i;
      if (peer >= group.world_size) peer -= group.world_size;
      store_flagged(group.at(peer, offset), message);
    }
  }
}

// Sums, in rank order from +0, this rank's `own` message and what each peer r sent to offset + r * stride of this slab;
// frees those places.
template <class T, int kMaxWorld>
__device__ inline Vec receive_sum(const Group& group, Waiter& waiter, const Vec& own, uint32_t offset, uint32_t stride,
                                  uint32_t slot, uint32_t generation) {
  const auto place = [&](int r) { return group.at(group.rank, offset + uint32_t(r) * stride); };
  Vec received[kMaxWorld];
#pragma unroll
  for (int r = 0; r < kMaxWorld; ++r) {
    received[r] = own;
    if (r < group.world_size && r != group.rank) received[r] = load_flagged(place(r));
  }
  waiter.begin();
  for (;;) {
    int missing = -1;
#pragma unroll
    for (int r = 0; r < kMaxWorld; ++r) {
      if (!has_arrived(received[r])) {
        missing = r;
        received[r] = load_flagged(place(r));
      }
    }
    if (missing < 0 || !waiter.go_on(missing, slot, generation)) break;
  }
  float sum[Io<T>::kPerVec] = {};
#pragma unroll
  for (int r = 0; r < kMaxWorld; ++r) {
    if (r < group.world_size) {
      float f[Io<T>::kPerVec];
      Io<T>::unpack(received[r], f);
#pragma unroll
      for (int i = 0; i < Io<T>::kPerVec; ++i) sum[i] += f[i];
      if (r != group.rank) store_flagged(place(r), free_slot());
    }
  }
  return Io<T>::pack(sum);
}

// One thread of a call writes down what the call was. What it reads at the start it uses at the end: nothing waits.
class Tracer {
 public:
  __device__ Tracer(const Group& group, const TraceRecord& facts) : control_(group.control()), facts_(facts) {
    if (!writes()) return;
    atomicAdd(&control_->started, 1u);
    op_number_ = load_counter(&control_->op_number);
  }

  __device__ void finish() {
    if (!writes()) return;
    TraceRecord record = facts_;
    record.op_number = op_number_;
    control_->trace[op_number_ % kTraceLength] = record;
    control_->op_number = op_number_ + 1;
  }

 private:
  __device__ static bool writes() { return blockIdx.x == 0 && threadIdx.x == 0; }

  Control* control_;
  const TraceRecord& facts_;
  uint32_t op_number_ = 0;
};

}  // namespace fusedcomm::gpu
