"""Conversions between storage types and fp32, for use inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter truncates where it should round to bf16, and mistakes bf16 subnormals and FP8 altogether; there
# the same conversions are made of integer operations.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """The fp32 values of a bf16, fp16 or fp32 tensor; exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 rounded to bf16, fp16 or fp32, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits.to(tl.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits >> 16) | 0x40
        return tl.where(x != x, nan, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def encode_fp8(x, FNUZ: tl.constexpr, HARDWARE: tl.constexpr):
    """The codes (uint8) of fp32 values that the format can hold, or NaN: e4m3fn, or e4m3fnuz with FNUZ.

    Rounds to nearest even. HARDWARE: the device converts to this format itself.
    """
    if HARDWARE and FNUZ:
        return x.to(tl.float8e4b8).to(tl.uint8, bitcast=True)
    elif HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        # as encode_fp8 of csrc/include/fusedcomm/group_quant.h
        BIAS: tl.constexpr = 8 if FNUZ else 7
        MIN_NORMAL: tl.constexpr = (127 + 1 - BIAS) << 23
        REBIAS: tl.constexpr = (127 - BIAS) << 3
        # Adding 2^(23 + quantum exponent) leaves |x| / quantum, rounded to nearest even, in the low bits.
        MAGIC: tl.constexpr = (127 + 23 - 2 - BIAS) << 23
        bits = x.to(tl.int32, bitcast=True)
        magnitude = tl.where(x != x, 0, bits & 0x7FFFFFFF)
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - REBIAS
        magic = tl.full(x.shape, MAGIC, tl.int32).to(tl.float32, bitcast=True)
        subnormal = (magnitude.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - MAGIC
        code = tl.where(magnitude < MIN_NORMAL, subnormal, normal)
        sign = (bits >> 24) & 0x80
        if FNUZ:
            sign = tl.where(code == 0, 0, sign)  # -0 is the NaN of this format
            return tl.where(x != x, 0x80, code | sign).to(tl.uint8)
        else:
            return tl.where(x != x, 0x7F, code | sign).to(tl.uint8)
