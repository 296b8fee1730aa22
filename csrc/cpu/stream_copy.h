// memcpy for results that are larger than the caches: stores that go past them leave them to the shared slots, and
// spare the read of every line that is about to be overwritten.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fusedcomm::cpu {

inline void stream_copy(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to) & 63);
  if (bytes >= 4096) {
    std::memcpy(to, from, size_t(head));
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
      for (int i = 0; i < 4; ++i) {  // one whole line, so that no partial write leaves the core
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, v);
      }
    }
    _mm_sfence();  // such stores are not ordered by the release of a lock or a counter
  }
#endif
  std::memcpy(to, from, size_t(bytes));
}

}  // namespace fusedcomm::cpu
