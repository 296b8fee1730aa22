// Filters: what is not below a threshold, divided by its mass; 0 elsewhere.
#pragma once

#include "cpu/sampling/select.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

struct TopK {
  Filter filter;
  int64_t survivors;  // candidates: what is kept; -1: there was no limit, and they are not there
};

// After the survey. Without needs_divisor the mass of what is kept is not summed.
template <class R>
TopK top_k_filter(Row<R>& row, int64_t k, bool needs_divisor = true) {
  TopK found = {{row.unit, 0.0f, 1.0f}, -1};
  if (k == 0) {
    if (needs_divisor) found.filter.divisor = divisor(weigh(row, 0.0f, found.filter));
    return found;
  }
  Scratch& scratch = row.scratch;
  const float unit = row.unit;
  const float least = lower_bound<Count>(scratch.groups, num_groups(row.vocab), uint64_t(k), scratch.bins,
                                         [unit](F32 x) FUSEDCOMM_INLINED { return x * unit; });
  const int64_t candidates = collect(row, least > 0.0f ? least : kSmallestFloat);
  found.filter.threshold = select_threshold<Count>(scratch, candidates, uint64_t(k)).value;
  found.survivors = drop_below(scratch.candidates, candidates, found.filter.threshold);
  if (needs_divisor) found.filter.divisor = divisor(total_mass(scratch.candidates, found.survivors));
  return found;
}

// Where the product of a divisor and a threshold says which values need no look: a little below it.
constexpr float kBelow = 1.0f - 0x1p-16f;

// The threshold of top-p among all that the filter, which has none, makes of the row; after the survey. unit: of what
// it makes.
template <class R>
Threshold top_p_threshold(Row<R>& row, const Filter& filter, float p, float unit) {
  const uint64_t aim = goal(p, unit);
  if (aim == kOutOfReach) return {0.0f, weigh(row, 0.0f, filter)};
  Scratch& scratch = row.scratch;
  float bound = lower_bound<Mass>(scratch.groups, num_groups(row.vocab), aim, scratch.bins, filter);
  // Values below this add up to less than half of 1 - p, so what is left of a row of mass 1 reaches p.
  if (bound == 0.0f) bound = (p > 0.0f ? 1.0f - p : 1.0f) * unit / (2.0f * float(row.vocab));
  const float least = bound * filter.divisor * kBelow;
  const auto search = [&](float from) {
    const int64_t candidates = collect(row, from > 0.0f ? from : kSmallestFloat);
    if (filter.divisor != 1.0f) divide(scratch.candidates, candidates, filter.divisor);
    return select_threshold<Mass>(scratch, candidates, aim);
  };
  const Threshold found = search(least);
  return found.value >= bound && found.value > 0.0f ? found : search(0.0f);
}

// Two filters in sequence.
struct TopKTopP {
  Filter by_k, by_p;

  FUSEDCOMM_INLINE F32 operator()(F32 x) const { return by_p(by_k(x)); }
  // What both keep, as by_k keeps it.
  FUSEDCOMM_INLINE F32 keep(F32 x) const {
    const F32 y = by_k.keep(x);
    return select(y / by_k.divisor >= by_p.threshold, y, F32{});
  }
  // No value below this is kept.
  float least() const {
    const float of_p = by_p.threshold * by_k.divisor * kBelow;
    return of_p > by_k.threshold ? of_p : by_k.threshold;
  }
};

template <class R>
TopKTopP top_k_top_p_filter(Row<R>& row, int64_t k, float p) {
  const TopK top_k = top_k_filter(row, k);
  const Filter& by_k = top_k.filter;
  Threshold found;
  if (top_k.survivors < 0) {
    found = top_p_threshold(row, by_k, p, 1.0f);
  } else {
    float* const survivors = row.scratch.candidates;
    divide(survivors, top_k.survivors, by_k.divisor);
    const uint64_t aim = goal(p, 1.0f);
    found = aim == kOutOfReach ? Threshold{0.0f, total_mass(survivors, top_k.survivors)}
                               : select_threshold<Mass>(row.scratch, top_k.survivors, aim);
  }
  return {by_k, {1.0f, found.value, divisor(found.reached)}};
}

// The least fp32 that is not below the product, which is exact in fp64.
inline float min_p_threshold(float min_p, float largest) {
  const float positive = min_p > 0.0f ? min_p : 0.0f;
  const double product = double(positive < 1.0f ? positive : 1.0f) * double(largest);
  const float nearest = float(product);
  return double(nearest) < product ? bit_cast<float>(bit_cast<uint32_t>(nearest) + 1) : nearest;
}

// ---- rows begin … end of a call ----

// Calls body(row, i) for each of them, after the survey.
template <class T, class Body>
inline void each_row(const Rows& rows, int64_t begin, int64_t end, Scratch& scratch, const Body& body) {
  for (int64_t i = begin; i < end; ++i) {
    Row<RowReader<T, Probability>> row = {{rows, i}, rows.vocab, scratch};
    survey<false>(row);
    body(row, i);
  }
}

template <class T>
void top_k_renorm(const Rows& rows, const Limit& top_k, float* out, int64_t begin, int64_t end, Scratch& scratch) {
  each_row<T>(rows, begin, end, scratch, [&](auto& row, int64_t i) {
    const Filter filter = top_k_filter(row, at(top_k, i, rows.vocab)).filter;
    write(row, filter.threshold, out + i * rows.vocab, filter);
  });
}

template <class T>
void top_p_renorm(const Rows& rows, const PerRow& top_p, float* out, int64_t begin, int64_t end, Scratch& scratch) {
  each_row<T>(rows, begin, end, scratch, [&](auto& row, int64_t i) {
    const Threshold found = top_p_threshold(row, {row.unit, 0.0f, 1.0f}, at(top_p, i), row.unit);
    const Filter filter = {row.unit, found.value, divisor(found.reached)};
    write(row, filter.threshold, out + i * rows.vocab, filter);
  });
}

template <class T>
void top_k_top_p_renorm(const Rows& rows, const Limit& top_k, const PerRow& top_p, float* out, int64_t begin,
                        int64_t end, Scratch& scratch) {
  each_row<T>(rows, begin, end, scratch, [&](auto& row, int64_t i) {
    const TopKTopP filters = top_k_top_p_filter(row, at(top_k, i, rows.vocab), at(top_p, i));
    write(row, filters.least(), out + i * rows.vocab, filters);
  });
}

template <class T>
void min_p_renorm(const Rows& rows, const PerRow& min_p, float* out, int64_t begin, int64_t end, Scratch& scratch) {
  each_row<T>(rows, begin, end, scratch, [&](auto& row, int64_t i) {
    Filter filter = {row.unit, min_p_threshold(at(min_p, i), row.largest * row.unit), 1.0f};
    filter.divisor = divisor(weigh(row, filter.threshold, [&](F32 x) FUSEDCOMM_INLINED { return filter.keep(x); }));
    write(row, filter.threshold, out + i * rows.vocab, filter);
  });
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
