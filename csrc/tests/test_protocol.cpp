// The Communicator with threads as ranks: every collective against scalar arithmetic in random order, and every way
// that a group ends. Under the sanitizers it shows races and steps outside the slots.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "check.h"
#include "cpu/communicator.h"
#include "scalar.h"

using namespace fusedcomm::cpu;
using namespace fusedcomm::test;

namespace {

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kHalf, DType::kFloat};
constexpr int64_t kSlot = 8192;  // small: most inputs take several pieces
constexpr int64_t kAlwaysOneShot = int64_t(1) << 40;

struct Options {
  int64_t one_shot_max = 1024;
  int64_t piece_bytes = kSlot;
  double timeout_s = 60.0;
  int spins = 50;
  int64_t yield_ns = 0;
};

// The segments of a group and a communicator a rank, as set-up would make them.
class World {
 public:
  explicit World(int size, const Options& options = {}) : size_(size) {
    std::vector<void*> segments;
    for (int r = 0; r < size; ++r) {
      memory_.emplace_back(static_cast<char*>(std::aligned_alloc(4096, size_t(segment_bytes(kSlot)))), &std::free);
      std::memset(memory_.back().get(), 0xa5, size_t(segment_bytes(kSlot)));
      segments.push_back(new (memory_.back().get()) SegmentHeader());
      deaths_.push_back(eventfd(0, EFD_CLOEXEC));  // becomes readable, as a pidfd does when its process ends
    }
    for (int r = 0; r < size; ++r) {
      Config config;
      config.rank = r;
      config.world_size = size;
      config.slot_bytes = kSlot;
      config.piece_bytes = options.piece_bytes;
      config.one_shot_max_bytes = options.one_shot_max;
      config.min_chunk_bytes = 256;
      config.max_chunk_bytes = 1024;
      config.wait = {options.spins, options.yield_ns};
      config.timeout_ns = int64_t(options.timeout_s * 1e9);
      comms_.push_back(std::make_unique<Communicator>(config, segments, deaths_));
    }
  }
  ~World() {
    for (const int fd : deaths_) close(fd);
  }

  int size() const { return size_; }

  void die(int rank) {
    const uint64_t one = 1;
    CHECK(write(deaths_[size_t(rank)], &one, sizeof(one)) == sizeof(one));
  }

  // body(rank, comm) on a thread a rank
  template <class Body>
  void run(const Body& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < size_; ++r) threads.emplace_back([&, r] { body(r, *comms_[size_t(r)]); });
    for (std::thread& t : threads) t.join();
  }

 private:
  int size_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> memory_;
  std::vector<int> deaths_;
  std::vector<std::unique_ptr<Communicator>> comms_;
};

// Calls until it is done, as Python does; throws what it throws.
template <class Call>
void complete(const Call& call) {
  while (!call()) {
  }
}

// What the call fails with; "" if it does not.
template <class Call>
std::string error_of(const Call& call) {
  try {
    complete(call);
  } catch (const CommError& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Rank r's input of a call: any rank can make those of all.
std::vector<uint8_t> input(int call, int rank, DType dtype, int64_t count) {
  std::mt19937 random(unsigned(call * 64 + rank));
  std::normal_distribution<float> normal;
  std::vector<uint8_t> bytes(size_t(count * element_bytes(dtype)));
  for (int64_t i = 0; i < count; ++i) store(bytes.data(), dtype, i, round_to(normal(random), dtype));
  return bytes;
}

struct AllInputs {
  std::vector<std::vector<uint8_t>> data;
  std::vector<const void*> pointers;

  AllInputs(int call, int size, DType dtype, int64_t count) {
    for (int r = 0; r < size; ++r) data.push_back(input(call, r, dtype, count));
    for (const auto& d : data) pointers.push_back(d.data());
  }
};

std::vector<uint8_t> poisoned(int64_t bytes) { return std::vector<uint8_t>(size_t(bytes), 0xa5); }

void check_all_reduce(int call, int rank, Communicator& comm, int size, DType dtype, int64_t count, bool in_place) {
  const AllInputs in(call, size, dtype, count);
  std::vector<uint8_t> own = in.data[size_t(rank)], other = poisoned(count * element_bytes(dtype));
  std::vector<uint8_t>& out = in_place ? own : other;
  complete([&] { return comm.all_reduce(dtype, own.data(), out.data(), count); });
  for (int64_t i = 0; i < count; ++i) {
    CHECK_THAT(same(load(out.data(), dtype, i), rank_order_sum(in.pointers, dtype, i)),
               "call " << call << " rank " << rank << " of " << size << " at " << i << " of " << count);
  }
}

// Rows with residual, and quantised where group_size says so.
void check_norm(int call, int rank, Communicator& comm, int size, DType dtype, int64_t rows, int64_t hidden,
                int64_t group_size) {
  const int64_t count = rows * hidden, element = element_bytes(dtype);
  const AllInputs in(call, size, dtype, count);
  const std::vector<uint8_t> residual = input(call, 40 + rank, dtype, count);  // each rank's own
  const bool with_residual = call % 3 != 0;
  std::vector<float> weight(size_t(hidden), 1.0f);
  for (int64_t i = 0; i < hidden; ++i) weight[size_t(i)] = 1.0f + float(i % 7);
  std::vector<uint8_t> norm = poisoned(count * element), residual_out = poisoned(count * element),
                       fp8 = poisoned(count);
  std::vector<float> scale(group_size == 0 ? 0 : size_t(count / group_size), -1.0f);
  NormTarget target;
  target.residual = with_residual ? residual.data() : nullptr;
  target.residual_out = residual_out.data();
  target.weight = weight.data();
  target.eps = 1e-6f;
  target.hidden = hidden;
  target.norm = norm.data();
  if (group_size != 0) {
    target.quant.fp8 = fp8.data();
    target.quant.scale = scale.data();
    target.quant.row_stride = hidden / group_size;
    target.quant.group_stride = 1;
    target.quant.group_size = group_size;
  }
  complete([&] { return comm.all_reduce_norm(dtype, in.pointers[size_t(rank)], rows, target); });
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<float> r;
    for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
      const float sum = size == 1 ? load(in.pointers[0], dtype, i) : rank_order_sum(in.pointers, dtype, i);
      r.push_back(with_residual ? round_to(sum + load(residual.data(), dtype, i), dtype) : sum);
      CHECK_THAT(same(load(residual_out.data(), dtype, i), r.back()), "call " << call << " row " << row);
    }
    const std::vector<float> y = norm_row(r, weight.data(), target.eps, dtype);
    for (int64_t i = 0; i < hidden; ++i) {
      CHECK_THAT(same(load(norm.data(), dtype, row * hidden + i), y[size_t(i)]), "call " << call << " row " << row);
    }
    for (int64_t first = 0; group_size != 0 && first < hidden; first += group_size) {
      const QuantizedGroup want = quantize(&y[size_t(first)], group_size, Fp8Format::kE4M3fn, false);
      CHECK(same(scale[size_t((row * hidden + first) / group_size)], want.scale));
      CHECK(std::equal(want.codes.begin(), want.codes.end(), fp8.begin() + row * hidden + first));
    }
  }
}

void check_all_gather(int call, int rank, Communicator& comm, int size, int64_t bytes) {
  const AllInputs in(call, size, DType::kFloat, (bytes + 3) / 4);
  std::vector<uint8_t> out = poisoned(bytes * size);
  complete([&] { return comm.all_gather(in.pointers[size_t(rank)], out.data(), bytes); });
  for (int r = 0; r < size; ++r)
    CHECK(bytes == 0 || std::memcmp(&out[size_t(r * bytes)], in.pointers[size_t(r)], size_t(bytes)) == 0);
}

void check_broadcast(int call, int rank, Communicator& comm, int size, int64_t bytes, int root) {
  const AllInputs in(call, size, DType::kFloat, (bytes + 3) / 4);
  std::vector<uint8_t> x = in.data[size_t(rank)];
  complete([&] { return comm.broadcast(x.data(), bytes, root); });
  CHECK(bytes == 0 || std::memcmp(x.data(), in.pointers[size_t(root)], size_t(bytes)) == 0);
}

void check_reduce_scatter(int call, int rank, Communicator& comm, int size, DType dtype, int64_t share) {
  const AllInputs in(call, size, dtype, share * size);
  std::vector<uint8_t> out = poisoned(share * element_bytes(dtype));
  complete([&] { return comm.reduce_scatter(dtype, in.pointers[size_t(rank)], out.data(), share); });
  for (int64_t i = 0; i < share; ++i) {
    CHECK(same(load(out.data(), dtype, i), rank_order_sum(in.pointers, dtype, rank * share + i)));
  }
}

// Calls of random kind, type and size, with pauses that differ by rank; every rank draws the same calls.
void random_calls(int size, const Options& options, int calls, unsigned seed) {
  World world(size, options);
  world.run([&](int rank, Communicator& comm) {
    std::mt19937 random(seed), pauses(seed * 100 + unsigned(rank));
    for (int call = 0; call < calls; ++call) {
      if (pauses() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(pauses() % 300));
      const DType dtype = kDTypes[random() % 3];
      // 0 now and then, one-shot, two-shot, and several pieces
      const int64_t limits[] = {1, 40, 600, 3000, 9000};
      const int64_t count = int64_t(random() % uint32_t(limits[random() % 5]));
      const int kind = int(random() % 8), root = int(random() % unsigned(size));
      const int64_t hidden = 1 + count % 700;
      switch (kind) {
        case 0:
        case 1:
          check_all_reduce(call, rank, comm, size, dtype, count, kind == 1);
          break;
        case 2:
          check_norm(call, rank, comm, size, dtype, count / 300, hidden, 0);
          break;
        case 3:
          check_norm(call, rank, comm, size, dtype, count / 500, 32 * (1 + hidden % 12), 32);
          break;
        case 4:
          check_all_gather(call, rank, comm, size, count);
          break;
        case 5:
          check_broadcast(call, rank, comm, size, count, root);
          break;
        case 6:
          check_reduce_scatter(call, rank, comm, size, dtype, count / size);
          break;
        case 7:
          complete([&] { return comm.barrier(); });
          break;
      }
      CHECK(!comm.in_call() && comm.failure() == Failure::kNone);
    }
  });
}

const int kWorldSizes[] = {1, 2, 3, 5, 6, 7, 8, 16};

}  // namespace

TEST(random_calls_at_every_world_size) {
  for (const int size : kWorldSizes) random_calls(size, {}, 600 / (size + 2), unsigned(size));
}

TEST(random_calls_one_shot) {
  for (const int size : {2, 3, 8}) {
    Options options;
    options.one_shot_max = kAlwaysOneShot;
    random_calls(size, options, 80, unsigned(100 + size));
  }
}

TEST(random_calls_two_shot) {
  for (const int size : {2, 3, 8}) {
    Options options;
    options.one_shot_max = 0;
    random_calls(size, options, 80, unsigned(200 + size));
  }
}

TEST(random_calls_asleep_at_once_and_in_small_pieces) {
  for (const int size : {2, 5}) {
    Options options;
    options.spins = 0;
    options.piece_bytes = 2816;  // a multiple of 64 that is no power of two; one row of 700 fp32 just fits
    random_calls(size, options, 100, unsigned(300 + size));
    options.yield_ns = 20000;
    random_calls(size, options, 60, unsigned(400 + size));
  }
}

TEST(one_shot_and_two_shot_give_the_same_bits) {
  for (const int size : {2, 3, 8}) {
    for (const DType dtype : kDTypes) {
      const int64_t count = 5003;
      std::vector<std::vector<uint8_t>> results;
      for (const int64_t one_shot_max : {kAlwaysOneShot, int64_t(0)}) {
        Options options;
        options.one_shot_max = one_shot_max;
        World world(size, options);
        std::vector<std::vector<uint8_t>> out(static_cast<size_t>(size), poisoned(count * element_bytes(dtype)));
        world.run([&](int rank, Communicator& comm) {
          const std::vector<uint8_t> x = input(7, rank, dtype, count);
          complete([&] { return comm.all_reduce(dtype, x.data(), out[size_t(rank)].data(), count); });
          CHECK((one_shot_max == 0 ? comm.num_two_shot() : comm.num_one_shot()) == 1);
          CHECK(comm.num_one_shot() + comm.num_two_shot() == 1);
        });
        results.insert(results.end(), out.begin(), out.end());
      }
      for (const auto& result : results) CHECK(result == results[0]);
    }
  }
}

TEST(a_missing_rank_is_named_at_the_deadline) {
  for (const int size : {2, 3, 8}) {
    for (const int missing : {0, size - 1}) {  // rank 0's segment holds the counters
      Options options;
      options.timeout_s = 0.2;
      World world(size, options);
      world.run([&](int rank, Communicator& comm) {
        if (rank == missing) return;
        const std::vector<uint8_t> x = input(1, rank, DType::kFloat, 100);
        std::vector<uint8_t> out(x.size());
        const auto call = [&] { return comm.all_reduce(DType::kFloat, x.data(), out.data(), 100); };
        const std::string error = error_of(call);
        CHECK_THAT(contains(error, "all_reduce") && contains(error, "rank " + std::to_string(rank) + " waited"), error);
        // whoever gives up first says so to the others, who then need not wait for their own deadline
        if (comm.failure() == Failure::kTimeout) {
          CHECK_THAT(contains(error, "for rank " + std::to_string(missing)), error);
        } else {
          CHECK(comm.failure() == Failure::kPeerGone);
        }
        CHECK(!comm.in_call());
        CHECK(error_of(call) == error);  // and from then on
        CHECK(error_of([&] { return comm.barrier(); }) == error);
      });
    }
  }
}

TEST(a_rank_that_died_is_noticed_long_before_the_deadline) {
  for (const int dead : {0, 2}) {
    World world(4);
    world.run([&](int rank, Communicator& comm) {
      complete([&] { return comm.barrier(); });
      if (rank == dead) {
        world.die(rank);
        return;
      }
      const auto start = std::chrono::steady_clock::now();
      const std::string error = error_of([&] { return comm.barrier(); });
      CHECK_THAT(contains(error, "barrier"), error);
      CHECK_THAT(contains(error, "rank " + std::to_string(dead) + ", which has died") || contains(error, "given up"),
                 error);
      CHECK(comm.failure() == Failure::kPeerGone);
      CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(20));  // the deadline is 60
    });
  }
}

TEST(a_rank_that_died_after_its_part_spoils_nothing) {
  World world(3);
  world.run([&](int rank, Communicator& comm) {
    check_all_reduce(1, rank, comm, 3, DType::kFloat, 3000, false);
    if (rank == 1) world.die(1);
    if (rank != 1) CHECK(contains(error_of([&] { return comm.barrier(); }), "rank"));
  });
}

TEST(closing_ends_the_waits_of_others) {
  World world(3);
  world.run([&](int rank, Communicator& comm) {
    if (rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      comm.close();
      comm.close();
      return;
    }
    const std::string error = error_of([&] { return comm.barrier(); });
    CHECK_THAT(contains(error, "rank 1, which has closed the group") || contains(error, "given up"), error);
    CHECK(comm.failure() == Failure::kPeerGone);
  });
}

TEST(closing_after_the_last_call_spoils_nothing) {
  for (int repeat = 0; repeat < 20; ++repeat) {
    World world(4);
    world.run([&](int rank, Communicator& comm) {
      check_all_reduce(repeat, rank, comm, 4, DType::kBFloat16, 4000, false);
      comm.close();
    });
  }
}

TEST(a_rank_that_gives_up_takes_the_others_along) {
  World world(3);
  world.run([&](int rank, Communicator& comm) {
    if (rank == 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      comm.fail(Failure::kInterrupted, "interrupted");
      CHECK(error_of([&] { return comm.barrier(); }) == "interrupted");
      return;
    }
    const std::string error = error_of([&] { return comm.barrier(); });
    CHECK_THAT(contains(error, "given up"), error);
  });
}

TEST(different_calls_fail_on_all_ranks_and_name_both) {
  World world(4);
  world.run([&](int rank, Communicator& comm) {
    const std::vector<uint8_t> x = input(1, rank, DType::kFloat, 100);
    std::vector<uint8_t> out(1600);
    const std::string error = rank == 2
                                  ? error_of([&] { return comm.all_gather(x.data(), out.data(), 400); })
                                  : error_of([&] { return comm.all_reduce(DType::kFloat, x.data(), out.data(), 100); });
    CHECK_THAT(contains(error, "different calls"), error);
    CHECK_THAT(contains(error, "all_gather") && contains(error, "all_reduce") && contains(error, "rank 2"), error);
    CHECK(comm.failure() == Failure::kMismatch);
  });
}

TEST(every_difference_between_calls_is_noticed) {
  const auto mismatch = [](const auto& odd_call, const auto& call) {
    World world(3);
    world.run([&](int rank, Communicator& comm) {
      const std::string error =
          rank == 1 ? error_of([&] { return odd_call(comm); }) : error_of([&] { return call(comm); });
      CHECK_THAT(contains(error, "different calls"), error);
    });
  };
  static uint8_t memory[3][65536];
  static const float weight[512] = {};
  const auto sum = [](DType dtype, int64_t count) {
    return [=](Communicator& comm) {
      return comm.all_reduce(dtype, memory[comm.config().rank], memory[comm.config().rank], count);
    };
  };
  const auto norm = [](int64_t rows, int64_t hidden, int64_t group_size) {
    return [=](Communicator& comm) {
      uint8_t* own = memory[comm.config().rank];
      NormTarget target;
      target.hidden = hidden;
      target.weight = weight;
      target.residual_out = own;
      target.norm = own + 16384;
      if (group_size != 0) {
        target.quant.fp8 = own + 32768;
        target.quant.scale = reinterpret_cast<float*>(own + 49152);
        target.quant.row_stride = hidden / group_size;
        target.quant.group_stride = 1;
        target.quant.group_size = group_size;
      }
      return comm.all_reduce_norm(DType::kFloat, own, rows, target);
    };
  };
  const auto broadcast = [](int root) {
    return [=](Communicator& comm) { return comm.broadcast(memory[comm.config().rank], 64, root); };
  };
  const auto barrier = [](Communicator& comm) { return comm.barrier(); };
  mismatch(sum(DType::kFloat, 64), sum(DType::kFloat, 65));
  mismatch(sum(DType::kBFloat16, 64), sum(DType::kHalf, 64));
  mismatch(sum(DType::kFloat, 4096), sum(DType::kFloat, 4));  // other pieces, other algorithm
  mismatch(sum(DType::kFloat, 64), norm(1, 64, 0));
  mismatch(norm(2, 64, 0), norm(1, 128, 0));
  mismatch(norm(1, 128, 0), norm(1, 128, 32));
  mismatch(norm(1, 128, 64), norm(1, 128, 32));
  mismatch(broadcast(0), broadcast(1));
  mismatch(barrier, sum(DType::kFloat, 64));
}

TEST(a_call_can_be_looked_at_between_its_slices) {
  World world(2);
  world.run([&](int rank, Communicator& comm) {
    const std::vector<uint8_t> x = input(1, rank, DType::kFloat, 100);
    std::vector<uint8_t> out(x.size());
    if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    int slices = 0;
    while (!comm.all_reduce(DType::kFloat, x.data(), out.data(), 100)) {
      ++slices;
      CHECK(comm.in_call());
    }
    CHECK(!comm.in_call());
    if (rank == 0) CHECK(slices >= 2);  // a signal handler gets its turn
  });
}

TEST(another_call_before_the_first_is_done_is_refused) {
  World world(2);
  world.run([&](int rank, Communicator& comm) {
    const float x[64] = {};
    float out[64];
    if (rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      complete([&] { return comm.all_reduce(DType::kFloat, x, out, 64); });  // rank 0 had sent its part
      CHECK(contains(error_of([&] { return comm.barrier(); }), "given up"));
      return;
    }
    CHECK(!comm.all_reduce(DType::kFloat, x, out, 64));
    const std::string error = error_of([&] { return comm.barrier(); });
    CHECK_THAT(contains(error, "barrier called while all_reduce"), error);
    CHECK(comm.failure() == Failure::kInterrupted);
  });
}

int main() { return run_tests(); }
