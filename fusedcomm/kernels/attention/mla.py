"""MLA query and cache preparation in Triton: one program a token and a few heads of its query, or its key."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.heads import find_in_cache, load_heads, store, store_heads
from fusedcomm.kernels.attention.rope import rotate_heads


# Positions and slots may be any part of a longer tensor; where it begins is no reason to compile again.
@triton.jit(
    do_not_specialize=["num_positions", "num_slots"],
    do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr", "scale_ptr"],
)
def mla_prepare_kernel(
    q_nope_ptr,  # [T, NUM_HEADS, NOPE_DIM]
    q_pe_ptr,  # [T, NUM_HEADS, ROTARY_DIM]
    k_nope_ptr,  # [T, NOPE_DIM]
    k_pe_ptr,  # [T, ROTARY_DIM]
    cos_sin_ptr,  # [num_positions, ROTARY_DIM]
    positions_ptr,  # [T] int64
    q_ptr,  # [T, NUM_HEADS, NOPE_DIM + ROTARY_DIM], contiguous
    cache_ptr,  # [blocks, CACHE_BLOCK, NOPE_DIM + ROTARY_DIM] of the type of q, or bytes of FP8
    slot_mapping_ptr,  # [T] int64
    scale_ptr,  # one fp32, or None
    num_positions,
    num_slots,
    q_nope_token_stride,
    q_nope_head_stride,
    q_pe_token_stride,
    q_pe_head_stride,
    k_nope_stride,
    k_pe_stride,
    cos_sin_stride,
    cache_block_stride,
    cache_token_stride,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NEOX: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,  # tokens
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    Q_PIECES: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    WIDTH: tl.constexpr = NOPE_DIM + ROTARY_DIM
    token = (tl.program_id(0) // (Q_PIECES + 1)).to(tl.int64)
    piece = tl.program_id(0) % (Q_PIECES + 1)
    angles = (cos_sin_ptr, cos_sin_stride, num_positions, tl.load(positions_ptr + token))
    NOPE_BLOCK: tl.constexpr = triton.next_power_of_2(NOPE_DIM)
    element = tl.arange(0, NOPE_BLOCK)
    # What is copied is loaded before, and stored after, what is rotated.
    if piece < Q_PIECES:
        EVEN: tl.constexpr = NUM_HEADS % BLOCK_HEADS == 0 and NOPE_BLOCK == NOPE_DIM
        head = piece * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        q_row_ptr = q_ptr + token * (NUM_HEADS * WIDTH)
        q_nope = load_heads(
            (q_nope_ptr + token * q_nope_token_stride, q_nope_head_stride), head, element, NUM_HEADS, NOPE_DIM, EVEN
        )
        rotate_heads(
            (q_pe_ptr + token * q_pe_token_stride, q_pe_head_stride),
            angles,
            (q_row_ptr + NOPE_DIM, WIDTH),
            None,
            head,
            NUM_HEADS,
            BLOCK_HEADS,
            ROTARY_DIM,
            NEOX,
            False,
            False,
        )
        store_heads((q_row_ptr, WIDTH), head, element, q_nope, NUM_HEADS, NOPE_DIM, EVEN)
    else:
        only = tl.arange(0, 1)
        ptr, num_heads, head_stride, pack_stride, scale = find_in_cache(
            cache_ptr,
            slot_mapping_ptr + token,
            num_slots,
            scale_ptr,
            cache_block_stride,
            0,
            0,
            cache_token_stride,
            1,
            CACHE_BLOCK,
            1,
        )
        k_nope = load_heads((k_nope_ptr + token * k_nope_stride, 0), only, element, 1, NOPE_DIM, False)
        rotate_heads(
            (k_pe_ptr + token * k_pe_stride, 0),
            angles,
            None,
            (ptr + NOPE_DIM, num_heads, head_stride, pack_stride, scale),
            only,
            1,
            1,
            ROTARY_DIM,
            NEOX,
            FNUZ,
            HARDWARE_FP8,
        )
        cache = (ptr, num_heads, head_stride, pack_stride, scale)
        store(None, cache, only, element, k_nope, 1, NOPE_DIM, False, 0, FNUZ, HARDWARE_FP8)
