// The smallest value of a row such that what is not below it reaches an aim, a count (top-k) or a mass (top-p): a radix
// select over the bits of the values from the top down, a round for 9 or 10 of them.
//
// A round: each block puts its values that may be the threshold into bins and sends the sums of groups of bins to all
// blocks; when it has those of all blocks it knows in which group the aim is reached, and sends its bins of that group;
// when it has those of all, it knows the bin. So all blocks find the same, and little goes between them. Once few
// values are left, all blocks get them all (Candidates), and each goes on by itself.
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

// In shared memory, cleared at the start. What blocks send to each other in rounds that follow each other:
//
// - sums of groups go to two inboxes in turn: whoever sends those of round n + 2 has all of round n + 1, and every
//   block sends these after it has read those of round n;
// - bins go to one: whoever sends those of a round has all groups of that round, and every block sends these after it
//   has read the bins of the round before.
template <class Bins>
struct alignas(16) SearchMemory {
  Bins bins;
  Inbox<uint64_t, kGroups> groups[2];
  Inbox<uint64_t, kWarpSize> lanes;
  Found found;

  __device__ void open(const Team& team) {
    groups[0].open(team);
    groups[1].open(team);
    lanes.open(team);
  }
};

// kLists: values may become candidates, in a list of its own.
template <class Bins, bool kLists = true>
class Search {
 public:
  __device__ Search(const Team& team, SearchMemory<Bins>& memory)
      : memory_(memory), most_candidates_(team.is_alone() ? Bins::kFew : kMostCandidates) {}

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

  // Once few values are left, they are to be brought to all blocks, in this list: see gather(). even_if_done: for what
  // comes after the search.
  __device__ void may_list(Candidates& room, bool even_if_done = false) {
    room_ = &room;
    lists_if_done_ = even_if_done;
  }
  __device__ Candidates& room() const { return *room_; }
  // All values that are left are in the list.
  __device__ void look_at(const Candidates& list) { list_ = &list; }
  __device__ bool wants_candidates() const {
    return kLists && has_few_ && list_ == nullptr && (!is_done() || lists_if_done_);
  }
  __device__ bool has_candidates() const { return kLists && list_ != nullptr; }
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

  // What is left of the row, if it is looked at still.
  template <int kCount>
  __device__ void add_of_row(const Values<kCount>& y) {
    if (!has_candidates()) add(y);
  }
  __device__ bool needs_row() const { return !is_done() && !has_candidates(); }
  __device__ void add_candidates() {
    if (is_done() || !has_candidates()) return;
    for (int i = int(threadIdx.x); i < list_->size(); i += int(blockDim.x)) add(Values<1>{(*list_)[i]});
  }

  // Finds the threshold among the candidates, if there are no more than Bins::kFew: each is held against all others. By
  // all threads, with clear bins.
  __device__ void finish_if_few() {
    if (is_done() || !has_candidates() || list_->size() > Bins::kFew) return;
    struct Room {
      uint64_t masses[Bins::kFew], masses_up_to[Bins::kFew];
      uint32_t counts_up_to[Bins::kFew], best, place;
    };
    static_assert(sizeof(Room) <= sizeof(memory_.bins), "in place of the bins");
    Room& room = reinterpret_cast<Room&>(memory_.bins);
    const Candidates& list = *list_;
    const int num = list.size();
    for (int i = int(threadIdx.x); i < num; i += int(blockDim.x)) room.masses[i] = mass_of(list[i]);
    __syncthreads();
    constexpr int kLanes = 4;  // for each of them
    const int part = lane() % kLanes;
    uint32_t best = 0;
    for (int first = warp() * kWarpSize / kLanes; first < num; first += int(blockDim.x) / kLanes) {
      const int i = first + lane() / kLanes;
      const float own = i < num ? list[i] : 0.0f;
      uint64_t mass = 0;
      uint32_t count = 0;
#pragma unroll 4
      for (int j = part; j < num; j += kLanes) {
        const bool counts = list[j] >= own;
        mass += counts ? room.masses[j] : 0;
        count += uint32_t(counts);
      }
#pragma unroll
      for (int mask = 1; mask < kLanes; mask *= 2) {
        mass += shuffle_xor(mass, mask);
        count += shuffle_xor(count, mask);
      }
      if (i < num && part == 0) {
        room.masses_up_to[i] = mass;
        room.counts_up_to[i] = count;
      }
      if (i < num && sum_of(mass, count) >= aim_) best = max(best, __float_as_uint(own));
    }
    best = max_of_warp(best);
    if (lane() == 0 && best > 0) atomicMax(&room.best, best);
    __syncthreads();
    const uint32_t threshold = room.best;  // 0: the aim is not reached
    for (int i = int(threadIdx.x); i < num; i += int(blockDim.x)) {
      const bool is_last =
          threshold > 0 ? __float_as_uint(list[i]) == threshold : room.counts_up_to[i] == uint32_t(num);
      if (is_last) atomicMax(&room.place, uint32_t(i));
    }
    __syncthreads();
    mass_ = room.masses_up_to[room.place];
    above_ = sum_of(mass_, room.counts_up_to[room.place]);
    finish(threshold);
  }
  // The mass of what is kept, if the search ended among candidates and they are all of it; 0: ask elsewhere.
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
      const uint64_t sum = sum_of_warp(bins().in_bin(range_, group * kWarpSize + lane()));
      auto& inbox = memory_.groups[round_ % 2];
      has_candidates() ? inbox.keep(team, group, sum) : inbox.send(team, group, sum);
    }
  }

  // By one warp, the same in all rounds.
  __device__ void locate(const Team& team) {
    const uint64_t of_group = groups_of_team(team);
    uint64_t up_to = above_ + sum_up_to_lane(of_group);
    uint64_t reaching = ballot(up_to >= aim_);
    if (reaching == 0) {
      if (lane() == kWarpSize - 1) memory_.found = {up_to, 0, -1, false, false};
      return;
    }
    const int group = first_lane(reaching);
    const uint64_t above = shuffle(up_to - of_group, group);
    const int bin = group * kWarpSize + lane();
    const uint64_t of_bin = lanes_of_team(team, bins().in_bin(range_, bin));
    up_to = above + sum_up_to_lane(of_bin);
    reaching = ballot(up_to >= aim_);
    const int found_by = first_lane(reaching);
    Found found = {shuffle(up_to - of_bin, found_by), shuffle(of_bin, found_by), shuffle(bin, found_by), false, false};
    const float lower_end = __uint_as_float(range_of(found.bin).lower_end());
    found.is_last = range_.shift == 0 || Bins::takes_all(found.in_bin, aim_ - found.above, lower_end);
    found.has_few = kLists && room_ != nullptr && list_ == nullptr &&
                    Bins::are_few(found.above, found.in_bin, lower_end, most_candidates_) &&
                    (!found.is_last || lists_if_done_);
    if (lane() == 0) memory_.found = found;
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

  // What a bin has of the range, for the next round.
  __device__ Range range_of(int bin) const {
    const uint32_t top = range_.upper_end_of(bin);
    return {top, min(1u << range_.shift, top), range_.shift > 10 ? range_.shift / 2 : 0};
  }

  // The sum of a group a lane over the blocks.
  __device__ uint64_t groups_of_team(const Team& team) {
    auto& inbox = memory_.groups[round_ % 2];
    if (has_candidates()) return lane() < kGroups ? inbox.from(team.rank(), lane()) : 0;
    inbox.wait(team, round_ / 2 % 2);
    if (lane() == 0) inbox.expect(team);
    return lane() < kGroups ? sum_over_team(team, inbox) : 0;
  }

  // What a lane has, over the blocks.
  __device__ uint64_t lanes_of_team(const Team& team, uint64_t of_block) {
    if (team.is_alone() || has_candidates()) return of_block;
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

  __device__ void finish(uint32_t threshold) { range_ = {threshold, 0, 0}; }

  // Of candidates, and of what is above them all.
  __device__ uint64_t sum_of(uint64_t mass, uint32_t count) const { return Bins::kTakesAbove ? count : above_ + mass; }

  SearchMemory<Bins>& memory_;
  Candidates* room_ = nullptr;
  const Candidates* list_ = nullptr;
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
template <class... Searches>
__device__ inline void settle(const Team& team, Searches&... searches) {
  int next = 0;
  (((warp() == next++ % num_warps() && !searches.is_done()) ? searches.locate(team) : void()), ...);
  __syncthreads();
  ((searches.is_done() ? void() : (searches.clear_bins(), searches.advance())), ...);
  __syncthreads();
}

template <class... Searches>
__device__ inline void restart(const Team& team, Searches&... searches) {
  int next = 0;
  ((searches.is_done() ? void(++next) : searches.restart(team, warp() == next++ % num_warps())), ...);
  __syncthreads();
  (searches.clear_bins(), ...);
  __syncthreads();
}

// Brings the candidates of a search to every block of the team, if it wants them.
template <class Each, class Bins, bool kLists>
__device__ inline void gather(const Team& team, const Each& each, Search<Bins, kLists>& search) {
  if (!kLists || !search.wants_candidates()) return;
  Candidates& list = search.room();
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
  search.clear_bins();
  search.look_at(list);
  __syncthreads();
}

// Rounds until all of them are done. each(f) calls f(values) for all values of the slice.
template <class Each, class... Searches>
__device__ inline void search(const Team& team, const Each& each, Searches&... searches) {
  while (true) {
    (gather(team, each, searches), ...);
    (searches.finish_if_few(), ...);
    if ((searches.is_done() && ...)) return;
    if ((searches.needs_row() || ...)) each([&](const auto& y) { (searches.add_of_row(y), ...); });
    (searches.add_candidates(), ...);
    share(team, searches...);
    if ((searches.has_candidates() || ...)) __syncthreads();  // what a block keeps to itself, nothing waits for
    settle(team, searches...);
  }
}

}  // namespace fusedcomm::gpu::sampling
