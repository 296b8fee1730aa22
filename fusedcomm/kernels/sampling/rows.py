"""Rows as kernels read them, and what they are asked for: the largest value, masses, thresholds.

A program has a row. It reads it a tile at a time, and again for each question: from the second time on it comes out of
the cache. What a row is read as is said by a function READ and a tuple ``row`` of its own:
``READ(row, column, vocab)`` are fp32 values from 0 on, and 0 past the end of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import widen
from fusedcomm.kernels.sampling.fixed_point import OUT_OF_REACH, bits_of, mass_of, probability, unit_of

PIVOTS: tl.constexpr = tl.constexpr(4)
"""Sums that a pass of a search takes: of more, each pass would take longer than is saved by there being fewer."""


# ---- forms of a row ----


@triton.jit
def as_given(row, column, vocab):
    """Probabilities as they count, in the unit of the row: ``row = (pointer, unit)``."""
    pointer, unit = row
    return probability(widen(tl.load(pointer + column, mask=column < vocab, other=0.0))) * unit


@triton.jit
def kept(row, column, vocab):
    """Those of them that are at least a threshold, given by its bits: ``row = (pointer, unit, threshold)``."""
    pointer, unit, threshold = row
    y = as_given((pointer, unit), column, vocab)
    return tl.where(bits_of(y) >= threshold, y, 0.0)


@triton.jit
def renormalised(row, column, vocab):
    """These, divided by their mass: ``row = (pointer, unit, threshold, divisor)``."""
    pointer, unit, threshold, divisor = row
    return tl.div_rn(kept((pointer, unit, threshold), column, vocab), divisor)


@triton.jit
def kept_twice(row, column, vocab):
    """Those of these that are at least another threshold: ``row = (pointer, unit, threshold, divisor, second)``."""
    pointer, unit, threshold, divisor, second = row
    r = renormalised((pointer, unit, threshold, divisor), column, vocab)
    return tl.where(bits_of(r) >= second, r, 0.0)


@triton.jit
def given_where_kept_twice(row, column, vocab):
    """The values as_given of what kept_twice keeps; the same row."""
    pointer, unit, threshold, divisor, second = row
    y = kept((pointer, unit, threshold), column, vocab)
    return tl.where(bits_of(tl.div_rn(y, divisor)) >= second, y, 0.0)


@triton.jit
def source_of(rows_ptr, indices_ptr, row, num_rows, row_stride):
    """Where the row lies that a row of the result is of: an index past the ends is that of the row at that end."""
    index = row
    if indices_ptr is not None:
        index = tl.load(indices_ptr + row).to(tl.int64)
        index = tl.minimum(tl.maximum(index, 0), num_rows - 1)
    return rows_ptr + index * row_stride


@triton.jit
def parameter_of(values_ptr, value, row):
    """A parameter of the row: one of its own, or that of all rows."""
    if values_ptr is not None:
        value = tl.load(values_ptr + row)
    return value


# ---- questions ----


@triton.constexpr_function
def part_of_tile(tile):
    """What a program takes of a tile at a time where each value is held several times over: 4 values a thread."""
    return max(tile // 4, 512)


@triton.jit
def largest_of(READ: tl.constexpr, row, vocab, TILE: tl.constexpr):
    """The bits of the largest value."""
    largest = tl.zeros([TILE], tl.int32)
    start = 0
    while start < vocab:
        largest = tl.maximum(largest, bits_of(READ(row, start + tl.arange(0, TILE), vocab)))
        start += TILE
    return tl.max(largest, axis=0)


@triton.jit
def open_row(pointer, vocab, TILE: tl.constexpr):
    """(unit, the bits of the largest value in it) of the probabilities at a pointer."""
    largest = largest_of(as_given, (pointer, 1.0), vocab, TILE)
    unit = unit_of(largest)
    return unit, bits_of(largest.to(tl.float32, bitcast=True) * unit)


@triton.jit
def total_of(READ: tl.constexpr, row, vocab, TILE: tl.constexpr):
    """The sum of all masses."""
    masses = tl.zeros([TILE], tl.int64)
    start = 0
    while start < vocab:
        masses += mass_of(READ(row, start + tl.arange(0, TILE), vocab))
        start += TILE
    return tl.sum(masses, axis=0)


@triton.jit
def sums_from(READ: tl.constexpr, row, vocab, pivots, COUNTS: tl.constexpr, TILE: tl.constexpr):
    """How many values, or what mass, are at least each of the pivots ``[PIVOTS, 1]``, which are above 0."""
    PART: tl.constexpr = part_of_tile(TILE)
    sums = tl.zeros([PIVOTS, PART], tl.int32 if COUNTS else tl.int64)
    start = 0
    while start < vocab:
        for part in tl.static_range(TILE // PART):
            y = READ(row, start + part * PART + tl.arange(0, PART)[None, :], vocab)
            if COUNTS:
                sums += (bits_of(y) >= pivots).to(tl.int32)
            else:
                sums += tl.where(bits_of(y) >= pivots, mass_of(y), 0)
        start += TILE
    return tl.sum(sums, axis=1, keep_dims=True).to(tl.int64)


@triton.jit
def threshold_of(READ: tl.constexpr, row, vocab, largest, aim, COUNTS: tl.constexpr, TILE: tl.constexpr):
    """The bits of a threshold that keeps what the largest value t does such that all from t on reach the aim, or 0.

    They reach it from ``low`` on (or that is 0), and do not from ``high`` on. Each pass leaves a fifth of what is
    between them, until nothing between them can be left out: what is there is one value, or all of it is needed.
    ``largest``: of the row, by its bits. ``aim``: a count or a mass from 1 on; OUT_OF_REACH is no limit.
    """
    low = 0
    high = tl.where(aim == OUT_OF_REACH, 1, largest + 1)
    spare = OUT_OF_REACH  # what the sum from low on has over the aim
    lightest = tl.full([], 0, tl.int64)  # what a value from low on adds to it at least
    while (high - low > 1) & (spare >= lightest):
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = low + step * (1 + tl.arange(0, PIVOTS)[:, None])
        over = sums_from(READ, row, vocab, pivots, COUNTS, TILE) - aim
        low = tl.maximum(low, tl.max(tl.where(over >= 0, pivots, 0)))
        high = tl.minimum(high, tl.min(tl.where(over >= 0, high, pivots)))
        spare = tl.minimum(spare, tl.min(tl.where(over >= 0, over, OUT_OF_REACH)))
        lightest = tl.full([], 1, tl.int64) if COUNTS else mass_of(low.to(tl.float32, bitcast=True))
    return low


@triton.jit
def count_aim(top_k, vocab):
    """The aim of top-k."""
    k = top_k.to(tl.int64)
    return tl.where((k > 0) & (k < vocab), k, OUT_OF_REACH)
