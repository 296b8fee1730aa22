// What lies where in the shared segment of a rank: a header page, then two slots (generations) of partial sums.
//
//   [ SegmentHeader | slot 0 | slot 1 ]       slot_bytes each; every rank has one segment of the same size
//
// A rank copies its input into its own slot once and its peers read it there. On a GPU data is pushed and is its own
// flag; where caches are coherent one copy and a counter are cheaper than W - 1 copies and a flag in every word.
#pragma once

#include <atomic>
#include <cstdint>

namespace fusedcomm::cpu {

constexpr uint32_t kSegmentMagic = 0x46434d31;  // "FCM1"
constexpr int64_t kHeaderBytes = 4096;
constexpr int kNumGenerations = 2;

inline int64_t segment_bytes(int64_t slot_bytes) { return kHeaderBytes + kNumGenerations * slot_bytes; }
inline int64_t slot_offset(int generation, int64_t slot_bytes) { return kHeaderBytes + generation * slot_bytes; }

enum class Op : int32_t {
  kNone = 0,
  kAllReduce,
  kAllReduceRMSNorm,
  kAllReduceRMSNormQuant,
  kAllGather,
  kReduceScatter,
  kBroadcast,
  kBarrier,
};

// What a rank calls; ranks of one collective must agree on all of it.
struct CallFacts {
  Op op = Op::kNone;
  int32_t dtype = 0;
  int64_t rows = 0;
  int64_t hidden = 0;
  int64_t option = 0;  // group size, or the root of a broadcast
};

enum class RankState : uint32_t { kOpen = 0, kClosed = 1, kFailed = 2 };

// A counter that ranks sleep on. The futex is the low half of `value`; arrival() in communicator.cpp says what is in
// the high half.
struct alignas(64) WaitWord {
  std::atomic<uint64_t> value{0};
  std::atomic<uint32_t> sleepers{0};
};

// Read by peers only when something went wrong.
struct alignas(64) RankStatus {
  std::atomic<RankState> state{RankState::kOpen};
  std::atomic<uint64_t> progress{0};  // steps passed since the group was made: arrivals and finished shares
  CallFacts calls[kNumGenerations];   // written before the arrival of that generation
};

struct SegmentHeader {
  uint32_t magic = kSegmentMagic;
  RankStatus status;
  // The counters of the whole group are those in the segment of rank 0.
  WaitWord arrived[kNumGenerations];
  WaitWord shared[kNumGenerations];  // chunks summed, two-shot
  struct alignas(64) Ticket {
    std::atomic<uint64_t> next{0};
  } tickets[kNumGenerations];  // next chunk to sum, two-shot
};

static_assert(sizeof(SegmentHeader) <= kHeaderBytes, "the header has one page");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "counters are shared between processes");

}  // namespace fusedcomm::cpu
