#include "cpu/wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>

namespace fusedcomm::cpu {
namespace {

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
constexpr int kLowHalf = 0;
#else
constexpr int kLowHalf = 1;
#endif

uint32_t* futex_word(WaitWord& word) { return reinterpret_cast<uint32_t*>(&word.value) + kLowHalf; }

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

bool wait_for(WaitWord& word, uint32_t target, const WaitPolicy& policy, int64_t slice_ns) {
  for (int i = 0; i < policy.spins; ++i) {
    if (reached(word, target)) return true;
    pause();
  }
  if (reached(word, target)) return true;
  for (const int64_t start = now_ns(); now_ns() - start < policy.yield_ns;) {
    sched_yield();
    if (reached(word, target)) return true;
  }
  // Both sides use sequentially consistent order: either the sleeper sees the last addition, or the rank that made it
  // sees the sleeper.
  word.sleepers.fetch_add(1);
  bool done = false;
  for (const int64_t end = now_ns() + slice_ns;;) {
    const uint32_t seen = uint32_t(word.value.load());
    done = int32_t(seen - target) >= 0;
    const int64_t left = end - now_ns();
    if (done || left <= 0) break;
    const timespec timeout = {time_t(left / 1000000000), long(left % 1000000000)};
    const long rc = syscall(SYS_futex, futex_word(word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
    if (rc != 0 && errno == EINTR) break;  // the caller lets signal handlers run
    if (rc == 0) {  // woken: it is done, or a peer has failed or closed and the caller should look
      done = reached(word, target);
      break;
    }
  }
  word.sleepers.fetch_sub(1);
  return done;
}

void add_and_wake(WaitWord& word, uint64_t amount, uint32_t target) {
  const uint64_t value = word.value.fetch_add(amount) + amount;
  if (uint32_t(value) == target && word.sleepers.load() != 0) wake_all(word);
}

void wake_all(WaitWord& word) { syscall(SYS_futex, futex_word(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace fusedcomm::cpu
