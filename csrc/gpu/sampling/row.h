// How every kernel begins with its row.
#pragma once

#include "gpu/sampling/select.h"
#include "gpu/sampling/slice.h"
#include "gpu/sampling/tally.h"

namespace fusedcomm::gpu::sampling {

// The shared memory of a block: what a kernel asks for, cleared and opened, then room for the slice. Inputs may be read
// from here on; the team has not met.
template <class Memory, class Team>
__device__ inline Memory& prepare(const Team& team) {
  Memory& memory = *static_cast<Memory*>(shared_memory());
  clear(memory);
  __syncthreads();
  if (threadIdx.x == 0) memory.open(team);
  team.arrive();
  wait_for_previous_kernel();
  let_next_kernel_start();
  return memory;
}

template <class Memory>
__device__ inline float* room_for_slice(Memory& memory) {
  return reinterpret_cast<float*>(&memory + 1);
}

// The values of a slice, as search() takes them; and through a function.
template <class S>
__device__ inline auto values_of(S& slice) {
  return [&](const auto& f) { slice.each(f); };
}
template <class S, class Map>
__device__ inline auto mapped(S& slice, const Map& map) {
  return [&](const auto& f) { slice.each([&](const auto& x) { f(map(x)); }); };
}

// Loads the slice, lets the team meet, and makes the first round of the searches. The unit of almost all rows is 1: so
// values are taken for y while the largest is still being looked for, and once more if it was not. Aims depend on the
// unit: aim(unit) sets them.
template <class Team, class S, class Aim, class... Searches>
__device__ inline void open(const Team& team, Largest<Team>& largest, S& slice, const Aim& aim, Searches&... searches) {
  float largest_of_thread = 0.0f;
  slice.load([&](const auto& x) {
    for (const float v : x.v) largest_of_thread = larger(v, largest_of_thread);
    (searches.add(x), ...);
  });
  largest.note(largest_of_thread);
  team.meet();
  share(team, largest, searches...);
  const float unit = unit_of(largest.of(team));
  slice.bring_to(unit);
  aim(unit);
  if constexpr (sizeof...(searches) > 0) {
    if (unit != 1.0f) {
      restart(team, searches...);
      slice.each([&](const auto& y) { (searches.add(y), ...); });
      share(team, searches...);
    }
    settle(team, searches...);
  }
}

// Of mass(x) over the row.
template <class Team, class S, class Mass>
__device__ inline uint64_t total_of(const Team& team, Total<Team>& total, S& slice, const Mass& mass) {
  uint64_t sum = 0;
  slice.each([&](const auto& x) {
    for (const float v : x.v) sum += mass(v);
  });
  total.note(sum);
  share(team, total);
  return total.of(team).all;
}

}  // namespace fusedcomm::gpu::sampling
