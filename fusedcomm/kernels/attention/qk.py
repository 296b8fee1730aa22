"""QK-norm and RoPE in Triton: one program a token and a piece of its heads."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.heads import (
    apply_norm,
    copy_heads,
    find_in_cache,
    inverse_rms,
    load_for_each,
    load_heads,
    store_heads,
    sum_of_squares,
)
from fusedcomm.kernels.attention.rope import norm_and_rotate


@triton.jit
def norm_heads(
    x,
    weight_ptr,
    out,
    piece,
    eps,
    weight_bias,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Norms BLOCK_HEADS heads of one token; x and out are (pointer, stride of heads)."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    EVEN: tl.constexpr = NUM_HEADS % BLOCK_HEADS == 0 and BLOCK == HEAD_DIM
    head, element = piece * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK)
    loaded = load_heads(x, head, element, NUM_HEADS, HEAD_DIM, EVEN)
    weight = load_for_each(weight_ptr, element, HEAD_DIM, BLOCK_HEADS, BLOCK == HEAD_DIM) + weight_bias
    y = apply_norm(loaded, inverse_rms(sum_of_squares(loaded), eps, HEAD_DIM), weight)
    store_heads(out, head, element, y, NUM_HEADS, HEAD_DIM, EVEN)


@triton.jit
def qk_rmsnorm_kernel(
    q_ptr,  # [T, NUM_HEADS_Q, HEAD_DIM]
    k_ptr,  # [T, NUM_HEADS_K, HEAD_DIM]
    q_weight_ptr,  # [HEAD_DIM]
    k_weight_ptr,  # [HEAD_DIM]
    q_out_ptr,  # like q
    k_out_ptr,  # like k
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_token_stride,
    k_out_head_stride,
    eps,
    weight_bias,
    NUM_HEADS_Q: tl.constexpr,
    NUM_HEADS_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    Q_PIECES: tl.constexpr,
    PIECES: tl.constexpr,  # of the queries' heads, then of the keys'
):
    token = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.program_id(0) % PIECES
    if piece < Q_PIECES:
        x = (q_ptr + token * q_token_stride, q_head_stride)
        out = (q_out_ptr + token * q_out_token_stride, q_out_head_stride)
        norm_heads(x, q_weight_ptr, out, piece, eps, weight_bias, NUM_HEADS_Q, BLOCK_HEADS, HEAD_DIM)
    else:
        x = (k_ptr + token * k_token_stride, k_head_stride)
        out = (k_out_ptr + token * k_out_token_stride, k_out_head_stride)
        norm_heads(x, k_weight_ptr, out, piece - Q_PIECES, eps, weight_bias, NUM_HEADS_K, BLOCK_HEADS, HEAD_DIM)


# Positions and slots may be any part of a longer tensor; where it begins is no reason to compile again.
@triton.jit(
    do_not_specialize=["num_positions", "num_slots"],
    do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr", "k_scale_ptr", "v_scale_ptr"],
)
def qk_norm_rope_kernel(
    qkv_ptr,  # [T, (NUM_HEADS_Q + 2 * NUM_HEADS_K) * HEAD_DIM]
    q_weight_ptr,  # [HEAD_DIM]
    k_weight_ptr,  # [HEAD_DIM]
    cos_sin_ptr,  # [num_positions, ROTARY_DIM]
    positions_ptr,  # [T] int64
    q_ptr,  # [T, NUM_HEADS_Q, HEAD_DIM]
    k_ptr,  # [T, NUM_HEADS_K, HEAD_DIM]
    v_ptr,  # like k, or None
    k_cache_ptr,  # in the type of qkv or bytes of FP8, or None
    v_cache_ptr,
    slot_mapping_ptr,  # [T] int64
    k_scale_ptr,  # one fp32, or None
    v_scale_ptr,
    num_positions,
    num_slots,
    qkv_stride,
    cos_sin_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    # as find_in_cache takes them
    k_cache_block_stride,
    k_cache_head_stride,
    k_cache_pack_stride,
    k_cache_token_stride,
    v_cache_block_stride,
    v_cache_head_stride,
    v_cache_pack_stride,
    v_cache_token_stride,
    eps,
    weight_bias,
    NUM_HEADS_Q: tl.constexpr,
    NUM_HEADS_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    Q_ROUNDS: tl.constexpr,
    K_ROUNDS: tl.constexpr,
    Q_PIECES: tl.constexpr,
    K_PIECES: tl.constexpr,
    PIECES: tl.constexpr,  # of the queries' heads, then of the keys', then of the values' where they are written
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,  # tokens
    K_PACK: tl.constexpr,
    V_PACK: tl.constexpr,
    V_TOKENS: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    token = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.program_id(0) % PIECES
    row_ptr = qkv_ptr + token * qkv_stride
    slot_ptr = None if slot_mapping_ptr is None else slot_mapping_ptr + token
    if piece < Q_PIECES:
        norm_and_rotate(
            (row_ptr, HEAD_DIM),
            q_weight_ptr,
            (cos_sin_ptr, cos_sin_stride, num_positions, tl.load(positions_ptr + token)),
            (q_ptr + token * q_token_stride, q_head_stride),
            None,
            piece,
            eps,
            weight_bias,
            NUM_HEADS_Q,
            BLOCK_HEADS,
            Q_ROUNDS,
            HEAD_DIM,
            ROTARY_DIM,
            NEOX,
            0,
            False,
            False,
        )
    elif piece < Q_PIECES + K_PIECES:
        norm_and_rotate(
            (row_ptr + NUM_HEADS_Q * HEAD_DIM, HEAD_DIM),
            k_weight_ptr,
            (cos_sin_ptr, cos_sin_stride, num_positions, tl.load(positions_ptr + token)),
            (k_ptr + token * k_token_stride, k_head_stride),
            None
            if k_cache_ptr is None
            else find_in_cache(
                k_cache_ptr,
                slot_ptr,
                num_slots,
                k_scale_ptr,
                k_cache_block_stride,
                k_cache_head_stride,
                k_cache_pack_stride,
                k_cache_token_stride,
                NUM_HEADS_K,
                CACHE_BLOCK,
                1,
            ),
            piece - Q_PIECES,
            eps,
            weight_bias,
            NUM_HEADS_K,
            BLOCK_HEADS,
            K_ROUNDS,
            HEAD_DIM,
            ROTARY_DIM,
            NEOX,
            K_PACK,
            FNUZ,
            HARDWARE_FP8,
        )
    else:
        copy_heads(
            (row_ptr + (NUM_HEADS_Q + NUM_HEADS_K) * HEAD_DIM, HEAD_DIM),
            None if v_ptr is None else (v_ptr + token * v_token_stride, v_head_stride),
            None
            if v_cache_ptr is None
            else find_in_cache(
                v_cache_ptr,
                slot_ptr,
                num_slots,
                v_scale_ptr,
                v_cache_block_stride,
                v_cache_head_stride,
                v_cache_pack_stride,
                v_cache_token_stride,
                NUM_HEADS_K,
                CACHE_BLOCK,
                V_TOKENS,
            ),
            piece - Q_PIECES - K_PIECES,
            NUM_HEADS_K,
            BLOCK_HEADS,
            HEAD_DIM,
            V_PACK,
            FNUZ,
            HARDWARE_FP8,
        )
