// A thread of the emulated GPU: a stack of its own, which the scheduler enters and which comes back to it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fusedcomm::emulator {

// Jumps, where swapcontext() would make a system call for the mask of signals; only the first one needs a context.
class Fiber {
 public:
  // body, which must not return, runs from the next resume() on; what ran before is dropped.
  void start(void (*body)()) {
    if (stack_ == nullptr) stack_.reset(new char[kStackBytes]);
    getcontext(&first_);
    first_.uc_stack.ss_sp = stack_.get();
    first_.uc_stack.ss_size = kStackBytes;
    first_.uc_link = nullptr;
    makecontext(&first_, body, 0);
    has_run_ = false;
  }

  // By the scheduler: until pause().
  void resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (has_run_) _longjmp(own_, 1);
    has_run_ = true;
    setcontext(&first_);
  }
  // By the fiber itself.
  void pause() {
    if (_setjmp(own_) == 0) _longjmp(scheduler_, 1);
  }

  bool has_on_stack(uintptr_t address) const {
    const auto low = reinterpret_cast<uintptr_t>(stack_.get());
    return address >= low && address < low + kStackBytes;
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  std::unique_ptr<char[]> stack_;
  bool has_run_ = false;
  ucontext_t first_;
  jmp_buf own_, scheduler_;
};

}  // namespace fusedcomm::emulator
