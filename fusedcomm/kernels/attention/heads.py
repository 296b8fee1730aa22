"""Norm and rotation of heads, for use inside Triton kernels: a tile ``[heads, elements]`` at a time.

The arithmetic is that of fusedcomm.ops.attention.qk_reference, to the bit; kernels are compiled without fp fusion.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import encode_fp8, narrow, widen
from fusedcomm.kernels.norm import sqrt


@triton.jit
def tree_sum_rows(x):
    """The tree of fusedcomm.kernels.norm.tree_sum over each row of a tensor of two dimensions."""
    for _ in tl.static_range(10):  # log2 of the largest head
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def load_heads(x_ptr, head, head_stride, element, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """fp32 values of these elements of these heads; 0 where there is no such head or element."""
    mask = (head < NUM_HEADS)[:, None] & (element < HEAD_DIM)[None, :]
    return widen(tl.load(x_ptr + head[:, None] * head_stride + element[None, :], mask=mask, other=0.0))


@triton.jit
def store_heads(x_ptr, head, head_stride, element, values, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """fp32 values, rounded to the type of the memory."""
    mask = (head < NUM_HEADS)[:, None] & (element < HEAD_DIM)[None, :]
    at = x_ptr + head[:, None] * head_stride + element[None, :]
    tl.store(at, narrow(values, x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def inverse_rms(x, eps, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row."""
    mean = tl.div_rn(tree_sum_rows(tl.fma(x, x, 0.0)), float(HEAD_DIM))
    return tl.div_rn(1.0, sqrt(mean + eps))


@triton.jit
def apply_weight(x, inverse, weight_ptr, weight_bias, element, HEAD_DIM: tl.constexpr, dtype: tl.constexpr):
    """The normed values as fp32 after their rounding to dtype."""
    weight = widen(tl.load(weight_ptr + element, mask=element < HEAD_DIM, other=0.0))
    return widen(narrow(x * inverse[:, None] * (weight + weight_bias)[None, :], dtype))


@triton.jit
def partner_of(element, ROTARY_DIM: tl.constexpr, NEOX: tl.constexpr):
    """The element that each is rotated with; itself where none is."""
    if NEOX:
        partner = tl.where(element < ROTARY_DIM // 2, element + ROTARY_DIM // 2, element - ROTARY_DIM // 2)
    else:
        partner = element ^ 1
    return tl.where(element < ROTARY_DIM, partner, element)


@triton.jit
def rotate(
    x,
    partner,  # x at partner_of
    element,
    cos_sin_ptr,  # [num_positions, ROTARY_DIM]: cosines, then sines
    cos_sin_stride,
    num_positions,
    position,
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
):
    """The rotated values, not rounded yet. A position outside of the table is not read: they are NaN."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if NEOX:
        is_first = element < HALF
        pair = tl.where(is_first, element, element - HALF)
    else:
        is_first = element % 2 == 0
        pair = element // 2
    is_rotated = element < ROTARY_DIM
    is_known = (position >= 0) & (position < num_positions)
    row = cos_sin_ptr + tl.where(is_known, position, 0) * cos_sin_stride
    cos = widen(tl.load(row + pair, mask=is_rotated & is_known, other=0.0))
    sin = widen(tl.load(row + HALF + pair, mask=is_rotated & is_known, other=0.0))
    nan = float("nan")
    cos, sin = tl.where(is_known, cos, nan), tl.where(is_known, sin, nan)
    crossed = partner * sin[None, :]
    turned = x * cos[None, :] + tl.where(is_first[None, :], -crossed, crossed)
    return tl.where(is_rotated[None, :], turned, x)


@triton.jit
def norm_and_rotate(
    x_ptr,  # the heads of one token
    head,
    head_stride,
    element,
    weight_ptr,
    cos_sin_ptr,
    cos_sin_stride,
    num_positions,
    position,
    eps,
    weight_bias,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
):
    """Heads with norm and rotation, as fp32 after their rounding to the type of the memory.

    What an element is rotated with is loaded for a second time, from the cache of the multiprocessor: that costs less
    than moving it between threads. So nothing may be written over x.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = load_heads(x_ptr, head, head_stride, element, NUM_HEADS, HEAD_DIM)
    inverse = inverse_rms(x, eps, HEAD_DIM)
    y = apply_weight(x, inverse, weight_ptr, weight_bias, element, HEAD_DIM, dtype)
    other = partner_of(element, ROTARY_DIM, NEOX)
    partner = load_heads(x_ptr, head, head_stride, other, NUM_HEADS, HEAD_DIM)
    partner = apply_weight(partner, inverse, weight_ptr, weight_bias, other, HEAD_DIM, dtype)
    y = rotate(y, partner, element, cos_sin_ptr, cos_sin_stride, num_positions, position, ROTARY_DIM, NEOX)
    return widen(narrow(y, dtype))


@triton.jit
def as_stored(y, scale_ptr, dtype: tl.constexpr, FP8: tl.constexpr, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """fp32 values as a cache holds them: rounded to its dtype, or the codes (uint8) of ``clamp(y / scale)``."""
    if FP8:
        FP8_MAX: tl.constexpr = 240.0 if FNUZ else 448.0
        if scale_ptr is not None:
            y = tl.div_rn(y, tl.broadcast_to(tl.load(scale_ptr), y.shape))
        y = tl.where(y > FP8_MAX, FP8_MAX, y)  # NaN compares false and stays
        y = tl.where(y < -FP8_MAX, -FP8_MAX, y)
        return encode_fp8(y, FNUZ, HARDWARE_FP8)
    else:
        return narrow(y, dtype)
