// Filters: what is not below a threshold, divided by its mass; 0 elsewhere.
#pragma once

#include "gpu/quotient.h"
#include "gpu/sampling/row.h"

namespace fusedcomm::gpu::sampling {

struct alignas(16) TopKMemory {
  Largest largest;
  Total kept;
  SearchMemory<Counts> counts;
  Candidates candidates;

  __device__ void open(const Team& team) {
    largest.open(team), kept.open(team), counts.open(team), candidates.open(team);
  }
};

struct alignas(16) TopPMemory {
  Largest largest;
  Total kept;
  SearchMemory<Masses> masses;
  Candidates candidates;

  __device__ void open(const Team& team) {
    largest.open(team), kept.open(team), masses.open(team), candidates.open(team);
  }
};

struct alignas(16) TopKTopPMemory {
  TopKMemory top_k;
  SearchMemory<Masses> masses;

  __device__ void open(const Team& team) { top_k.open(team), masses.open(team); }
};

struct alignas(16) MinPMemory {
  Largest largest;
  Total kept;

  __device__ void open(const Team& team) { largest.open(team), kept.open(team); }
};

// What a filter makes of the values of a row: those from the threshold on over the m of the row, a number from 2^-44 to
// 2^19, and 0 for the others.
class Filter {
 public:
  __device__ explicit Filter(float threshold, float m = 1.0f)
      : threshold_(threshold), m_(m), inverse_(reciprocal(m)), is_plain_(threshold >= kLeastPlain) {}

  __device__ float operator()(float y) const { return y >= threshold_ ? divide(y, m_) : 0.0f; }
  // The same. Most rows keep few values, and dividing is most of the work.
  template <int kCount>
  __device__ Values<kCount> operator()(const Values<kCount>& y) const {
    float largest = y.v[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = larger(largest, y.v[i]);
    if (largest < threshold_) return {};
    if (is_plain_) return y.map([&](float v) { return v >= threshold_ ? quotient<2>(v, m_, inverse_) : 0.0f; });
    return y.map(*this);
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
template <class S>
__device__ inline void search_top_k(const Team& team, TopKMemory& memory, S& slice, Search<Counts>& search_k, int k,
                                    bool lists) {
  if (k == 0) search_k.skip();
  search_k.aim_at(uint64_t(k));
  search_k.may_list(memory.candidates, lists);
  open(team, memory.largest, slice, [](float) {}, search_k);
  search(team, values_of(slice), search_k);
}

// Of what top-k keeps.
template <class S>
__device__ inline uint64_t mass_of_kept(const Team& team, TopKMemory& memory, S& slice,
                                        const Search<Counts>& search_k) {
  if (search_k.mass_of_kept() > 0) return search_k.mass_of_kept();
  const Filter filter(search_k.threshold());
  if (!search_k.has_candidates()) {
    return total_of(team, memory.kept, slice, [&](float y) { return filter.mass(y); });
  }
  uint64_t sum = 0;
  const Candidates& list = memory.candidates;
  for (int i = int(threadIdx.x); i < list.size(); i += int(blockDim.x)) sum += filter.mass(list[i]);
  memory.kept.note(sum);
  __syncthreads();
  return memory.kept.of_block();
}

// A search over what the filter of top-k makes of the row.
template <class S>
__device__ inline void search_of_kept(const Team& team, Candidates& candidates, S& slice, const Filter& by_k,
                                      const Search<Counts>& search_k, Search<Masses>& search_p) {
  if (search_k.has_candidates()) {
    for (int i = int(threadIdx.x); i < candidates.size(); i += int(blockDim.x)) {
      candidates[i] = by_k(Values<1>{candidates[i]}).v[0];
    }
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
template <bool kLists>
__device__ inline void begin_top_p(Search<Masses, kLists>& search_p, float p, int vocab) {
  search_p.expect_from(least_threshold(p, vocab));
  if (goal(p, 1.0f) == kOutOfReach) search_p.skip();
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    top_k_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Limit top_k, float* out) {
  const Team team;
  TopKMemory& memory = prepare<TopKMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  Search<Counts> search_k(team, memory.counts);
  search_top_k(team, memory, slice, search_k, at(top_k, row, rows.vocab), false);
  const Filter filter(search_k.threshold(), divisor(mass_of_kept(team, memory, slice, search_k)));
  slice.write(out + row * rows.vocab, [&](const auto& y, int) { return filter(y); });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    top_p_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ PerRow top_p, float* out) {
  const Team team;
  TopPMemory& memory = prepare<TopPMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  const float p = at(top_p, row);
  Search<Masses> search_p(team, memory.masses);
  search_p.may_list(memory.candidates);
  begin_top_p(search_p, p, rows.vocab);
  const bool keeps_all = search_p.is_done();
  open(team, memory.largest, slice, [&](float c) { search_p.aim_at(goal(p, c)); }, search_p);
  search(team, values_of(slice), search_p);
  const uint64_t mass = keeps_all ? total_of(team, memory.kept, slice, MassOf()) : search_p.reached();
  const Filter filter(search_p.threshold(), divisor(mass));
  slice.write(out + row * rows.vocab, [&](const auto& y, int) { return filter(y); });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    top_k_top_p_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Limit top_k,
                              const __grid_constant__ PerRow top_p, float* out) {
  const Team team;
  TopKTopPMemory& memory = prepare<TopKTopPMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  Search<Counts> search_k(team, memory.top_k.counts);
  search_top_k(team, memory.top_k, slice, search_k, at(top_k, row, rows.vocab), true);
  const Filter by_k(search_k.threshold(), divisor(mass_of_kept(team, memory.top_k, slice, search_k)));
  Search<Masses> search_p(team, memory.masses);
  search_p.aim_at(goal(at(top_p, row), 1.0f));
  search_of_kept(team, memory.top_k.candidates, slice, by_k, search_k, search_p);
  const Filter by_p(search_p.threshold(), divisor(search_p.reached()));
  slice.write(out + row * rows.vocab, [&](const auto& y, int) { return by_p(by_k(y)); });
}

// The least fp32 that is not below the product, which is exact in fp64.
__device__ inline float min_p_threshold(float min_p, float largest) {
  const float positive = min_p > 0.0f ? min_p : 0.0f;
  const double product = double(positive < 1.0f ? positive : 1.0f) * double(largest);
  const float nearest = float(product);
  return double(nearest) < product ? __uint_as_float(__float_as_uint(nearest) + 1) : nearest;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    min_p_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ PerRow min_p, float* out) {
  const Team team;
  MinPMemory& memory = prepare<MinPMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  open(team, memory.largest, slice, [](float) {});
  const float largest = memory.largest.of(team);
  const float threshold = min_p_threshold(at(min_p, row), Probability::in_unit(largest, unit_of(largest)));
  const Filter all_kept(threshold);
  const uint64_t mass = total_of(team, memory.kept, slice, [&](float y) { return all_kept.mass(y); });
  const Filter filter(threshold, divisor(mass));
  slice.write(out + row * rows.vocab, [&](const auto& y, int) { return filter(y); });
}

}  // namespace fusedcomm::gpu::sampling
