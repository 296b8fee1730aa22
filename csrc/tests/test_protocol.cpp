// The Communicator with threads as ranks, so that the sanitizers see the whole protocol.
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/communicator.h"

using namespace fusedcomm::cpu;

namespace {

constexpr int64_t kSlot = 8192;  // small: most inputs take several pieces

// The segments of a group, as set-up would map them.
class World {
 public:
  World(int size, int64_t one_shot_max, double timeout_s = 60.0, int spins = 50) : size_(size) {
    std::vector<void*> segments;
    for (int r = 0; r < size; ++r) {
      memory_.emplace_back(static_cast<char*>(std::aligned_alloc(4096, size_t(segment_bytes(kSlot)))), &std::free);
      segments.push_back(new (memory_.back().get()) SegmentHeader());
    }
    for (int r = 0; r < size; ++r) {
      Config config;
      config.rank = r;
      config.world_size = size;
      config.slot_bytes = config.piece_bytes = kSlot;
      config.one_shot_max_bytes = one_shot_max;
      config.min_chunk_bytes = 256;
      config.max_chunk_bytes = 1024;
      config.wait = {spins, 0};
      config.timeout_ns = int64_t(timeout_s * 1e9);
      comms_.push_back(std::make_unique<Communicator>(config, segments, std::vector<int>(size_t(size), -1)));
    }
  }

  Communicator& comm(int rank) { return *comms_[size_t(rank)]; }

  void run(const std::function<void(int, Communicator&)>& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < size_; ++r) threads.emplace_back([&, r] { body(r, comm(r)); });
    for (std::thread& t : threads) t.join();
  }

 private:
  int size_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> memory_;
  std::vector<std::unique_ptr<Communicator>> comms_;
};

float value(int rank, int64_t i, int call) { return float((rank * 31 + i * 7 + call * 13) % 97) - 48.0f; }

void all_reduce(Communicator& comm, const std::vector<float>& x, std::vector<float>& out) {
  while (!comm.all_reduce(DType::kFloat, x.data(), out.data(), int64_t(x.size()))) {
  }
}

// Random calls of random size; every rank draws the same ones.
void random_calls(int size, int64_t one_shot_max) {
  World world(size, one_shot_max);
  world.run([&](int rank, Communicator& comm) {
    std::mt19937 rng(11);
    for (int call = 0; call < 60; ++call) {
      const int64_t n = 1 + int64_t(rng() % 6000);
      std::vector<float> x(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) x[size_t(i)] = value(rank, i, call);
      switch (rng() % 5) {
        case 0:
        case 1: {
          std::vector<float> out(size_t(n), -1.0f);
          all_reduce(comm, x, out);
          for (int64_t i = 0; i < n; ++i) {
            float sum = 0.0f;
            for (int r = 0; r < size; ++r) sum += value(r, i, call);
            CHECK(out[size_t(i)] == sum);
          }
          break;
        }
        case 2: {
          std::vector<float> out(size_t(n * size), -1.0f);
          while (!comm.all_gather(x.data(), out.data(), n * 4)) {
          }
          for (int64_t i = 0; i < n * size; ++i) CHECK(out[size_t(i)] == value(int(i / n), i % n, call));
          break;
        }
        case 3: {
          const int root = int(rng() % unsigned(size));
          while (!comm.broadcast(x.data(), n * 4, root)) {
          }
          for (int64_t i = 0; i < n; ++i) CHECK(x[size_t(i)] == value(root, i, call));
          break;
        }
        case 4: {
          const int64_t share = n / size;
          std::vector<float> out(size_t(share), -1.0f);
          while (!comm.reduce_scatter(DType::kFloat, x.data(), out.data(), share)) {
          }
          for (int64_t i = 0; i < share; ++i) {
            float sum = 0.0f;
            for (int r = 0; r < size; ++r) sum += value(r, rank * share + i, call);
            CHECK(out[size_t(i)] == sum);
          }
          break;
        }
      }
      if (call % 7 == 0) {
        while (!comm.barrier()) {
        }
      }
    }
    CHECK(comm.failure() == Failure::kNone);
  });
}

// Rows normed by one-shot and by two-shot, in one piece and in many: the same bits.
void same_bits(int size) {
  constexpr int64_t kRows = 9, kHidden = 384;
  std::vector<std::vector<float>> results;
  for (const int64_t one_shot_max : {int64_t(1) << 40, int64_t(0)}) {
    World world(size, one_shot_max);
    std::vector<std::vector<float>> norms(static_cast<size_t>(size));
    world.run([&](int rank, Communicator& comm) {
      std::vector<float> x(kRows * kHidden), residual(x.size()), residual_out(x.size()), norm(x.size());
      std::vector<float> weight(kHidden, 1.25f), scale(kRows * kHidden / 128);
      std::vector<uint8_t> fp8(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] = 0.01f * value(rank, int64_t(i), 1);
        residual[i] = 0.3f * value(0, int64_t(i), 2);
      }
      NormTarget target;
      target.residual = residual.data();
      target.residual_out = residual_out.data();
      target.weight = weight.data();
      target.eps = 1e-6f;
      target.hidden = kHidden;
      target.norm = norm.data();
      target.quant.fp8 = fp8.data();
      target.quant.scale = scale.data();
      target.quant.row_stride = kHidden / 128;
      target.quant.group_stride = 1;
      target.quant.group_size = 128;
      while (!comm.all_reduce_norm(DType::kFloat, x.data(), kRows, target)) {
      }
      norms[size_t(rank)] = norm;
      CHECK((one_shot_max == 0 ? comm.num_two_shot() : comm.num_one_shot()) == 1);
    });
    for (const auto& norm : norms) results.push_back(norm);
  }
  for (const auto& result : results) {
    CHECK(std::memcmp(result.data(), results[0].data(), result.size() * sizeof(float)) == 0);
  }
}

std::string error_of(const std::function<bool()>& call) {
  try {
    while (!call()) {
    }
  } catch (const CommError& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void missing_rank_times_out() {
  World world(3, 0, 0.3);
  world.run([&](int rank, Communicator& comm) {
    if (rank == 1) return;
    std::vector<float> x(100, 1.0f), out(100);
    const auto call = [&] { return comm.all_reduce(DType::kFloat, x.data(), out.data(), 100); };
    const std::string error = error_of(call);
    CHECK(contains(error, "all_reduce") && contains(error, "rank 1"));
    CHECK(contains(error, ("rank " + std::to_string(rank) + " waited").c_str()));
    CHECK(comm.failure() == Failure::kTimeout || comm.failure() == Failure::kPeerGone);
    CHECK(error_of(call) == error);  // refuses from then on
  });
}

void different_calls_fail_everywhere() {
  World world(4, 0);
  world.run([&](int rank, Communicator& comm) {
    std::vector<float> x(100, 1.0f), out(400);
    const std::string error =
        rank == 2
            ? error_of([&] { return comm.all_gather(x.data(), out.data(), 400); })
            : error_of([&] { return comm.all_reduce(DType::kFloat, x.data(), out.data(), rank == 3 ? 50 : 100); });
    CHECK(contains(error, "different calls") && comm.failure() == Failure::kMismatch);
    CHECK(contains(error, "all_gather") && contains(error, "all_reduce"));
  });
}

void closing_ends_waits() {
  World world(2, 0);
  world.run([&](int rank, Communicator& comm) {
    if (rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      comm.close();
      return;
    }
    const std::string error = error_of([&] { return comm.barrier(); });
    CHECK(contains(error, "rank 1") && contains(error, "closed") && comm.failure() == Failure::kPeerGone);
  });
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3, 4, 6, 8, 16}) {
    random_calls(size, 0);
    random_calls(size, int64_t(1) << 40);
    same_bits(size);
  }
  missing_rank_times_out();
  different_calls_fail_everywhere();
  closing_ends_waits();
  std::printf("protocol: all calls agree, all failures are noticed\n");
}
