// Probabilities from logits.
#pragma once

#include "gpu/sampling/row.h"

namespace fusedcomm::gpu::sampling {

struct alignas(16) SoftmaxMemory {
  Largest largest;
  Total total;
  LargestKey first;  // ~ of the first place of the largest value

  __device__ void open(const Team& team) { largest.open(team), total.open(team), first.open(team); }
};

constexpr float kSmallestTemperature = 0x1p-126f;
constexpr float kLargestTemperature = 0x1p126f;

// Where the largest value comes first.
template <class S>
__device__ inline int first_place(const Team& team, LargestKey& first, const S& slice, float largest) {
  uint32_t found = 0;
  for (int i = slice.run().begin + lane(); i < slice.run().end; i += kWarpSize) {
    if (slice.at(i) == largest) found = max(found, ~uint32_t(i));
  }
  if (found != 0) first.note(found);
  share(team, first);
  return int(~first.of(team));
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    softmax_temperature_kernel(const __grid_constant__ Rows rows, const __grid_constant__ PerRow temperature,
                               float* out) {
  const Team team;
  SoftmaxMemory& memory = prepare<SoftmaxMemory>(team);
  const int64_t row = team.row();
  Slice slice(team, RowReader<T, Logit>(rows, row), rows.vocab, room_for_slice(memory));
  float largest_of_thread = -INFINITY;
  slice.load([&](const auto& x) {
    for (const float v : x.v) largest_of_thread = v > largest_of_thread ? v : largest_of_thread;
  });
  memory.largest.note(largest_of_thread);
  team.meet();
  share(team, memory.largest);
  const float largest = memory.largest.of(team);
  const float given = at(temperature, row);
  float* const to = out + row * rows.vocab;
  if (given >= kSmallestTemperature) {
    const float t = given < kLargestTemperature ? given : kLargestTemperature;
    const auto weight = [&](float x) { return x > -INFINITY ? expf(divide(x - largest, t)) : 0.0f; };
    const float m = divisor(total_of(team, memory.total, slice, [&](float x) { return mass_of(weight(x)); }));
    slice.write(to, [&](float x, int) { return divide(weight(x), m); });
  } else {
    const int chosen = first_place(team, memory.first, slice, largest);
    slice.write(to, [&](float x, int i) { return i == chosen && x > -INFINITY ? 1.0f : 0.0f; });
  }
}

}  // namespace fusedcomm::gpu::sampling
