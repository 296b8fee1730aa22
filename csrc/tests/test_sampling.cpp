// Sampling and verification of all instruction sets against the specification's arithmetic, by sorting and one value at
// a time: rows of every length with every kind of value, in memory that ends where they do.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/sampling/kernels.h"
#include "scalar.h"

using namespace fusedcomm::cpu::sampling;
using namespace fusedcomm::test;

namespace {

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found;
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if (const Kernels* kernels = find_kernels(isa)) found.push_back(kernels);
  }
  return found;
}

// ---- the specification: docs/sampling.md, "To the bit" ----

constexpr double kScale = 0x1p44;

struct Values {
  std::vector<float> y;
  float unit;
};

Values values_of(const std::vector<float>& x) {
  float largest = 0.0f;
  std::vector<float> counted;
  for (const float v : x) counted.push_back(v > 0.0f ? std::min(v, 0x1.fffffep+126f) : 0.0f);
  for (const float v : counted) largest = std::max(largest, v);
  const int exponent = largest == 0.0f ? -126 : std::max(std::ilogb(largest), -126);
  const float unit = exponent >= -20 && exponent <= 0 ? 1.0f : std::ldexp(1.0f, -exponent);
  for (float& v : counted) v *= unit;
  return {counted, unit};
}

uint64_t mass(float y) { return y > 0.0f ? std::max<uint64_t>(1, uint64_t(std::nearbyint(double(y) * kScale))) : 0; }

uint64_t mass_from(const std::vector<float>& y, float threshold) {
  uint64_t total = 0;
  for (const float v : y) total += v >= threshold ? mass(v) : 0;
  return total;
}

std::vector<float> divided(const std::vector<float>& y, float threshold) {
  const uint64_t total = mass_from(y, threshold);
  const float m = total == 0 ? 1.0f : float(total) * 0x1p-44f;
  std::vector<float> result;
  for (const float v : y) result.push_back(v >= threshold ? v / m : 0.0f);
  return result;
}

std::vector<float> descending(std::vector<float> y) {
  std::sort(y.begin(), y.end(), [](float a, float b) { return a > b; });
  return y;
}

float top_k_threshold(const std::vector<float>& y, int64_t k) {
  return k > 0 && k < int64_t(y.size()) ? descending(y)[size_t(k - 1)] : 0.0f;
}

float top_p_threshold(const std::vector<float>& y, float p, float unit) {
  if (!(p < 1.0f)) return 0.0f;
  uint64_t sum = 0;
  for (const float v : descending(y)) {
    sum += mass(v);
    if (v > 0.0f && double(sum) >= double(p) * double(unit) * kScale) return v;
  }
  return 0.0f;
}

std::vector<float> kept_by_min_p(const std::vector<float>& y, float min_p) {
  const double least = (min_p > 0.0f ? std::min(min_p, 1.0f) : 0.0) * double(*std::max_element(y.begin(), y.end()));
  std::vector<float> kept;
  for (const float v : y) kept.push_back(double(v) >= least ? v : 0.0f);
  return kept;
}

int32_t drawn(const std::vector<float>& y, float u) {
  const uint64_t total = mass_from(y, 0.0f);
  u = u > 0.0f ? std::min(u, 1.0f - 0x1p-24f) : 0.0f;
  const auto target = uint64_t((unsigned __int128)(total)*uint64_t(double(u) * 0x1p31) >> 31);
  uint64_t up_to = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    if ((up_to += mass(y[i])) > target) return int32_t(i);
  }
  return 0;
}

int32_t residual(const std::vector<float>& target, const float* draft, float u) {
  std::vector<float> left = target;
  for (size_t i = 0; draft != nullptr && i < left.size(); ++i) left[i] -= draft[i];
  const bool any = std::any_of(left.begin(), left.end(), [](float v) { return v > 0.0f; });
  return drawn(values_of(any ? left : target).y, u);
}

// ---- what goes in ----

enum class Kind { kPeaked, kFlat, kTied, kSteps, kBits, kSubnormal, kHuge, kZeros, kSpecials };
constexpr Kind kKinds[] = {Kind::kPeaked,    Kind::kFlat, Kind::kTied,  Kind::kSteps,   Kind::kBits,
                           Kind::kSubnormal, Kind::kHuge, Kind::kZeros, Kind::kSpecials};
constexpr int32_t kVocabs[] = {1, 2, 3, 15, 16, 17, 100, 255, 256, 257, 1023, 1024, 1025, 3000};
constexpr float kShares[] = {0.0f, 1e-6f, 0.1f, 0.5f, 0.9f, 0.999f, 1.0f, NAN, -1.0f, INFINITY};

std::vector<float> row(std::mt19937& random, Kind kind, int32_t vocab) {
  std::normal_distribution<float> normal;
  std::vector<float> x;
  for (int32_t i = 0; i < vocab; ++i) {
    switch (kind) {
      case Kind::kPeaked:
      case Kind::kFlat:
        x.push_back(std::exp(normal(random) * (kind == Kind::kPeaked ? 5.0f : 0.1f)));
        break;
      case Kind::kTied:
        x.push_back(float(random() % 4u));
        break;
      case Kind::kSteps:  // quarters of the smallest mass, beside a value that leaves the unit at 1
        x.push_back(i == 0 ? 0x1p-20f : float(random() % 64u) * 0x1p-46f);
        break;
      case Kind::kBits:
        x.push_back(float_of(uint32_t(random())));
        break;
      case Kind::kSubnormal:
        x.push_back(float_of(uint32_t(random()) >> 10));
        break;
      case Kind::kHuge:
        x.push_back(std::fabs(normal(random)) * 0x1p126f);
        break;
      case Kind::kZeros:
        x.push_back(random() & 1u ? 0.0f : -0.0f);
        break;
      case Kind::kSpecials: {
        const float specials[] = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 0x1p-149f, -1.0f, 3.4e38f};
        x.push_back(random() % 8u == 0 ? specials[random() % 8u] : float(random() % 1000u) * 1e-6f);
        break;
      }
    }
  }
  if (kind == Kind::kPeaked || kind == Kind::kFlat || kind == Kind::kTied) {
    float sum = 0.0f;
    for (const float v : x) sum += v;
    for (float& v : x) v = sum > 0.0f ? v / sum : v;
  }
  return x;
}

float uniform(std::mt19937& random) {
  const float odd[] = {0.0f, 1.0f - 0x1p-24f, 1.0f, NAN, -1.0f, 0x1p-40f};
  return random() % 4u == 0 ? odd[random() % 6u] : float(random() >> 8) * 0x1p-24f;
}

struct Call {
  std::vector<uint8_t> memory;
  std::vector<std::vector<float>> values;  // of each row of the result
  std::vector<int32_t> indices;
  Rows rows;

  // Rows of one dtype that lie apart, named in any order; `named` may be past the ends.
  Call(std::mt19937& random, DType dtype, int32_t vocab) {
    const int32_t num_rows = 1 + int32_t(random() % 4u), stride = vocab + int32_t(random() % 3u);
    const int64_t element = fusedcomm::element_bytes(dtype);
    memory.assign(size_t(((num_rows - 1) * stride + vocab) * element), 0xff);  // NaN between rows
    for (int32_t r = 0; r < num_rows; ++r) {
      const std::vector<float> x = row(random, kKinds[random() % std::size(kKinds)], vocab);
      for (int32_t i = 0; i < vocab; ++i) store(memory.data(), dtype, r * stride + i, round_to(x[size_t(i)], dtype));
    }
    for (int i = 0; i < 6; ++i) indices.push_back(int32_t(random() % uint32_t(num_rows + 2)) - 1);
    for (const int32_t index : indices) {
      const int32_t source = std::clamp(index, 0, num_rows - 1);
      values.emplace_back();
      for (int32_t i = 0; i < vocab; ++i) values.back().push_back(load(memory.data(), dtype, source * stride + i));
    }
    rows.data = memory.data();
    rows.dtype = dtype;
    rows.stride = stride;
    rows.num_rows = num_rows;
    rows.indices = {indices.data(), false};
    rows.count = int64_t(indices.size());
    rows.vocab = vocab;
  }
};

void check_row(const char* isa, const char* op, const float* got, const std::vector<float>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK_THAT(bits_of(got[i]) == bits_of(want[i]),
               isa << " " << op << " at " << i << " of " << want.size() << ": " << got[i] << " and not " << want[i]);
  }
}

// Poison, exactly as large as the result.
std::vector<float> poisoned(const Call& call) {
  return std::vector<float>(call.values.size() * size_t(call.rows.vocab), NAN);
}

}  // namespace

TEST(filters_and_tokens_to_the_bit) {
  std::mt19937 random(1);
  const auto scratch = std::make_unique<Scratch>();
  for (int repetition = 0; repetition < 40; ++repetition) {
    for (const int32_t vocab : kVocabs) {
      const DType dtype = DType(random() % 3u);
      const Call call(random, dtype, vocab);
      const int64_t count = call.rows.count;
      std::vector<int64_t> k;
      std::vector<float> p, u;
      for (int64_t i = 0; i < count; ++i) {
        k.push_back(int64_t(random() % uint32_t(vocab + 3)) - 1);
        p.push_back(kShares[random() % std::size(kShares)]);
        u.push_back(uniform(random));
      }
      const Limit top_k = {{k.data(), true}, 0};
      const PerRow share = {p.data(), 0.0f};
      const bool joint = random() & 1u;
      for (const Kernels* kernels : tables()) {
        const RowKernels& run = kernels->rows[int(dtype)];
        std::vector<float> by_k = poisoned(call), by_p = by_k, by_both = by_k, by_min_p = by_k;
        std::vector<int32_t> all(size_t(count), -7), kept(size_t(count), -7);
        run.top_k_renorm(call.rows, top_k, by_k.data(), 0, count, *scratch);
        run.top_p_renorm(call.rows, share, by_p.data(), 0, count, *scratch);
        run.top_k_top_p_renorm(call.rows, top_k, share, by_both.data(), 0, count, *scratch);
        run.min_p_renorm(call.rows, share, by_min_p.data(), 0, count, *scratch);
        run.sample(call.rows, u.data(), all.data(), 0, count, *scratch);
        run.sample_top_k_top_p(call.rows, top_k, share, u.data(), joint, kept.data(), 0, count, *scratch);
        for (size_t i = 0; i < size_t(count); ++i) {
          const auto [y, unit] = values_of(call.values[i]);
          const size_t at = i * size_t(vocab);
          const float of_k = top_k_threshold(y, k[i]), of_p = top_p_threshold(y, p[i], unit);
          const std::vector<float> survivors = divided(y, of_k);
          const float of_survivors = top_p_threshold(survivors, p[i], 1.0f);
          check_row(kernels->isa, "top_k_renorm", &by_k[at], survivors);
          check_row(kernels->isa, "top_p_renorm", &by_p[at], divided(y, of_p));
          check_row(kernels->isa, "top_k_top_p_renorm", &by_both[at], divided(survivors, of_survivors));
          check_row(kernels->isa, "min_p_renorm", &by_min_p[at], divided(kept_by_min_p(y, p[i]), 0.0f));
          CHECK(all[i] == drawn(y, u[i]));
          std::vector<float> left;
          for (size_t e = 0; e < y.size(); ++e) {
            const bool stays = y[e] >= of_k && (joint ? y[e] >= of_p : survivors[e] >= of_survivors);
            left.push_back(stays ? y[e] : 0.0f);
          }
          CHECK_THAT(kept[i] == drawn(left, u[i]),
                     kernels->isa << " joint " << joint << " k " << k[i] << " p " << p[i]);
        }
      }
    }
  }
}

TEST(min_p_compares_with_the_exact_product) {
  std::mt19937 random(7);
  const auto scratch = std::make_unique<Scratch>();
  for (int repetition = 0; repetition < 200; ++repetition) {
    const float largest = float(random() >> 8) * 0x1p-24f + 0.25f, share = float(random() >> 8) * 0x1p-24f;
    const float nearest = largest * share;
    const std::vector<float> x = {std::nextafter(nearest, 0.0f), nearest, std::nextafter(nearest, 2.0f), largest};
    Rows rows;
    rows.data = x.data();
    rows.num_rows = rows.count = 1;
    rows.stride = rows.vocab = int32_t(x.size());
    const std::vector<float> want = divided(kept_by_min_p(values_of(x).y, share), 0.0f);
    for (const Kernels* kernels : tables()) {
      std::vector<float> out(x.size(), NAN);
      kernels->rows[int(DType::kFloat)].min_p_renorm(rows, {nullptr, share}, out.data(), 0, 1, *scratch);
      check_row(kernels->isa, "min_p_renorm", out.data(), want);
    }
  }
}

// The exponential is the library's own: within its tolerance of the exact one, the same for all instruction sets.
TEST(softmax_within_its_tolerance) {
  std::mt19937 random(2);
  const auto scratch = std::make_unique<Scratch>();
  for (int repetition = 0; repetition < 20; ++repetition) {
    for (const int32_t vocab : kVocabs) {
      const DType dtype = DType(random() % 3u);
      Call call(random, dtype, vocab);
      std::normal_distribution<float> normal;
      if (random() & 1u) {  // as logits are; garbage in the other half
        for (int64_t i = 0; i < int64_t(call.memory.size()) / fusedcomm::element_bytes(dtype); ++i) {
          store(call.memory.data(), dtype, i, round_to(normal(random) * 20.0f, dtype));
        }
        for (size_t r = 0; r < call.values.size(); ++r) {
          const int64_t source = std::clamp<int64_t>(call.indices[r], 0, call.rows.num_rows - 1);
          for (int32_t i = 0; i < vocab; ++i) {
            call.values[r][size_t(i)] = load(call.memory.data(), dtype, source * call.rows.stride + i);
          }
        }
      }
      const float temperatures[] = {1.0f, 0.7f, 0.0f, 1e-30f, 1e30f, NAN, -1.0f, INFINITY, 0x1p-149f};
      std::vector<float> t;
      for (size_t i = 0; i < call.values.size(); ++i) t.push_back(temperatures[random() % std::size(temperatures)]);
      std::vector<float> first;
      for (const Kernels* kernels : tables()) {
        std::vector<float> out = poisoned(call);
        kernels->rows[int(dtype)].softmax_temperature(call.rows, {t.data(), 0.0f}, out.data(), 0, call.rows.count,
                                                      *scratch);
        if (first.empty()) first = out;
        check_row(kernels->isa, "softmax_temperature", out.data(), first);
      }
      for (size_t r = 0; r < call.values.size(); ++r) {
        std::vector<double> x;
        for (const float v : call.values[r])
          x.push_back(v > -INFINITY ? std::min(double(v), 0x1.fffffep127) : -INFINITY);
        const double largest = *std::max_element(x.begin(), x.end());
        const size_t argmax = size_t(std::max_element(x.begin(), x.end()) - x.begin());
        const bool greedy = !(t[r] >= 0x1p-126f);
        const double temperature = std::min(double(t[r]), 0x1p126);
        double sum = 0.0;
        // a difference that fp32 does not hold is infinite
        const auto depth_of = [&](double v) { return double(float(largest - v)) / temperature; };
        for (const double v : x) sum += v > -INFINITY ? std::exp(-depth_of(v)) : 0.0;
        for (size_t i = 0; i < x.size(); ++i) {
          const float got = first[r * size_t(vocab) + i];
          if (!(x[i] > -INFINITY) || greedy) {
            CHECK(got == (greedy && largest > -INFINITY && i == argmax ? 1.0f : 0.0f));
            continue;
          }
          const double depth = depth_of(x[i]), want = std::exp(-depth) / sum;
          const double allowed = want > 0.0 ? std::max(0x1p-22 * (8.0 + depth) * want, 0x1p-126) : 0x1p-126;
          CHECK_THAT(std::fabs(got - want) <= allowed, got << " and not " << want << ", t " << t[r]);
        }
      }
    }
  }
}

TEST(any_split_of_the_rows_gives_the_same) {
  std::mt19937 random(3);
  const int32_t vocab = 3000;
  const Call call(random, DType::kFloat, vocab);
  const int64_t count = call.rows.count;
  for (const Kernels* kernels : tables()) {
    const auto filter = kernels->rows[int(DType::kFloat)].top_k_top_p_renorm;
    std::vector<float> whole = poisoned(call), parts = poisoned(call);
    const auto run = [&](std::vector<float>& out, int64_t begin, int64_t end) {
      const auto scratch = std::make_unique<Scratch>();
      filter(call.rows, {{}, 100}, {nullptr, 0.9f}, out.data(), begin, end, *scratch);
    };
    run(whole, 0, count);
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; i += 2) threads.emplace_back([&, i] { run(parts, i, std::min(i + 2, count)); });
    for (std::thread& thread : threads) thread.join();
    check_row(kernels->isa, "top_k_top_p_renorm in parts", parts.data(), whole);
  }
}

namespace {

// A batch of drafts of any shape: probabilities, ids and links that may be anything.
struct Drafts {
  int64_t batch = 4, size, vocab;
  std::vector<float> target, draft, uniforms, finals;
  std::vector<int64_t> ids, position, next, sibling;

  explicit Drafts(std::mt19937& random) : size(1 + int64_t(random() % 6u)), vocab(1 + int64_t(random() % 300u)) {
    for (int64_t i = 0; i < batch * size; ++i) {
      const Kind kind = random() % 4u == 0 ? kKinds[random() % std::size(kKinds)] : Kind::kPeaked;
      const std::vector<float> t = row(random, kind, int32_t(vocab));
      const std::vector<float> d = random() % 4u == 0 ? t : row(random, kind, int32_t(vocab));
      target.insert(target.end(), t.begin(), t.end());
      draft.insert(draft.end(), d.begin(), d.end());
      const auto likely = std::max_element(t.begin(), t.end()) - t.begin();
      ids.push_back(random() % 2u ? likely : int64_t(random() % uint32_t(vocab + 2)) - 1);
      uniforms.push_back(uniform(random));
      position.push_back(batch * size - 1 - i + (random() % 16u == 0 ? 1000 : 0));
      next.push_back(random() % 8u ? std::min(i % size + 1, size) : int64_t(random() % 9u) - 2);
      sibling.push_back(int64_t(random() % uint32_t(size + 2)) - 1);
    }
    for (int64_t b = 0; b < batch; ++b) finals.push_back(uniform(random));
  }

  std::vector<float> target_row(int64_t i) const {
    return {target.begin() + i * vocab, target.begin() + (i + 1) * vocab};
  }
  float p(const std::vector<float>& rows, int64_t i, int64_t id) const {
    if (id < 0 || id >= vocab) return 0.0f;
    const float found = rows[size_t(i * vocab + id)];
    return found > 0.0f ? found : 0.0f;
  }
};

}  // namespace

TEST(chains_of_drafts) {
  std::mt19937 random(4);
  const auto scratch = std::make_unique<Scratch>();
  for (int repetition = 0; repetition < 200; ++repetition) {
    const Drafts in(random);
    const int64_t n = in.size - 1;  // of the target there is one row more
    std::vector<int32_t> ids;
    std::vector<float> draft, uniforms;
    for (int64_t b = 0; b < in.batch; ++b) {
      for (int64_t i = 0; i < n; ++i) {
        ids.push_back(int32_t(in.ids[size_t(b * in.size + i)]));
        uniforms.push_back(in.uniforms[size_t(b * in.size + i)]);
      }
      const auto first = in.draft.begin() + b * in.size * in.vocab;
      draft.insert(draft.end(), first, first + n * in.vocab);
    }
    const float single = float(random() % 3u) * 0.5f, acc = float(random() % 3u) * 0.5f;
    for (const Kernels* kernels : tables()) {
      std::vector<int32_t> output(size_t(in.batch * in.size), -7), accepted(size_t(in.batch), -7);
      ChainArguments a;
      a.draft_probs = draft.data();
      a.draft_ids = {ids.data(), false};
      a.target_probs = in.target.data();
      a.uniforms = uniforms.data();
      a.final_uniforms = in.finals.data();
      a.output_ids = output.data();
      a.accepted = accepted.data();
      a.batch = in.batch;
      a.num_drafts = int32_t(n);
      a.vocab = int32_t(in.vocab);
      kernels->chain_speculative_sampling(a, 0, in.batch, *scratch);

      std::vector<int32_t> lengths(size_t(in.batch), -7);
      std::vector<int64_t> bonus(size_t(in.batch), -7), tokens(size_t(in.batch * in.size), -7);
      BlockArguments block;
      block.candidates = in.ids.data();
      block.target_probs = in.target.data();
      block.uniforms = in.uniforms.data();
      block.final_uniforms = in.finals.data();
      block.threshold_single = single;
      block.threshold_acc = acc;
      block.out = {lengths.data(), bonus.data(), tokens.data()};
      block.batch = in.batch;
      block.size = int32_t(in.size);
      block.vocab = int32_t(in.vocab);
      kernels->dflash_chain_verify(block, 0, in.batch, *scratch);

      for (int64_t b = 0; b < in.batch; ++b) {
        const int64_t first = b * in.size;
        int64_t count = 0;
        for (; count < n; ++count) {
          const int64_t id = ids[size_t(b * n + count)];
          if (!(uniforms[size_t(b * n + count)] * in.p(draft, b * n + count, id) < in.p(in.target, first + count, id)))
            break;
        }
        CHECK(accepted[size_t(b)] == count);
        const float* const refused = count < n ? draft.data() + (b * n + count) * in.vocab : nullptr;
        const int32_t token = residual(in.target_row(first + count), refused, in.finals[size_t(b)]);
        for (int64_t i = 0; i <= n; ++i) {
          CHECK(output[size_t(first + i)] == (i < count ? ids[size_t(b * n + i)] : i == count ? token : -1));
        }

        const auto draft_id = [&](int64_t i) { return in.ids[size_t(first + 1 + i)]; };
        for (count = 0; count < n; ++count) {
          const float p = in.p(in.target, first + count, draft_id(count));
          if (!(p > 0.0f && (in.uniforms[size_t(first + count)] < p / acc || p >= single))) break;
        }
        CHECK(lengths[size_t(b)] == count);
        std::vector<float> without(size_t(in.vocab), 0.0f);
        const std::vector<float> target = in.target_row(first + count);
        if (count < n && draft_id(count) >= 0 && draft_id(count) < in.vocab) {
          without[size_t(draft_id(count))] = target[size_t(draft_id(count))];
        }
        CHECK(bonus[size_t(b)] == residual(target, without.data(), in.finals[size_t(b)]));
        for (int64_t i = 0; i <= n; ++i) {
          CHECK(tokens[size_t(first + i)] == (i < count ? draft_id(i) : i == count ? bonus[size_t(b)] : -1));
        }
      }
    }
  }
}

TEST(chains_of_ids) {
  std::mt19937 random(5);
  for (int repetition = 0; repetition < 200; ++repetition) {
    const int64_t batch = 1 + int64_t(random() % 5u), size = 1 + int64_t(random() % 8u);
    std::vector<int64_t> candidates;
    std::vector<int32_t> predict;
    for (int64_t i = 0; i < batch * size; ++i) {
      candidates.push_back(int64_t(random() % 3u) - 1 + (random() % 16u == 0 ? int64_t(1) << 32 : 0));
      predict.push_back(int32_t(random() % 3u) - 1);
    }
    for (const Kernels* kernels : tables()) {
      std::vector<int32_t> lengths(size_t(batch), -7);
      std::vector<int64_t> bonus(size_t(batch), -7), tokens(size_t(batch * size), -7);
      GreedyArguments a;
      a.candidates = {candidates.data(), true};
      a.target_predict = {predict.data(), false};
      a.out = {lengths.data(), bonus.data(), tokens.data()};
      a.batch = batch;
      a.size = int32_t(size);
      kernels->greedy_chain_verify(a, 0, batch);
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t* const row = candidates.data() + b * size;
        const auto agrees = [&](int64_t i) { return row[i + 1] == predict[size_t(b * size + i)]; };
        int64_t count = 0;
        while (count < size - 1 && agrees(count)) ++count;
        CHECK(lengths[size_t(b)] == count && bonus[size_t(b)] == predict[size_t(b * size + count)]);
        for (int64_t i = 0; i < size; ++i) {
          CHECK(tokens[size_t(b * size + i)] == (i < count ? row[i + 1] : i == count ? bonus[size_t(b)] : -1));
        }
      }
    }
  }
}

TEST(trees_of_drafts) {
  std::mt19937 random(6);
  const auto scratch = std::make_unique<Scratch>();
  for (int repetition = 0; repetition < 300; ++repetition) {
    const Drafts in(random);
    const int64_t path_size = 1 + int64_t(random() % 6u), num_positions = in.batch * in.size;
    const float single = float(random() % 3u) * 0.5f, acc_limit = float(random() % 3u) * 0.5f;
    for (const Kernels* kernels : tables()) {
      std::vector<int32_t> predicts(size_t(num_positions), -1), path(size_t(in.batch * path_size), -7);
      std::vector<int32_t> counts(size_t(in.batch), -7);
      std::vector<float> draft = in.draft, want_draft = in.draft;
      TreeArguments a;
      a.predicts = predicts.data();
      a.accept_index = path.data();
      a.accept_token_num = counts.data();
      a.candidates = in.ids.data();
      a.retrive_index = in.position.data();
      a.retrive_next_token = in.next.data();
      a.retrive_next_sibling = in.sibling.data();
      a.uniforms = in.uniforms.data();
      a.final_uniforms = in.finals.data();
      a.target_probs = in.target.data();
      a.draft_probs = draft.data();
      a.threshold_single = single;
      a.threshold_acc = acc_limit;
      a.batch = in.batch;
      a.num_positions = num_positions;
      a.size = int32_t(in.size);
      a.path_size = int32_t(path_size);
      a.vocab = int32_t(in.vocab);
      kernels->tree_speculative_sampling(a, 0, in.batch, *scratch);

      std::vector<int32_t> want_predicts(size_t(num_positions), -1);
      for (int64_t b = 0; b < in.batch; ++b) {
        const int64_t first = b * in.size;
        const auto is_node = [&](int64_t node) { return node >= 0 && node < in.size; };
        std::vector<int64_t> nodes = {0};
        int64_t node = in.next[size_t(first)];
        float acc = 0.0f;
        for (int64_t step = 1; step < in.size && is_node(node) && int64_t(nodes.size()) < path_size; ++step) {
          const int64_t current = first + nodes.back(), id = in.ids[size_t(first + node)];
          const float p = in.p(in.target, current, id);
          acc += p;
          if (p > 0.0f && (in.uniforms[size_t(current)] < acc / acc_limit || p >= single)) {
            nodes.push_back(node);
            node = in.next[size_t(first + node)];
            acc = 0.0f;
          } else {
            if (id >= 0 && id < in.vocab) want_draft[size_t(current * in.vocab + id)] = p;
            node = in.sibling[size_t(first + node)];
          }
        }
        CHECK(counts[size_t(b)] == int64_t(nodes.size()) - 1);
        for (int64_t i = 0; i < path_size; ++i) {
          const bool used = i < int64_t(nodes.size());
          const int64_t at = used ? in.position[size_t(first + nodes[size_t(i)])] : -1;
          CHECK(path[size_t(b * path_size + i)] == (at < num_positions ? at : -1));
          if (!used || at >= num_positions) continue;
          const int64_t current = first + nodes[size_t(i)];
          const bool is_last = i + 1 == int64_t(nodes.size());
          const float* const left = i + 1 == path_size ? nullptr : want_draft.data() + current * in.vocab;
          want_predicts[size_t(at)] = is_last ? residual(in.target_row(current), left, in.finals[size_t(b)])
                                              : int32_t(in.ids[size_t(first + nodes[size_t(i + 1)])]);
        }
      }
      CHECK(predicts == want_predicts);
      for (size_t i = 0; i < draft.size(); ++i) CHECK(bits_of(draft[i]) == bits_of(want_draft[i]));
    }
  }
}

int main() { return run_tests(); }
