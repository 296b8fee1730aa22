"""Probabilities as integers, so that their sums do not depend on an order.

Sums of fp32 come out differently with every way to split a row. Here a row becomes integers first, and sums of integers
are the same on every backend, for every split and on every rank: thresholds, masses and samples are equal to the bit.

1. Values. A probability x that is NaN or not above 0 counts as 0; one of 2^127 or more counts as the largest fp32
   below that.
2. Unit. ``c = 1`` if the largest value of the row is in ``[2^-20, 2)``, as that of every distribution over up to 2^18
   tokens is. Otherwise ``c = 2^-E``, where E is the exponent of the largest (-126 for subnormal ones): rows that are
   far from adding up to 1 keep their precision. ``y = x * c`` in fp32, so below 2.
3. Masses. ``q = rint(y * 2^44)``, half to even, and at least 1 where y is above 0. A row of up to 2^18 values below 2
   stays below 2^63. Every y from 2^-20 on is exact, a smaller one off by 2^-45 at most, and below 2^-45 by 2^-44.
4. Results. The fp32 of a sum of masses, rounded to nearest even, times 2^-44 is ``m``. A value becomes ``y / m``, the
   IEEE quotient in fp32, subnormal ones included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FRACTION_BITS = 44
UNIFORM_BITS = 31
MAX_VOCAB = 1 << 18
_LARGEST = float.fromhex("0x1.fffffep+126")  # the largest fp32 whose unit, 2^-126, is a normal number
_SMALLEST_EXPONENT = -20
_INT64_MAX = (1 << 63) - 1


class Rows(NamedTuple):
    """Rows of values in units of their own."""

    y: torch.Tensor
    """fp32 ``[N, V]``, from 0 to below 2."""
    unit: torch.Tensor
    """fp32 ``[N, 1]``: c, a power of two."""


def rows_of(probs: torch.Tensor, indices: torch.Tensor | None = None) -> Rows:
    """The rows of ``probs [B, V]`` that ``indices [N]`` name (clamped to those there are), or all, in their units."""
    x = take(probs, indices).float()
    x = torch.where(x > 0, x, 0.0).clamp(max=_LARGEST)
    exponent = (x.amax(-1, keepdim=True).view(torch.int32) >> 23).clamp(min=1) - 127
    ordinary = (exponent >= _SMALLEST_EXPONENT) & (exponent <= 0)
    unit = (torch.where(ordinary, 127, 127 - exponent) << 23).view(torch.float32)
    return Rows(x * unit, unit)


def take(t: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """The rows of t that are named, and those at the ends for indices past them."""
    return t if indices is None else t[indices.clamp(0, t.shape[0] - 1).long()]


def masses_of(y: torch.Tensor) -> torch.Tensor:
    """q of every value: int64, like y."""
    return torch.where(y > 0, (y * float(1 << FRACTION_BITS)).clamp(min=1.0), 0.0).round().long()


def divisor(mass: torch.Tensor) -> torch.Tensor:
    """m of sums of masses: fp32; 1 where there is no mass, which turns 0 / m to 0."""
    return torch.where(mass > 0, mass.float() * 2.0**-FRACTION_BITS, 1.0)


def goal(top_p: torch.Tensor, unit: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The sum of masses that reaches ``top_p``: int64, at least 1, and out of reach from 1 on or for NaN.

    Where the product is no integer it is below 2^23, and the largest value of a row alone has 2^24: it is reached with
    any rounding.
    """
    reach = (top_p * float(1 << FRACTION_BITS) * unit).clamp(min=1.0)
    limited = (top_p < 1) & (reach < 2.0**63)
    return torch.where(limited, torch.where(limited, reach, 1.0).long(), _INT64_MAX)


def inverse_cdf(masses: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first id of each row of ``masses [N, V]`` whose sum up to it is above ``u * total``: int64 ``[N]``.

    ``u`` (fp32) counts in steps of 2^-31, rounded down; from 1 on it counts as 1 - 2^-24, and as 0 where it is NaN or
    not above 0. So the id has a mass. A row without any gives 0.
    """
    u = torch.where(uniforms > 0, uniforms, 0.0).clamp(max=1 - 2.0**-24)
    steps = (u * float(1 << UNIFORM_BITS)).long()
    sums = masses.cumsum(-1)
    total = sums[:, -1:]
    found = torch.searchsorted(sums, _fraction(total, steps.unsqueeze(-1)), right=True).squeeze(-1)
    return torch.where(total.squeeze(-1) > 0, found, 0)


def _fraction(total: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """``floor(total * steps / 2^31)``: the high 64 bits of ``total * (steps << 33)``. No product here passes 63."""
    high, low = total >> UNIFORM_BITS, total & ((1 << UNIFORM_BITS) - 1)
    return high * steps + ((low * steps) >> UNIFORM_BITS)
