// Waiting on a counter in shared memory: spin, then yield, then sleep on a futex.
#pragma once

#include <cstdint>

#include "fusedcomm/layout.h"

namespace fusedcomm::cpu {

struct WaitPolicy {
  int spins = 0;             // polls before the first yield; 0 where ranks share cores
  int64_t yield_ns = 50000;  // how long to offer the core to others before sleeping
};

int64_t now_ns();

inline bool reached(const WaitWord& word, uint32_t target) {
  return int32_t(uint32_t(word.value.load(std::memory_order_acquire)) - target) >= 0;
}

// True once the low half of the counter is at `target`; false after `slice_ns` asleep, so that the caller can look
// whether the wait still makes sense.
bool wait_for(WaitWord& word, uint32_t target, const WaitPolicy& policy, int64_t slice_ns);

// Adds `amount`; wakes the sleepers when the low half gets to `target`.
void add_and_wake(WaitWord& word, uint64_t amount, uint32_t target);

// Wakes the sleepers without adding, so that they look at the state of their peers.
void wake_all(WaitWord& word);

}  // namespace fusedcomm::cpu
