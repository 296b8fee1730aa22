"""RMSNorm of a row, with the residual addition before it and the quantisation after it, in Triton.

One program a row; the whole row stays in registers. The arithmetic is that of fusedcomm.ops.reference, to the bit:
IEEE division and root, no product contracted into a fused multiply-add, the mean of squares as one fixed tree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import narrow, widen
from fusedcomm.kernels.quant import quantise_groups


@triton.jit
def tree_sum(x):
    """Sum of a tensor of one dimension, a power of two: ``s[i] = s[2i] + s[2i + 1]`` level by level.

    Each reduction has two operands, so no compiler has an order to choose: neighbours first meet in registers, then
    across lanes, then across warps.
    """
    for _ in tl.static_range(15):  # log2 of the largest row
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def sqrt(x):
    """The correctly rounded root. That of Triton for AMD is not where x is tiny: it is scaled there, exactly."""
    tiny = x < 2.0**-96
    root = tl.sqrt_rn(tl.where(tiny, x * 2.0**64, x))
    return tl.where(tiny, root * 2.0**-32, root)


@triton.jit
def add_and_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    residual_out_ptr,
    eps,
    weight_bias,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``round(x + residual)`` of this program's row, stored where it is asked for; returns its RMSNorm, rounded."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    in_row = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    rounded = tl.load(x_ptr + at, mask=in_row, other=0.0)
    weight = widen(tl.load(weight_ptr + column, mask=in_row, other=0.0))
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=in_row, other=0.0)
        rounded = narrow(widen(rounded) + widen(residual), dtype)
    if residual_out_ptr is not None:
        tl.store(residual_out_ptr + at, rounded, mask=in_row)
    r = widen(rounded)
    # r² + 0 is r², and no compiler contracts it further, with whatever options it runs: r · r + r' · r' it would.
    mean = tl.div_rn(tree_sum(tl.fma(r, r, 0.0)), float(HIDDEN))
    return narrow(r * tl.div_rn(1.0, sqrt(mean + eps)) * (weight + weight_bias), dtype)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [rows, HIDDEN]
    residual_ptr,  # like x, or None
    weight_ptr,  # [HIDDEN]
    norm_ptr,  # like x
    residual_out_ptr,  # like x, or None
    eps,
    weight_bias,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    y = add_and_norm(x_ptr, residual_ptr, weight_ptr, residual_out_ptr, eps, weight_bias, HIDDEN, BLOCK)
    column = tl.arange(0, BLOCK)
    tl.store(norm_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + column, y, mask=column < HIDDEN)


@triton.jit(do_not_specialize=["scale_row_stride", "scale_column_stride"])
def rms_norm_quant_kernel(
    x_ptr,  # [rows, HIDDEN]
    residual_ptr,  # like x, or None
    weight_ptr,  # [HIDDEN]
    norm_ptr,  # like x, or None
    residual_out_ptr,  # like x
    fp8_ptr,  # [rows, HIDDEN] uint8
    scale_ptr,
    scale_row_stride,
    scale_column_stride,
    eps,
    weight_bias,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    y = add_and_norm(x_ptr, residual_ptr, weight_ptr, residual_out_ptr, eps, weight_bias, HIDDEN, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    if norm_ptr is not None:
        column = tl.arange(0, BLOCK)
        tl.store(norm_ptr + row * HIDDEN + column, y, mask=column < HIDDEN)
    quantise_groups(
        widen(y),
        row,
        0,
        fp8_ptr,
        scale_ptr,
        scale_row_stride,
        scale_column_stride,
        HIDDEN,
        GROUP_SIZE,
        PACKED,
        FNUZ,
        HARDWARE_FP8,
    )
