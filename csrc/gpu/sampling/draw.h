// Tokens by inverse CDF: the first whose masses up to it are above the uniform's part of all of them.
#pragma once

#include "gpu/sampling/renorm.h"

namespace fusedcomm::gpu::sampling {

// `total` is that of the masses mass(x), and has been shared. One thread of the team calls emit(token).
template <class Team, class S, class Mass, class Emit>
__device__ inline void draw(const Team& team, const Total<Team>& total, const S& slice, const Mass& mass, float u,
                            const Emit& emit) {
  const auto sums = total.of(team);
  const uint64_t target = part_of(sums.all, u);
  if (sums.all == 0) {
    if (team.rank() == 0 && threadIdx.x == 0) emit(0);
    return;
  }
  if (target < sums.before || target - sums.before >= total.of_block()) return;

  const uint64_t of_warp = lane() < num_warps() ? total.of_warp(lane()) : 0;
  uint64_t up_to = sums.before + sum_up_to_lane(of_warp);
  const int chosen_warp = first_lane(ballot(up_to > target));
  if (warp() != chosen_warp) return;
  uint64_t before = shuffle(up_to - of_warp, chosen_warp);

  const Run run = slice.run();
  for (int first = run.begin; first < run.end; first += kQuad * kWarpSize) {
    const int mine = first + kQuad * lane();
    uint64_t q[kQuad], sum = 0;
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      q[e] = mine + e < run.end ? mass(slice.at(mine + e)) : 0;
      sum += q[e];
    }
    up_to = before + sum_up_to_lane(sum);
    const uint64_t reaching = ballot(up_to > target);
    if (reaching == 0) {
      before = shuffle(up_to, kWarpSize - 1);
      continue;
    }
    if (lane() == first_lane(reaching)) {
      int token = mine;
      up_to -= sum;
#pragma unroll
      for (int e = 0; e < kQuad - 1; ++e) token += int((up_to += q[e]) <= target);
      emit(token);
    }
    return;
  }
}

template <class Team>
struct alignas(16) DrawMemory {
  Largest<Team> largest;
  Total<Team> as_they_are, in_unit;

  __device__ void open(const Team& team) { largest.open(team), as_they_are.open(team), in_unit.open(team); }
};

// Loads the slice; notes its largest value, and its masses as if the unit were 1.
template <class Team, class S>
__device__ inline void load_and_weigh(DrawMemory<Team>& memory, S& slice) {
  float largest = 0.0f;
  uint64_t sum = 0;
  slice.load([&](const auto& x) {
    for (const float v : x.v) {
      largest = larger(v, largest);
      sum += mass_of(v);
    }
  });
  memory.largest.note(largest);
  memory.as_they_are.note(sum);
}

// A token of the row that has been loaded and whose largest value this is.
template <class Team, class S, class Emit>
__device__ inline void draw_in_unit(const Team& team, DrawMemory<Team>& memory, S& slice, float largest, float u,
                                    const Emit& emit) {
  const float unit = unit_of(largest);
  if (unit == 1.0f) return draw(team, memory.as_they_are, slice, MassOf(), u, emit);
  (void)memory.as_they_are.of(team);  // no block leaves before it has what it is sent
  slice.bring_to(unit);
  (void)total_of(team, memory.in_unit, slice, MassOf());
  draw(team, memory.in_unit, slice, MassOf(), u, emit);
}

template <class T>
struct Sample {
  static constexpr int kBlocksOfSm = 3;
  struct Arguments {
    Rows rows;
    const float* uniforms;
    int32_t* out;
  };
  template <class Team>
  using Memory = DrawMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    load_and_weigh(memory, slice);
    team.meet();
    share(team, memory.largest, memory.as_they_are);
    draw_in_unit(team, memory, slice, memory.largest.of(team), a.uniforms[row], [&](int token) { a.out[row] = token; });
  }
};

template <class Team>
struct alignas(16) FilteredDrawMemory {
  TopKTopPMemory<Team> filters;
  Total<Team> drawn;

  __device__ void open(const Team& team) { filters.open(team), drawn.open(team); }
};

// Top-p is a share of what top-k keeps.
template <class T>
struct SampleTopKFirst {
  static constexpr int kBlocksOfSm = 2;
  struct Arguments {
    Rows rows;
    Limit top_k;
    PerRow top_p;
    const float* uniforms;
    int32_t* out;
  };
  template <class Team>
  using Memory = FilteredDrawMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    const uint64_t aim = goal(at(a.top_p, row), 1.0f);
    const bool has_top_p = aim != kOutOfReach;
    Search<Team, Counts> search_k(team, memory.filters.top_k.counts);
    search_top_k(team, memory.filters.top_k, slice, search_k, at(a.top_k, row, a.rows.vocab), has_top_p);
    const Filter by_k(search_k.threshold(),
                      has_top_p ? divisor(mass_of_kept(team, memory.filters.top_k, slice, search_k)) : 1.0f);
    Search<Team, Masses> search_p(team, memory.filters.masses);
    search_p.aim_at(aim);
    if (!has_top_p) search_p.skip();
    search_of_kept(team, memory.filters.top_k.candidates, slice, by_k, search_k, search_p);
    const float threshold = search_p.threshold();
    const auto mass = [&](float y) { return threshold == 0.0f || by_k(y) >= threshold ? by_k.mass(y) : 0; };
    (void)total_of(team, memory.drawn, slice, mass);
    draw(team, memory.drawn, slice, mass, a.uniforms[row], [&](int token) { a.out[row] = token; });
  }
};

// The higher of the thresholds is what counts: if it is known after the first round which one it is, the other is not
// looked for. If not, neither has a list of candidates, for which there is room once.
template <class Team>
__device__ inline void keep_higher(Search<Team, Counts>& search_k, Search<Team, Masses>& search_p) {
  if (search_k.at_least() > search_p.at_most()) {
    search_p.skip();
  } else if (search_p.at_least() > search_k.at_most()) {
    search_k.skip();
  } else if (!search_k.is_done() && !search_p.is_done()) {
    search_k.may_not_list();
    search_p.may_not_list();
    __syncthreads();
  }
}

// Both filters look at the whole row, so both thresholds are searched at once.
template <class T>
struct SampleJoint {
  static constexpr int kBlocksOfSm = 2;
  struct Arguments {
    Rows rows;
    Limit top_k;
    PerRow top_p;
    const float* uniforms;
    int32_t* out;
  };
  template <class Team>
  using Memory = FilteredDrawMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    const int k = at(a.top_k, row, a.rows.vocab);
    const float p = at(a.top_p, row);
    Search<Team, Counts> search_k(team, memory.filters.top_k.counts);
    Search<Team, Masses> search_p(team, memory.filters.masses);
    search_k.aim_at(uint64_t(k));
    search_k.may_list(memory.filters.top_k.candidates);
    search_p.may_list(memory.filters.top_k.candidates);
    if (k == 0) search_k.skip();
    begin_top_p(search_p, p, a.rows.vocab);
    open(team, memory.filters.top_k.largest, slice, [&](float c) { search_p.aim_at(goal(p, c)); }, search_k, search_p);
    keep_higher(search_k, search_p);
    search(team, values_of(slice), search_k, search_p);
    const float by_k = search_k.threshold(), by_p = search_p.threshold();
    const Filter both(larger(by_k, by_p));
    const auto mass = [&](float y) { return both.mass(y); };
    (void)total_of(team, memory.drawn, slice, mass);
    draw(team, memory.drawn, slice, mass, a.uniforms[row], [&](int token) { a.out[row] = token; });
  }
};

}  // namespace fusedcomm::gpu::sampling
