// Filters of probabilities, the choice of tokens, and speculative verification, as the kernels of every device are
// told.
//
// Semantics, to the bit: fusedcomm/ops/sampling/reference.py and fusedcomm/ops/speculative/reference.py. Everything but
// the rows of probabilities is contiguous.
#pragma once

#include <cstdint>

#include "fusedcomm/types.h"

namespace fusedcomm::sampling {

constexpr int32_t kMaxVocab = 1 << 18;

// Whole numbers, int32 or int64.
struct Integers {
  const void* data = nullptr;
  bool is_wide = false;
};

// Rows of probabilities or logits.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t stride = 0;  // elements from a row to the next
  int64_t num_rows = 0;
  Integers indices;   // of the row that each row of the result is of; without: the same one
  int64_t count = 0;  // rows of the result
  int32_t vocab = 0;
};

// A limit of top-k for each row, or one for all; what is not from 1 to V - 1 is none.
struct Limit {
  Integers rows;
  int32_t value = 0;
};

// A number for each row, or one for all.
struct PerRow {
  const float* rows = nullptr;
  float value = 0.0f;
};

struct ChainArguments {
  const float* draft_probs = nullptr;   // [batch, num_drafts, vocab]
  Integers draft_ids;                   // [batch, num_drafts]
  const float* target_probs = nullptr;  // [batch, num_drafts + 1, vocab]
  const float* uniforms = nullptr;      // [batch, num_drafts]
  const float* final_uniforms = nullptr;
  int32_t* output_ids = nullptr;  // [batch, num_drafts + 1]
  int32_t* accepted = nullptr;
  int64_t batch = 0;
  int32_t num_drafts = 0;
  int32_t vocab = 0;
};

// What the verifications of chains write.
struct Verified {
  int32_t* accept_len = nullptr;
  int64_t* bonus = nullptr;
  int64_t* tokens = nullptr;  // [batch, size]
};

struct BlockArguments {
  const int64_t* candidates = nullptr;  // [batch, size]
  const float* target_probs = nullptr;  // [batch, size, vocab]
  const float* uniforms = nullptr;      // [batch, size]
  const float* final_uniforms = nullptr;
  float threshold_single = 1.0f;
  float threshold_acc = 1.0f;
  Verified out;
  int64_t batch = 0;
  int32_t size = 0;
  int32_t vocab = 0;
};

struct GreedyArguments {
  Integers candidates;      // [batch, size]
  Integers target_predict;  // [batch, size]
  Verified out;
  int64_t batch = 0;
  int32_t size = 0;
};

struct TreeArguments {
  int32_t* predicts = nullptr;      // [num_positions]
  int32_t* accept_index = nullptr;  // [batch, path_size]
  int32_t* accept_token_num = nullptr;
  const int64_t* candidates = nullptr;  // [batch, size], as the next three
  const int64_t* retrive_index = nullptr;
  const int64_t* retrive_next_token = nullptr;
  const int64_t* retrive_next_sibling = nullptr;
  const float* uniforms = nullptr;  // [batch, size]
  const float* final_uniforms = nullptr;
  const float* target_probs = nullptr;  // [batch, size, vocab]
  float* draft_probs = nullptr;         // likewise
  float threshold_single = 1.0f;
  float threshold_acc = 1.0f;
  int64_t batch = 0;
  int64_t num_positions = 0;
  int32_t size = 0;
  int32_t path_size = 0;
  int32_t vocab = 0;
};

}  // namespace fusedcomm::sampling
