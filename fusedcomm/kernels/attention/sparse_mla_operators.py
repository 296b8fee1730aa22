"""The Triton kernels of sparse MLA behind the signatures of fusedcomm.ops.attention.sparse_mla_reference.

They are torch operators (``torch.ops.fusedcomm_triton``): see fusedcomm.kernels.registration.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from fusedcomm.kernels.attention import sparse_mla_hopper
from fusedcomm.kernels.attention.sparse_mla import sparse_mla_decode_kernel, sparse_mla_reduce_kernel
from fusedcomm.kernels.attention.sparse_mla_hopper import Keys
from fusedcomm.kernels.attention.sparse_mla_splits import Plan, Tile, choose_splits, tile_of
from fusedcomm.kernels.attention.sparse_mla_write import sparse_mla_write_kernel
from fusedcomm.kernels.attention.workspace import workspace
from fusedcomm.kernels.fp8 import computes_with, converts_to
from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.registration import register
from fusedcomm.platform import device_facts

_TOKENS = 4  # that a program writes: 16 elements a thread
_VALUES = 512
_MAX_SLOT = 2**31 - 1  # an index is an int32
_CPU_MULTIPROCESSORS = 4  # that the interpreter pretends to have


def _sparse_mla_write(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, fnuz: bool) -> None:
    num_tokens, (num_blocks, block_size, token_bytes) = kv.shape[0], cache.shape
    launch(
        sparse_mla_write_kernel,
        (triton.cdiv(num_tokens, _TOKENS),),
        cache.device,
        kv,
        cache,
        slot_mapping,
        num_tokens,
        num_blocks * block_size,
        kv.stride(0),
        cache.stride(0) // 16,
        BLOCK_SIZE=block_size,
        TOKEN_BYTES=token_bytes,
        FNUZ=fnuz,
        HARDWARE_FP8=converts_to(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn, cache.device),
        TOKENS=_TOKENS,
        num_warps=2 if device_facts(cache.device).arch.startswith("gfx") else 4,
        enable_fp_fusion=False,
    )


def _sparse_mla_decode(
    q: torch.Tensor,
    main_cache: torch.Tensor,
    main_indices: torch.Tensor,
    main_lens: torch.Tensor | None,
    main_indptr: torch.Tensor | None,
    extra_cache: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_lens: torch.Tensor | None,
    extra_indptr: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int | None,
    fnuz: bool,
    out: torch.Tensor,
) -> None:
    main = main_cache, main_indices, main_lens, main_indptr
    extra = extra_cache, extra_indices, extra_lens, extra_indptr
    arguments = q, main, extra, attn_sink, scale, num_splits, fnuz, out
    if q.device.type == "cpu" or q.device.index == torch.cuda.current_device():
        _decode(*arguments)
        return
    with torch.cuda.device(q.device):  # the workspace is for its current stream
        _decode(*arguments)


def _decode(
    q: torch.Tensor,
    main: Keys,
    extra: Keys,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int | None,
    fnuz: bool,
    out: torch.Tensor,
) -> None:
    rows, num_heads = q.shape[:2]
    if rows == 0:
        return
    facts = device_facts(q.device)
    tile = tile_of(num_heads, facts.arch)
    tiles = sum(triton.cdiv(_capacity(keys, rows), tile.keys) for keys in (main, extra))
    is_native = sparse_mla_hopper.takes(q, out, fnuz)
    if is_native:
        how = sparse_mla_hopper.plan(q.device.index, q.shape[2], rows, num_heads, tiles, num_splits)
    else:
        slots = (facts.num_sms or _CPU_MULTIPROCESSORS) * tile.programs
        programs = rows * triton.cdiv(num_heads, tile.heads)
        how = Plan(tile.heads, num_splits or choose_splits(programs, tiles, slots), merged=False)
    num_splits = how.num_splits
    is_reduced = num_splits > 1 and not how.merged
    partial, lse, out_strides = out, None, (out.stride(0), 0, out.stride(1))
    if is_reduced:
        results = rows * num_splits * num_heads
        memory = workspace(results * (_VALUES + 1), q.device)
        partial, lse = memory[: results * _VALUES], memory[results * _VALUES :]
        out_strides = (num_splits * num_heads * _VALUES, num_heads * _VALUES, _VALUES)
    if is_native:
        sparse_mla_hopper.decode(q, main, extra, attn_sink, scale, how, out, partial, lse)
    else:
        _launch_decode(q, main, extra, attn_sink, scale, num_splits, fnuz, tile, partial, lse, out_strides)
    if is_reduced:
        launch(
            sparse_mla_reduce_kernel,
            (rows * num_heads,),
            q.device,
            partial,
            lse,
            attn_sink,
            out,
            num_splits,
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            SPLITS=triton.next_power_of_2(num_splits),
            num_warps=4,
            enable_fp_fusion=True,
        )


def _launch_decode(
    q: torch.Tensor,
    main: Keys,
    extra: Keys,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    fnuz: bool,
    tile: Tile,
    partial: torch.Tensor,
    lse: torch.Tensor | None,
    out_strides: tuple[int, int, int],
) -> None:
    rows, num_heads = q.shape[:2]
    main_pointers, main_numbers, main_block, main_ragged = _arguments(main)
    extra_pointers, extra_numbers, extra_block, extra_ragged = _arguments(extra)
    launch(
        sparse_mla_decode_kernel,
        (rows * num_splits * triton.cdiv(num_heads, tile.heads),),
        q.device,
        q,
        *main_pointers,
        *extra_pointers,
        attn_sink,
        partial,
        lse,
        scale * math.log2(math.e),
        num_splits,
        *main_numbers,
        *extra_numbers,
        q.stride(0),
        q.stride(1),
        *out_strides,
        NUM_HEADS=num_heads,
        HEADS=tile.heads,
        KEYS=tile.keys,
        TOKEN_BYTES=584 if q.shape[2] == _VALUES else 656,
        MAIN_BLOCK=main_block,
        EXTRA_BLOCK=extra_block,
        MAIN_RAGGED=main_ragged,
        EXTRA_RAGGED=extra_ragged,
        FNUZ=fnuz,
        HARDWARE_FP8=computes_with(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn, q.device),
        MERGED=tile.merged,
        IN_REGISTERS=tile.in_registers,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def _capacity(keys: Keys, rows: int) -> int:
    """How many keys a row may have: all of a dense list, its share of a ragged one."""
    _, indices, lens, _ = keys
    if indices is None:
        return 0
    return indices.shape[1] if lens is not None else triton.cdiv(indices.shape[0], rows)


def _arguments(keys: Keys) -> tuple[tuple[Any, ...], tuple[int, ...], int, bool]:
    """(pointers, numbers, block size, whether ragged) of a list of keys as the kernel takes them."""
    cache, indices, lens, indptr = keys
    if cache is None or indices is None:
        return (None, None, None), (0, -1, 0, 0), 0, False
    num_blocks, block_size = cache.shape[:2]
    last_slot = min(num_blocks * block_size - 1, _MAX_SLOT)
    size, stride = (indices.shape[0], 0) if lens is None else (indices.shape[1], indices.stride(0))
    bounds = indptr if lens is None else lens
    return (cache, indices, bounds), (size, last_slot, stride, cache.stride(0) // 16), block_size, lens is None


# ---- registration ----

sparse_mla_write = register(
    _sparse_mla_write, "sparse_mla_write(Tensor kv, Tensor(a!) cache, Tensor slot_mapping, bool fnuz) -> ()"
)
sparse_mla_decode_out = register(
    _sparse_mla_decode,
    "sparse_mla_decode_out(Tensor q, Tensor main_cache, Tensor main_indices, Tensor? main_lens, "
    "Tensor? main_indptr, Tensor? extra_cache, Tensor? extra_indices, Tensor? extra_lens, Tensor? extra_indptr, "
    "Tensor? attn_sink, float scale, int? num_splits, bool fnuz, Tensor(a!) out) -> ()",
)
