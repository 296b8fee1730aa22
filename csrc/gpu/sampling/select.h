// The smallest value of a row such that what is not below it reaches an aim, a count (top-k) or a mass (top-p): a radix
// select over the bits of the values from the top down, a round for 9 or 10 of them.
//
// A round: each block puts its values that may be the threshold into bins and sends the sums of groups of bins to all
// blocks; when it has those of all blocks it knows in which group the aim is reached, and sends its bins of that group;
// when it has those of all, it knows the bin. So all blocks find the same, and little goes between them. Once few
// values are left, all blocks get them all (Candidates), and each goes on by itself: in rounds, or, if they are very
// few, by sorting them.
#pragma once

#include "gpu/sampling/bins.h"
#include "gpu/sampling/candidates.h"

namespace fusedcomm::gpu::sampling {

struct Found {
  uint64_t above;   // the sum of all bins above the one in which the aim is reached, or of all
  uint64_t in_bin;  // the sum of that bin
  int bin;          // -1: the aim is not reached
  bool is_last;     // the threshold is the lower end of the bin
  bool has_few;     // what may be the threshold is to be listed
};

// Of a search among sorted candidates.
struct End {
  uint64_t reached;  // the sum of what is not below the threshold
  uint64_t mass;     // of these candidates
  uint32_t threshold;
};

// In shared memory, cleared at the start. What blocks send to each other in rounds that follow each other:
//
// - sums of groups go to two inboxes in turn: whoever sends those of round n + 2 has all of round n + 1, and every
//   block sends these after it has read those of round n;
// - bins go to one: whoever sends those of a round has all groups of that round, and every block sends these after it
//   has read the bins of the round before.
template <class Team, class Bins>
struct alignas(16) SearchMemory {
  Bins bins;
  Inbox<Team, uint64_t, kGroups> groups[2];
  Inbox<Team, uint64_t, kWarpSize> lanes;
  uint64_t own_groups[kGroups];  // of a round that is the block's own affair
  Found found;
  End end;

  __device__ void open(const Team& team) {
    groups[0].open(team);
    groups[1].open(team);
    lanes.open(team);
  }
};

template <class Team, class Bins>
class Search {
 public:
  __device__ Search(const Team& team, SearchMemory<Team, Bins>& memory)
      : memory_(memory), most_candidates_(team.is_alone() ? kMostSorted : kMostCandidates) {}

  // At least 1.
  __device__ void aim_at(uint64_t aim) { aim_ = aim; }
  // Keeps everything, without a round.
  __device__ void skip() { finish(0); }
  // Before the first round: the aim is likely to be reached by values from here on.
  __device__ void expect_from(float low) {
    const uint32_t whole_bins = __float_as_uint(low) >> kFirstShift << kFirstShift;
    range_.size = kEnd - max(whole_bins, Bins::kLow);
  }

  __device__ bool is_done() const { return range_.size == 0; }
  // The result: 0 where the whole row does not reach the aim.
  __device__ float threshold() const { return __uint_as_float(range_.top); }
  // The sum of what is not below the threshold.
  __device__ uint64_t reached() const { return above_; }
  // What the threshold is not below, and not above, as far as is known; as bit patterns.
  __device__ uint32_t at_least() const {
    if (is_done()) return range_.top;
    return range_.shift < kFirstShift ? range_.lower_end() : 0;  // a bin in which the aim is reached, or not yet
  }
  __device__ uint32_t at_most() const { return range_.top; }

  // Once few values are left, they are to be brought to all blocks, in this list: see gather(). even_if_done: for what
  // comes after the search.
  __device__ void may_list(Candidates<Team>& room, bool even_if_done = false) {
    room_ = &room;
    lists_if_done_ = even_if_done;
  }
  // A round of the row follows instead, if one of candidates was to; behind a barrier.
  __device__ void may_not_list() {
    room_ = nullptr;
    has_few_ = false;
    clear_bins();
  }
  __device__ Candidates<Team>& room() const { return *room_; }
  // All values that are left are in the list.
  __device__ void look_at(Candidates<Team>& list) { list_ = &list; }
  __device__ bool wants_candidates() const { return has_few_ && list_ == nullptr && (!is_done() || lists_if_done_); }
  __device__ bool has_candidates() const { return list_ != nullptr; }
  __device__ bool has_sorted() const { return has_sorted_; }
  __device__ bool is_candidate(float y) const {
    if constexpr (Bins::kTakesAbove) return __float_as_uint(y) >= (is_done() ? range_.top : range_.lower_end());
    return range_.below_top(y) < range_.size;
  }
  // Room for candidates of the block, between rounds.
  __device__ float* scratch() {
    static_assert(sizeof(Bins) >= kMostCandidates * sizeof(float), "a candidate a bin");
    return reinterpret_cast<float*>(&memory_.bins);
  }
  __device__ void clear_bins() { clear(memory_.bins); }
  // For a round of the row; of candidates, it clears them itself.
  __device__ bool needs_bins() const { return !is_done() && !wants_candidates(); }

  // The rest of the search, where the candidates are listed. By all threads.
  __device__ void finish_among_candidates() {
    if (!has_candidates() || has_sorted_) return;
    if (list_->size() > kMostSorted) {
      while (!is_done()) round_of_candidates();
      return;
    }
    list_->sort();
    __syncthreads();
    finish_among_sorted(*list_, [](float y) { return y; });
    has_sorted_ = true;
  }
  // The same for sorted values through a function that leaves them in order. Of a search that is done, it finds
  // reached() and mass_of_kept().
  template <class Map>
  __device__ void finish_among_sorted(const Candidates<Team>& list, const Map& map) {
    if (warp() == 0) {
      const End end = end_among(list.size(), [&](int i) { return map(list.sorted(i)); });
      if (lane() == 0) memory_.end = end;
    }
    __syncthreads();
    const End end = memory_.end;
    above_ = end.reached;
    mass_ = end.mass;
    finish(end.threshold);
  }
  // The mass of what is kept, if the search ended among sorted candidates and they are all of it; 0: ask elsewhere.
  __device__ uint64_t mass_of_kept() const { return Bins::kTakesAbove ? mass_ : 0; }

  // Values are from 0 to below 2; others are left out. So is 0, which filters leave in many places: it adds nothing to
  // a mass, and is the threshold where what is above it does not reach the aim.
  template <int kCount>
  __device__ void add(const Values<kCount>& y) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) any |= range_.below_top(y.v[i]) < range_.size;
    if (any) bins().add(range_, y);
  }

  // After all bins of the block are filled.
  __device__ void send(const Team& team) {
    if (is_done()) return;
    for (int group = warp(); group < kGroups; group += num_warps()) {
      memory_.groups[round_ % 2].send(team, group, sum_of_group(group));
    }
  }

  // By one warp, the same in all rounds.
  __device__ void locate(const Team& team) {
    locate(groups_of_team(team), [&](uint64_t of_bin) { return lanes_of_team(team, of_bin); });
  }

  // Takes what locate() has found, after a barrier.
  __device__ void advance() {
    const Found found = memory_.found;
    ++round_;
    above_ = found.above;
    if (found.bin < 0) {
      const uint32_t end = range_.lower_end();
      if (end <= 1) return finish(0);
      range_ = {end - 1, min(end - 1, kMostPatterns), kFirstShift};
      return;
    }
    range_ = range_of(found.bin);
    has_few_ = found.has_few;
    if (!found.is_last) return;
    above_ += found.in_bin;
    finish(range_.lower_end());
  }

  // The first round again, with other values. By all threads; is_locator: of the warp that calls locate().
  __device__ void restart(const Team& team, bool is_locator) {
    if (is_locator) (void)groups_of_team(team);
    ++round_;
  }

 private:
  // A round looks at 32 powers of 2, with 32 bins for each: where a row has many values, as many additions to one bin
  // would wait for each other. Only if these do not reach the aim, the next one looks below.
  static constexpr uint32_t kEnd = 0x40000000u;  // 2
  static constexpr int kFirstShift = 18;
  static constexpr uint32_t kMostPatterns = uint32_t(kBins) << kFirstShift;
  static_assert(kEnd - Bins::kLow <= kMostPatterns, "a bin for each");

  __device__ Bins& bins() { return memory_.bins; }

  // Of the block, by a warp; the same in all its lanes.
  __device__ uint64_t sum_of_group(int group) { return sum_of_warp(bins().in_bin(range_, group * kWarpSize + lane())); }

  // of_group: the sum of a group a lane; bins_of_all(what the block has of a bin a lane): over all blocks that count.
  template <class BinsOfAll>
  __device__ void locate(uint64_t of_group, const BinsOfAll& bins_of_all) {
    uint64_t up_to = above_ + sum_up_to_lane(of_group);
    uint64_t reaching = ballot(up_to >= aim_);
    if (reaching == 0) {
      if (lane() == kWarpSize - 1) memory_.found = {up_to, 0, -1, false, false};
      return;
    }
    const int group = first_lane(reaching);
    const uint64_t above = shuffle(up_to - of_group, group);
    const int bin = group * kWarpSize + lane();
    const uint64_t of_bin = bins_of_all(bins().in_bin(range_, bin));
    up_to = above + sum_up_to_lane(of_bin);
    reaching = ballot(up_to >= aim_);
    if (lane() != first_lane(reaching)) return;
    Found found = {up_to - of_bin, of_bin, bin, false, false};
    const float lower_end = __uint_as_float(range_of(bin).lower_end());
    found.is_last = range_.shift == 0 || Bins::takes_all(of_bin, aim_ - found.above, lower_end);
    found.has_few = room_ != nullptr && list_ == nullptr &&
                    Bins::are_few(found.above, of_bin, lower_end, most_candidates_) &&
                    (!found.is_last || lists_if_done_);
    memory_.found = found;
  }

  // As a round of the row is, but for other blocks.
  __device__ void round_of_candidates() {
    clear_bins();
    __syncthreads();
    for (int i = int(threadIdx.x); i < list_->size(); i += int(blockDim.x)) add(Values<1>{(*list_)[i]});
    __syncthreads();
    for (int group = warp(); group < kGroups; group += num_warps()) {
      const uint64_t sum = sum_of_group(group);
      if (lane() == 0) memory_.own_groups[group] = sum;
    }
    __syncthreads();
    if (warp() == 0) {
      locate(lane() < kGroups ? memory_.own_groups[lane()] : 0, [](uint64_t of_bin) { return of_bin; });
    }
    __syncthreads();
    advance();
  }

  // By a warp, among num values, from the largest down. A lane has some that follow each other.
  template <class Value>
  __device__ End end_among(int num, const Value& value) const {
    constexpr int kEach = kMostSorted / kWarpSize;
    const int first = kEach * lane();
    float y[kEach];
    uint64_t mass[kEach], mass_of_lane = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      y[e] = value(first + e);
      mass[e] = mass_of(y[e]);
      mass_of_lane += mass[e];
    }
    float threshold = 0.0f;  // so it stays if the aim is not reached
    if (is_done()) {
      threshold = this->threshold();
    } else if constexpr (Bins::kTakesAbove) {
      if (aim_ <= uint64_t(num)) threshold = value(int(aim_) - 1);
    } else {
      uint64_t up_to = above_ + sum_up_to_lane(mass_of_lane);
      const uint64_t reaching = ballot(up_to >= aim_);
      if (reaching != 0) {
        float last = y[kEach - 1];
#pragma unroll
        for (int e = kEach - 1; e > 0; --e) {
          up_to -= mass[e];
          if (up_to >= aim_) last = y[e - 1];
        }
        threshold = shuffle(last, first_lane(reaching));
      }
    }
    uint64_t kept = 0;
    uint32_t count = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const bool is_kept = first + e < num && y[e] >= threshold;
      kept += is_kept ? mass[e] : 0;
      count += uint32_t(is_kept);
    }
    kept = sum_of_warp(kept);
    return {Bins::kTakesAbove ? sum_of_warp(count) : above_ + kept, kept, __float_as_uint(threshold)};
  }

  // What a bin has of the range, for the next round.
  __device__ Range range_of(int bin) const {
    const uint32_t top = range_.upper_end_of(bin);
    return {top, min(1u << range_.shift, top), range_.shift > 10 ? range_.shift / 2 : 0};
  }

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
    for (int block = 0; block < Team::kMostBlocks; ++block) {
      if (block < team.size()) sum += inbox.from(block, lane());
    }
    return sum;
  }

  __device__ void finish(uint32_t threshold) { range_ = {threshold, 0, 0}; }

  SearchMemory<Team, Bins>& memory_;
  Candidates<Team>* room_ = nullptr;
  Candidates<Team>* list_ = nullptr;
  bool has_sorted_ = false;
  int most_candidates_;
  bool lists_if_done_ = false;
  bool has_few_ = false;
  uint64_t aim_ = 1;
  uint64_t above_ = 0;  // the sum of what is above the range
  uint64_t mass_ = 0;
  Range range_ = {kEnd - 1, kEnd - Bins::kLow, kFirstShift};  // at the end the threshold, and 0
  uint32_t round_ = 0;
  uint32_t exchange_ = 0;  // of bins; where a round reaches no aim there is none
};

// Ends a round, after share(). Each search is looked up by a warp of its own.
template <class Team, class... Searches>
__device__ inline void settle(const Team& team, Searches&... searches) {
  int next = 0;
  (((warp() == next++ % num_warps() && !searches.is_done()) ? searches.locate(team) : void()), ...);
  __syncthreads();
  ((searches.is_done() ? void() : searches.advance()), ...);
  if (!(searches.needs_bins() || ...)) return;
  (searches.clear_bins(), ...);
  __syncthreads();
}

template <class Team, class... Searches>
__device__ inline void restart(const Team& team, Searches&... searches) {
  int next = 0;
  ((searches.is_done() ? void(++next) : searches.restart(team, warp() == next++ % num_warps())), ...);
  __syncthreads();
  (searches.clear_bins(), ...);
  __syncthreads();
}

// Brings the candidates of a search to every block of the team, if it wants them.
template <class Team, class Each, class Bins>
__device__ inline void gather(const Team& team, const Each& each, Search<Team, Bins>& search) {
  if (!search.wants_candidates()) return;
  Candidates<Team>& list = search.room();
  float* const own = search.scratch();
  each([&](const auto& y) {
    bool any = false;
    for (const float v : y.v) any |= search.is_candidate(v);
    if (!any) return;
    for (const float v : y.v) {
      if (search.is_candidate(v)) list.collect(own, v);
    }
  });
  list.exchange(team, own);
  __syncthreads();
  search.look_at(list);
}

// Rounds until all of them are done. each(f) calls f(values) for all values of the slice.
template <class Team, class Each, class... Searches>
__device__ inline void search(const Team& team, const Each& each, Searches&... searches) {
  while (true) {
    (gather(team, each, searches), ...);
    (searches.finish_among_candidates(), ...);
    if ((searches.is_done() && ...)) return;
    each([&](const auto& y) { (searches.add(y), ...); });
    share(team, searches...);
    settle(team, searches...);
  }
}

}  // namespace fusedcomm::gpu::sampling
