// Filters: what is not below a threshold, divided by its mass; 0 elsewhere.
#pragma once

#include "gpu/quotient.h"
#include "gpu/sampling/row.h"

namespace fusedcomm::gpu::sampling {

template <class Team>
struct alignas(16) TopKMemory {
  Largest<Team> largest;
  Total<Team> kept;
  SearchMemory<Team, Counts> counts;
  Candidates<Team> candidates;

  __device__ void open(const Team& team) {
    largest.open(team), kept.open(team), counts.open(team), candidates.open(team);
  }
};

template <class Team>
struct alignas(16) TopPMemory {
  Largest<Team> largest;
  Total<Team> kept;
  SearchMemory<Team, Masses> masses;
  Candidates<Team> candidates;

  __device__ void open(const Team& team) {
    largest.open(team), kept.open(team), masses.open(team), candidates.open(team);
  }
};

template <class Team>
struct alignas(16) TopKTopPMemory {
  TopKMemory<Team> top_k;
  SearchMemory<Team, Masses> masses;

  __device__ void open(const Team& team) { top_k.open(team), masses.open(team); }
};

template <class Team>
struct alignas(16) MinPMemory {
  Largest<Team> largest;
  Total<Team> kept;

  __device__ void open(const Team& team) { largest.open(team), kept.open(team); }
};

// What a filter makes of the values of a row: those from the threshold on over the m of the row, a number from 2^-44 to
// 2^19, and 0 for the others.
class Filter {
 public:
  __device__ explicit Filter(float threshold, float m = 1.0f)
      : threshold_(threshold), m_(m), inverse_(reciprocal(m)), is_plain_(threshold >= kLeastPlain) {}

  __device__ float operator()(float y) const {
    if (!(y >= threshold_)) return 0.0f;
    return is_plain_ ? quotient<2>(y, m_, inverse_) : divide(y, m_);
  }
  // The same. Most rows keep few values, and dividing is most of the work.
  template <int kCount>
  __device__ Values<kCount> operator()(const Values<kCount>& y) const {
    float largest = y.v[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = larger(largest, y.v[i]);
    if (largest < threshold_) return {};
    if (is_plain_) return y.map([&](float v) { return v >= threshold_ ? quotient<2>(v, m_, inverse_) : 0.0f; });
    return y.map([&](float v) { return v >= threshold_ ? divide(v, m_) : 0.0f; });
  }
  // Of what it keeps, before it is divided.
  __device__ uint64_t mass(float y) const { return y >= threshold_ ? mass_of(y) : 0; }

 private:
  static constexpr float kLeastPlain = 0x1p-60f;  // below, the remainder of a division may underflow

  float threshold_, m_, inverse_;
  bool is_plain_;
};

// The threshold of top-k; k = 0: no limit. Afterwards the search may have candidates: all that is kept, and more.
// lists: it is to have them wherever they are few, for what follows.
template <class Team, class S>
__device__ inline void search_top_k(const Team& team, TopKMemory<Team>& memory, S& slice,
                                    Search<Team, Counts>& search_k, int k, bool lists) {
  if (k == 0) search_k.skip();
  search_k.aim_at(uint64_t(k));
  search_k.may_list(memory.candidates, lists);
  open(team, memory.largest, slice, [](float) {}, search_k);
  search(team, values_of(slice), search_k);
}

// Of what top-k keeps.
template <class Team, class S>
__device__ inline uint64_t mass_of_kept(const Team& team, TopKMemory<Team>& memory, S& slice,
                                        const Search<Team, Counts>& search_k) {
  if (search_k.mass_of_kept() > 0) return search_k.mass_of_kept();
  const Filter filter(search_k.threshold());
  if (!search_k.has_candidates()) {
    return total_of(team, memory.kept, slice, [&](float y) { return filter.mass(y); });
  }
  uint64_t sum = 0;
  const Candidates<Team>& list = memory.candidates;
  for (int i = int(threadIdx.x); i < list.size(); i += int(blockDim.x)) sum += filter.mass(list[i]);
  memory.kept.note(sum);
  __syncthreads();
  return memory.kept.of_block();
}

// A search over what the filter of top-k makes of the row.
template <class Team, class S>
__device__ inline void search_of_kept(const Team& team, Candidates<Team>& candidates, S& slice, const Filter& by_k,
                                      const Search<Team, Counts>& search_k, Search<Team, Masses>& search_p) {
  if (search_p.is_done()) return;
  if (search_k.has_sorted()) return search_p.finish_among_sorted(candidates, by_k);
  if (search_k.has_candidates()) {
    for (int i = int(threadIdx.x); i < candidates.size(); i += int(blockDim.x)) candidates[i] = by_k(candidates[i]);
    search_p.look_at(candidates);  // of which each thread looks at its own
  } else {
    search_p.may_list(candidates);
  }
  search(team, mapped(slice, by_k), search_p);
}

// What is below it weighs less than 1 - p in a row that adds up to 1, so the threshold of top-p is not below it.
__device__ inline float least_threshold(float p, int vocab) {
  return p < 1.0f ? (1.0f - larger(p, 0.0f)) / float(vocab) : 0.0f;
}

// A search for the threshold of top-p, but for its aim, which depends on the unit of the row.
template <class Team>
__device__ inline void begin_top_p(Search<Team, Masses>& search_p, float p, int vocab) {
  search_p.expect_from(least_threshold(p, vocab));
  if (goal(p, 1.0f) == kOutOfReach) search_p.skip();
}

template <class T>
struct TopKRenorm {
  static constexpr int kBlocksOfSm = 2;
  struct Arguments {
    Rows rows;
    Limit top_k;
    float* out;
  };
  template <class Team>
  using Memory = TopKMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    Search<Team, Counts> search_k(team, memory.counts);
    search_top_k(team, memory, slice, search_k, at(a.top_k, row, a.rows.vocab), false);
    const Filter filter(search_k.threshold(), divisor(mass_of_kept(team, memory, slice, search_k)));
    slice.write(a.out + row * a.rows.vocab, [&](const auto& y, int) { return filter(y); });
  }
};

template <class T>
struct TopPRenorm {
  static constexpr int kBlocksOfSm = 2;
  struct Arguments {
    Rows rows;
    PerRow top_p;
    float* out;
  };
  template <class Team>
  using Memory = TopPMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    const float p = at(a.top_p, row);
    Search<Team, Masses> search_p(team, memory.masses);
    search_p.may_list(memory.candidates);
    begin_top_p(search_p, p, a.rows.vocab);
    const bool keeps_all = search_p.is_done();
    open(team, memory.largest, slice, [&](float c) { search_p.aim_at(goal(p, c)); }, search_p);
    search(team, values_of(slice), search_p);
    const uint64_t mass = keeps_all ? total_of(team, memory.kept, slice, MassOf()) : search_p.reached();
    const Filter filter(search_p.threshold(), divisor(mass));
    slice.write(a.out + row * a.rows.vocab, [&](const auto& y, int) { return filter(y); });
  }
};

template <class T>
struct TopKTopPRenorm {
  static constexpr int kBlocksOfSm = 2;
  struct Arguments {
    Rows rows;
    Limit top_k;
    PerRow top_p;
    float* out;
  };
  template <class Team>
  using Memory = TopKTopPMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    const uint64_t aim = goal(at(a.top_p, row), 1.0f);
    Search<Team, Counts> search_k(team, memory.top_k.counts);
    search_top_k(team, memory.top_k, slice, search_k, at(a.top_k, row, a.rows.vocab), true);
    const Filter by_k(search_k.threshold(), divisor(mass_of_kept(team, memory.top_k, slice, search_k)));
    Search<Team, Masses> search_p(team, memory.masses);
    search_p.aim_at(aim);
    search_of_kept(team, memory.top_k.candidates, slice, by_k, search_k, search_p);
    const Filter by_p(search_p.threshold(), divisor(search_p.reached()));
    slice.write(a.out + row * a.rows.vocab, [&](const auto& y, int) { return by_p(by_k(y)); });
  }
};

// The least fp32 that is not below the product, which is exact in fp64.
__device__ inline float min_p_threshold(float min_p, float largest) {
  const float positive = min_p > 0.0f ? min_p : 0.0f;
  const double product = double(positive < 1.0f ? positive : 1.0f) * double(largest);
  const float nearest = float(product);
  return double(nearest) < product ? __uint_as_float(__float_as_uint(nearest) + 1) : nearest;
}

template <class T>
struct MinPRenorm {
  static constexpr int kBlocksOfSm = 3;
  struct Arguments {
    Rows rows;
    PerRow min_p;
    float* out;
  };
  template <class Team>
  using Memory = MinPMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Probability>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    open(team, memory.largest, slice, [](float) {});
    const float largest = memory.largest.of(team);
    const float threshold = min_p_threshold(at(a.min_p, row), Probability::in_unit(largest, unit_of(largest)));
    const Filter all_kept(threshold);
    const uint64_t mass = total_of(team, memory.kept, slice, [&](float y) { return all_kept.mass(y); });
    const Filter filter(threshold, divisor(mass));
    slice.write(a.out + row * a.rows.vocab, [&](const auto& y, int) { return filter(y); });
  }
};

}  // namespace fusedcomm::gpu::sampling
