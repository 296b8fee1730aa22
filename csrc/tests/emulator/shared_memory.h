// The shared memory of a block, in which each access is held against those before it: two of one word, one of which
// writes, race unless the later thread knows of the earlier access. It does if a barrier or a message lay between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace fusedcomm::emulator {

// For each thread of the cluster, up to which of its moments another knows what it did.
using Clock = std::vector<uint32_t>;

inline void learn(Clock& clock, const Clock& other) {
  if (clock.empty()) clock.assign(other.size(), 0);
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = clock[i] < other[i] ? other[i] : clock[i];
}

// An atomic one reads and writes; two of them do not race.
enum class AccessKind { kRead, kWrite, kAtomic };

class SharedMemory {
 public:
  // Holds random bytes: on a GPU it is not cleared.
  SharedMemory(int bytes, std::mt19937_64& random);

  uint8_t* data() const { return data_; }
  // Whether an address belongs here, or just misses.
  bool is_near(uintptr_t address) const;
  bool has(size_t offset, size_t bytes) const { return offset <= bytes_ && bytes <= bytes_ - offset; }
  size_t offset_of(const void* p) const { return size_t(static_cast<const uint8_t*>(p) - data_); }

  // Notes the access of a thread to bytes that are there, whose clock is known. What is wrong with it; empty: nothing.
  std::string access(size_t offset, size_t bytes, AccessKind kind, int thread, const Clock& known);

 private:
  struct Access {
    int thread;
    uint32_t time;
  };
  struct Word {
    std::vector<Access> reads, writes;  // since the last write that was not atomic, it included
    bool is_atomic = false;             // all of the writes are
  };

  static const Access* unknown(const std::vector<Access>& accesses, int thread, const Clock& known);
  static void note(std::vector<Access>& accesses, Access access);
  static std::string access_word(Word& word, AccessKind kind, int thread, const Clock& known);

  size_t bytes_;
  std::unique_ptr<uint8_t[]> room_;
  uint8_t* data_;
  std::vector<Word> words_;
};

}  // namespace fusedcomm::emulator
