#include "machine.h"

Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace fusedcomm::emulator {

namespace {

constexpr int kMostErrors = 20;
constexpr int kMaxThreads = 1024;

}  // namespace

Machine& Machine::the() {
  static Machine machine;
  return machine;
}

void Machine::fail(const std::string& what) {
  if (++num_errors_ > kMostErrors) return;
  errors_ += "cluster " + std::to_string(cluster_);
  if (current_ != nullptr) {
    errors_ += ", block " + std::to_string(current_->block) + ", thread " + std::to_string(current_->index);
  }
  errors_ += ": " + what + "\n";
}

// ---- launches ----

void Machine::reset(uint64_t seed, int accesses_between_switches) {
  random_.seed(seed);
  delivers_late_ = seed % 2 == 0;
  accesses_between_switches_ = accesses_between_switches;
  ranges_.clear();
  errors_.clear();
  num_errors_ = 0;
}

bool Machine::is_possible(const Shape& shape) {
  const bool has_whole_warps = shape.threads > 0 && shape.threads % shape.warp_size == 0;
  const bool has_whole_clusters = shape.blocks_in_cluster > 0 && shape.blocks % shape.blocks_in_cluster == 0;
  const bool finds_room = shape.threads <= kMaxThreads && shape.shared_bytes <= kMaxSharedBytes;
  return has_whole_warps && has_whole_clusters && finds_room;
}

void Machine::run(void (*body)(const void*), const void* arguments, const Shape& shape) {
  if (!is_possible(shape)) {
    fail("no such launch: " + std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
         " threads, " + std::to_string(shape.blocks_in_cluster) + " in a cluster, " +
         std::to_string(shape.shared_bytes) + " bytes of shared memory");
    return;
  }
  shape_ = shape;
  body_ = body;
  arguments_ = arguments;
  blockDim = {unsigned(shape.threads), 1, 1};
  gridDim = {unsigned(shape.blocks), 1, 1};
  for (cluster_ = 0; cluster_ < shape.blocks / shape.blocks_in_cluster && errors_.empty(); ++cluster_) {
    begin_cluster();
    run_cluster();
    end_cluster();
  }
}

void Machine::begin_cluster() {
  const int blocks = shape_.blocks_in_cluster;
  memories_.clear();
  for (int i = 0; i < blocks; ++i) memories_.emplace_back(shape_.shared_bytes, random_);
  block_barriers_.assign(size_t(blocks), {});
  cluster_barrier_ = {};
  warps_.assign(size_t(num_threads() / shape_.warp_size), {});
  signals_.clear();
  messages_.clear();
  num_live_ = num_threads();
  while (int(threads_.size()) < num_live_) threads_.emplace_back();
  for (int i = 0; i < num_live_; ++i) {
    Thread& thread = threads_[size_t(i)];
    thread.block = i / shape_.threads;
    thread.index = i % shape_.threads;
    thread.is_live = true;
    thread.has_arrived = thread.has_met = false;
    thread.waits_for = nullptr;
    thread.known.assign(size_t(num_live_), 0);
    thread.known[size_t(i)] = 1;
    thread.fiber.start(run_thread);
  }
}

void Machine::run_thread() {
  Machine& machine = the();
  machine.body_(machine.arguments_);
  machine.current_->is_live = false;
  --machine.num_live_;
  machine.current_->fiber.pause();  // for good
}

// A thread that can go on, from a random one on; null: none can.
Machine::Thread* Machine::next_thread() {
  const auto count = size_t(num_threads());
  const size_t first = random_() % count;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads_[(first + i) % count];
    if (thread.is_live && (thread.waits_for == nullptr || *thread.waits_for != thread.seen)) return &thread;
  }
  return nullptr;
}

void Machine::run_cluster() {
  while (num_live_ > 0 && num_errors_ < kMostErrors) {
    Thread* const thread = next_thread();
    if (!messages_.empty() && (thread == nullptr || (!delivers_late_ && random_() % 8 == 0))) {
      do {
        deliver_any();
      } while (delivers_late_ && !messages_.empty() && random_() % 16 != 0);  // to look for a thread takes long
      continue;
    }
    if (thread == nullptr) {
      fail("deadlock: " + std::to_string(num_live_) + " threads wait");
      return;
    }
    current_ = thread;
    threadIdx = {unsigned(thread->index), 0, 0};
    blockIdx = {unsigned(cluster_ * shape_.blocks_in_cluster + thread->block), 0, 0};
    thread->fiber.resume();
    current_ = nullptr;
  }
}

void Machine::end_cluster() {
  if (!messages_.empty()) fail(std::to_string(messages_.size()) + " messages have not arrived");
  for (int i = 0; i < num_threads(); ++i) {
    const Thread& thread = threads_[size_t(i)];
    if (!thread.is_live && thread.has_arrived != thread.has_met) {
      fail("a thread has left without meet()");
      return;
    }
  }
}

// ---- what threads do ----

void* Machine::shared() const { return memories_[size_t(current_->block)].data(); }

int Machine::rank() const { return current_->block; }

void Machine::wait_while(const uint64_t& counter, uint64_t value) {
  current_->waits_for = &counter;
  current_->seen = value;
  while (counter == value) current_->fiber.pause();
  current_->waits_for = nullptr;
}

void Machine::maybe_switch() {
  if (accesses_between_switches_ > 0 && random_() % unsigned(accesses_between_switches_) == 0) current_->fiber.pause();
}

void Machine::enter(Barrier& barrier, int threads) {
  learn(barrier.gathered, current_->known);
  ++current_->known[size_t(current_index())];
  if (++barrier.arrived < threads) return;
  barrier.done = std::move(barrier.gathered);
  barrier.gathered.clear();
  barrier.arrived = 0;
  ++barrier.generation;
}

void Machine::sync_block() {
  Barrier& barrier = block_barriers_[size_t(current_->block)];
  const uint64_t generation = barrier.generation;
  enter(barrier, shape_.threads);
  wait_while(barrier.generation, generation);
  learn(current_->known, barrier.done);
  maybe_switch();
}

// The lanes of a warp meet at every instruction that they share; what they wrote before is not ordered by it. Which
// half of Warp::values has theirs: a lane that goes on may be at the next instruction before others have read.
uint64_t Machine::meet_warp(Instruction instruction, uint64_t value) {
  Warp& warp = warps_[size_t(current_index() / shape_.warp_size)];
  if (warp.arrived > 0 && warp.instruction != instruction) fail("lanes of a warp are at different instructions");
  warp.instruction = instruction;
  const uint64_t generation = warp.generation;
  warp.values[generation % 2][current_->index % shape_.warp_size] = value;
  if (++warp.arrived == shape_.warp_size) {
    warp.arrived = 0;
    ++warp.generation;
  }
  wait_while(warp.generation, generation);
  return generation % 2;
}

uint64_t Machine::exchange(uint64_t value, int from_lane) {
  const uint64_t half = meet_warp(Instruction::kExchange, value);
  if (from_lane < 0 || from_lane >= shape_.warp_size) {
    fail("there is no lane " + std::to_string(from_lane));
    return value;
  }
  return warps_[size_t(current_index() / shape_.warp_size)].values[half][from_lane];
}

uint64_t Machine::vote(bool holds) {
  const uint64_t half = meet_warp(Instruction::kVote, holds ? 1 : 0);
  uint64_t lanes = 0;
  for (int i = 0; i < shape_.warp_size; ++i) {
    lanes |= warps_[size_t(current_index() / shape_.warp_size)].values[half][i] << i;
  }
  return lanes;
}

}  // namespace fusedcomm::emulator
