// What blocks of a cluster send to each other. A message arrives at any time after it was sent, in any order, and
// brings what its sender knew to whoever waits for the phase that it is part of.
#include <cstring>

#include "machine.h"

namespace fusedcomm::emulator {

void Machine::arrive() {
  if (current_->has_arrived) fail("arrive() for the second time");
  current_->has_arrived = true;
  current_->met_generation = cluster_barrier_.generation;
  enter(cluster_barrier_, num_threads());
  maybe_switch();
}

void Machine::meet() {
  if (!current_->has_arrived || current_->has_met) fail("meet() without arrive()");
  current_->has_met = true;
  wait_while(cluster_barrier_.generation, current_->met_generation);
  learn(current_->known, cluster_barrier_.done);
}

Machine::Signal& Machine::signal_at(int block, size_t offset) {
  const auto found = signals_.find({block, offset});
  if (found != signals_.end()) return found->second;
  fail("the signal at byte " + std::to_string(offset) + " of block " + std::to_string(block) + " is not set");
  return signals_[{block, offset}];
}

void Machine::set_signal(const void* signal) {
  const size_t offset = memory().offset_of(signal);
  access_shared(current_->block, offset, sizeof(uint64_t), AccessKind::kWrite);
  if (!signals_.insert({{current_->block, offset}, Signal()}).second) fail("a signal is set for the second time");
}

// A phase ends when its bytes are known and are all there; messages may come before they are known.
void Machine::step(Signal& signal) {
  if (!signal.is_expected || signal.missing_bytes != 0) return;
  signal.is_expected = false;
  signal.done = signal.gathered;
  ++signal.phase;
}

void Machine::expect(const void* signal, int bytes) {
  Signal& own = signal_at(current_->block, memory().offset_of(signal));
  if (own.is_expected) fail("expect() for the second time in a phase");
  own.is_expected = true;
  own.missing_bytes += bytes;
  learn(own.gathered, current_->known);
  ++current_->known[size_t(current_index())];
  step(own);
  maybe_switch();
}

void Machine::wait(const void* signal, uint32_t phase) {
  const Signal& own = signal_at(current_->block, memory().offset_of(signal));
  if (phase > 1) fail("there is no phase " + std::to_string(phase));
  if (!current_->has_met) fail("wait() before meet()");
  while (own.phase % 2 == phase) wait_while(own.phase, own.phase);
  learn(current_->known, own.done);
  maybe_switch();
}

void Machine::send(void* place, uint64_t value, int bytes, const void* signal, int block) {
  if (block < 0 || block >= size()) {
    fail("there is no block " + std::to_string(block));
    return;
  }
  if (!current_->has_met) fail("send() before meet()");
  const size_t offset = memory().offset_of(place);
  if (!access_shared(block, offset, size_t(bytes), AccessKind::kWrite)) return;
  messages_.push_back({block, offset, memory().offset_of(signal), value, bytes, current_->known});
  ++current_->known[size_t(current_index())];
  if (!delivers_late_ && random_() % 2 == 0) deliver_any();
  maybe_switch();
}

void Machine::deliver_any() {
  std::swap(messages_[random_() % messages_.size()], messages_.back());
  const Message message = std::move(messages_.back());
  messages_.pop_back();
  bool is_there = false;  // the block has not left
  for (int i = 0; i < shape_.threads; ++i) is_there |= threads_[size_t(message.block * shape_.threads + i)].is_live;
  if (!is_there) fail("a message to block " + std::to_string(message.block) + ", which has left");
  std::memcpy(memories_[size_t(message.block)].data() + message.offset, &message.value, size_t(message.bytes));
  Signal& signal = signal_at(message.block, message.signal);
  learn(signal.gathered, message.known);
  signal.missing_bytes -= message.bytes;
  step(signal);
}

}  // namespace fusedcomm::emulator
