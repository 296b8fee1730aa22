// Filters: what is not below a threshold, divided by its mass; 0 elsewhere.
#pragma once

#include "gpu/sampling/row.h"

namespace fusedcomm::gpu::sampling {

struct alignas(16) TopKMemory {
  Largest largest;
  Total kept;
  SearchMemory<Counts> counts;

  __device__ void open(const Team& team) { largest.open(team), kept.open(team), counts.open(team); }
};

struct alignas(16) TopPMemory {
  Largest largest;
  SearchMemory<Masses> masses;

  __device__ void open(const Team& team) { largest.open(team), masses.open(team); }
};

struct alignas(16) TopKTopPMemory {
  Largest largest;
  Total kept;
  SearchMemory<Counts> counts;
  SearchMemory<Masses> masses;

  __device__ void open(const Team& team) { largest.open(team), kept.open(team), counts.open(team), masses.open(team); }
};

struct alignas(16) MinPMemory {
  Largest largest;
  Total kept;

  __device__ void open(const Team& team) { largest.open(team), kept.open(team); }
};

// What a filter makes of the values of a row.
struct Filter {
  float unit, threshold, divisor;

  __device__ float operator()(float x) const {
    const float y = x * unit;
    return y >= threshold ? divide(y, divisor) : 0.0f;
  }
  // Of what it keeps, before it is divided.
  __device__ uint64_t mass(float x) const {
    const float y = x * unit;
    return y >= threshold ? mass_of(y) : 0;
  }
};

// The filter of top-k. It divides by the mass of what it keeps if this is wanted.
template <class S>
__device__ inline Filter top_k_filter(const Team& team, Largest& largest, SearchMemory<Counts>& counts, Total& kept,
                                      S& slice, int k, bool divides = true) {
  Search<Counts> search_k(counts);
  if (k == 0) search_k.skip();
  search_k.aim_at(uint64_t(k));
  const float unit = open(team, largest, slice, [](float) {}, search_k);
  search(team, mapped(slice, InUnit{unit}), search_k);
  Filter filter = {unit, search_k.threshold(), 1.0f};
  if (divides) filter.divisor = divisor(total_of(team, kept, slice, [&](float x) { return filter.mass(x); }));
  return filter;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    top_k_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Limit top_k, float* out) {
  const Team team;
  TopKMemory& memory = prepare<TopKMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  const Filter filter =
      top_k_filter(team, memory.largest, memory.counts, memory.kept, slice, at(top_k, row, rows.vocab));
  slice.write(out + row * rows.vocab, [&](float x, int) { return filter(x); });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    top_p_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ PerRow top_p, float* out) {
  const Team team;
  TopPMemory& memory = prepare<TopPMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  const float p = at(top_p, row);
  Search<Masses> search_p(memory.masses);
  const float unit = open(team, memory.largest, slice, [&](float c) { search_p.aim_at(goal(p, c)); }, search_p);
  search(team, mapped(slice, InUnit{unit}), search_p);
  const Filter filter = {unit, search_p.threshold(), divisor(search_p.reached())};
  slice.write(out + row * rows.vocab, [&](float x, int) { return filter(x); });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    top_k_top_p_renorm_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Limit top_k,
                              const __grid_constant__ PerRow top_p, float* out) {
  const Team team;
  TopKTopPMemory& memory = prepare<TopKTopPMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Probability>(rows, row), rows.vocab, room_for_slice(memory));
  const Filter by_k = top_k_filter(team, memory.largest, memory.counts, memory.kept, slice, at(top_k, row, rows.vocab));
  Search<Masses> search_p(memory.masses);
  search_p.aim_at(goal(at(top_p, row), 1.0f));
  search(team, mapped(slice, by_k), search_p);
  const Filter by_p = {1.0f, search_p.threshold(), divisor(search_p.reached())};
  slice.write(out + row * rows.vocab, [&](float x, int) { return by_p(by_k(x)); });
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
  const float unit = open(team, memory.largest, slice, [](float) {});
  Filter filter = {unit, min_p_threshold(at(min_p, row), memory.largest.of(team) * unit), 1.0f};
  filter.divisor = divisor(total_of(team, memory.kept, slice, [&](float x) { return filter.mass(x); }));
  slice.write(out + row * rows.vocab, [&](float x, int) { return filter(x); });
}

}  // namespace fusedcomm::gpu::sampling
