// Sparse MLA decode as a torch operator; the kernel is Hopper's (gpu/hopper/sparse_mla.cu). Shapes and values were
// checked in Python (fusedcomm/ops/attention/sparse_mla.py): here only what would make the kernel leave its memory.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "bind/arguments.h"
#include "bind/gpu_stream.h"
#include "gpu/communicator.h"
#include "gpu/sparse_mla.h"

namespace fusedcomm {

namespace {

using gpu::MlaKeys;
using gpu::MlaLayout;
using Optional = std::optional<Handle>;

constexpr int64_t kV4TokenBytes = 584, kV32TokenBytes = 656, kValue = 512;
constexpr int64_t kMaxSplits = 65535;  // of a grid's third dimension, as of its second

// A tensor that the operator owns from its first line on, looked at once.
struct Given {
  explicit Given(Handle handle) : owned(handle), view(owned) {}

  int64_t stride(int64_t d) const {
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(owned.get(), &strides));
    return strides[d];
  }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(view.data);
  }

  Owned owned;
  View view;
};

std::optional<Given> given(const Optional& handle) {
  if (!handle) return std::nullopt;
  return std::optional<Given>(std::in_place, *handle);
}

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, what); }

void check_place(const Given& t, const View& q, int32_t dtype, const char* what) {
  check(t.view.device_type == q.device_type && t.view.device == q.device && t.view.dtype == dtype, what);
}

const int32_t* integers(const std::optional<Given>& t, const View& q, int64_t size) {
  if (!t) return nullptr;
  check_place(*t, q, aoti_torch_dtype_int32(), "lens, indptr: expected int32 on the device of q");
  check(t->view.is_contiguous && t->view.numel == size, "lens, indptr: expected [rows] and [rows + 1]");
  return t->data<int32_t>();
}

MlaKeys keys_of(const View& q, const Given& cache, const std::optional<Given>& indices,
                const std::optional<Given>& lens, const std::optional<Given>& indptr, int64_t token_bytes) {
  check(indices.has_value() && lens.has_value() != indptr.has_value(), "indices: expected lens or indptr with them");
  check_place(cache, q, aoti_torch_dtype_uint8(), "cache: expected uint8 on the device of q");
  check_place(*indices, q, aoti_torch_dtype_int32(), "indices: expected int32 on the device of q");
  const int64_t rows = q.sizes[0], dims = indices->view.dim;
  check(cache.view.dim == 3 && cache.view.sizes[2] == token_bytes, "cache: expected [blocks, block_size, 584 or 656]");
  check(cache.view.numel == 0 || (cache.stride(2) == 1 && (cache.view.sizes[1] == 1 || cache.stride(1) == token_bytes)),
        "cache: expected blocks that are contiguous");
  check(dims == (lens ? 2 : 1) && (!lens || indices->view.sizes[0] == rows), "indices: expected [rows, max] or [all]");
  const int64_t last = indices->view.sizes[dims - 1];
  check(last <= 1 || indices->stride(dims - 1) == 1, "indices: expected a last dimension of stride 1");
  MlaKeys keys;
  keys.cache = cache.data<uint8_t>();
  keys.block_size = int32_t(cache.view.sizes[1]);
  keys.block_stride = cache.view.sizes[0] > 1 ? cache.stride(0) : 0;
  keys.num_slots = cache.view.sizes[0] * cache.view.sizes[1];
  check(reinterpret_cast<uintptr_t>(keys.cache) % 16 == 0 && keys.block_stride % 16 == 0,
        "cache: expected blocks aligned to 16 bytes");
  keys.indices = indices->data<int32_t>();
  keys.lens = integers(lens, q, rows);
  keys.indptr = integers(indptr, q, rows + 1);
  keys.row_stride = lens ? indices->stride(0) : last;
  keys.capacity = int32_t(last);
  return keys;
}

template <class T>
T* result(const std::optional<Given>& t, const View& q, int32_t dtype, int64_t size) {
  if (!t) return nullptr;
  check_place(*t, q, dtype, "out, partial, lse: expected bf16, fp32 and fp32 on the device of q");
  check(t->view.is_contiguous && t->view.numel >= size && reinterpret_cast<uintptr_t>(t->view.data) % 16 == 0,
        "out, partial, lse: expected contiguous tensors that fit, aligned to 16 bytes");
  return static_cast<T*>(t->owned.data());
}

MlaLayout layout_of(int64_t dim) {
  check(dim == 512 || dim == 576, "q: expected a last dimension of 512 or 576");
  return dim == 512 ? MlaLayout::kV4 : MlaLayout::kV32;
}

void check_form(int64_t block_heads) {
  check(block_heads == 16 || block_heads == 32 || block_heads == 64, "block_heads: expected 16, 32 or 64");
}

// How many clusters that merge so many splits the device runs at a time; 0: it cannot merge them.
int64_t sparse_mla_active_clusters(int64_t device, int64_t dim, int64_t block_heads, int64_t num_splits) {
  check_form(block_heads);
  if (num_splits < 1 || num_splits > gpu::kMaxMergedSplits) return 0;
  const gpu::DeviceGuard guard{int32_t(device)};
  const int clusters = gpu::sparse_mla_active_clusters(layout_of(dim), int(block_heads), int(num_splits));
  STD_TORCH_CHECK(clusters >= 0, "asking for the clusters of sparse_mla_decode failed with the CUDA error ", -clusters);
  return clusters;
}

void sparse_mla_decode_out(Handle q_given, Handle main_cache_given, Handle main_indices_given, Optional main_lens_given,
                           Optional main_indptr_given, Optional extra_cache_given, Optional extra_indices_given,
                           Optional extra_lens_given, Optional extra_indptr_given, Optional sink_given, double scale,
                           int64_t block_heads, int64_t num_splits, Handle out_given, Optional partial_given,
                           Optional lse_given) {
  const Given q(q_given), main_cache(main_cache_given);
  const auto main_indices = given(main_indices_given), main_lens = given(main_lens_given);
  const auto main_indptr = given(main_indptr_given), extra_cache = given(extra_cache_given);
  const auto extra_indices = given(extra_indices_given), extra_lens = given(extra_lens_given);
  const auto extra_indptr = given(extra_indptr_given), sink = given(sink_given);
  const auto out = given(out_given), partial = given(partial_given), lse = given(lse_given);

  check(q.view.dim == 3 && q.view.is_contiguous && q.view.dtype == aoti_torch_dtype_bfloat16() &&
            q.view.device_type == aoti_torch_device_type_cuda() && reinterpret_cast<uintptr_t>(q.view.data) % 16 == 0,
        "q: expected contiguous bf16 [rows, heads, 512 or 576] on a GPU");
  const int64_t rows = q.view.sizes[0], heads = q.view.sizes[1], dim = q.view.sizes[2];
  check(rows <= 65535 && num_splits >= 1 && num_splits <= kMaxSplits, "q: expected at most 65535 rows and splits");
  check_form(block_heads);
  const MlaLayout layout = layout_of(dim);
  const int64_t token_bytes = dim == 512 ? kV4TokenBytes : kV32TokenBytes;

  gpu::SparseMlaArguments a;
  a.keys[0] = keys_of(q.view, main_cache, main_indices, main_lens, main_indptr, token_bytes);
  if (extra_cache) {
    a.keys[1] = keys_of(q.view, *extra_cache, extra_indices, extra_lens, extra_indptr, token_bytes);
  }
  if (sink) {
    check_place(*sink, q.view, aoti_torch_dtype_float32(), "attn_sink: expected fp32 on the device of q");
    check(sink->view.is_contiguous && sink->view.numel == heads, "attn_sink: expected [heads]");
    a.sink = sink->data<float>();
  }
  const int64_t results = rows * heads;
  a.q = q.view.data;
  a.out = result<void>(out, q.view, aoti_torch_dtype_bfloat16(), results * kValue);
  if (num_splits > 1) {
    a.partial = result<float>(partial, q.view, aoti_torch_dtype_float32(), num_splits * results * kValue);
    a.lse = result<float>(lse, q.view, aoti_torch_dtype_float32(), num_splits * results);
    check((a.partial != nullptr) == (a.lse != nullptr), "partial, lse: expected both or neither");
    check(a.partial != nullptr || (block_heads < 64 && num_splits <= gpu::kMaxMergedSplits),
          "partial, lse: expected tensors with blocks of 64 heads and with more than 16 splits");
  }
  a.rows = int32_t(rows);
  a.heads = int32_t(heads);
  a.splits = int32_t(num_splits);
  a.block_heads = int32_t(block_heads);
  a.scale = float(scale);
  const gpu::DeviceGuard guard(q.view.device);
  const int status = gpu::sparse_mla_decode(layout, a, current_stream(q.view.device));
  STD_TORCH_CHECK(status == 0, "launching sparse_mla_decode failed with the CUDA error ", status);
}

STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CUDA, m) { m.impl("sparse_mla_decode_out", TORCH_BOX(&sparse_mla_decode_out)); }
STABLE_TORCH_LIBRARY_IMPL(fusedcomm, CompositeExplicitAutograd, m) {
  m.impl("sparse_mla_active_clusters", TORCH_BOX(&sparse_mla_active_clusters));
}

}  // namespace
}  // namespace fusedcomm
