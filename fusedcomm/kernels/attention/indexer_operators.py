"""The Triton kernels of the indexer behind the signatures of fusedcomm.ops.attention.indexer_reference.

They are torch operators (``torch.ops.fusedcomm_triton``): see fusedcomm.kernels.registration.
"""

from __future__ import annotations

import functools

import torch
import triton

from fusedcomm.kernels.attention.indexer import (
    indexer_k_gather_kernel,
    indexer_k_write_kernel,
    indexer_logits_kernel,
)
from fusedcomm.kernels.fp8 import converts_to
from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.registration import register
from fusedcomm.platform import device_facts

_TOKENS = 32  # that a program writes or gathers: a thread moves two times 16 bytes of codes
_WIDTH = 128  # entries of cu_seq_lens that are compared at once
_SCORED_TOKENS = 128
_MIN_DOT = 16  # rows and columns of the smallest tl.dot


def _indexer_k_write(
    k: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, ue8m0: bool, preshuffle: bool, fnuz: bool
) -> None:
    num_blocks, block_size = kv_cache.shape[:2]
    num_tokens, unit = k.shape[0], _stride_unit(kv_cache)
    launch(
        indexer_k_write_kernel,
        (triton.cdiv(num_tokens, _TOKENS),),
        kv_cache.device,
        k,
        kv_cache,
        slot_mapping,
        num_tokens,
        num_blocks * block_size,
        k.stride(0),
        kv_cache.stride(0) // unit,
        BLOCK_SIZE=block_size,
        STRIDE_UNIT=unit,
        PRESHUFFLE=preshuffle,
        UE8M0=ue8m0,
        FNUZ=fnuz,
        HARDWARE_FP8=converts_to(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn, kv_cache.device),
        TOKENS=_TOKENS,
        num_warps=_num_warps(_TOKENS),
        enable_fp_fusion=False,
    )


def _indexer_k_gather(
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    preshuffle: bool,
) -> None:
    num_blocks, block_size = kv_cache.shape[:2]
    num_rows, (num_requests, max_blocks) = dst_k.shape[0], block_table.shape
    unit = _stride_unit(kv_cache)
    launch(
        indexer_k_gather_kernel,
        (triton.cdiv(num_rows, _TOKENS),),
        kv_cache.device,
        kv_cache,
        dst_k,
        dst_scale,
        block_table,
        cu_seq_lens,
        num_rows,
        num_requests,
        num_blocks,
        max_blocks,
        triton.cdiv(num_requests + 1, _WIDTH),
        kv_cache.stride(0) // unit,
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        STRIDE_UNIT=unit,
        PRESHUFFLE=preshuffle,
        WIDTH=_WIDTH,
        TOKENS=_TOKENS,
        num_warps=_num_warps(_TOKENS),
    )


def _indexer_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    preshuffle: bool,
    fnuz: bool,
) -> None:
    batch, next_n, num_heads = q.shape[:3]
    num_blocks, block_size = kv_cache.shape[:2]
    length, unit = out.shape[1], _stride_unit(kv_cache)
    num_tiles = triton.cdiv(length, _SCORED_TOKENS)
    block_heads = max(triton.next_power_of_2(num_heads), _MIN_DOT)
    launch(
        indexer_logits_kernel,
        (batch * num_tiles,),
        kv_cache.device,
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        out,
        next_n,
        length,
        num_tiles,
        num_blocks,
        block_table.shape[1],
        kv_cache.stride(0) // unit,
        context_lens.stride(0),
        block_table.stride(0),
        NUM_HEADS=num_heads,
        BLOCK_HEADS=block_heads,
        BLOCK_SIZE=block_size,
        STRIDE_UNIT=unit,
        LENS_BY_QUERY=context_lens.dim() == 2,
        PRESHUFFLE=preshuffle,
        FNUZ=fnuz,
        FP8_DOT=_multiplies(fnuz, kv_cache.device),
        TOKENS=_SCORED_TOKENS,
        num_warps=8 if block_heads > 32 else 4,
        enable_fp_fusion=True,
    )


def _num_warps(tokens: int) -> int:
    """So that a thread has 32 elements of the keys."""
    lanes = 64 if torch.version.hip else 32
    return max(tokens * 128 // (32 * lanes), 1)


def _stride_unit(kv_cache: torch.Tensor) -> int:
    """What divides the stride of blocks: 16 bytes, which is as much as a thread moves at once, else 4."""
    return 16 if kv_cache.stride(0) % 16 == 0 else 4


@functools.cache
def _multiplies(fnuz: bool, device: torch.device) -> bool:
    """Whether the device has matrix instructions for this FP8 format; without, bf16 takes its place."""
    arch = device_facts(device).arch
    if fnuz:
        return arch == "gfx942"
    return arch == "gfx950" or (arch.startswith("sm_") and int(arch[3:]) >= 89)


# ---- registration ----

indexer_k_write = register(
    _indexer_k_write,
    "indexer_k_write(Tensor k, Tensor(a!) kv_cache, Tensor slot_mapping, bool ue8m0, bool preshuffle, bool fnuz) -> ()",
)
indexer_k_gather = register(
    _indexer_k_gather,
    "indexer_k_gather(Tensor kv_cache, Tensor(a!) dst_k, Tensor(b!) dst_scale, Tensor block_table, "
    "Tensor cu_seq_lens, bool preshuffle) -> ()",
)
indexer_logits = register(
    _indexer_logits,
    "indexer_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
    "Tensor(a!) out, bool preshuffle, bool fnuz) -> ()",
)
