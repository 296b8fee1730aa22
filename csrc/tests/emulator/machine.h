// A GPU on the host, for tests: the kernels are compiled as C++, and every thread of a cluster is a fiber. Fibers run
// one at a time in a random order and change at barriers, at messages, and at random accesses of shared memory. Found
// are races in shared memory, deadlocks, lanes that are not together at an instruction of their warp, messages that a
// block does not wait for, and accesses out of bounds. Blocks of different clusters run one after another.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

struct Dimensions {
  unsigned x, y, z;
};
extern Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace fusedcomm::emulator {

constexpr int kMaxSharedBytes = 227 * 1024;  // of a block

struct Shape {
  int64_t blocks;
  int threads, blocks_in_cluster, shared_bytes;
  int warp_size;
};

class Machine {
 public:
  static Machine& the();

  // ---- by the host ----

  // Forgets what was found and which memory there is. A fiber gives way at one of so many accesses of shared memory; 0:
  // only at barriers and messages.
  void reset(uint64_t seed, int accesses_between_switches);
  void allow(const void* start, int64_t bytes, bool writes);
  // body(arguments) by every thread.
  void run(void (*body)(const void*), const void* arguments, const Shape& shape);
  // What was found, a line each; empty: nothing.
  const std::string& errors() const { return errors_; }

  // ---- by the thread that runs ----

  void* shared() const;
  int rank() const;
  int size() const { return shape_.blocks_in_cluster; }
  int64_t cluster() const { return cluster_; }

  // Of any memory, as the compiler has instrumented it.
  void access(const void* p, size_t bytes, bool writes);
  // Before an atomic operation on a word of shared memory.
  void access_atomically(const void* p);

  void sync_block();
  // The value of another lane; a bit of each lane.
  uint64_t exchange(uint64_t value, int from_lane);
  uint64_t vote(bool holds);

  // As Team and Signal of csrc/gpu/sampling/cluster.h.
  void arrive();
  void meet();
  void set_signal(const void* signal);
  void expect(const void* signal, int bytes);
  void wait(const void* signal, uint32_t phase);
  void send(void* place, uint64_t value, int bytes, const void* signal, int block);

 private:
  struct Thread {
    Fiber fiber;
    int block = 0, index = 0;
    bool is_live = false, has_arrived = false, has_met = false;
    uint64_t met_generation = 0;
    Clock known;
    const uint64_t* waits_for = nullptr;  // to differ from `seen`
    uint64_t seen = 0;
  };
  struct Barrier {
    int arrived = 0;
    uint64_t generation = 0;
    Clock gathered, done;
  };
  enum class Instruction { kNone, kExchange, kVote };
  struct Warp {
    uint64_t values[2][64];  // of this instruction and the one before
    Instruction instruction = Instruction::kNone;
    int arrived = 0;
    uint64_t generation = 0;
  };
  struct Signal {
    bool is_expected = false;  // the bytes of the phase are known
    int64_t missing_bytes = 0;
    uint64_t phase = 0;
    Clock gathered, done;
  };
  struct Message {
    int block;
    size_t offset, signal;
    uint64_t value;
    int bytes;
    Clock known;
  };
  struct Range {
    uintptr_t start, end;
    bool writes;
  };

  static void run_thread();

  int num_threads() const { return shape_.threads * shape_.blocks_in_cluster; }
  int current_index() const { return current_->block * shape_.threads + current_->index; }
  SharedMemory& memory() { return memories_[size_t(current_->block)]; }

  void fail(const std::string& what);
  bool is_possible(const Shape& shape);
  void begin_cluster();
  void run_cluster();
  void end_cluster();
  Thread* next_thread();

  void wait_while(const uint64_t& counter, uint64_t value);
  void maybe_switch();
  void enter(Barrier& barrier, int threads);
  uint64_t meet_warp(Instruction instruction, uint64_t value);

  // Whether the memory has such bytes.
  bool access_shared(int block, size_t offset, size_t bytes, AccessKind kind);
  Signal& signal_at(int block, size_t offset);
  void step(Signal& signal);
  void deliver_any();

  std::mt19937_64 random_{1};
  int accesses_between_switches_ = 0;
  bool delivers_late_ = false;  // what blocks send, only once no thread can go on
  std::vector<Range> ranges_;
  std::string errors_;
  int num_errors_ = 0;

  Shape shape_ = {};
  void (*body_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  int64_t cluster_ = 0;
  std::deque<Thread> threads_;
  Thread* current_ = nullptr;
  int num_live_ = 0;
  std::deque<SharedMemory> memories_;
  std::vector<Warp> warps_;
  std::vector<Barrier> block_barriers_;
  Barrier cluster_barrier_;
  std::map<std::pair<int, size_t>, Signal> signals_;  // by block and offset
  std::vector<Message> messages_;                     // on their way
};

}  // namespace fusedcomm::emulator
