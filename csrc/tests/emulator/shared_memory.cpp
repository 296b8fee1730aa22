#include "shared_memory.h"

namespace fusedcomm::emulator {

namespace {

constexpr size_t kMargin = 4096;  // around the memory: what just misses it is found
constexpr size_t kAlignment = 16;
constexpr size_t kWordBytes = 4;

}  // namespace

SharedMemory::SharedMemory(int bytes, std::mt19937_64& random)
    : bytes_(size_t(bytes)), room_(new uint8_t[bytes_ + 2 * kMargin + kAlignment]), words_(bytes_ / kWordBytes + 1) {
  const auto start = reinterpret_cast<uintptr_t>(room_.get()) + kMargin;
  data_ = room_.get() + kMargin + (kAlignment - start % kAlignment) % kAlignment;
  for (size_t i = 0; i < bytes_; ++i) data_[i] = uint8_t(random());
}

bool SharedMemory::is_near(uintptr_t address) const {
  const auto start = reinterpret_cast<uintptr_t>(data_);
  return address >= start - kMargin && address < start + bytes_ + kMargin;
}

const SharedMemory::Access* SharedMemory::unknown(const std::vector<Access>& accesses, int thread, const Clock& known) {
  for (const Access& access : accesses) {
    if (access.thread != thread && known[size_t(access.thread)] < access.time) return &access;
  }
  return nullptr;
}

// The latest of each thread: whoever knows it knows those before.
void SharedMemory::note(std::vector<Access>& accesses, Access access) {
  for (Access& other : accesses) {
    if (other.thread == access.thread) {
      other = access;
      return;
    }
  }
  accesses.push_back(access);
}

std::string SharedMemory::access_word(Word& word, AccessKind kind, int thread, const Clock& known) {
  const char* before = "write";
  const bool both_atomic = kind == AccessKind::kAtomic && word.is_atomic;
  const Access* other = both_atomic ? nullptr : unknown(word.writes, thread, known);
  if (other == nullptr && kind != AccessKind::kRead) {
    before = "read";
    other = unknown(word.reads, thread, known);
  }
  std::string error;
  if (other != nullptr) {
    error = std::string("race: a ") + (kind == AccessKind::kRead ? "read" : "write") + " after a " + before +
            " of thread " + std::to_string(other->thread) + " of the cluster";
  }
  const Access access = {thread, known[size_t(thread)]};
  if (kind == AccessKind::kRead) {
    note(word.reads, access);
    return error;
  }
  word.reads.clear();
  if (!both_atomic) word.writes.clear();
  word.is_atomic = kind == AccessKind::kAtomic;
  note(word.writes, access);
  return error;
}

std::string SharedMemory::access(size_t offset, size_t bytes, AccessKind kind, int thread, const Clock& known) {
  std::string error;
  if (offset % bytes != 0) error = "a misaligned access of " + std::to_string(bytes) + " bytes";
  for (size_t i = offset / kWordBytes; i <= (offset + bytes - 1) / kWordBytes; ++i) {
    const std::string race = access_word(words_[i], kind, thread, known);
    if (error.empty()) error = race;
  }
  return error.empty() ? error : error + ", at byte " + std::to_string(offset) + " of the shared memory";
}

}  // namespace fusedcomm::emulator
