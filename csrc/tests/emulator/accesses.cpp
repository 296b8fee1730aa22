// Every access of memory, for the compiler has instrumented the kernels as for ThreadSanitizer; its runtime's functions
// are these here.
#include <cstring>

#include "machine.h"

namespace {

using fusedcomm::emulator::Machine;

void read(const void* p, size_t bytes) { Machine::the().access(p, bytes, false); }
void write(const void* p, size_t bytes) { Machine::the().access(p, bytes, true); }

// As vectors of a thread would: by what keeps every access aligned.
template <class F>
void each_part(const void* p, size_t bytes, const F& f) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const size_t part = (address | bytes) % 4 == 0 ? 4 : 1;
  for (size_t i = 0; i < bytes; i += part) f(static_cast<const char*>(p) + i, part);
}

}  // namespace

extern "C" {

// The bounds of this library, by the linker; those of the process have the same names.
extern __attribute__((visibility("hidden"))) char __ehdr_start[];
extern __attribute__((visibility("hidden"))) char _end[];

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define FUSEDCOMM_ACCESSES(bytes)                                             \
  void __tsan_read##bytes(void* p) { read(p, bytes); }                        \
  void __tsan_write##bytes(void* p) { write(p, bytes); }                      \
  void __tsan_unaligned_read##bytes(void* p) { read(p, bytes); }              \
  void __tsan_unaligned_write##bytes(void* p) { write(p, bytes); }            \
  void __tsan_volatile_read##bytes(void* p) { read(p, bytes); }               \
  void __tsan_volatile_write##bytes(void* p) { write(p, bytes); }             \
  void __tsan_read_write##bytes(void* p) { read(p, bytes), write(p, bytes); } \
  void __tsan_unaligned_read_write##bytes(void* p) { read(p, bytes), write(p, bytes); }
FUSEDCOMM_ACCESSES(1)
FUSEDCOMM_ACCESSES(2)
FUSEDCOMM_ACCESSES(4)
FUSEDCOMM_ACCESSES(8)
FUSEDCOMM_ACCESSES(16)
#undef FUSEDCOMM_ACCESSES

void __tsan_read_range(void* p, size_t bytes) { each_part(p, bytes, read); }
void __tsan_write_range(void* p, size_t bytes) { each_part(p, bytes, write); }
void* __tsan_memset(void* p, int value, size_t bytes) {
  __tsan_write_range(p, bytes);
  return std::memset(p, value, bytes);
}
void* __tsan_memcpy(void* to, void* from, size_t bytes) {
  __tsan_read_range(from, bytes);
  __tsan_write_range(to, bytes);
  return std::memcpy(to, from, bytes);
}

void* __tsan_memmove(void* to, void* from, size_t bytes) {
  __tsan_read_range(from, bytes);
  __tsan_write_range(to, bytes);
  return std::memmove(to, from, bytes);
}

}  // extern "C"

namespace fusedcomm::emulator {

void Machine::allow(const void* start, int64_t bytes, bool writes) {
  const auto address = reinterpret_cast<uintptr_t>(start);
  ranges_.push_back({address, address + uintptr_t(bytes), writes});
}

void Machine::access(const void* p, size_t bytes, bool writes) {
  if (current_ == nullptr) return;  // of the host
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (current_->fiber.has_on_stack(address)) return;
  if (memory().is_near(address)) {
    access_shared(current_->block, memory().offset_of(p), bytes, writes ? AccessKind::kWrite : AccessKind::kRead);
    maybe_switch();
    return;
  }
  for (const Range& range : ranges_) {
    if (address < range.start || address + bytes > range.end || (writes && !range.writes)) continue;
    if (address % bytes != 0) fail("a misaligned access of " + std::to_string(bytes) + " bytes of global memory");
    return;
  }
  const bool is_constant =
      address >= reinterpret_cast<uintptr_t>(__ehdr_start) && address < reinterpret_cast<uintptr_t>(_end);
  if (is_constant && !writes) return;
  fail(std::string(writes ? "a write" : "a read") + " out of bounds of global memory");
}

void Machine::access_atomically(const void* p) {
  access_shared(current_->block, memory().offset_of(p), sizeof(uint32_t), AccessKind::kAtomic);
  maybe_switch();
}

bool Machine::access_shared(int block, size_t offset, size_t bytes, AccessKind kind) {
  SharedMemory& memory = memories_[size_t(block)];
  if (!memory.has(offset, bytes)) {
    fail("out of bounds of shared memory, at byte " + std::to_string(ptrdiff_t(offset)));
    return false;
  }
  const std::string error = memory.access(offset, bytes, kind, current_index(), current_->known);
  if (!error.empty()) fail(error);
  return true;
}

}  // namespace fusedcomm::emulator
