// The sum of a row as one fixed balanced tree: neighbours are added level by level, s[i] = s[2i] + s[2i+1], over the
// row padded with +0 to a power of two. Its value depends on the row alone: not on the vector width, the number of
// rows, or the kernel that computes it. A GPU gets the same bits from a butterfly over lanes and then warps.
#pragma once

#include <cstdint>

#include "fusedcomm/vec.h"

namespace fusedcomm::FUSEDCOMM_ISA {

constexpr int kTreeBlock = 8;  // vectors added at once: three levels in registers

class TreeSum {
 public:
  // Appends the next kTreeBlock vectors of the row.
  FUSEDCOMM_INLINE void append(const F32 (&v)[kTreeBlock]) {
    const F32 a = add_neighbours(v[0], v[1]), b = add_neighbours(v[2], v[3]);
    const F32 c = add_neighbours(v[4], v[5]), d = add_neighbours(v[6], v[7]);
    F32 node = add_neighbours(add_neighbours(a, b), add_neighbours(c, d));
    // A binary counter: bit l of count_ says whether pending_[l] waits for its right neighbour.
    int level = 0;
    for (uint32_t carry = count_; carry & 1u; carry >>= 1) node = add_neighbours(pending_[level++], node);
    pending_[level] = node;
    ++count_;
  }

  float finish() const {
    F32 node = {};
    bool started = false;
    for (int level = 0; count_ >> level; ++level) {
      const bool waiting = count_ >> level & 1u;
      if (waiting) {
        const bool last = count_ >> level == 1u;
        if (started) {
          node = add_neighbours(pending_[level], node);
        } else {
          node = last ? pending_[level] : add_neighbours(pending_[level], F32{});
        }
        started = true;
      } else if (started) {
        node = add_neighbours(node, F32{});
      }
    }
    float s[kLanes];
    store_bits(s, node);
    for (int n = kLanes / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) s[i] = s[2 * i] + s[2 * i + 1];
    }
    return s[0];
  }

 private:
  // 32,768 elements in vectors of 4, eight at a time: at most 1024 blocks, so 11 levels; 20 leaves room.
  F32 pending_[20];
  uint32_t count_ = 0;
};

}  // namespace fusedcomm::FUSEDCOMM_ISA
