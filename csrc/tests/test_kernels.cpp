// The kernel tables of all instruction sets against the specification's arithmetic, scalar by scalar, and so against
// each other: sums, norms and quantisation of random rows of every length, with every kind of value.
#include <algorithm>
#include <random>

#include "check.h"
#include "cpu/kernels.h"
#include "scalar.h"

using namespace fusedcomm::cpu;
using namespace fusedcomm::test;

namespace {

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kHalf, DType::kFloat};
constexpr Fp8Format kFormats[] = {Fp8Format::kE4M3fn, Fp8Format::kE4M3fnuz};
constexpr int64_t kGroupSizes[] = {32, 64, 128, 256};
constexpr uint8_t kPoison = 0xa5;
constexpr int64_t kGuard = 64;  // bytes before and behind each output that must stay as they are

std::vector<const Kernels*> tables(DType dtype) {
  std::vector<const Kernels*> found;
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if (const Kernels* kernels = find_kernels(dtype, isa)) found.push_back(kernels);
  }
  return found;
}

// Memory of exactly this size, so that the address sanitizer sees every step outside.
class Bytes {
 public:
  explicit Bytes(int64_t size) : data_(size_t(size + 2 * kGuard), kPoison), size_(size) {}
  void* get() { return data_.data() + kGuard; }
  const void* get() const { return data_.data() + kGuard; }
  bool guards_hold() const {
    const auto poison = [](uint8_t b) { return b == kPoison; };
    return std::all_of(data_.begin(), data_.begin() + kGuard, poison) &&
           std::all_of(data_.begin() + kGuard + size_, data_.end(), poison);
  }

 private:
  std::vector<uint8_t> data_;
  int64_t size_;
};

enum class Values { kOrdinary, kBits, kSmall, kHuge, kZeros, kSpecials };
constexpr Values kValues[] = {Values::kOrdinary, Values::kBits,  Values::kSmall,
                              Values::kHuge,     Values::kZeros, Values::kSpecials};

float value(std::mt19937& random, Values kind) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case Values::kOrdinary:
      return normal(random);
    case Values::kBits:
      return float_of(uint32_t(random()));
    case Values::kSmall:
      return normal(random) * 1e-38f;
    case Values::kHuge:
      return normal(random) * 1e38f;
    case Values::kZeros:
      return random() & 1u ? 0.0f : -0.0f;
    case Values::kSpecials: {
      const float specials[] = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 65504.0f, 1e-10f, 3.4e38f};
      return random() % 16 == 0 ? specials[random() % 8] : normal(random);
    }
  }
  return 0.0f;
}

std::vector<uint8_t> rows_of(std::mt19937& random, DType dtype, int64_t count, Values kind) {
  std::vector<uint8_t> bytes(size_t(count * element_bytes(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    if (kind == Values::kBits && dtype != DType::kFloat) {
      reinterpret_cast<uint16_t*>(bytes.data())[i] = uint16_t(random());
    } else {
      store(bytes.data(), dtype, i, round_to(value(random, kind), dtype));
    }
  }
  return bytes;
}

struct Inputs {
  std::vector<std::vector<uint8_t>> data;
  std::vector<const void*> pointers;
  Sources sources;

  Inputs(std::mt19937& random, DType dtype, int64_t count, int world_size, Values kind) {
    sources.count = world_size;
    for (int r = 0; r < world_size; ++r) data.push_back(rows_of(random, dtype, count, kind));
    for (int r = 0; r < world_size; ++r) {
      pointers.push_back(data[size_t(r)].data());
      sources.rows[r] = pointers.back();
    }
  }
};

void check_sum(std::mt19937& random, DType dtype, int64_t count, int world_size, Values kind) {
  const Inputs in(random, dtype, count, world_size, kind);
  std::vector<float> expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(rank_order_sum(in.pointers, dtype, i));
  const int64_t begin = int64_t(random() % uint32_t(count + 1)), end = begin + (count - begin) * 3 / 4;
  for (const Kernels* kernels : tables(dtype)) {
    Bytes out(count * element_bytes(dtype));
    kernels->sum(in.sources, out.get(), 0, count);
    CHECK(out.guards_hold());
    for (int64_t i = 0; i < count; ++i) {
      CHECK_THAT(same(load(out.get(), dtype, i), expected[size_t(i)]),
                 kernels->isa << " dtype " << int(dtype) << " ranks " << world_size << " at " << i << " of " << count
                              << ": " << load(out.get(), dtype, i) << " and not " << expected[size_t(i)]);
    }
    // a stretch of it alone: the same values there, nothing elsewhere
    const int64_t element = element_bytes(dtype);
    Bytes part(count * element);
    kernels->sum(in.sources, part.get(), begin, end);
    CHECK(part.guards_hold());
    const auto* bytes = static_cast<const uint8_t*>(part.get());
    for (int64_t i = 0; i < count; ++i) {
      if (i >= begin && i < end) {
        CHECK_THAT(same(load(part.get(), dtype, i), expected[size_t(i)]), kernels->isa << " stretch at " << i);
      } else {
        for (int64_t b = i * element; b < (i + 1) * element; ++b) CHECK_THAT(bytes[b] == kPoison, kernels->isa);
      }
    }
    // in the place of one of the sources, as two-shot does it
    std::vector<uint8_t> own = in.data[0];
    Sources aliased = in.sources;
    aliased.rows[0] = own.data();
    kernels->sum(aliased, own.data(), 0, count);
    for (int64_t i = 0; i < count; ++i) {
      CHECK_THAT(same(load(own.data(), dtype, i), expected[size_t(i)]), kernels->isa << " in place at " << i);
    }
  }
}

struct NormCase {
  DType dtype;
  int64_t rows, hidden;
  int world_size;
  bool residual;
  float eps;
  int64_t group_size = 0;  // 0: no quantisation
  Fp8Format format = Fp8Format::kE4M3fn;
  bool packed = false, column_major = false, emit = true;
};

void check_norm(std::mt19937& random, const NormCase& c, Values kind) {
  const int64_t count = c.rows * c.hidden, element = element_bytes(c.dtype);
  const Inputs in(random, c.dtype, count, c.world_size, kind);
  const std::vector<uint8_t> residual = rows_of(random, c.dtype, count, kind);
  std::vector<float> weight;
  for (int64_t i = 0; i < c.hidden; ++i) weight.push_back(value(random, Values::kOrdinary));

  // what the specification says
  std::vector<float> r, y;
  for (int64_t row = 0; row < c.rows; ++row) {
    std::vector<float> row_r;
    for (int64_t i = row * c.hidden; i < (row + 1) * c.hidden; ++i) {
      // a single source is a sum already
      const float sum = c.world_size == 1 ? load(in.pointers[0], c.dtype, i) : rank_order_sum(in.pointers, c.dtype, i);
      row_r.push_back(c.residual ? round_to(sum + load(residual.data(), c.dtype, i), c.dtype) : sum);
    }
    const std::vector<float> row_y = norm_row(row_r, weight.data(), c.eps, c.dtype);
    r.insert(r.end(), row_r.begin(), row_r.end());
    y.insert(y.end(), row_y.begin(), row_y.end());
  }

  const int64_t groups = c.group_size == 0 ? 0 : c.hidden / c.group_size;
  const int64_t columns = c.packed ? (groups + 3) / 4 : groups;
  const int64_t padded_rows = (c.rows + 3) / 4 * 4;
  for (const Kernels* kernels : tables(c.dtype)) {
    Bytes norm(count * element), residual_out(count * element), fp8(count), scale(columns * padded_rows * 4);
    NormTarget target;
    target.residual = c.residual ? residual.data() : nullptr;
    target.residual_out = residual_out.get();
    target.weight = weight.data();
    target.eps = c.eps;
    target.hidden = c.hidden;
    target.norm = c.emit || c.group_size == 0 ? norm.get() : nullptr;
    if (c.group_size != 0) {
      target.quant.fp8 = static_cast<uint8_t*>(fp8.get());
      (c.packed ? reinterpret_cast<void*&>(target.quant.packed_scale) : reinterpret_cast<void*&>(target.quant.scale)) =
          scale.get();
      target.quant.row_stride = c.packed || c.column_major ? 1 : groups;
      target.quant.group_stride = c.packed || c.column_major ? padded_rows : 1;
      target.quant.group_size = c.group_size;
      target.quant.format = c.format;
    }
    const auto kernel = c.group_size == 0 ? kernels->norm : kernels->norm_quant[int(c.format)];
    // the first row for itself, then the others: rows are independent
    kernel(in.sources, target, 0, std::min<int64_t>(1, c.rows));
    Sources rest = in.sources;
    for (int s = 0; s < c.world_size; ++s) rest.rows[s] = in.data[size_t(s)].data() + c.hidden * element;
    if (c.rows > 1) kernel(rest, target, 1, c.rows - 1);

    CHECK(norm.guards_hold() && residual_out.guards_hold() && fp8.guards_hold() && scale.guards_hold());
    for (int64_t i = 0; i < count; ++i) {
      CHECK_THAT(same(load(residual_out.get(), c.dtype, i), r[size_t(i)]), kernels->isa << " residual at " << i);
      if (target.norm != nullptr) {
        CHECK_THAT(same(load(norm.get(), c.dtype, i), y[size_t(i)]),
                   kernels->isa << " dtype " << int(c.dtype) << " H " << c.hidden << " norm at " << i << ": "
                                << load(norm.get(), c.dtype, i) << " and not " << y[size_t(i)]);
      }
    }
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = row * c.hidden + group * c.group_size;
        const QuantizedGroup want = quantize(&y[size_t(first)], c.group_size, c.format, c.packed);
        if (c.packed) {
          const auto* words = static_cast<const uint32_t*>(scale.get());
          const uint32_t word = words[row + group / 4 * padded_rows];
          CHECK_THAT((word >> (8 * (group % 4)) & 255u) == want.exponent, kernels->isa << " group " << group);
          if (group == groups - 1 && groups % 4 != 0) CHECK(word >> (8 * (groups % 4)) == 0);
        } else {
          const auto* scales = static_cast<const float*>(scale.get());
          const int64_t at = row * target.quant.row_stride + group * target.quant.group_stride;
          CHECK_THAT(same(scales[at], want.scale), kernels->isa << " scale of group " << group << ": " << scales[at]);
        }
        for (int64_t i = 0; i < c.group_size; ++i) {
          const uint8_t code = static_cast<const uint8_t*>(fp8.get())[first + i];
          const bool both_nan = is_fp8_nan(code, c.format) && is_fp8_nan(want.codes[size_t(i)], c.format);
          CHECK_THAT(code == want.codes[size_t(i)] || both_nan,
                     kernels->isa << " y " << y[size_t(first + i)] << " by " << want.scale << ": code " << int(code)
                                  << " and not " << int(want.codes[size_t(i)]));
        }
      }
    }
  }
}

}  // namespace

TEST(all_instruction_sets_of_this_machine_are_tested) {
  for (const DType dtype : kDTypes) {
    std::printf("     dtype %d:", int(dtype));
    for (const Kernels* kernels : tables(dtype)) std::printf(" %s", kernels->isa);
    std::printf("\n");
    CHECK(find_kernels(dtype, "generic") != nullptr);
    CHECK(find_kernels(dtype, "no such") == nullptr);
    CHECK(find_kernels(dtype) == tables(dtype).back());  // the fastest
  }
}

TEST(sums_of_every_length) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (int64_t count = 0; count <= 300; ++count) {
      check_sum(random, dtype, count, 1 + int(random() % 16), kValues[count % 6]);
    }
    for (const int64_t count : {511, 1000, 4097}) {
      for (const Values kind : kValues) check_sum(random, dtype, count, 8, kind);
    }
  }
}

TEST(sums_of_every_world_size) {
  std::mt19937 random(2);
  for (const DType dtype : kDTypes) {
    for (int world_size = 1; world_size <= kMaxWorldSize; ++world_size) {
      for (const Values kind : kValues) check_sum(random, dtype, 133, world_size, kind);
    }
  }
}

// From +0: a sum of negative zeros is +0 for any number of ranks, and never the -0 that marks a free slot elsewhere.
TEST(negative_zeros_add_up_to_zero) {
  const uint16_t zeros[64] = {};
  uint16_t negative[64];
  std::fill(std::begin(negative), std::end(negative), uint16_t(0x8000));
  for (const DType dtype : {DType::kBFloat16, DType::kHalf}) {
    for (const Kernels* kernels : tables(dtype)) {
      Sources sources;
      sources.count = 3;
      sources.rows[0] = sources.rows[1] = sources.rows[2] = negative;
      uint16_t out[64];
      kernels->sum(sources, out, 0, 64);
      CHECK_THAT(std::equal(std::begin(out), std::end(out), std::begin(zeros)), kernels->isa);
    }
  }
}

TEST(norms_of_every_length) {
  std::mt19937 random(3);
  for (const DType dtype : kDTypes) {
    for (int64_t hidden = 1; hidden <= 300; ++hidden) {
      const NormCase c = {dtype, 2, hidden, 1 + int(hidden % 4), hidden % 3 != 0, hidden % 2 ? 1e-6f : 0.0f};
      check_norm(random, c, kValues[hidden % 6]);
    }
    for (const int64_t hidden : {1023, 1024, 1025, 4096, 7168, 12289, 32767, 32768}) {
      check_norm(random, {dtype, 1, hidden, 2, true, 1e-6f}, Values::kOrdinary);
      check_norm(random, {dtype, 1, hidden, 1, false, 1e-6f}, Values::kBits);
    }
  }
}

TEST(norms_of_every_kind_of_value) {
  std::mt19937 random(4);
  for (const DType dtype : kDTypes) {
    for (const Values kind : kValues) {
      for (int repeat = 0; repeat < 5; ++repeat) check_norm(random, {dtype, 3, 1000, 8, true, 1e-6f}, kind);
    }
  }
}

TEST(quantised_norms) {
  std::mt19937 random(5);
  for (const DType dtype : kDTypes) {
    for (const Fp8Format format : kFormats) {
      for (const int64_t group_size : kGroupSizes) {
        for (int groups = 1; groups <= 9; ++groups) {
          NormCase c = {dtype, 1 + groups % 5, group_size * groups, 1 + groups % 3, groups % 2 == 0, 1e-6f};
          c.group_size = group_size;
          c.format = format;
          c.packed = groups % 3 == 0;
          c.column_major = groups % 3 == 1;
          c.emit = groups % 2 == 0;
          check_norm(random, c, kValues[(groups + int(group_size / 32)) % 6]);
        }
      }
    }
  }
}

// All values of the 16-bit types, and many of fp32, through the quantiser alone.
TEST(quantisation_of_every_value) {
  std::mt19937 random(6);
  for (const DType dtype : kDTypes) {
    const int64_t hidden = 1024, rows = 64;
    std::vector<uint8_t> x(size_t(rows * hidden * element_bytes(dtype)));
    std::vector<float> y(size_t(rows * hidden));
    for (int64_t i = 0; i < rows * hidden; ++i) {
      if (dtype == DType::kFloat) {
        reinterpret_cast<uint32_t*>(x.data())[i] = uint32_t(random());
      } else {
        reinterpret_cast<uint16_t*>(x.data())[i] = uint16_t(i);
      }
    }
    for (int64_t i = 0; i < rows * hidden; ++i) y[size_t(i)] = load(x.data(), dtype, i);
    for (const Fp8Format format : kFormats) {
      for (const Kernels* kernels : tables(dtype)) {
        Bytes fp8(rows * hidden), scale(rows * hidden / 32 * 4);
        QuantTarget target;
        target.fp8 = static_cast<uint8_t*>(fp8.get());
        target.scale = static_cast<float*>(scale.get());
        target.row_stride = hidden / 32;
        target.group_stride = 1;
        target.group_size = 32;
        target.format = format;
        kernels->quant[int(format)](x.data(), hidden, target, 0, rows);
        CHECK(fp8.guards_hold() && scale.guards_hold());
        for (int64_t group = 0; group < rows * hidden / 32; ++group) {
          const QuantizedGroup want = quantize(&y[size_t(group * 32)], 32, format, false);
          CHECK_THAT(same(static_cast<const float*>(scale.get())[group], want.scale), kernels->isa);
          for (int64_t i = 0; i < 32; ++i) {
            const uint8_t code = static_cast<const uint8_t*>(fp8.get())[group * 32 + i];
            const bool both_nan = is_fp8_nan(code, format) && is_fp8_nan(want.codes[size_t(i)], format);
            CHECK_THAT(code == want.codes[size_t(i)] || both_nan,
                       kernels->isa << " value " << y[size_t(group * 32 + i)] << " by " << want.scale);
          }
        }
      }
    }
  }
}

int main() { return run_tests(); }
