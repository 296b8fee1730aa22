"""What is written to the sparse MLA caches, in Triton: to the bit as fusedcomm.ops.attention.sparse_mla_reference."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.fp8_rows import quantise_rows
from fusedcomm.kernels.attention.sparse_mla_keys import ROPE_AT_584, ROPE_AT_656, token_at
from fusedcomm.kernels.convert import narrow, widen

ROPE: tl.constexpr = tl.constexpr(64)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def sparse_mla_write_kernel(
    kv_ptr,  # [num_tokens, 512 or 576]
    cache_ptr,  # bytes
    slot_mapping_ptr,  # [num_tokens] int64
    num_tokens,
    num_slots,
    kv_stride,
    block_stride,  # in 16 bytes: so its divisor is known
    BLOCK_SIZE: tl.constexpr,
    TOKEN_BYTES: tl.constexpr,  # 584 or 656
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program quantises and writes TOKENS tokens."""
    GROUP: tl.constexpr = 64 if TOKEN_BYTES == 584 else 128
    NUM_GROUPS: tl.constexpr = 7 if TOKEN_BYTES == 584 else 4
    ROWS: tl.constexpr = 8 if TOKEN_BYTES == 584 else 4  # of groups a token, a power of two
    NOPE: tl.constexpr = GROUP * NUM_GROUPS
    first = tl.program_id(0).to(tl.int64) * TOKENS
    # ---- codes and scales: a row is a group of a token
    token, group = first + tl.arange(0, TOKENS * ROWS) // ROWS, tl.arange(0, TOKENS * ROWS) % ROWS
    element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_group = (token < num_tokens) & (group < NUM_GROUPS)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1)
    x = tl.load(kv_ptr + token[:, None] * kv_stride + element, mask=is_group[:, None], other=0.0)
    codes, scale = quantise_rows(widen(x), TOKEN_BYTES == 584, FNUZ, HARDWARE_FP8)
    is_known = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_known, slot, 0)
    data_at, scale_at = token_at(slot // BLOCK_SIZE, slot % BLOCK_SIZE, block_stride, BLOCK_SIZE, TOKEN_BYTES)
    tl.store(cache_ptr + data_at[:, None] + element, codes, mask=(is_known & is_group)[:, None])
    if TOKEN_BYTES == 584:  # the eighth byte pads them
        exponent = tl.where(group < NUM_GROUPS, scale.to(tl.int32, bitcast=True) >> 23, 0)
        tl.store(cache_ptr + scale_at + group, exponent.to(tl.uint8), mask=is_known)
    else:
        scale_ptr = (cache_ptr + scale_at).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scale_ptr + group, scale, mask=is_known & is_group)
    # ---- RoPE values: a row is a token
    token, element = first + tl.arange(0, TOKENS), tl.arange(0, ROPE)
    is_token = token < num_tokens
    slot = tl.load(slot_mapping_ptr + token, mask=is_token, other=-1)
    x = tl.load(kv_ptr + token[:, None] * kv_stride + NOPE + element[None, :], mask=is_token[:, None], other=0.0)
    if x.dtype != tl.bfloat16:
        x = narrow(widen(x), tl.bfloat16)
    is_known = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_known, slot, 0)
    data_at, _ = token_at(slot // BLOCK_SIZE, slot % BLOCK_SIZE, block_stride, BLOCK_SIZE, TOKEN_BYTES)
    rope_ptr = cache_ptr + data_at + (ROPE_AT_584 if TOKEN_BYTES == 584 else ROPE_AT_656)
    rope_ptr = rope_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(rope_ptr[:, None] + element[None, :], x, mask=is_known[:, None])
