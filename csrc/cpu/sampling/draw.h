// The choice of tokens: the first id of a row such that the masses up to it are above a part of all of them.
#pragma once

#include "cpu/sampling/filters.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

// scratch.masses holds those of the runs of what map(x) makes of the row, total their sum.
template <class R, class Map>
int32_t draw(const Row<R>& row, uint64_t total, float u, const Map& map) {
  if (total == 0) return 0;
  const uint64_t target = part_of(total, u);
  uint64_t up_to = 0;
  int64_t begin = 0;
  for (; up_to + row.scratch.masses[begin / kRun] <= target; begin += kRun) up_to += row.scratch.masses[begin / kRun];
  int64_t token = -1;
  each_vector(row.read, begin, end_of_run(begin, row.vocab), [&](int64_t i, F32 x) FUSEDCOMM_INLINED {
    if (token >= 0) return;
    float q[kLanes];
    store_bits(q, mass_of(map(x)));
    for (int l = 0; l < kLanes && token < 0; ++l) {
      up_to += uint64_t(int64_t(q[l]));
      if (up_to > target) token = i + l;
    }
  });
  return int32_t(token);
}

// From the row as it is, after a survey that has weighed it.
template <class R>
int32_t draw_from(Row<R>& row, uint64_t total, float u) {
  const float unit = row.unit;
  const auto in_unit = [unit](F32 x) FUSEDCOMM_INLINED { return x * unit; };
  if (unit != 1.0f) total = weigh(row, 0.0f, in_unit);
  return draw(row, total, u, in_unit);
}

// Both filters look at the whole row, so both thresholds are of the same values.
template <class R>
Filter joint_filter(Row<R>& row, int64_t k, float p) {
  const TopK top_k = top_k_filter(row, k, false);
  const uint64_t aim = goal(p, row.unit);
  if (aim == kOutOfReach) return top_k.filter;
  // Where what top-k keeps does not reach p, top-p keeps all of it and more.
  const Threshold by_p = top_k.survivors < 0 ? top_p_threshold(row, top_k.filter, p, row.unit)
                                             : select_threshold<Mass>(row.scratch, top_k.survivors, aim);
  return {row.unit, by_p.value > top_k.filter.threshold ? by_p.value : top_k.filter.threshold, 1.0f};
}

template <class R, class Kept>
int32_t draw_kept(Row<R>& row, float least, float u, const Kept& kept) {
  const auto map = [&kept](F32 x) FUSEDCOMM_INLINED { return kept.keep(x); };
  return draw(row, weigh(row, least, map), u, map);
}

template <class T>
void sample(const Rows& rows, const float* uniforms, int32_t* tokens, int64_t begin, int64_t end, Scratch& scratch) {
  for (int64_t i = begin; i < end; ++i) {
    Row<RowReader<T, Probability>> row = {{rows, i}, rows.vocab, scratch};
    const uint64_t total = survey<true>(row);
    tokens[i] = draw_from(row, total, uniforms[i]);
  }
}

template <class T>
void sample_top_k_top_p(const Rows& rows, const Limit& top_k, const PerRow& top_p, const float* uniforms, bool joint,
                        int32_t* tokens, int64_t begin, int64_t end, Scratch& scratch) {
  each_row<T>(rows, begin, end, scratch, [&](auto& row, int64_t i) {
    const int64_t k = at(top_k, i, rows.vocab);
    const float p = at(top_p, i), u = uniforms[i];
    if (joint) {
      const Filter both = joint_filter(row, k, p);
      tokens[i] = draw_kept(row, both.threshold, u, both);
    } else if (goal(p, 1.0f) != kOutOfReach) {
      const TopKTopP filters = top_k_top_p_filter(row, k, p);
      tokens[i] = draw_kept(row, filters.least(), u, filters);
    } else {
      const Filter by_k = top_k_filter(row, k, false).filter;
      tokens[i] = draw_kept(row, by_k.threshold, u, by_k);
    }
  });
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
