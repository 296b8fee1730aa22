// A row, and the passes over it. They go by runs of kRunVectors vectors, of which the first pass notes the largest
// value of each lane: so later ones leave out runs in which nothing matters.
#pragma once

#include "cpu/sampling/fixed_point.h"

// Of a lambda that is called for every vector.
#define FUSEDCOMM_INLINED __attribute__((always_inline))

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

constexpr int64_t kRun = int64_t(kRunVectors) * kLanes;

inline int64_t at(const Integers& t, int64_t i) {
  return t.is_wide ? static_cast<const int64_t*>(t.data)[i] : static_cast<const int32_t*>(t.data)[i];
}

inline float at(const PerRow& t, int64_t row) { return t.rows != nullptr ? t.rows[row] : t.value; }

// From 1 to vocab - 1, or 0 for none.
inline int64_t at(const Limit& t, int64_t row, int64_t vocab) {
  const int64_t k = t.rows.data != nullptr ? at(t.rows, row) : t.value;
  return k > 0 && k < vocab ? k : 0;
}

template <class V>
FUSEDCOMM_INLINE F32 with_padding(F32 x, int64_t count) {
  for (int64_t l = count; l < kLanes; ++l) x[l] = V::kLeast;
  return x;
}

// Reads values V of type T.
template <class T, class V>
class RowReader {
 public:
  using Value = V;

  RowReader(const Rows& rows, int64_t row) {
    int64_t source = row;
    if (rows.indices.data != nullptr) {
      source = at(rows.indices, row);
      source = source < 0 ? 0 : source < rows.num_rows ? source : rows.num_rows - 1;
    }
    data_ = static_cast<const T*>(rows.data) + source * rows.stride;
  }

  FUSEDCOMM_INLINE F32 whole(int64_t i) const { return V::of(Io<T>::load(data_ + i)); }
  // Lanes from count on are V's least.
  FUSEDCOMM_INLINE F32 part(int64_t i, int64_t count) const {
    return with_padding<V>(V::of(load_partial(data_ + i, count)), count);
  }

 private:
  const T* data_;
};

// Calls body(i, x) for the vectors of elements begin … end; the last one may be a part.
template <class Reader, class Body>
FUSEDCOMM_INLINE void each_vector(const Reader& read, int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, read.whole(i));
  if (i < end) body(i, read.part(i, end - i));
}

// The lanes of x that are elements of out below end, from i on.
FUSEDCOMM_INLINE void store(float* out, int64_t i, int64_t end, F32 x) {
  if (end - i >= kLanes) {
    store_bits(out + i, x);
  } else {
    store_partial(out + i, x, end - i);
  }
}

inline int64_t end_of_run(int64_t begin, int64_t vocab) { return begin + kRun < vocab ? begin + kRun : vocab; }

inline int64_t num_groups(int64_t vocab) { return (vocab + kRun - 1) / kRun * kLanes; }

template <class R>
struct Row {
  using Reader = R;

  R read;
  int64_t vocab;
  Scratch& scratch;
  float largest = 0.0f;
  float unit = 1.0f;

  // Whether a value of the run is least or more, in the row's unit.
  FUSEDCOMM_INLINE bool reaches(int64_t run_begin, float least) const {
    const F32 of_lanes = load_bits<F32>(scratch.groups + run_begin / kRunVectors);
    return lanes_of(of_lanes * unit >= least) != 0;
  }
};

// The first pass: the largest value and the unit. kWeigh: the masses of the runs too, as far as the unit is 1; then
// their sum comes back.
template <bool kWeigh, class R>
uint64_t survey(Row<R>& row) {
  F32 largest = splat(R::Value::kLeast);
  uint64_t total = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kRun) {
    F32 of_lanes = splat(R::Value::kLeast);
    MassSum sum;
    each_vector(row.read, begin, end_of_run(begin, row.vocab), [&](int64_t, F32 x) FUSEDCOMM_INLINED {
      of_lanes = larger_of(x, of_lanes);
      if (kWeigh) sum.add(x);
    });
    store_bits(row.scratch.groups + begin / kRunVectors, of_lanes);
    largest = larger_of(of_lanes, largest);
    if (kWeigh) total += row.scratch.masses[begin / kRun] = sum.total();
  }
  row.largest = largest_lane(largest);
  row.unit = unit_of(row.largest);
  return total;
}

// What a filter makes of values.
struct Filter {
  float unit = 1.0f, threshold = 0.0f, divisor = 1.0f;

  // What it keeps, as it is.
  FUSEDCOMM_INLINE F32 keep(F32 x) const {
    const F32 y = x * unit;
    return select(y >= threshold, y, F32{});
  }
  FUSEDCOMM_INLINE F32 operator()(F32 x) const { return keep(x) / divisor; }
};

// The masses of the runs of what map(x) makes of the row, and their sum. Runs below `least` are left out: they have no
// mass.
template <class R, class Map>
uint64_t weigh(Row<R>& row, float least, const Map& map) {
  uint64_t total = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kRun) {
    MassSum sum;
    if (row.reaches(begin, least)) {
      each_vector(row.read, begin, end_of_run(begin, row.vocab),
                  [&](int64_t, F32 x) FUSEDCOMM_INLINED { sum.add(map(x)); });
    }
    total += row.scratch.masses[begin / kRun] = sum.total();
  }
  return total;
}

// What map(x) makes of the row; of runs below `least` it is 0.
template <class R, class Map>
void write(const Row<R>& row, float least, float* out, const Map& map) {
  for (int64_t begin = 0; begin < row.vocab; begin += kRun) {
    const int64_t end = end_of_run(begin, row.vocab);
    if (!row.reaches(begin, least)) {
      __builtin_memset(out + begin, 0, size_t(end - begin) * sizeof(float));
      continue;
    }
    each_vector(row.read, begin, end, [&](int64_t i, F32 x) FUSEDCOMM_INLINED { store(out, i, end, map(x)); });
  }
}

// The values that are least or more, in the row's unit, to scratch.candidates. least is above 0.
template <class R>
int64_t collect(const Row<R>& row, float least) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kRun) {
    if (!row.reaches(begin, least)) continue;
    each_vector(row.read, begin, end_of_run(begin, row.vocab), [&](int64_t, F32 x) FUSEDCOMM_INLINED {
      const F32 y = x * row.unit;
      const uint32_t lanes = lanes_of(y >= least);
      if (lanes != 0) count = append(row.scratch.candidates, count, y, lanes);
    });
  }
  return count;
}

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
