// Probabilities from logits.
#pragma once

#include "gpu/sampling/row.h"

namespace fusedcomm::gpu::sampling {

template <class Team>
struct alignas(16) SoftmaxMemory {
  Largest<Team> largest;
  Total<Team> total;
  LargestKey<Team> first;  // ~ of the first place of the largest value

  __device__ void open(const Team& team) { largest.open(team), total.open(team), first.open(team); }
};

constexpr float kSmallestTemperature = 0x1p-126f;
constexpr float kLargestTemperature = 0x1p126f;

// exp((x - largest) / t), 0 for -inf. A product with 1 / t takes the place of the quotient: both are rounded.
class Weight {
 public:
  __device__ Weight(float largest, float t) : largest_(largest), inverse_(reciprocal(t)) {}
  __device__ float operator()(float x) const { return x > -INFINITY ? expf((x - largest_) * inverse_) : 0.0f; }

 private:
  float largest_, inverse_;
};

// Where the largest value comes first.
template <class Team, class S>
__device__ inline int first_place(const Team& team, LargestKey<Team>& first, const S& slice, float largest) {
  uint32_t found = 0;
  for (int i = slice.run().begin + lane(); i < slice.run().end; i += kWarpSize) {
    if (slice.at(i) == largest) found = max(found, ~uint32_t(i));
  }
  if (found != 0) first.note(found);
  share(team, first);
  return int(~first.of(team));
}

template <class T>
struct SoftmaxTemperature {
  static constexpr int kBlocksOfSm = 3;
  struct Arguments {
    Rows rows;
    PerRow temperature;
    float* out;
  };
  template <class Team>
  using Memory = SoftmaxMemory<Team>;

  template <class Team>
  __device__ static void run(const Arguments& a) {
    const Team team;
    Memory<Team>& memory = prepare<Memory<Team>>(team);
    const int64_t row = team.row();
    Slice slice(team, RowReader<T, Logit>(a.rows, row), a.rows.vocab, room_for_slice(memory));
    float largest_of_thread = -INFINITY;
    slice.load([&](const auto& x) {
      for (const float v : x.v) largest_of_thread = larger(v, largest_of_thread);
    });
    memory.largest.note(largest_of_thread);
    team.meet();
    share(team, memory.largest);
    const float largest = memory.largest.of(team);
    const float given = at(a.temperature, row);
    float* const to = a.out + row * a.rows.vocab;
    if (given >= kSmallestTemperature) {
      const float t = given < kLargestTemperature ? given : kLargestTemperature;
      const Weight weight(largest, t);
      uint64_t sum = 0;
      slice.replace(weight, [&](const auto& w) {
        for (const float v : w.v) sum += mass_of(v);
      });
      memory.total.note(sum);
      share(team, memory.total);
      const float inverse = reciprocal(divisor(memory.total.of(team).all));
      slice.write(to, [&](const auto& x, int) {
        return x.map([&](float v) { return (kHasClusters ? v : weight(v)) * inverse; });
      });
    } else {
      const int chosen = first_place(team, memory.first, slice, largest);
      slice.write(to, [&](const auto& x, int i) {
        auto at = i;
        return x.map([&](float v) { return at++ == chosen && v > -INFINITY ? 1.0f : 0.0f; });
      });
    }
  }
};

}  // namespace fusedcomm::gpu::sampling
