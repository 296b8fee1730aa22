// One rank's end of the GPU collectives: launches kernels, and watches for what goes wrong.
//
// Calls are asynchronous. What a kernel could not wait for is in the host page by the time its stream is through; the
// next call raises it. A watcher thread sees peers die, close or fail, and marks them gone in the host page, which ends
// every wait on them.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fusedcomm/layout.h"
#include "gpu/arguments.h"
#include "gpu/failure.h"
#include "gpu/stream_gate.h"

namespace fusedcomm::gpu {

struct Config {
  int rank = 0;
  int world_size = 1;
  int device = 0;
  int64_t slab_bytes = 0;
  int64_t buffer_bytes = 0;
  int64_t one_shot_max_bytes = 0;  // larger messages take two-shot
  int64_t timeout_ns = 0;
};

struct CallRecord {
  uint32_t op_number;
  uint32_t op;         // 1 all_reduce, 2 allreduce_rmsnorm, 3 allreduce_rmsnorm_quant
  uint32_t algorithm;  // 1 one-shot, 2 two-shot
  DType dtype;
  uint32_t rows;
  uint32_t hidden;
};

class CommError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Communicator {
 public:
  // slabs[r] is the slab of rank r as mapped here; segments[r] the host segment of rank r (layout.h); pidfds[r] becomes
  // readable when that process ends (-1: unknown). Throws std::runtime_error.
  Communicator(const Config& config, const std::vector<void*>& slabs, const std::vector<cpu::SegmentHeader*>& segments,
               const std::vector<int>& pidfds);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Throw CommError if the group has failed, std::runtime_error if the launch does.
  void all_reduce(DType dtype, const void* x, void* out, int64_t count, void* stream);
  // All-reduce + add + RMSNorm, and per-group quantisation where arguments.quant asks for it.
  void all_reduce_norm(DType dtype, const void* x, int64_t rows, const NormArguments& arguments, void* stream);

  // Throws CommError if the device or this rank has failed.
  void check();
  // Marks this rank failed, so that peers that wait for it give up.
  void fail(const std::string& why);
  // Waits for the device, stops the watcher, tells the peers. Twice is fine.
  void close();

  const Config& config() const { return config_; }
  StreamGate& gate() { return gate_; }
  Failure failure() const { return failure_; }
  const std::string& message() const { return message_; }
  uint64_t num_one_shot() const { return num_one_shot_; }
  uint64_t num_two_shot() const { return num_two_shot_; }
  std::vector<CallRecord> trace() const;

 private:
  struct Impl;

  void check_launch(int status);
  void watch();
  bool is_gone(int rank) const;

  Config config_;
  StreamGate gate_;
  Impl* impl_;
  std::vector<cpu::SegmentHeader*> segments_;
  std::vector<int> pidfds_;
  std::thread watcher_;
  int stop_fd_ = -1;
  Failure failure_ = Failure::kNone;
  std::string message_;
  uint64_t num_one_shot_ = 0;
  uint64_t num_two_shot_ = 0;
};

// Local ops; `device` is the current one.
void local_norm(DType dtype, const void* x, int64_t rows, const NormArguments& arguments, int device, void* stream);
void local_quant(DType dtype, const void* x, int64_t rows, int64_t hidden, const QuantTarget& target, int device,
                 void* stream);

constexpr int kNumTraced = 256;

// What the GPU's conversion instructions produce.
Fp8Format native_fp8_format(int device);

// For measurements; -1 keeps a value. Communicators made from then on use it.
void set_geometry(int device, int overlaps, int cluster_threads, int sum_threads, int sender_threads,
                  int receiver_threads, int lead);

// Makes a device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace fusedcomm::gpu
