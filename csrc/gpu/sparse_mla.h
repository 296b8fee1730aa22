// Sparse MLA decode on Hopper: what the kernel is given. See hopper/sparse_mla.cu.
#pragma once

#include <cstdint>

namespace fusedcomm::gpu {

enum class MlaLayout {
  kV4,   // 584 bytes a token: 448 FP8 values and 64 bf16, then apart from these 7 UE8M0 scales of 64 values each
  kV32,  // 656 bytes a token: 512 FP8 values, 4 fp32 scales of 128 values each, 64 bf16
};

// A cache and, for every row, the tokens of it that are attended to.
struct MlaKeys {
  const uint8_t* cache = nullptr;  // 16-byte aligned
  int64_t block_stride = 0;        // bytes, a multiple of 16
  int32_t block_size = 1;          // tokens
  int64_t num_slots = 0;           // of the cache; 0: there is no such cache
  const int32_t* indices = nullptr;
  int64_t row_stride = 0;           // from the indices of a row to those of the next; or the number of all indices
  const int32_t* lens = nullptr;    // [rows]: how many indices a row has, at most `capacity` of them,
  const int32_t* indptr = nullptr;  // or [rows + 1]: where those of each row begin
  int32_t capacity = 0;
};

struct SparseMlaArguments {
  MlaKeys keys[2];
  const void* q = nullptr;      // [rows, heads, 512 or 576] bf16, contiguous
  const float* sink = nullptr;  // [heads] or null
  void* out = nullptr;          // [rows, heads, 512] bf16, contiguous
  float* partial = nullptr;     // [rows, splits, heads, 512], normalised; written in place of out
  float* lse = nullptr;         // [rows, splits, heads]: log2 of the sum of exp, -inf without a key; with partial
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t splits = 1;       // without partial, several of them are merged by a cluster of blocks
  int32_t block_heads = 0;  // 16, 32 or 64: that a block takes; those of 64 do not merge
  float scale = 1.0f;
};

constexpr int kMaxMergedSplits = 16;

// How many clusters that merge `splits` splits the current device runs at a time, or a negative status of the runtime.
int sparse_mla_active_clusters(MlaLayout layout, int block_heads, int splits);

// The status is the runtime's; 0 is success. The device of the stream is the current one.
int sparse_mla_decode(MlaLayout layout, const SparseMlaArguments& arguments, void* stream);

}  // namespace fusedcomm::gpu
