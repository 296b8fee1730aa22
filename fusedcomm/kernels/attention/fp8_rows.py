"""FP8 codes of values that share a scale, and back, in Triton; to the bit as fusedcomm.ops.attention's references."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import INTERPRETED, encode_fp8

MIN_AMAX: tl.constexpr = tl.constexpr(1e-4)


@triton.jit
def magnitude_bits(x):
    """The magnitudes of fp32 values, as integers: they compare alike, and a NaN is larger than everything."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two_scale(amax_bits, FNUZ: tl.constexpr):
    """(the smallest power of two that is not below amax / FP8_MAX, its inverse), from the bits of amax.

    2^k is not below it where the exponent of amax is k above that of FP8_MAX and its mantissa at most as large, or the
    exponent smaller. Rounding the quotient to fp32 first changes nothing: for the smallest amax that is too large for
    2^k it is (1 + 2^-23) 2^k. Both numbers are normal, as amax is 1e-4 at least; NaN where amax is not finite.
    """
    MANTISSA: tl.constexpr = 0x700000 if FNUZ else 0x600000  # of 240 = 1.875 * 2^7, of 448 = 1.75 * 2^8
    EXPONENT: tl.constexpr = 7 if FNUZ else 8
    bits = (((amax_bits + (0x7FFFFF - MANTISSA)) >> 23) - EXPONENT) << 23
    is_finite = amax_bits < 0x7F800000
    scale = tl.where(is_finite, bits, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, tl.where(is_finite, (254 << 23) - bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def divide(x, scale, inverse):
    """The quotients x / scale rounded to fp32, where an FP8 code depends on it; inverse: 1 / scale rounded to fp32.

    The product with the inverse, and the correction that its error asks for: the last steps of a division, without the
    others and without checks of ranges. What is rounded at last is less than 2^-46 of the quotient off, which matters
    next to the middle between two fp32 numbers alone. As integers of 25 bits these middles, where a code changes, are
    c * 2^20 + 1 or - 1, so only for mantissas of the scale j * 2^20 + s, s from -8 to 8, a quotient comes that close
    without being there. All quotients by these 136 mantissas are what a division gives (a test has the closest ones).
    Where steps are inexact since x is that small, codes are those of zeros, with the sign of x. With an infinite scale
    the product is all, and a zero.
    """
    if INTERPRETED:  # has no fma
        return tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        quotient = x * inverse
        divisor = tl.broadcast_to(tl.where(scale == float("inf"), 0.0, scale), x.shape)
        # times -1: Triton's minus is 0 - x, which costs an instruction, and gives +0 for the inverse of infinity
        excess = tl.fma(quotient, divisor, x * -1.0)
        return tl.fma(excess, tl.broadcast_to(inverse * -1.0, x.shape), quotient)


@triton.jit
def scale_of(amax_bits, UE8M0: tl.constexpr, FNUZ: tl.constexpr):
    """(``max(amax, 1e-4) / FP8_MAX``, rounded up to a power of two with UE8M0; its inverse), from the bits of amax."""
    FP8_MAX: tl.constexpr = 240.0 if FNUZ else 448.0
    amax_bits = tl.maximum(amax_bits, magnitude_bits(tl.full(amax_bits.shape, MIN_AMAX, tl.float32)))
    if UE8M0:
        return power_of_two_scale(amax_bits, FNUZ)
    else:
        scale = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), FP8_MAX)
        return scale, tl.div_rn(1.0, scale)


@triton.jit
def codes_of(x, scale, inverse, UE8M0: tl.constexpr, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """The codes of x / scale, with what scale_of gave for them.

    Nothing has to be clamped: no quotient is above FP8_MAX by more than a rounding of fp32, which that of FP8 takes
    away. The product with the inverse of a power of two is the quotient: the same number is rounded.
    """
    q = x * inverse if UE8M0 else divide(x, scale, inverse)
    return encode_fp8(q, FNUZ, HARDWARE_FP8)


@triton.jit
def quantise_rows(x, UE8M0: tl.constexpr, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """(codes ``[T, N]``, scales ``[T]``) of fp32 rows."""
    scale, inverse = scale_of(tl.max(magnitude_bits(x), axis=1), UE8M0, FNUZ)
    return codes_of(x, scale[:, None], inverse[:, None], UE8M0, FNUZ, HARDWARE_FP8), scale


@triton.jit
def decode_fp8(codes, FNUZ: tl.constexpr):
    """The fp32 values of FP8 codes (uint8)."""
    code = codes.to(tl.int32)
    # The exponent, in the place of fp32's, is off by the difference of the biases: of subnormals too.
    REBIAS: tl.constexpr = 2.0**119 if FNUZ else 2.0**120
    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * REBIAS
    is_nan = (code == 0x80) if FNUZ else ((code & 0x7F) == 0x7F)
    return tl.where(is_nan, float("nan"), tl.where(code >= 0x80, -magnitude, magnitude))
