// The smallest value of a row such that what is not below it reaches an aim, a count (top-k) or a mass (top-p): a radix
// select over the bits of the values from the top down, a round for 9 or 10 of them.
//
// A round: each block puts its values that may be the threshold into bins and sends the sums of groups of bins to all
// blocks; when it has those of all blocks it knows in which group the aim is reached, and sends its bins of that group;
// when it has those of all, it knows the bin. So all blocks find the same, and little goes between them.
#pragma once

#include "gpu/sampling/bins.h"

namespace fusedcomm::gpu::sampling {

struct Found {
  uint64_t above;   // the sum of all bins above the one in which the aim is reached, or of all
  uint64_t in_bin;  // the sum of that bin
  int bin;          // -1: the aim is not reached
};

// In shared memory, cleared at the start. What blocks send to each other in rounds that follow each other:
//
// - sums of groups go to two inboxes in turn: whoever sends those of round n + 2 has all of round n + 1, and every
// block
//   sends these after it has read those of round n;
// - bins go to one: whoever sends those of a round has all groups of that round, and every block sends these after it
// has
//   read the bins of the round before.
template <class Bins>
struct alignas(16) SearchMemory {
  Bins bins[2];
  Inbox<uint64_t, kGroups> groups[2];
  Inbox<uint64_t, kWarpSize> lanes;
  Found found;

  __device__ void open(const Team& team) {
    groups[0].open(team);
    groups[1].open(team);
    lanes.open(team);
  }
};

template <class Bins>
class Search {
 public:
  __device__ explicit Search(SearchMemory<Bins>& memory) : memory_(memory) {}

  // At least 1.
  __device__ void aim_at(uint64_t aim) { aim_ = aim; }
  // Keeps everything, without a round.
  __device__ void skip() { finish(0); }

  __device__ bool is_done() const { return size_ == 0; }
  // The result: 0 where the whole row does not reach the aim.
  __device__ float threshold() const { return __uint_as_float(top_); }
  // The sum of what is not below the threshold.
  __device__ uint64_t reached() const { return above_; }

  // Values are from 0 to below 2; others are left out. So is 0, which filters leave in many places: it adds nothing to
  // a mass, and is the threshold where what is above it does not reach the aim.
  template <int kCount>
  __device__ void add(const Values<kCount>& y) {
    uint32_t bin[kCount];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t below_top = top_ - __float_as_uint(y.v[i]);
      const bool is_inside = below_top < size_;
      bin[i] = is_inside ? below_top >> shift_ : kBins;
      any |= is_inside;
    }
    if (any) bins().add(bin, y);
  }

  // After all bins of the block are filled.
  __device__ void send(const Team& team) {
    if (is_done()) return;
    for (int group = warp(); group < kGroups; group += num_warps()) {
      const uint64_t sum = sum_of_warp(bins().in_bin(group * kWarpSize + lane()));
      memory_.groups[round_ % 2].send(team, group, sum);
    }
  }

  // By one warp, the same in all rounds.
  __device__ void locate(const Team& team) {
    const uint64_t of_group = groups_of_team(team);
    uint64_t up_to = above_ + sum_up_to_lane(of_group);
    uint64_t reaching = ballot(up_to >= aim_);
    if (reaching == 0) {
      if (lane() == kWarpSize - 1) memory_.found = {up_to, 0, -1};
      return;
    }
    const int group = first_lane(reaching);
    const uint64_t above = shuffle(up_to - of_group, group);
    const int bin = group * kWarpSize + lane();
    const uint64_t of_bin = lanes_of_team(team, bins().in_bin(bin));
    up_to = above + sum_up_to_lane(of_bin);
    reaching = ballot(up_to >= aim_);
    if (lane() == first_lane(reaching)) memory_.found = {up_to - of_bin, of_bin, bin};
  }

  // The bins of the next round.
  __device__ void clear_next() { clear(memory_.bins[(round_ + 1) % 2]); }

  // Takes what locate() has found, after a barrier.
  __device__ void advance() {
    const Found found = memory_.found;
    ++round_;
    above_ = found.above;
    if (found.bin < 0) {
      if (top_ < kOrdinaryLow) return finish(0);
      top_ = kOrdinaryLow - 1;
      size_ = top_;
      shift_ = kLowShift;
      return;
    }
    top_ -= uint32_t(found.bin) << shift_;
    size_ = min(1u << shift_, top_);
    const uint32_t lower_end = top_ - (size_ - 1);
    if (shift_ == 0 || Bins::takes_all(found.in_bin, aim_ - found.above, lower_end)) {
      above_ += found.in_bin;
      return finish(lower_end);
    }
    shift_ = shift_ > 10 ? shift_ / 2 : 0;
  }

  // The first round again, with other values. By all threads; is_locator: of the warp that calls locate().
  __device__ void restart(const Team& team, bool is_locator) {
    if (is_locator) (void)groups_of_team(team);
    ++round_;
  }

 private:
  // The first round looks at values from 2^-31 on, 32 bins for each power of 2: where a row has many values, as many
  // additions to one bin would wait for each other. Only if these do not reach the aim, the next one looks below.
  static constexpr uint32_t kEnd = 0x40000000u;          // 2
  static constexpr uint32_t kOrdinaryLow = 0x30000000u;  // 2^-31
  static constexpr int kOrdinaryShift = 18, kLowShift = 20;
  static_assert((kEnd - kOrdinaryLow) >> kOrdinaryShift == kBins && kOrdinaryLow >> kLowShift <= kBins, "all values");

  __device__ Bins& bins() { return memory_.bins[round_ % 2]; }

  // The sum of a group a lane over the blocks.
  __device__ uint64_t groups_of_team(const Team& team) {
    auto& inbox = memory_.groups[round_ % 2];
    inbox.wait(team, round_ / 2 % 2);
    if (lane() == 0) inbox.expect(team);
    return lane() < kGroups ? sum_over_team(team, inbox) : 0;
  }

  // What a lane has, over the blocks.
  __device__ uint64_t lanes_of_team(const Team& team, uint64_t of_block) {
    if (team.is_alone()) return of_block;
    memory_.lanes.send_lanes(team, of_block);
    memory_.lanes.wait(team, exchange_++ % 2);
    if (lane() == 0) memory_.lanes.expect(team);
    return sum_over_team(team, memory_.lanes);
  }

  template <class Box>
  __device__ static uint64_t sum_over_team(const Team& team, const Box& inbox) {
    uint64_t sum = 0;
#pragma unroll
    for (int block = 0; block < kMaxTeam; ++block) {
      if (block < team.size()) sum += inbox.from(block, lane());
    }
    return sum;
  }

  __device__ void finish(uint32_t threshold) {
    top_ = threshold;
    size_ = 0;
  }

  SearchMemory<Bins>& memory_;
  uint64_t aim_ = 1;
  uint64_t above_ = 0;  // the sum of what is above the range
  // The range, bit patterns [top - size + 1, top], in bins of 2^shift of them; at the end the threshold, and 0.
  uint32_t top_ = kEnd - 1;
  uint32_t size_ = kEnd - kOrdinaryLow;
  int shift_ = kOrdinaryShift;
  uint32_t round_ = 0;
  uint32_t exchange_ = 0;  // of bins; where a round reaches no aim there is none
};

// Ends a round, after share(). Each search is looked up by a warp of its own.
template <class... Searches>
__device__ inline void settle(const Team& team, Searches&... searches) {
  int next = 0;
  (((warp() == next++ % num_warps() && !searches.is_done()) ? searches.locate(team) : void()), ...);
  ((searches.is_done() ? void() : searches.clear_next()), ...);
  __syncthreads();
  ((searches.is_done() ? void() : searches.advance()), ...);
}

template <class... Searches>
__device__ inline void restart(const Team& team, Searches&... searches) {
  int next = 0;
  ((searches.is_done() ? void(++next) : searches.restart(team, warp() == next++ % num_warps())), ...);
}

// Rounds until all of them are done. each(f) calls f(values) for all values of the slice.
template <class Each, class... Searches>
__device__ inline void search(const Team& team, const Each& each, Searches&... searches) {
  while (!(searches.is_done() && ...)) {
    each([&](const auto& y) { (searches.add(y), ...); });
    share(team, searches...);
    settle(team, searches...);
  }
}

}  // namespace fusedcomm::gpu::sampling
