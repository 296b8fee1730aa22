"""Probabilities as integers: the arithmetic of fusedcomm.ops.sampling.fixed_point, to the bit.

Values are fp32 from 0 on, whose bits are in the order of the numbers: thresholds are compared as int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

OUT_OF_REACH: tl.constexpr = tl.constexpr((1 << 63) - 1)
LARGEST_PROBABILITY: tl.constexpr = tl.constexpr(float.fromhex("0x1.fffffep+126"))


@triton.jit
def bits_of(y):
    return y.to(tl.int32, bitcast=True)


@triton.jit
def probability(x):
    """fp32 as it counts: NaN and what is not above 0 as 0, 2^127 and more as the largest fp32 below that."""
    x = tl.where(x > 0.0, x, 0.0)
    return tl.where(x < LARGEST_PROBABILITY, x, LARGEST_PROBABILITY)


@triton.jit
def unit_of(largest_bits):
    """c of a row whose largest value has these bits."""
    exponent = tl.maximum(largest_bits >> 23, 1) - 127
    is_ordinary = (exponent >= -20) & (exponent <= 0)
    return (tl.where(is_ordinary, 127, 127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(y):
    """q = rint(y * 2^44) of values below 2, at least 1 for what is above 0: int64."""
    MIN_SHIFTED: tl.constexpr = 127 - 21  # the exponent of 2^-21, whose mass is its mantissa
    MAGIC: tl.constexpr = 0x4B000000  # 2^23: added to less than that it leaves the integer in the low bits, rounded
    bits = bits_of(y)
    shift = tl.maximum((bits >> 23) - MIN_SHIFTED, 0)
    shifted = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64) << shift
    rounded = bits_of(y * 2.0**44 + 2.0**23) - MAGIC
    rounded = tl.maximum(rounded, tl.minimum(bits, 1)).to(tl.int64)
    return tl.where(bits >= MIN_SHIFTED << 23, shifted, rounded)


@triton.jit
def divisor_of(mass):
    """m of a sum of masses; 1 where there is none, which turns 0 / m to 0."""
    return tl.where(mass > 0, mass.to(tl.float32) * 2.0**-44, 1.0)


@triton.jit
def goal(share, unit):
    """The sum of masses that reaches a share: from 1 on, OUT_OF_REACH where there is no limit."""
    reach = share * 2.0**44 * unit
    is_limited = (share < 1.0) & (reach < 2.0**63)
    return tl.where(is_limited, tl.where(is_limited & (reach > 1.0), reach, 1.0).to(tl.int64), OUT_OF_REACH)


@triton.jit
def part_of(total, uniform):
    """``floor(total * n / 2^31)``, where n is the uniform in steps of 2^-31. No product here passes 63 bits."""
    u = tl.where(uniform > 0.0, uniform, 0.0)
    u = tl.where(u < 1.0 - 2.0**-24, u, 1.0 - 2.0**-24)
    steps = (u * 2.0**31).to(tl.int64)
    return (total >> 31) * steps + (((total & 0x7FFFFFFF) * steps) >> 31)
