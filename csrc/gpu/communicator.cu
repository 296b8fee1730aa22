#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "gpu/communicator.h"
#include "gpu/kernels.h"

namespace fusedcomm::gpu {

using cpu::RankState;
using cpu::SegmentHeader;

namespace {

constexpr int kMaxDevices = 64;
constexpr int kWatchIntervalMs = 20;
constexpr int kFirstCaptureError = 900;  // of both runtimes: StreamCaptureUnsupported, …
constexpr int kLastCaptureError = 908;

void check_status(Status status, const char* what) {
  if (status != kOk) throw std::runtime_error(std::string(what) + ": " + FUSEDCOMM_RT(GetErrorString)(status));
}

struct Device {
  Geometry geometry;
  Fp8Format format = Fp8Format::kE4M3fn;
};

// Facts of a device, asked for once.
Device& device_of(int index) {
  static Device known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  if (index < 0 || index >= kMaxDevices) throw std::runtime_error("device: expected an index below 64");
  std::call_once(once[index], [index] {
    FUSEDCOMM_PROPERTIES p;
    check_status(FUSEDCOMM_RT(GetDeviceProperties)(&p, index), "device properties");
    known[index].geometry.num_sms = p.multiProcessorCount;
    known[index].geometry.overlaps = can_overlap(p);
    if (has_clusters(p)) known[index].geometry.cluster_threads = 128;
    if (architecture(p) == "gfx942") known[index].format = Fp8Format::kE4M3fnuz;
  });
  return known[index];
}

const char* op_name(uint32_t op) {
  switch (op) {
    case 1:
      return "all_reduce";
    case 2:
      return "allreduce_rmsnorm";
    default:
      return "allreduce_rmsnorm_quant";
  }
}

}  // namespace

const Kernels& kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return bf16_kernels();
    case DType::kHalf:
      return half_kernels();
    default:
      return float_kernels();
  }
}

struct Communicator::Impl {
  Group group;
  HostPage* page = nullptr;  // group.host is where the device sees it
  Geometry geometry;
};

Communicator::Communicator(const Config& config, const std::vector<void*>& slabs,
                           const std::vector<SegmentHeader*>& segments, const std::vector<int>& pidfds)
    : config_(config), impl_(new Impl), segments_(segments), pidfds_(pidfds) {
  const DeviceGuard guard(config.device);
  Group& group = impl_->group;
  group = {};
  for (int r = 0; r < config.world_size; ++r) group.slabs[r] = static_cast<char*>(slabs[size_t(r)]);
  group.rank = config.rank;
  group.world_size = config.world_size;
  group.layout = slab_layout(config.world_size, config.buffer_bytes);
  const double timeout_ticks = double(config.timeout_ns) * 1e-9 * double(ticks_per_second(config.device));
  group.timeout_ticks = uint32_t(std::min(timeout_ticks / double(1 << kCoarse), double(INT32_MAX)));
  try {
    if (group.layout.bytes != config.slab_bytes) throw std::runtime_error("slab_bytes: expected those of slab_bytes()");
    impl_->geometry = device_of(config.device).geometry;
    void* page = nullptr;
    check_status(allocate_host_page(&page, sizeof(HostPage)), "allocating host memory");
    impl_->page = new (page) HostPage();
    void* seen = nullptr;
    check_status(FUSEDCOMM_RT(HostGetDevicePointer)(&seen, page, 0), "mapping host memory");
    group.host = static_cast<HostPage*>(seen);
    char* const own = group.slabs[config.rank];
    const size_t tail = group.layout.bytes - group.layout.one_shot_counters;
    check_status(FUSEDCOMM_RT(Memset)(own + group.layout.one_shot_counters, 0, tail), "clearing the counters");
    check_status(FUSEDCOMM_RT(DeviceSynchronize)(), "clearing the counters");
    stop_fd_ = eventfd(0, EFD_CLOEXEC);
    if (stop_fd_ < 0) throw std::runtime_error("eventfd failed");
    watcher_ = std::thread([this] { watch(); });
  } catch (...) {
    if (stop_fd_ >= 0) ::close(stop_fd_);
    if (impl_->page != nullptr) free_host_page(impl_->page);
    delete impl_;
    throw;
  }
}

Communicator::~Communicator() {
  close();
  free_host_page(impl_->page);
  delete impl_;
}

void Communicator::all_reduce(DType dtype, const void* x, void* out, int64_t count, void* stream) {
  check();
  if (count == 0) return;
  const int64_t element = element_bytes(dtype), bytes = count * element;
  const SlabLayout& layout = impl_->group.layout;
  const bool one_shot = bytes <= config_.one_shot_max_bytes;
  const int64_t capacity = int64_t(one_shot ? layout.one_shot_slots : layout.two_shot_slots) * kSlotBytes;
  // pieces of one size, of whole slots: each costs its hops
  const int64_t piece = slots_of(divide_up(bytes, divide_up(bytes, capacity))) * kSlotBytes;
  const DeviceGuard guard(config_.device);
  impl_->group.op = 1;
  for (int64_t done = 0; done < bytes; done += piece) {
    SumArguments a;
    a.x = static_cast<const char*>(x) + done;
    a.out = static_cast<char*>(out) + done;
    a.count = std::min(piece, bytes - done) / element;
    check_launch(int(kernels_of(dtype).sum(impl_->group, one_shot ? Algorithm::kOneShot : Algorithm::kTwoShot,
                                           impl_->geometry, a, static_cast<Stream>(stream))));
  }
  ++(one_shot ? num_one_shot_ : num_two_shot_);
}

void Communicator::all_reduce_norm(DType dtype, const void* x, int64_t rows, const NormArguments& arguments,
                                   void* stream) {
  check();
  if (rows == 0) return;
  const int64_t row_bytes = arguments.hidden * element_bytes(dtype), row_slots = slots_of(row_bytes);
  const SlabLayout& layout = impl_->group.layout;
  if (arguments.hidden % 8 != 0 || arguments.hidden > kMaxFusedHidden || row_slots > layout.two_shot_slots) {
    throw std::runtime_error("x: expected H a multiple of 8, up to 16384, and a row that fits the slab");
  }
  const bool one_shot = rows * row_bytes <= config_.one_shot_max_bytes && row_slots <= layout.one_shot_slots;
  const int64_t capacity = (one_shot ? layout.one_shot_slots : layout.two_shot_slots) / row_slots;
  const int64_t piece = divide_up(rows, divide_up(rows, capacity));
  const DeviceGuard guard(config_.device);
  impl_->group.op = arguments.quant.fp8 == nullptr ? 2 : 3;
  for (int64_t done = 0; done < rows; done += piece) {
    NormArguments a = arguments;
    a.inverse_hidden = 1.0f / float(a.hidden);
    const auto advance = [&](auto*& p, int64_t bytes) {
      if (p != nullptr) p = reinterpret_cast<decltype(+p)>(reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes));
    };
    advance(a.residual, done * row_bytes);
    advance(a.residual_out, done * row_bytes);
    advance(a.norm, done * row_bytes);
    advance(a.quant.fp8, done * arguments.hidden);
    advance(a.quant.scale, done * a.quant.row_stride * 4);
    advance(a.quant.packed_scale, done * a.quant.row_stride * 4);
    check_launch(int(kernels_of(dtype).norm(impl_->group, one_shot ? Algorithm::kOneShot : Algorithm::kTwoShot,
                                            impl_->geometry, static_cast<const char*>(x) + done * row_bytes,
                                            std::min(piece, rows - done), a, static_cast<Stream>(stream))));
  }
  ++(one_shot ? num_one_shot_ : num_two_shot_);
}

// Peers that launched wait for this rank, and what it sent next would be taken for this call's.
void Communicator::check_launch(int status) {
  if (Status(status) == kOk) return;
  if (status >= kFirstCaptureError && status <= kLastCaptureError) {  // recorded or not, nothing has been sent
    check_status(Status(status), "capturing a collective");
  }
  fail(std::string("launching ") + op_name(impl_->group.op) +
       " failed: " + FUSEDCOMM_RT(GetErrorString)(Status(status)));
  throw CommError(message_);
}

void Communicator::check() {
  if (failure_ != Failure::kNone) throw CommError(message_);
  const volatile FailureRecord& r = impl_->page->record;
  if (r.state != kRecorded) return;
  std::atomic_thread_fence(std::memory_order_acquire);
  failure_ = Failure(r.kind);
  // Nothing here waits for the device: something else on it may be waiting for the same peer.
  const std::string what = op_name(r.op);
  const std::string peer = std::to_string(r.peer), rank = std::to_string(config_.rank);
  const std::string where = " (call " + std::to_string(r.op_number) + ", block " + std::to_string(r.block) + ", slot " +
                            std::to_string(r.slot) + ", generation " + std::to_string(r.generation) + ")";
  if (failure_ == Failure::kTimeout) {
    const std::string seconds = std::to_string(double(config_.timeout_ns) * 1e-9);
    message_ = what + ": rank " + rank + " waited " + seconds.substr(0, seconds.find('.') + 3) + " s for rank " + peer;
  } else {
    message_ = what + ": rank " + rank + " waited for rank " + peer + ", which is gone";
  }
  message_ += where;
  segments_[size_t(config_.rank)]->status.state.store(RankState::kFailed);
  throw CommError(message_);
}

void Communicator::fail(const std::string& why) {
  if (failure_ == Failure::kNone) {
    failure_ = Failure::kInterrupted;
    message_ = why;
  }
  segments_[size_t(config_.rank)]->status.state.store(RankState::kFailed);
}

void Communicator::close() {
  if (!watcher_.joinable()) return;
  // The watcher goes on until the device is through: a kernel may be waiting for a peer that dies.
  const DeviceGuard guard(config_.device);
  (void)FUSEDCOMM_RT(DeviceSynchronize)();
  auto& state = segments_[size_t(config_.rank)]->status.state;
  RankState open = RankState::kOpen;
  state.compare_exchange_strong(open, RankState::kClosed);
  const uint64_t one = 1;
  if (write(stop_fd_, &one, sizeof(one)) != sizeof(one)) std::terminate();  // an eventfd takes a 1
  watcher_.join();
  ::close(stop_fd_);
}

std::vector<CallRecord> Communicator::trace() const {
  static_assert(kNumTraced == kTraceLength, "one length for both sides");
  const DeviceGuard guard(config_.device);
  Control control;
  const char* const address = impl_->group.slabs[config_.rank] + impl_->group.layout.control;
  check_status(FUSEDCOMM_RT(DeviceSynchronize)(), "reading the trace");
  check_status(FUSEDCOMM_RT(Memcpy)(&control, address, sizeof(control), FUSEDCOMM_RT(MemcpyDeviceToHost)),
               "reading the trace");
  std::vector<CallRecord> calls;
  const uint32_t end = control.op_number, length = std::min<uint32_t>(end, kTraceLength);
  for (uint32_t n = end - length; n != end; ++n) {
    const TraceRecord& t = control.trace[n % kTraceLength];
    calls.push_back({t.op_number, t.op, t.algorithm, DType(t.dtype), t.rows, t.hidden});
  }
  return calls;
}

bool Communicator::is_gone(int rank) const { return segments_[size_t(rank)]->status.state.load() != RankState::kOpen; }

void Communicator::watch() {
  std::vector<pollfd> fds;
  std::vector<int> rank_of;
  fds.push_back({stop_fd_, POLLIN, 0});
  rank_of.push_back(-1);
  for (int r = 0; r < config_.world_size; ++r) {
    if (r == config_.rank || pidfds_[size_t(r)] < 0) continue;
    fds.push_back({pidfds_[size_t(r)], POLLIN, 0});
    rank_of.push_back(r);
  }
  uint32_t gone = 0;
  for (;;) {
    const int ready = poll(fds.data(), nfds_t(fds.size()), kWatchIntervalMs);
    if (ready > 0 && (fds[0].revents & POLLIN) != 0) return;
    for (size_t i = 1; ready > 0 && i < fds.size(); ++i) {
      if (fds[i].revents == 0) continue;
      gone |= 1u << rank_of[i];
      fds[i].fd = -1;  // poll() skips it from now on
    }
    for (int r = 0; r < config_.world_size; ++r) {
      if (r != config_.rank && is_gone(r)) gone |= 1u << r;
    }
    // A failure that this rank's kernels found: whoever waits for this rank learns of it now, not at its next call.
    const uint32_t state = __atomic_load_n(&impl_->page->record.state, __ATOMIC_ACQUIRE);
    if (state == kRecorded) segments_[size_t(config_.rank)]->status.state.store(RankState::kFailed);
    __atomic_store_n(&impl_->page->gone, gone, __ATOMIC_RELEASE);
  }
}

Fp8Format native_fp8_format(int device) { return device_of(device).format; }

void set_geometry(int device, int overlaps, int cluster_threads, int sum_threads, int sender_threads,
                  int receiver_threads, int lead) {
  Geometry& g = device_of(device).geometry;
  if (overlaps >= 0) g.overlaps = overlaps != 0;
  if (cluster_threads >= 0) g.cluster_threads = cluster_threads;
  if (sum_threads >= 0) g.sum_threads = sum_threads;
  if (sender_threads >= 0) g.sender_threads = sender_threads;
  if (receiver_threads >= 0) g.receiver_threads = receiver_threads;
  if (lead >= 0) g.lead = lead;
}

void local_norm(DType dtype, const void* x, int64_t rows, const NormArguments& arguments, int device, void* stream) {
  if (rows == 0) return;
  NormArguments a = arguments;
  a.inverse_hidden = 1.0f / float(a.hidden);
  check_status(kernels_of(dtype).local_norm(device_of(device).geometry, x, rows, a, static_cast<Stream>(stream)),
               "launching rms_norm");
}

void local_quant(DType dtype, const void* x, int64_t rows, int64_t hidden, const QuantTarget& target, int device,
                 void* stream) {
  if (rows == 0 || hidden == 0) return;
  check_status(
      kernels_of(dtype).local_quant(device_of(device).geometry, x, rows, hidden, target, static_cast<Stream>(stream)),
      "launching per_group_quant_fp8");
}

}  // namespace fusedcomm::gpu
