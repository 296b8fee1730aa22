"""Per-group FP8 quantisation in Triton, to the bit as fusedcomm.ops.reference has it."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import encode_fp8, widen


@triton.jit
def quantise_groups(
    y,  # [BLOCK] fp32: the row from the column ``first`` on
    row,
    first,
    fp8_ptr,
    scale_ptr,
    scale_row_stride,
    scale_column_stride,
    HIDDEN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Stores the FP8 codes and the scales of a piece of a row: whole groups, and with PACKED whole words of four."""
    FP8_MAX: tl.constexpr = 240.0 if FNUZ else 448.0
    NUM_GROUPS: tl.constexpr = HIDDEN // GROUP_SIZE
    block_groups: tl.constexpr = y.shape[0] // GROUP_SIZE
    y = tl.reshape(y, [block_groups, GROUP_SIZE])
    # The larger magnitude, compared as integers: a NaN is larger than everything, so it survives.
    amax = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < 1e-10, 1e-10, amax), FP8_MAX)
    group = first // GROUP_SIZE + tl.arange(0, block_groups)
    if PACKED:
        # The smallest power of two >= scale, as a biased exponent. NaN and inf give 255, which is E8M0's NaN.
        finite = scale < float("inf")
        bits = tl.where(finite, scale.to(tl.int32, bitcast=True), 0)
        exponent = tl.where(finite, (bits + 0x7FFFFF) >> 23, 255)
        scale = tl.where(finite, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
        bytes_of_word = tl.reshape(tl.where(group < NUM_GROUPS, exponent, 0), [block_groups // 4, 4])
        # Bits of their own, so the sum is their union.
        packed = tl.sum(bytes_of_word.to(tl.uint32) << (8 * tl.arange(0, 4))[None, :].to(tl.uint32), axis=1)
        word = first // (4 * GROUP_SIZE) + tl.arange(0, block_groups // 4)
        at = row * scale_row_stride + word.to(tl.int64) * scale_column_stride
        tl.store(scale_ptr + at, packed.to(tl.int32, bitcast=True), mask=word < (NUM_GROUPS + 3) // 4)
    else:
        at = row * scale_row_stride + group.to(tl.int64) * scale_column_stride
        tl.store(scale_ptr + at, scale, mask=group < NUM_GROUPS)
    q = tl.div_rn(y, tl.broadcast_to(scale[:, None], [block_groups, GROUP_SIZE]))
    q = tl.where(q > FP8_MAX, FP8_MAX, q)  # NaN compares false and stays
    q = tl.where(q < -FP8_MAX, -FP8_MAX, q)
    codes = tl.reshape(encode_fp8(q, FNUZ, HARDWARE_FP8), [block_groups * GROUP_SIZE])
    column = first + tl.arange(0, block_groups * GROUP_SIZE)
    tl.store(fp8_ptr + row * HIDDEN + column, codes, mask=column < HIDDEN)


@triton.jit(do_not_specialize=["scale_row_stride", "scale_column_stride"])
def group_quant_kernel(
    x_ptr,  # [rows, HIDDEN]
    fp8_ptr,  # [rows, HIDDEN] uint8
    scale_ptr,
    scale_row_stride,
    scale_column_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """One program a piece of BLOCK elements of a row."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    quantise_groups(
        widen(x),
        row,
        first,
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
