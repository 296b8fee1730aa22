// Collectives of processes on one machine through their shared segments.
//
// A call is a series of rounds, one for each piece of the input that fits a slot. In a round every rank copies its
// piece into its own slot (generation n mod 2) and arrives; when all have arrived it reads its peers' slots.
//   one-shot   every rank sums the whole piece for itself
//   two-shot   chunks of the piece are summed once, by whichever rank takes the next ticket; all read the sums.
//              A rank that has no core at the moment holds nobody up: the running ones take its share.
// Two generations suffice: a rank writes generation n + 2 only after all arrived at n + 1, which each does after it has
// read n.
//
// Every collective returns true when it is done and false after a while asleep: call it again with the same arguments
// (the caller runs its signal handlers in between). A failure is thrown once and leaves the group failed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/wait.h"
#include "fusedcomm/layout.h"

namespace fusedcomm::cpu {

enum class Failure : int32_t { kNone = 0, kTimeout = 1, kPeerGone = 2, kMismatch = 3, kInterrupted = 4 };

class CommError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Runs body(context, begin, end) over parts of [begin, end), on several threads where the process has them.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void* context,
                             void (*body)(void* context, int64_t begin, int64_t end));

struct Config {
  int rank = 0;
  int world_size = 1;
  int64_t slot_bytes = 0;          // a multiple of 4096
  int64_t piece_bytes = 0;         // what a round takes at most; <= slot_bytes
  int64_t one_shot_max_bytes = 0;  // larger messages take two-shot
  int64_t min_chunk_bytes = 8192;  // what a ticket of two-shot stands for, at least and at most; multiples of 64
  int64_t max_chunk_bytes = 32768;
  WaitPolicy wait;
  int64_t timeout_ns = 60'000'000'000;
  ParallelFor parallel = nullptr;  // null: this thread does it all
};

class Communicator {
 public:
  // segments[r] is the mapped segment of rank r; pidfds[r] becomes readable when that process ends (-1: unknown).
  Communicator(const Config& config, std::vector<void*> segments, std::vector<int> pidfds);

  bool all_reduce(DType dtype, const void* x, void* out, int64_t count);
  // All-reduce + add + RMSNorm, and per-group quantisation where target.quant asks for it.
  bool all_reduce_norm(DType dtype, const void* x, int64_t rows, const NormTarget& target);
  bool all_gather(const void* x, void* out, int64_t bytes);                   // out [world_size][bytes]
  bool reduce_scatter(DType dtype, const void* x, void* out, int64_t count);  // x [world_size][count]
  bool broadcast(void* x, int64_t bytes, int root);
  bool barrier();

  // Marks the group failed here, so that peers that wait for this rank give up at once.
  void fail(Failure kind, const std::string& message);
  void close();

  bool in_call() const { return call_.active; }
  Failure failure() const { return failure_; }
  const std::string& message() const { return message_; }
  uint64_t num_one_shot() const { return num_one_shot_; }
  uint64_t num_two_shot() const { return num_two_shot_; }
  const Config& config() const { return config_; }

 private:
  enum class Step { kPublish, kArrived, kShared };

  // Where an unfinished call stands.
  struct Call {
    bool active = false;
    CallFacts facts;
    int64_t piece = 0;
    Step step = Step::kPublish;
    int64_t waiting_since = 0;
  };

  template <class Steps>
  bool run(const CallFacts& facts, int64_t pieces, const Steps& steps);
  template <class Steps>
  void share(const Steps& steps, int64_t chunks, int generation);
  bool wait(WaitWord& word, uint32_t target);
  void look_at_peers();
  void check_same_call(int generation);
  bool peer_is_gone(int rank) const;
  [[noreturn]] void throw_failure(Failure kind, const std::string& message);

  SegmentHeader& header(int rank) const { return *static_cast<SegmentHeader*>(segments_[size_t(rank)]); }
  SegmentHeader& hub() const { return header(0); }
  RankStatus& status() const { return header(config_.rank).status; }
  char* slot(int rank, int generation) const {
    return static_cast<char*>(segments_[size_t(rank)]) + slot_offset(generation, config_.slot_bytes);
  }
  Sources sources(int generation, int64_t byte_offset) const;
  int64_t chunk_elements(int64_t message_bytes, int64_t element) const;

  friend struct Summation;
  friend struct SumSteps;
  friend struct NormSteps;
  friend struct GatherSteps;
  friend struct ReduceScatterSteps;
  friend struct BroadcastSteps;

  Config config_;
  std::vector<void*> segments_;
  std::vector<int> pidfds_;
  uint64_t round_ = 0;
  uint64_t arrived_[kNumGenerations] = {};  // what hub().arrived will hold when all have arrived
  uint64_t shared_[kNumGenerations] = {};   // likewise hub().shared
  uint64_t tickets_[kNumGenerations] = {};  // where hub().tickets started
  Call call_;
  Failure failure_ = Failure::kNone;
  std::string message_;
  uint64_t num_one_shot_ = 0;
  uint64_t num_two_shot_ = 0;
};

}  // namespace fusedcomm::cpu
