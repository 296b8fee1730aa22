"""QK-norm and RoPE in Triton: one program a token and a few of its heads."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.heads import apply_weight, inverse_rms, load_heads, store_heads


@triton.jit
def norm_heads(
    x_ptr,
    head_stride,
    weight_ptr,
    out_ptr,
    out_head_stride,
    first,
    eps,
    weight_bias,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Norms BLOCK_HEADS heads of one token from ``first`` on."""
    head, element = first + tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_DIM)
    x = load_heads(x_ptr, head, head_stride, element, NUM_HEADS, HEAD_DIM)
    inverse = inverse_rms(x, eps, HEAD_DIM)
    y = apply_weight(x, inverse, weight_ptr, weight_bias, element, HEAD_DIM, x_ptr.dtype.element_ty)
    store_heads(out_ptr, head, out_head_stride, element, y, NUM_HEADS, HEAD_DIM)


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
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)  # of the queries' heads, then of the keys'
    Q_PIECES: tl.constexpr = (NUM_HEADS_Q + BLOCK_HEADS - 1) // BLOCK_HEADS
    if piece < Q_PIECES:
        norm_heads(
            q_ptr + token * q_token_stride,
            q_head_stride,
            q_weight_ptr,
            q_out_ptr + token * q_out_token_stride,
            q_out_head_stride,
            piece * BLOCK_HEADS,
            eps,
            weight_bias,
            NUM_HEADS_Q,
            HEAD_DIM,
            BLOCK_DIM,
            BLOCK_HEADS,
        )
    else:
        norm_heads(
            k_ptr + token * k_token_stride,
            k_head_stride,
            k_weight_ptr,
            k_out_ptr + token * k_out_token_stride,
            k_out_head_stride,
            (piece - Q_PIECES) * BLOCK_HEADS,
            eps,
            weight_bias,
            NUM_HEADS_K,
            HEAD_DIM,
            BLOCK_DIM,
            BLOCK_HEADS,
        )
