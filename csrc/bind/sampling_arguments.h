// What the operators of sampling and of speculative verification are given, in the kernels' terms.
//
// Python has checked shapes and values (fusedcomm/ops/sampling/checks.py and its neighbours): here only what would make
// a kernel leave its memory. These own their tensors from the first, and check when they are asked.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "bind/arguments.h"
#include "fusedcomm/sampling.h"

namespace fusedcomm::sampling {

inline void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, what); }

// A tensor that an operator owns from its first line on, looked at once.
class Given {
 public:
  explicit Given(Handle handle) : owned_(handle), view_(owned_) {}

  const View& view() const { return view_; }
  int64_t size(int64_t d) const { return view_.sizes[d]; }
  int64_t stride(int64_t d) const {
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(owned_.get(), &strides));
    return strides[d];
  }
  bool is_beside(const Given& other) const {
    return view_.device_type == other.view_.device_type && view_.device == other.view_.device;
  }
  bool is_dense(int32_t dtype, int64_t numel) const {
    return view_.dtype == dtype && view_.numel == numel && view_.is_contiguous;
  }

  template <class T>
  const T* data() const {
    return static_cast<const T*>(view_.data);
  }
  template <class T>
  T* written() const {
    return static_cast<T*>(owned_.data());
  }

 private:
  Owned owned_;
  View view_;
};

inline std::optional<Given> given(const std::optional<Handle>& handle) {
  if (!handle) return std::nullopt;
  return std::optional<Given>(std::in_place, *handle);
}

using Optional = std::optional<Handle>;

inline Integers integers_of(const Given& t, int64_t numel) {
  const int32_t dtype = t.view().dtype;
  const bool is_wide = dtype == aoti_torch_dtype_int64();
  check(is_wide || dtype == aoti_torch_dtype_int32(), "dtype: expected int32 or int64");
  check(t.is_dense(dtype, numel), "shape: expected a contiguous tensor that fits");
  return {t.view().data, is_wide};
}

// Rows of probabilities or logits, and which of them are meant.
class Source {
 public:
  Source(Handle rows, const Optional& indices) : tensor_(rows), indices_(given(indices)) {}

  const Given& tensor() const { return tensor_; }
  int32_t device() const { return tensor_.view().device; }

  Rows rows(int32_t device_type) const {
    const View& view = tensor_.view();
    check(view.device_type == device_type, "probs: expected a tensor on this type of device");
    check(view.dim == 2 && view.sizes[1] >= 1 && view.sizes[1] <= kMaxVocab, "probs: expected [B, V]");
    check(tensor_.stride(1) == 1 || view.sizes[1] == 1, "probs: expected a last dimension of stride 1");
    Rows rows;
    rows.data = view.data;
    rows.dtype = dtype_of(view);
    rows.stride = tensor_.stride(0);
    rows.num_rows = rows.count = view.sizes[0];
    rows.vocab = int32_t(view.sizes[1]);
    if (!indices_) return rows;
    rows.count = indices_->view().numel;
    check(indices_->is_beside(tensor_) && (rows.num_rows > 0 || rows.count == 0),
          "indices: expected a tensor on the device of probs, and a row to name");
    rows.indices = integers_of(*indices_, rows.count);
    return rows;
  }

 private:
  Given tensor_;
  std::optional<Given> indices_;
};

class LimitGiven {
 public:
  LimitGiven(const Optional& rows, int64_t value) : tensor_(given(rows)), value_(value) {}

  Limit of(const Source& source, const Rows& rows) const {
    Limit limit;
    // whatever is not from 1 to V - 1 is none
    limit.value = value_ > 0 && value_ <= kMaxVocab ? int32_t(value_) : 0;
    if (!tensor_) return limit;
    check(tensor_->is_beside(source.tensor()), "top_k: expected a tensor on the device of probs");
    limit.rows = integers_of(*tensor_, rows.count);
    return limit;
  }

 private:
  std::optional<Given> tensor_;
  int64_t value_;
};

class NumberGiven {
 public:
  NumberGiven(const Optional& rows, double value) : tensor_(given(rows)), value_(value) {}

  PerRow of(const Source& source, const Rows& rows) const {
    PerRow numbers;
    numbers.value = float(value_);
    if (!tensor_) return numbers;
    check(tensor_->is_beside(source.tensor()) && tensor_->is_dense(aoti_torch_dtype_float32(), rows.count),
          "top_p, min_p, temperature, uniforms: expected contiguous fp32 [N] on the device of probs");
    numbers.rows = tensor_->data<float>();
    return numbers;
  }

 private:
  std::optional<Given> tensor_;
  double value_;
};

inline float* probabilities(const Given& out, const Source& source, const Rows& rows) {
  check(out.is_beside(source.tensor()) && out.is_dense(aoti_torch_dtype_float32(), rows.count * rows.vocab),
        "out: expected contiguous fp32 [N, V] on the device of probs");
  return out.written<float>();
}

inline int32_t* tokens(const Given& out, const Source& source, const Rows& rows) {
  check(out.is_beside(source.tensor()) && out.is_dense(aoti_torch_dtype_int32(), rows.count),
        "out: expected contiguous int32 [N] on the device of probs");
  return out.written<int32_t>();
}

// The shape of what is verified, [batch, size] or [batch, size, vocab], which all else has to fit.
struct Block {
  Block(const Given& t, int64_t inner, int32_t device_type) : tensor(t) {
    const View& view = t.view();
    check(view.device_type == device_type && view.is_contiguous, "expected contiguous tensors on this type of device");
    check(view.dim == 2 + inner && view.sizes[1] >= 1 && view.sizes[1] <= INT32_MAX, "expected [bs, D >= 1, …]");
    batch = view.sizes[0];
    size = int32_t(view.sizes[1]);
    if (inner == 0) return;
    check(view.sizes[2] >= 1 && view.sizes[2] <= kMaxVocab, "target_probs: expected [bs, D, V]");
    check(view.dtype == aoti_torch_dtype_float32(), "target_probs: expected fp32");
    vocab = int32_t(view.sizes[2]);
  }

  void fits(const Given& t, int32_t dtype, int64_t numel) const {
    check(t.is_beside(tensor) && t.is_dense(dtype, numel), "expected contiguous tensors that fit, on one device");
  }
  const float* floats(const Given& t, int64_t numel) const {
    fits(t, aoti_torch_dtype_float32(), numel);
    return t.data<float>();
  }
  const int64_t* wide(const Given& t, int64_t numel) const {
    fits(t, aoti_torch_dtype_int64(), numel);
    return t.data<int64_t>();
  }
  Integers integers(const Given& t, int64_t numel) const {
    check(t.is_beside(tensor), "expected tensors on one device");
    return integers_of(t, numel);
  }
  int32_t* written32(const Given& t, int64_t numel) const {
    fits(t, aoti_torch_dtype_int32(), numel);
    return t.written<int32_t>();
  }
  int64_t* written64(const Given& t, int64_t numel) const {
    fits(t, aoti_torch_dtype_int64(), numel);
    return t.written<int64_t>();
  }
  Verified verified(const Given& accept_len, const Given& bonus, const Given& tokens) const {
    return {written32(accept_len, batch), written64(bonus, batch), written64(tokens, batch * size)};
  }

  const Given& tensor;
  int64_t batch = 0;
  int32_t size = 0;
  int32_t vocab = 0;
};

}  // namespace fusedcomm::sampling
