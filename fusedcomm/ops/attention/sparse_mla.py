"""Sparse MLA: the FP8 caches of DeepSeek V4 and V3.2, and attention over the tokens of them that a list names.

Both layouts of a cache ``[blocks, block_size, 584 or 656]`` (see CacheLayout) are bytes (uint8: the FP8 format of the
device) or have the FP8 dtype itself. Slot ``s`` is the token at offset ``s % block_size`` of block
``s // block_size``. Within a block tokens are packed; blocks may lie apart, by a multiple of 16 bytes (V4's are padded
to a multiple of 576). What is negative or past the end of the cache is skipped: neither read nor written.
"""

from __future__ import annotations

import math

import torch

from fusedcomm.ops.attention.paged_checks import cache_fp8_dtype, check_integers, check_paged_cache, check_rows
from fusedcomm.ops.attention.qk_checks import check_outputs, check_tensor
from fusedcomm.ops.attention.qk_norm import unit_stride
from fusedcomm.ops.attention.sparse_mla_layout import LAYOUTS, VALUE_DIM
from fusedcomm.ops.attention.sparse_mla_operators import sparse_mla_operators

MAX_HEADS = 128
MAX_SPLITS = 16
_ALIGNMENT = 16  # what a thread loads at once


def sparse_mla_quant_and_cache(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Quantises latent keys to FP8 by groups and writes them, with their RoPE values, to the paged cache.

    Of each group ``scale = max(amax, 1e-4) / FP8_MAX`` (448 for e4m3fn, 240 for e4m3fnuz), in the 584-byte layout
    rounded up to a power of two, and ``fp8 = clamp(x / scale)`` rounded to nearest even: the arithmetic of DeepSeek's
    kernels. A group that holds a NaN has the scale NaN. The byte that pads the scales is 0. Mutates the cache; no host
    synchronisation, capturable in a graph. One launch on a GPU.

    Args:
        kv: ``[T, 512]`` for a cache of 584 bytes a token: 448 values, then 64 with RoPE. ``[T, 576]`` for 656: 512,
            then 64. bf16, fp16 or fp32; RoPE values are stored as bf16. Copied where neighbours in a row are apart.
        cache: ``[blocks, block_size, 584 or 656]``, uint8 or FP8, written.
        slot_mapping: int64 ``[T]``. Below 0 or past the end: skipped. If a slot is there twice, one of the two tokens
            is left in each of its bytes.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then.
    """
    check_paged_cache(cache, "cache", tuple(LAYOUTS), _ALIGNMENT)
    check_rows(kv, "kv", (LAYOUTS[cache.shape[2]].head_dim,), cache.device)
    check_integers(slot_mapping, "slot_mapping", (kv.shape[0],), torch.int64, cache.device)
    fnuz = cache_fp8_dtype(cache) is torch.float8_e4m3fnuz
    operators = sparse_mla_operators(cache.device.type)
    operators.sparse_mla_write(unit_stride(kv), cache.view(torch.uint8), slot_mapping, fnuz)


def sparse_mla_decode(
    q: torch.Tensor,
    main_cache: torch.Tensor,
    main_indices: torch.Tensor,
    main_lens: torch.Tensor | None = None,
    main_indptr: torch.Tensor | None = None,
    *,
    extra_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    extra_indptr: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    scale: float,
    out: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attention of each row of queries over the cached tokens that its lists name; one softmax over both lists.

    ``out = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))`` with ``s_j = scale * q . k_j``, where v_j is the first
    512 elements of k_j (the attention of DeepSeek V3.2 and V4). A row without any key is 0, whatever the sink. Queries
    of several tokens of a request are rows with lists of their own. Lists, lengths and bounds are read when the kernel
    runs, so they may change between replays of a graph.

    No host synchronisation, capturable in a graph. On a GPU keys are dequantised to bf16, products and sums are fp32;
    one launch, and one more to reduce if num_splits is not 1; then partial results, in fp32, go through memory that is
    kept between calls (see fusedcomm.kernels.attention.workspace). On the CPU all is fp32.

    Args:
        q: bf16 ``[B, H, 512]`` for caches of 584 bytes a token, ``[B, H, 576]`` for 656; H from 1 to 128. Rows and
            heads may lie apart; only a last dimension with a stride other than 1 is copied.
        main_cache: ``[blocks, block_size, 584 or 656]``, as sparse_mla_quant_and_cache writes it.
        main_indices: int32 slots of main_cache: ``[B, max]``, rows may lie apart; or ragged ``[N]``. Those below 0 or
            past the end are skipped, and nothing of them is read.
        main_lens: int32 ``[B]``: of a dense list; how many entries of each row count.
        main_indptr: int32 ``[B + 1]``: of a ragged list; row b has the entries from ``indptr[b]`` up to
            ``indptr[b + 1]``.
        extra_cache, extra_indices, extra_lens, extra_indptr: a second list, in a cache of the same layout and format,
            whose blocks may have another size; or None. Dense or ragged, whatever the main one is.
        attn_sink: fp32 ``[H]``, contiguous: logits that only add to the denominator; or None.
        scale: of the scores, a finite number.
        out: written and returned; bf16 ``[B, H, 512]``, last stride 1, apart from all inputs.
        num_splits: 1 to 16, into how many parts the keys of a row are split; None chooses by the sizes that the host
            knows. The result differs by the rounding of sums alone. On the CPU it changes nothing.

    Returns:
        bf16 ``[B, H, 512]``.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then.
    """
    check_paged_cache(main_cache, "main_cache", tuple(LAYOUTS), _ALIGNMENT)
    device, token_bytes = main_cache.device, main_cache.shape[2]
    head_dim = LAYOUTS[token_bytes].head_dim
    _check_queries(q, head_dim, device)
    rows, num_heads = q.shape[:2]
    _check_list("main", rows, main_indices, main_lens, main_indptr, device)
    inputs = {"q": q, "main_cache": main_cache, "main_indices": main_indices}
    if extra_cache is not None:
        check_paged_cache(extra_cache, "extra_cache", (token_bytes,), _ALIGNMENT)
        if extra_cache.device != device or cache_fp8_dtype(extra_cache) != cache_fp8_dtype(main_cache):
            raise ValueError(
                f"extra_cache: expected {cache_fp8_dtype(main_cache)} on {device} like main_cache, "
                f"got {cache_fp8_dtype(extra_cache)} on {extra_cache.device}"
            )
        _check_list("extra", rows, extra_indices, extra_lens, extra_indptr, device)
        inputs |= {"extra_cache": extra_cache, "extra_indices": extra_indices}  # type: ignore[dict-item]
    else:
        given = {"extra_indices": extra_indices, "extra_lens": extra_lens, "extra_indptr": extra_indptr}
        for name, t in given.items():
            if t is not None:
                raise ValueError(f"{name}: expected None without extra_cache, got {type(t).__name__}")
    if attn_sink is not None:
        check_tensor(attn_sink, "attn_sink", (num_heads,), (torch.float32,), device)
        attn_sink = attn_sink.contiguous()
        inputs["attn_sink"] = attn_sink
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    if num_splits is not None and (
        isinstance(num_splits, bool) or not isinstance(num_splits, int) or not 1 <= num_splits <= MAX_SPLITS
    ):
        raise ValueError(f"num_splits: expected None or an int from 1 to {MAX_SPLITS}, got {num_splits!r}")
    shape = (rows, num_heads, VALUE_DIM)
    if out is None:
        out = q.new_empty(shape)
    else:
        check_outputs({"out": (out, shape)}, inputs, q)
    sparse_mla_operators(device.type).sparse_mla_decode_out(
        unit_stride(q),
        main_cache.view(torch.uint8),
        main_indices,
        main_lens,
        main_indptr,
        None if extra_cache is None else extra_cache.view(torch.uint8),
        extra_indices,
        extra_lens,
        extra_indptr,
        attn_sink,
        float(scale),
        num_splits,
        cache_fp8_dtype(main_cache) is torch.float8_e4m3fnuz,
        out,
    )
    return out


def _check_queries(q: torch.Tensor, head_dim: int, device: torch.device) -> None:
    if not isinstance(q, torch.Tensor):
        raise ValueError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    if q.dim() != 3 or q.shape[2] != head_dim or not 1 <= q.shape[1] <= MAX_HEADS:
        raise ValueError(
            f"q: expected shape [B, H from 1 to {MAX_HEADS}, {head_dim}] for this cache, got {tuple(q.shape)}"
        )
    check_tensor(q, "q", tuple(q.shape), (torch.bfloat16,), device)


def _check_list(
    name: str,
    rows: int,
    indices: torch.Tensor | None,
    lens: torch.Tensor | None,
    indptr: torch.Tensor | None,
    device: torch.device,
) -> None:
    """A dense list with lengths, or a ragged one with bounds."""
    if (lens is None) == (indptr is None):
        got = "neither" if lens is None else "both"
        raise ValueError(f"{name}_lens: expected either it or {name}_indptr, got {got}")
    if indices is None:
        raise ValueError(f"{name}_indices: expected a torch.Tensor, got NoneType")
    if lens is not None:
        check_integers(indices, f"{name}_indices", (rows, None), torch.int32, device)
        check_integers(lens, f"{name}_lens", (rows,), torch.int32, device)
    elif indptr is not None:
        check_integers(indices, f"{name}_indices", (None,), torch.int32, device)
        check_integers(indptr, f"{name}_indptr", (rows + 1,), torch.int32, device)
