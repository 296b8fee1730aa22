#include "cpu/communicator.h"

#include <poll.h>

#include <algorithm>
#include <cstring>

#include "cpu/call_facts.h"
#include "cpu/stream_copy.h"

namespace fusedcomm::cpu {
namespace {

constexpr int64_t kStreamBytes = 8 << 20;  // results from here on bypass the caches: no consumer finds them there
constexpr int64_t kSliceNs = 50'000'000;   // how long a wait sleeps before it looks at its peers

// What a rank adds when it arrives: one in the low half, the hash of its call in the high half. When all have arrived
// the word equals world_size times the own amount, or some rank made another call. It costs nothing: the word is read
// anyway.
uint64_t arrival(const CallFacts& facts) { return uint64_t(hash(facts)) << 32 | 1u; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// memcpy of perhaps nothing, from and to perhaps nowhere.
void copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, size_t(bytes));
}

template <class Body>
void parallel_rows(ParallelFor parallel, int64_t rows, int64_t grain, const Body& body) {
  if (parallel == nullptr || rows <= grain) {
    body(int64_t(0), rows);
    return;
  }
  parallel(0, rows, grain, const_cast<Body*>(&body),
           [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); });
}

}  // namespace

Communicator::Communicator(const Config& config, std::vector<void*> segments, std::vector<int> pidfds)
    : config_(config), segments_(std::move(segments)), pidfds_(std::move(pidfds)) {}

// ---- the protocol ----

template <class Steps>
bool Communicator::run(const CallFacts& facts, int64_t pieces, const Steps& steps) {
  if (failure_ != Failure::kNone) throw CommError(message_);
  if (!call_.active) {
    call_ = Call{};
    call_.active = true;
    call_.facts = facts;
  } else if (!same(call_.facts, facts)) {
    throw_failure(Failure::kInterrupted,
                  describe(facts) + " called while " + describe(call_.facts) + " was unfinished on this rank");
  }
  for (; call_.piece < pieces; ++call_.piece) {
    const int g = int(round_ % kNumGenerations);
    if (call_.step == Step::kPublish) {
      steps.publish(call_.piece, slot(config_.rank, g));
      status().calls[g] = facts;
      const uint64_t amount = arrival(facts);
      arrived_[g] += amount * uint64_t(config_.world_size);
      add_and_wake(hub().arrived[g], amount, uint32_t(arrived_[g]));
      status().progress.fetch_add(1);
      call_.step = Step::kArrived;
    }
    if (call_.step == Step::kArrived) {
      if (!wait(hub().arrived[g], uint32_t(arrived_[g]))) return false;
      check_same_call(g);
      if (const int64_t chunks = steps.chunks(call_.piece); chunks > 0) share(steps, chunks, g);
      call_.step = Step::kShared;
    }
    if (!wait(hub().shared[g], uint32_t(shared_[g]))) return false;
    steps.finish(call_.piece, g);
    ++round_;
    call_.step = Step::kPublish;
  }
  call_.active = false;
  return true;
}

template <class Steps>
void Communicator::share(const Steps& steps, int64_t chunks, int g) {
  shared_[g] += uint64_t(chunks);
  std::atomic<uint64_t>& next = hub().tickets[g].next;
  for (;;) {
    const int64_t chunk = int64_t(next.fetch_add(1, std::memory_order_relaxed) - tickets_[g]);
    if (chunk >= chunks) break;
    steps.share(call_.piece, chunk, g);
    add_and_wake(hub().shared[g], 1, uint32_t(shared_[g]));
  }
  // Every rank draws exactly one ticket too many, so all know where the next round starts.
  tickets_[g] += uint64_t(chunks + config_.world_size);
  status().progress.fetch_add(1);
}

bool Communicator::wait(WaitWord& word, uint32_t target) {
  if (reached(word, target)) {
    call_.waiting_since = 0;
    return true;
  }
  if (call_.waiting_since == 0) call_.waiting_since = now_ns();
  const int64_t left = config_.timeout_ns - (now_ns() - call_.waiting_since);
  if (wait_for(word, target, config_.wait, std::clamp(left, int64_t(1'000'000), kSliceNs))) {
    call_.waiting_since = 0;
    return true;
  }
  look_at_peers();
  return false;
}

// Throws if a rank that this one waits for will not come any more, or the deadline has passed.
void Communicator::look_at_peers() {
  const uint64_t mine = status().progress.load();
  const std::string self = "rank " + std::to_string(config_.rank);
  std::string late;
  for (int r = 0; r < config_.world_size; ++r) {
    if (r == config_.rank || header(r).status.progress.load() >= mine) continue;
    const std::string peer = "rank " + std::to_string(r);
    const RankState state = header(r).status.state.load();
    const char* what = state == RankState::kClosed   ? " has closed the group"
                       : state == RankState::kFailed ? " has given up on the group after an error"
                       : peer_is_gone(r)             ? " has died"
                                                     : nullptr;
    if (what != nullptr) {
      // It may have arrived, finished and left between the two looks: what it did before it left counts.
      if (header(r).status.progress.load() >= mine) continue;
      throw_failure(Failure::kPeerGone, describe(call_.facts) + ": " + self + " waited for " + peer + ", which" + what);
    }
    late += (late.empty() ? "" : ", ") + peer;
  }
  const int64_t waited = now_ns() - call_.waiting_since;
  if (waited < config_.timeout_ns) return;
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.3g", double(waited) * 1e-9);
  throw_failure(Failure::kTimeout, describe(call_.facts) + ": " + self + " waited " + seconds + " s for " +
                                       (late.empty() ? "the group" : late) + " (FUSEDCOMM_TIMEOUT_S)");
}

bool Communicator::peer_is_gone(int rank) const {
  const int fd = pidfds_[size_t(rank)];
  if (fd < 0) return false;
  pollfd p = {fd, POLLIN, 0};
  return poll(&p, 1, 0) == 1 && (p.revents & POLLIN) != 0;
}

void Communicator::check_same_call(int g) {
  if (hub().arrived[g].value.load(std::memory_order_acquire) == arrived_[g]) return;
  std::string text = "ranks made different calls: rank " + std::to_string(config_.rank) + " " + describe(call_.facts);
  for (int r = 0; r < config_.world_size; ++r) {
    const CallFacts& theirs = header(r).status.calls[g];
    if (!same(theirs, call_.facts)) text += ", rank " + std::to_string(r) + " " + describe(theirs);
  }
  throw_failure(Failure::kMismatch, text);
}

void Communicator::throw_failure(Failure kind, const std::string& message) {
  fail(kind, message);
  throw CommError(message);
}

void Communicator::fail(Failure kind, const std::string& message) {
  if (failure_ == Failure::kNone) {
    failure_ = kind;
    message_ = message;
  }
  status().state.store(RankState::kFailed);
  call_.active = false;
  for (int g = 0; g < kNumGenerations; ++g) {
    wake_all(hub().arrived[g]);
    wake_all(hub().shared[g]);
  }
}

void Communicator::close() {
  RankState open = RankState::kOpen;
  status().state.compare_exchange_strong(open, RankState::kClosed);
  for (int g = 0; g < kNumGenerations; ++g) {
    wake_all(hub().arrived[g]);
    wake_all(hub().shared[g]);
  }
}

Sources Communicator::sources(int g, int64_t byte_offset) const {
  Sources s;
  s.count = config_.world_size;
  for (int r = 0; r < config_.world_size; ++r) s.rows[r] = slot(r, g) + byte_offset;
  return s;
}

// ---- the collectives: what a round publishes, shares and finishes ----

// A stretch of elements (or bytes) cut into pieces and, for two-shot, the pieces into chunks.
struct Split {
  int64_t total;
  int64_t per_piece;
  int64_t per_chunk;  // 0: one-shot

  // One even where there is nothing to move: ranks that disagree about that must meet to notice.
  int64_t pieces() const { return std::max<int64_t>(1, ceil_div(total, per_piece)); }
  int64_t begin(int64_t piece) const { return piece * per_piece; }
  int64_t size(int64_t piece) const { return std::min(per_piece, total - begin(piece)); }
  int64_t chunks(int64_t piece) const { return per_chunk == 0 ? 0 : ceil_div(size(piece), per_chunk); }
};

// The steps of a round that a collective does not have.
struct OneShot {
  void publish(int64_t, char*) const {}
  int64_t chunks(int64_t) const { return 0; }
  void share(int64_t, int64_t, int) const {}
  void finish(int64_t, int) const {}
};

// What sums have in common. Two-shot leaves the sum in the slot of rank 0, in the place of that rank's contribution:
// nobody else reads the chunk that a rank sums, and rows stay in one piece.
struct Summation {
  const Communicator& comm;
  const Kernels& kernels;
  const char* x;
  int64_t element;
  Split split;

  void publish(int64_t piece, char* slot) const {
    copy(slot, x + split.begin(piece) * element, split.size(piece) * element);
  }
  int64_t chunks(int64_t piece) const { return split.chunks(piece); }
  void share(int64_t piece, int64_t chunk, int g) const {
    const int64_t begin = chunk * split.per_chunk;
    kernels.sum(comm.sources(g, 0), comm.slot(0, g), begin, std::min(begin + split.per_chunk, split.size(piece)));
  }
  bool summed() const { return split.per_chunk != 0; }
};

struct SumSteps : Summation {
  char* out;

  void finish(int64_t piece, int g) const {
    char* const to = out + split.begin(piece) * element;
    const int64_t bytes = split.size(piece) * element;
    if (summed() && split.total * element >= kStreamBytes) {
      stream_copy(to, comm.slot(0, g), bytes);
    } else if (summed()) {
      copy(to, comm.slot(0, g), bytes);
    } else {
      kernels.sum(comm.sources(g, 0), to, 0, split.size(piece));
    }
  }
};

struct NormSteps : Summation {
  NormTarget target;

  void finish(int64_t piece, int g) const {
    const auto norm = target.quant.fp8 == nullptr ? kernels.norm : kernels.norm_quant[int(target.quant.format)];
    const int64_t first_row = split.begin(piece) / target.hidden;
    const int64_t row_bytes = target.hidden * element;
    parallel_rows(comm.config_.parallel, split.size(piece) / target.hidden, std::max<int64_t>(1, 32768 / target.hidden),
                  [&](int64_t begin, int64_t end) {
                    Sources rows = comm.sources(g, begin * row_bytes);
                    if (summed()) rows.count = 1;  // rank 0's slot holds the sum
                    norm(rows, target, first_row + begin, end - begin);
                  });
  }
};

struct GatherSteps : OneShot {
  const Communicator& comm;
  const char* x;
  char* out;
  Split split;  // in bytes

  void publish(int64_t piece, char* slot) const { copy(slot, x + split.begin(piece), split.size(piece)); }
  void finish(int64_t piece, int g) const {
    for (int r = 0; r < comm.config_.world_size; ++r) {
      copy(out + r * split.total + split.begin(piece), comm.slot(r, g), split.size(piece));
    }
  }
};

// A piece is the same stretch of every rank's part; they lie one after another in the slot.
struct ReduceScatterSteps : OneShot {
  const Communicator& comm;
  const Kernels& kernels;
  const char* x;
  char* out;
  int64_t element;
  Split split;  // in elements of a part

  void publish(int64_t piece, char* slot) const {
    const int64_t bytes = split.size(piece) * element;
    for (int r = 0; r < comm.config_.world_size; ++r) {
      copy(slot + r * bytes, x + (r * split.total + split.begin(piece)) * element, bytes);
    }
  }
  void finish(int64_t piece, int g) const {
    const int64_t mine = comm.config_.rank * split.size(piece) * element;
    kernels.sum(comm.sources(g, mine), out + split.begin(piece) * element, 0, split.size(piece));
  }
};

struct BroadcastSteps : OneShot {
  const Communicator& comm;
  char* x;
  int root;
  Split split;  // in bytes

  void publish(int64_t piece, char* slot) const {
    if (comm.config_.rank == root) copy(slot, x + split.begin(piece), split.size(piece));
  }
  void finish(int64_t piece, int g) const {
    if (comm.config_.rank != root) copy(x + split.begin(piece), comm.slot(root, g), split.size(piece));
  }
};

// Elements that a ticket of two-shot stands for, 0 for one-shot: enough chunks for all ranks, and none so small that
// drawing the ticket costs more than the sum.
int64_t Communicator::chunk_elements(int64_t message_bytes, int64_t element) const {
  if (message_bytes <= config_.one_shot_max_bytes) return 0;
  const int64_t fair = std::min(message_bytes, config_.piece_bytes) / config_.world_size;
  return std::clamp(fair, config_.min_chunk_bytes, config_.max_chunk_bytes) / 64 * 64 / element;
}

bool Communicator::all_reduce(DType dtype, const void* x, void* out, int64_t count) {
  const int64_t element = element_bytes(dtype);
  const Split split = {count, config_.piece_bytes / element, chunk_elements(count * element, element)};
  const SumSteps steps = {{*this, *find_kernels(dtype), static_cast<const char*>(x), element, split},
                          static_cast<char*>(out)};
  if (!run({Op::kAllReduce, int32_t(dtype), 1, count, 0}, split.pieces(), steps)) return false;
  ++(steps.summed() ? num_two_shot_ : num_one_shot_);
  return true;
}

bool Communicator::all_reduce_norm(DType dtype, const void* x, int64_t rows, const NormTarget& target) {
  const int64_t element = element_bytes(dtype), count = rows * target.hidden;
  const int64_t rows_per_piece = std::max<int64_t>(1, config_.piece_bytes / (target.hidden * element));
  const Split split = {count, rows_per_piece * target.hidden, chunk_elements(count * element, element)};
  const NormSteps steps = {{*this, *find_kernels(dtype), static_cast<const char*>(x), element, split}, target};
  const Op op = target.quant.fp8 == nullptr ? Op::kAllReduceRMSNorm : Op::kAllReduceRMSNormQuant;
  if (!run({op, int32_t(dtype), rows, target.hidden, target.quant.group_size}, split.pieces(), steps)) return false;
  ++(steps.summed() ? num_two_shot_ : num_one_shot_);
  return true;
}

bool Communicator::all_gather(const void* x, void* out, int64_t bytes) {
  const Split split = {bytes, config_.piece_bytes, 0};
  const GatherSteps steps = {{}, *this, static_cast<const char*>(x), static_cast<char*>(out), split};
  return run({Op::kAllGather, kBytes, 1, bytes, 0}, split.pieces(), steps);
}

bool Communicator::reduce_scatter(DType dtype, const void* x, void* out, int64_t count) {
  const int64_t element = element_bytes(dtype);
  const Split split = {count, config_.piece_bytes / (element * config_.world_size), 0};
  const ReduceScatterSteps steps = {
      {}, *this, *find_kernels(dtype), static_cast<const char*>(x), static_cast<char*>(out), element, split};
  return run({Op::kReduceScatter, int32_t(dtype), 1, count, 0}, split.pieces(), steps);
}

bool Communicator::broadcast(void* x, int64_t bytes, int root) {
  const Split split = {bytes, config_.piece_bytes, 0};
  const BroadcastSteps steps = {{}, *this, static_cast<char*>(x), root, split};
  return run({Op::kBroadcast, kBytes, 1, bytes, root}, split.pieces(), steps);
}

bool Communicator::barrier() { return run({Op::kBarrier, kBytes, 0, 0, 0}, 1, OneShot{}); }

}  // namespace fusedcomm::cpu
