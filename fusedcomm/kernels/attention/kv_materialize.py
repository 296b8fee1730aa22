"""The keys and values of several draft layers in Triton: one program a token, a layer and a piece of its heads."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.heads import copy_heads
from fusedcomm.kernels.attention.rope import norm_and_rotate


# Positions may be any part of a longer tensor; where it begins is no reason to compile again.
@triton.jit(do_not_specialize=["num_positions"], do_not_specialize_on_alignment=["positions_ptr"])
def kv_materialize_kernel(
    kv_ptr,  # [N, NUM_LAYERS, 2, NUM_HEADS, HEAD_DIM]
    weight_ptr,  # [NUM_LAYERS, HEAD_DIM]
    cos_sin_ptr,  # [num_positions, ROTARY_DIM]
    positions_ptr,  # [N] int64
    k_ptr,  # [NUM_LAYERS, N, NUM_HEADS, HEAD_DIM]
    v_ptr,  # like k
    num_positions,
    kv_token_stride,
    kv_layer_stride,
    kv_value_stride,
    kv_head_stride,
    cos_sin_stride,
    k_layer_stride,
    k_token_stride,
    k_head_stride,
    v_layer_stride,
    v_token_stride,
    v_head_stride,
    eps,
    weight_bias,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUNDS: tl.constexpr,
    K_PIECES: tl.constexpr,
    PIECES: tl.constexpr,  # of the heads of the keys, then of those of the values
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
):
    piece = tl.program_id(0) % PIECES
    layer = (tl.program_id(0) // PIECES % NUM_LAYERS).to(tl.int64)
    token = (tl.program_id(0) // (PIECES * NUM_LAYERS)).to(tl.int64)
    heads_ptr = kv_ptr + token * kv_token_stride + layer * kv_layer_stride
    if piece < K_PIECES:
        norm_and_rotate(
            (heads_ptr, kv_head_stride),
            weight_ptr + layer * HEAD_DIM,
            (cos_sin_ptr, cos_sin_stride, num_positions, tl.load(positions_ptr + token)),
            (k_ptr + layer * k_layer_stride + token * k_token_stride, k_head_stride),
            None,
            piece,
            eps,
            weight_bias,
            NUM_HEADS,
            BLOCK_HEADS,
            ROUNDS,
            HEAD_DIM,
            ROTARY_DIM,
            NEOX,
            0,
            False,
            False,
        )
    else:
        copy_heads(
            (heads_ptr + kv_value_stride, kv_head_stride),
            (v_ptr + layer * v_layer_stride + token * v_token_stride, v_head_stride),
            None,
            piece - K_PIECES,
            NUM_HEADS,
            BLOCK_HEADS,
            HEAD_DIM,
            0,
            False,
            False,
        )
