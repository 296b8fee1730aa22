"""The key cache of DeepSeek's sparse-attention indexer, and the logits that are read from it.

A block of the cache is packed: first the FP8 values of all its tokens, 128 each, then a fp32 scale for each.
Element c of the token at offset o of its block lies

- plain: at ``o * 128 + c``;
- preshuffled, in 16x16 tiles as AMD's matrix instructions read them:
  ``o // 16 * (16 * 128) + c // 16 * 256 + o % 16 * 16 + c % 16``.

The caches are bytes (uint8: the FP8 format of the device) or have the FP8 dtype itself. Blocks may lie apart: the
stride of the tensor counts. What is negative or past the end of the cache is skipped: neither read nor written.
"""

from __future__ import annotations

from typing import Literal

import torch

from fusedcomm.ops.attention.indexer_operators import indexer_operators, indexer_writer
from fusedcomm.ops.attention.indexer_reference import HEAD_DIM, SCALE_BYTES, TILE, TOKEN_BYTES
from fusedcomm.ops.attention.paged_checks import (
    cache_fp8_dtype,
    check_aligned,
    check_dense,
    check_flag,
    check_integers,
    check_paged_cache,
    check_rows,
)
from fusedcomm.ops.checks import FP8_DTYPES, check_apart

MAX_HEADS = 128


def indexer_k_quant_and_cache(
    k: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    quant_block_size: int = HEAD_DIM,
    scale_fmt: Literal["ue8m0"] | None = None,
    preshuffle: bool = False,
) -> None:
    """Quantises the indexer's keys to FP8, one scale a token, and writes both to the paged cache.

    ``scale = max(amax, 1e-4) / FP8_MAX`` (448 for e4m3fn, 240 for e4m3fnuz), ``fp8 = clamp(k / scale)`` rounded to
    nearest even; the arithmetic of DeepSeek-V3.2's indexer. A token that holds a NaN has the scale NaN. Mutates the
    cache; no host synchronisation, capturable in a graph. One launch on a GPU.

    Args:
        k: ``[T, 128]``, bf16, fp16 or fp32; copied where the elements of a row are not neighbours.
        kv_cache: ``[blocks, block_size, 132]``, uint8 or FP8, written; see the module for the layout. Within a block it
            is packed, blocks may lie a multiple of 4 bytes apart.
        slot_mapping: int64 ``[T]``; token ``s % block_size`` of block ``s // block_size``. Below 0 or past the end:
            skipped. Of two tokens with one slot either may stay, for each byte.
        quant_block_size: 128, elements a scale.
        scale_fmt: ``"ue8m0"`` rounds scales up to powers of two. They are stored as fp32 either way.
        preshuffle: the preshuffled layout; block_size is a multiple of 16.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then.
        SettingError: ``FUSEDCOMM_BACKEND=aiter``, and aiter cannot serve this (fusedcomm.ops.attention.aiter).
    """
    _check_cache(kv_cache, preshuffle)
    check_rows(k, "k", (HEAD_DIM,), kv_cache.device)
    check_integers(slot_mapping, "slot_mapping", (k.shape[0],), torch.int64, kv_cache.device)
    if quant_block_size != HEAD_DIM:
        raise ValueError(f"quant_block_size: expected {HEAD_DIM}, got {quant_block_size!r}")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt: expected None or 'ue8m0', got {scale_fmt!r}")
    fnuz = cache_fp8_dtype(kv_cache) is torch.float8_e4m3fnuz
    k = k if k.stride(-1) == 1 else k.contiguous()
    write = indexer_writer(kv_cache.device.type)
    write(k, kv_cache.view(torch.uint8), slot_mapping, scale_fmt is not None, preshuffle, fnuz)


def cp_gather_indexer_k_quant_cache(
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    preshuffle: bool = False,
) -> None:
    """Copies the quantised keys of several requests out of the paged cache, packed and in the order of tokens.

    Rows are row-major whatever the layout of the cache. Token t of request r goes to row ``cu_seq_lens[r] + t``. A row
    that belongs to no request, or whose block the table has not or that lies past the end of the cache, is left as it
    is. Mutates dst_k and dst_scale; no host synchronisation, capturable in a graph. One launch on a GPU.

    Args:
        kv_cache: as indexer_k_quant_and_cache writes it.
        dst_k: ``[N, 128]``, uint8 or the FP8 format of the cache, contiguous, written, apart from the cache; N at least
            ``cu_seq_lens[R]`` for all tokens to be copied.
        dst_scale: fp32 ``[N, 1]``, or its bytes, uint8 ``[N, 4]``; contiguous, written, apart from dst_k and the cache.
        block_table: int32 ``[R, max_blocks]``: the blocks of each request; rows may lie apart.
        cu_seq_lens: int32 ``[R + 1]``, from 0 on, not decreasing: where the tokens of each request begin.
        preshuffle: the layout of the cache.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then.
    """
    _check_cache(kv_cache, preshuffle)
    device = kv_cache.device
    check_integers(block_table, "block_table", (None, None), torch.int32, device)
    check_integers(cu_seq_lens, "cu_seq_lens", (block_table.shape[0] + 1,), torch.int32, device)
    num_rows = dst_k.shape[0] if isinstance(dst_k, torch.Tensor) and dst_k.dim() > 0 else 0
    check_dense(dst_k, "dst_k", (num_rows, HEAD_DIM), (torch.uint8, cache_fp8_dtype(kv_cache)), device)
    as_bytes = isinstance(dst_scale, torch.Tensor) and dst_scale.dtype is torch.uint8
    dtypes = (torch.float32, torch.uint8)
    check_dense(dst_scale, "dst_scale", (num_rows, SCALE_BYTES if as_bytes else 1), dtypes, device)
    check_aligned(dst_scale, "dst_scale", SCALE_BYTES)
    check_apart(dst_k, "dst_k", {"kv_cache": kv_cache})
    check_apart(dst_scale, "dst_scale", {"kv_cache": kv_cache, "dst_k": dst_k})
    scale = dst_scale.view(torch.float32).view(num_rows)
    operators = indexer_operators(device.type)
    operators.indexer_k_gather(
        kv_cache.view(torch.uint8), dst_k.view(torch.uint8), scale, block_table, cu_seq_lens, preshuffle
    )


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    preshuffle: bool = False,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The indexer's score of every cached token for every query: ``logits[t] = sum_h w_h relu(q_h . k_t) scale_t``.

    The lightning indexer of DeepSeek-V3.2 (2025), in fp32. The same numbers from both layouts. No host synchronisation,
    capturable in a graph; allocates nothing but the result. One launch on a GPU.

    Args:
        q: ``[B, next_n, H, 128]`` in the FP8 format of the cache, H from 1 to 128; made contiguous if it is not. The
            scale of q and the softmax's are factors of the weights.
        kv_cache: as indexer_k_quant_and_cache writes it.
        weights: fp32 ``[B * next_n, H]``; made contiguous if it is not.
        context_lens: int32 ``[B]``: tokens in the cache, those of the next_n queries included, so query j of a request
            sees the first ``context_len - next_n + 1 + j`` tokens; or int32 ``[B, next_n]``: what each query sees.
        block_table: int32 ``[B, max_blocks]``: the blocks of each request; rows may lie apart.
        max_context_len: columns of the result, on the host. Of a longer context only these are scored.
        preshuffle: the layout of the cache.
        out: written and returned; fp32 ``[B * next_n, max_context_len]``, contiguous, apart from the inputs.

    Returns:
        fp32 ``[B * next_n, max_context_len]``; -inf past what a query sees, and where the table has no block of the
        cache.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then.
    """
    _check_cache(kv_cache, preshuffle)
    device, fp8_dtype = kv_cache.device, cache_fp8_dtype(kv_cache)
    if not isinstance(q, torch.Tensor):
        raise ValueError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    if q.dtype not in FP8_DTYPES or q.dtype != fp8_dtype:
        raise ValueError(f"q: expected dtype {fp8_dtype} like the cache, got {q.dtype}")
    if q.dim() != 4 or q.shape[3] != HEAD_DIM or q.shape[1] < 1 or not 1 <= q.shape[2] <= MAX_HEADS:
        raise ValueError(
            f"q: expected shape [B, next_n >= 1, H from 1 to {MAX_HEADS}, {HEAD_DIM}], got {tuple(q.shape)}"
        )
    if q.device != device:
        raise ValueError(f"q: expected device {device} like the cache, got {q.device}")
    batch, next_n, num_heads = q.shape[:3]
    weights = weights.contiguous() if isinstance(weights, torch.Tensor) else weights
    check_dense(weights, "weights", (batch * next_n, num_heads), (torch.float32,), device)
    per_query = isinstance(context_lens, torch.Tensor) and context_lens.dim() == 2
    check_integers(context_lens, "context_lens", (batch, next_n) if per_query else (batch,), torch.int32, device)
    check_integers(block_table, "block_table", (batch, None), torch.int32, device)
    if isinstance(max_context_len, bool) or not isinstance(max_context_len, int) or max_context_len < 0:
        raise ValueError(f"max_context_len: expected an int >= 0, got {max_context_len!r}")
    shape = (batch * next_n, max_context_len)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    else:
        check_dense(out, "out", shape, (torch.float32,), device)
        inputs = {"q": q, "kv_cache": kv_cache, "weights": weights}
        check_apart(out, "out", inputs | {"context_lens": context_lens, "block_table": block_table})
    operators = indexer_operators(device.type)
    operators.indexer_logits(
        q.contiguous().view(torch.uint8),
        kv_cache.view(torch.uint8),
        weights,
        context_lens,
        block_table,
        out,
        preshuffle,
        fp8_dtype is torch.float8_e4m3fnuz,
    )
    return out


def _check_cache(kv_cache: torch.Tensor, preshuffle: bool) -> None:
    check_paged_cache(kv_cache, "kv_cache", (TOKEN_BYTES,), SCALE_BYTES)
    check_flag(preshuffle, "preshuffle")
    if preshuffle and kv_cache.shape[1] % TILE:
        raise ValueError(
            f"kv_cache: expected a block size that is a multiple of {TILE} with preshuffle, got {kv_cache.shape[1]}"
        )
