// A block's part of a row: a run of neighbouring elements, of which each warp has a run in turn.
#pragma once

#include "gpu/sampling.h"
#include "gpu/sampling/fixed_point.h"
#include "gpu/sampling/team.h"

namespace fusedcomm::gpu::sampling {

constexpr int kQuad = 4;  // elements that a thread moves at a time

__device__ inline int64_t at(const Integers& v, int64_t i) {
  return v.is_wide ? static_cast<const int64_t*>(v.data)[i] : int64_t(static_cast<const int32_t*>(v.data)[i]);
}

__device__ inline float at(const PerRow& v, int64_t i) { return v.rows != nullptr ? v.rows[i] : v.value; }

// 0: none.
__device__ inline int32_t at(const Limit& v, int64_t i, int32_t vocab) {
  const int64_t k = v.rows.data != nullptr ? at(v.rows, i) : v.value;
  return k > 0 && k < vocab ? int32_t(k) : 0;
}

// ---- elements of a row as fp32 ----

__device__ inline float load_one(const float* p) { return *p; }
__device__ inline float load_one(const BFloat16* p) { return __uint_as_float(uint32_t(p->bits) << 16); }
__device__ inline float load_one(const Half* p) {
  float value, zero;
  unpack_half(p->bits, value, zero);
  return value;
}

__device__ inline void load_quad(const float* p, float (&x)[kQuad]) {
  const Vec v = *reinterpret_cast<const Vec*>(p);
  Io<float>::unpack(v, x);
}

// A type of the compiler's own: of a struct it may make four stores.
__device__ inline void store_quad(float* p, const float (&x)[kQuad]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}

struct alignas(8) HalfVec {
  uint32_t w[2];
};
__device__ inline void load_quad(const BFloat16* p, float (&x)[kQuad]) {
  const HalfVec v = *reinterpret_cast<const HalfVec*>(p);
  unpack_bf16(v.w[0], x[0], x[1]);
  unpack_bf16(v.w[1], x[2], x[3]);
}
__device__ inline void load_quad(const Half* p, float (&x)[kQuad]) {
  const HalfVec v = *reinterpret_cast<const HalfVec*>(p);
  unpack_half(v.w[0], x[0], x[1]);
  unpack_half(v.w[1], x[2], x[3]);
}

template <class T>
__device__ inline bool has_quads(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kQuad * sizeof(T)) == 0;
}

// Some values of a thread: what is done to them is done side by side, so that one need not wait for another.
template <int kCount>
struct Values {
  float v[kCount];

  template <class F>
  __device__ Values map(const F& f) const {
    Values mapped;
#pragma unroll
    for (int i = 0; i < kCount; ++i) mapped.v[i] = f(v[i]);
    return mapped;
  }
};

// The values of a row, as they count.
template <class T, class M>
class RowReader {
 public:
  using Meaning = M;

  __device__ RowReader(const Rows& rows, int64_t row) {
    int64_t at_row = row;
    if (rows.indices.data != nullptr) {
      const int64_t index = at(rows.indices, row), last = rows.num_rows - 1;
      at_row = index < 0 ? 0 : index < last ? index : last;
    }
    row_ = static_cast<const T*>(rows.data) + at_row * rows.stride;
  }

  __device__ bool has_quads() const { return sampling::has_quads(row_); }
  __device__ float one(int i) const { return Meaning::of(load_one(row_ + i)); }
  __device__ void quad(int i, float (&x)[kQuad]) const {
    load_quad(row_ + i, x);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) x[e] = Meaning::of(x[e]);
  }

 private:
  const T* row_;
};

// Elements of the row, [begin, end).
struct Run {
  int begin, end;
};

// Of a slice that a block keeps: so many masses add up in SliceMasses, half of them to a word.
constexpr int kMostElements = 1 << 15;

// Runs begin at multiples of four.
__host__ __device__ constexpr int elements_of_block(int vocab, int blocks) {
  return ((vocab + blocks - 1) / blocks + kQuad - 1) / kQuad * kQuad;
}

// load() first; it and each() call f(values) until they have been through the slice, in no order. Values are kept in
// shared memory where blocks make up teams: then memory is read once. Elsewhere it (or the cache) is read each time,
// for a row of one block may be longer than its shared memory.
template <class Reader>
class Slice {
 public:
  // kept: elements_of_block() values of shared memory.
  template <class Team>
  __device__ Slice(const Team& team, const Reader& reader, int vocab, float* kept) : reader_(reader), kept_(kept) {
    const int elements = elements_of_block(vocab, team.size());
    first_ = min(elements * team.rank(), vocab);
    const int end = min(first_ + elements, vocab);
    const int quads = (end - first_ + kQuad - 1) / kQuad;
    const int each = (quads + num_warps() - 1) / num_warps() * kQuad;
    run_.begin = min(first_ + each * warp(), end);
    run_.end = min(run_.begin + each, end);
  }

  __device__ Reader& reader() { return reader_; }

  // From here on values are those of load() in this unit of the row. After a barrier behind load().
  __device__ void bring_to(float unit) {
    unit_ = unit;
    if (!kHasClusters || unit == 1.0f) return;
    replace([&](float x) { return Reader::Meaning::in_unit(x, unit); }, [](const auto&) {});
  }

  // Calls f(values) for all values map(x), which take the place of x where values are kept. After a barrier behind
  // load().
  template <class Map, class F>
  __device__ void replace(const Map& map, const F& f) {
    if constexpr (kHasClusters) {
      const int whole = run_.end - (run_.end - run_.begin) % kQuad;
#pragma unroll 2
      for (int i = run_.begin + kQuad * lane(); i < whole; i += kQuad * kWarpSize) {
        Values<kQuad> x;
        load_quad(kept_ + (i - first_), x.v);
        x = x.map(map);
        store_quad(kept_ + (i - first_), x.v);
        f(x);
      }
      const int i = whole + lane();
      if (i < run_.end) f(Values<1>{kept_[i - first_] = map(kept_[i - first_])});
    } else {
      each([&](const auto& x) { f(x.map(map)); });
    }
  }

  // What this warp has. f() is called for all of it by its lanes.
  __device__ const Run& run() const { return run_; }

  __device__ float at(int i) const {
    if constexpr (kHasClusters) return kept_[i - first_];
    return Reader::Meaning::in_unit(reader_.one(i), unit_);
  }

  template <class F>
  __device__ void load(const F& f) {
    read(f, [](float x) { return x; });
  }

  template <class F>
  __device__ void each(const F& f) {
    if constexpr (kHasClusters) {
      const int whole = run_.end - (run_.end - run_.begin) % kQuad;
#pragma unroll 1
      for (int i = run_.begin + kQuad * lane(); i < whole; i += kQuad * kWarpSize) {
        Values<kQuad> x;
        load_quad(kept_ + (i - first_), x.v);
        f(x);
      }
      if (whole + lane() < run_.end) f(Values<1>{kept_[whole + lane() - first_]});
    } else {
      read(f, [&](float x) { return Reader::Meaning::in_unit(x, unit_); });
    }
  }

  // row[i…] = f(values, i) for all values, i being the place of the first; after a barrier behind load().
  template <class F>
  __device__ void write(float* row, const F& f) const {
    const int end = run_.end;
    if (!has_quads(row) || !(kHasClusters || reader_.has_quads())) {
#pragma unroll 4
      for (int i = run_.begin + lane(); i < end; i += kWarpSize) row[i] = f(Values<1>{at(i)}, i).v[0];
      return;
    }
    const int whole = end - (end - run_.begin) % kQuad;
#pragma unroll 1
    for (int i = run_.begin + kQuad * lane(); i < whole; i += kQuad * kWarpSize) {
      Values<kQuad> x;
      if constexpr (kHasClusters) {
        load_quad(kept_ + (i - first_), x.v);
      } else {
        reader_.quad(i, x.v);
        x = x.map([&](float v) { return Reader::Meaning::in_unit(v, unit_); });
      }
      store_quad(row + i, f(x, i).v);
    }
    const int i = whole + lane();
    if (i < end) row[i] = f(Values<1>{at(i)}, i).v[0];
  }

 private:
  // f(meaning(values)) for all values of the slice, from memory.
  template <class F, class Map>
  __device__ void read(const F& f, const Map& meaning) {
    const int end = run_.end;
    if (!reader_.has_quads()) {
#pragma unroll 4
      for (int i = run_.begin + lane(); i < end; i += kWarpSize) f(take(i).map(meaning));
      return;
    }
    constexpr int kStep = kQuad * kWarpSize;      // from a quad of a thread to its next one
    constexpr int kBatch = kHasClusters ? 4 : 2;  // quads in flight
    const int whole = end - (end - run_.begin) % kQuad;
#pragma unroll 1
    for (int first = run_.begin + kQuad * lane(); first < whole; first += kBatch * kStep) {
      Values<kQuad> x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) reader_.quad(min(first + j * kStep, whole - kQuad), x[j].v);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * kStep >= whole) continue;
        keep(first + j * kStep, x[j]);
        f(x[j].map(meaning));
      }
    }
    if (whole + lane() < end) f(take(whole + lane()).map(meaning));
  }

  __device__ Values<1> take(int i) {
    const Values<1> x = {reader_.one(i)};
    if constexpr (kHasClusters) kept_[i - first_] = x.v[0];
    return x;
  }

  __device__ void keep(int i, const Values<kQuad>& x) {
    if constexpr (kHasClusters) store_quad(kept_ + (i - first_), x.v);
  }

  Reader reader_;
  float* kept_;
  int first_;
  Run run_;
  float unit_ = 1.0f;
};

}  // namespace fusedcomm::gpu::sampling
