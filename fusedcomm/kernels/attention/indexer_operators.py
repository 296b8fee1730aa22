"""The Triton kernels of the indexer behind the signatures of fusedcomm.ops.attention.indexer_reference.

They are torch operators (``torch.ops.fusedcomm_triton``): see fusedcomm.kernels.registration.
"""

from __future__ import annotations

import torch
import triton

from fusedcomm.kernels.attention.indexer import indexer_k_gather_kernel, indexer_k_write_kernel
from fusedcomm.kernels.attention.indexer_logits import indexer_logits_kernel
from fusedcomm.kernels.fp8 import computes_with, converts_to
from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.registration import register
from fusedcomm.platform import device_facts

# Tokens of a program and pieces of 16 codes of a thread. One: of two, ptxas loads the second when it has the first.
_WRITTEN_TOKENS, _WRITTEN_PIECES = 16, 1
_GATHERED_TOKENS, _GATHERED_PIECES = 32, 2
_COMPARED = 32  # entries of cu_seq_lens that a program compares at once
_SCORED_TOKENS = 64  # of a tile
_PROGRAMS = 24  # that score, of a multiprocessor, before they take more tiles each
_MAX_TILES = 16
_CPU_PROGRAMS = 4  # so that the interpreter, too, has some of several tiles
_MIN_DOT = 16  # rows and columns of the smallest tl.dot


def _indexer_k_write(
    k: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, ue8m0: bool, preshuffle: bool, fnuz: bool
) -> None:
    num_blocks, block_size = kv_cache.shape[:2]
    num_tokens, unit = k.shape[0], _stride_unit(kv_cache)
    launch(
        indexer_k_write_kernel,
        (triton.cdiv(num_tokens, _WRITTEN_TOKENS),),
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
        TOKENS=_WRITTEN_TOKENS,
        num_warps=_num_warps(_WRITTEN_TOKENS, _WRITTEN_PIECES),
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
        (triton.cdiv(num_rows, _GATHERED_TOKENS),),
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
        triton.cdiv(num_requests + 1, _COMPARED),
        _touched_log2(num_rows, num_requests, block_size),
        kv_cache.stride(0) // unit,
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        STRIDE_UNIT=unit,
        PRESHUFFLE=preshuffle,
        TOKENS=_GATHERED_TOKENS,
        num_warps=_num_warps(_GATHERED_TOKENS, _GATHERED_PIECES),
        enable_fp_fusion=False,
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
    num_tiles = _tiles(batch * triton.cdiv(length, _SCORED_TOKENS), kv_cache.device)
    num_parts = triton.cdiv(length, num_tiles * _SCORED_TOKENS)
    launch(
        indexer_logits_kernel,
        (batch * num_parts,),
        kv_cache.device,
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        out,
        next_n,
        length,
        num_parts,
        num_tiles,
        num_blocks,
        block_table.shape[1],
        kv_cache.stride(0) // unit,
        context_lens.stride(0),
        block_table.stride(0),
        ONE_QUERY=next_n == 1,
        NUM_HEADS=num_heads,
        BLOCK_HEADS=max(triton.next_power_of_2(num_heads), _MIN_DOT),
        BLOCK_SIZE=block_size,
        STRIDE_UNIT=unit,
        LENS_BY_QUERY=context_lens.dim() == 2,
        PRESHUFFLE=preshuffle,
        FNUZ=fnuz,
        FP8_DOT=computes_with(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn, kv_cache.device),
        TOKENS=_SCORED_TOKENS,
        num_warps=_SCORED_TOKENS // 16,
        enable_fp_fusion=True,
    )


def _touched_log2(num_rows: int, num_requests: int, block_size: int) -> int:
    """How much of the table a gather asks for early, as its kernel takes it: for requests of twice the mean length."""
    columns = triton.cdiv(2 * num_rows, max(num_requests, 1) * block_size)
    return int(triton.next_power_of_2(triton.cdiv(columns, 8))).bit_length() - 1


def _tiles(total: int, device: torch.device) -> int:
    """How many tiles a program scores, of all: few enough that every multiprocessor has several programs to take."""
    slots = device_facts(device).num_sms * _PROGRAMS or _CPU_PROGRAMS
    return min(max(total // slots, 1), _MAX_TILES)


def _num_warps(tokens: int, pieces: int) -> int:
    """So that a thread has so many of the eight pieces of each token."""
    return max(tokens * 8 // (pieces * _lanes()), 1)


def _lanes() -> int:
    """Threads of a warp."""
    return 64 if torch.version.hip else 32


def _stride_unit(kv_cache: torch.Tensor) -> int:
    """What divides the stride of blocks: 16 bytes, which is as much as a thread moves at once, else 4."""
    return 16 if kv_cache.stride(0) % 16 == 0 else 4


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
