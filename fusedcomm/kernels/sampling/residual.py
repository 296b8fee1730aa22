"""The token after the last draft that was accepted in Triton: fusedcomm.ops.speculative.residual has the definition."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.sampling.draw import draw
from fusedcomm.kernels.sampling.fixed_point import probability, unit_of
from fusedcomm.kernels.sampling.rows import largest_of


@triton.jit
def is_inside(index, size):
    return (index >= 0) & (index < size)


@triton.jit
def probability_at(pointer, index, vocab, mask):
    """What rows ``[vocab]`` at pointers give ids; 0 where it is NaN, negative, masked out, or the id is none."""
    p = tl.load(pointer + index, mask=mask & is_inside(index, vocab), other=0.0)
    return tl.where(p > 0.0, p, 0.0)


@triton.jit
def difference(row, column, vocab):
    """``row = (target, draft, subtracted, unit)``: the target less the draft in that many columns, all or none."""
    target_ptr, draft_ptr, subtracted, unit = row
    t = tl.load(target_ptr + column, mask=column < vocab, other=0.0)
    return probability(t - tl.load(draft_ptr + column, mask=column < subtracted, other=0.0)) * unit


@triton.jit
def without(row, column, vocab):
    """``row = (target, token, subtracted, unit)``: the target without a token, if it is in that many columns."""
    target_ptr, token, subtracted, unit = row
    t = tl.load(target_ptr + column, mask=column < vocab, other=0.0)
    return probability(tl.where((column == token) & (column < subtracted), 0.0, t)) * unit


@triton.jit
def draw_residual(READ: tl.constexpr, target_ptr, other, is_refused, vocab, uniform, TILE: tl.constexpr):
    """A token of what READ leaves of the target where a draft was refused, or of all of it where that is nothing."""
    subtracted = tl.where(is_refused, vocab, 0)
    largest = largest_of(READ, (target_ptr, other, subtracted, 1.0), vocab, TILE)
    if largest == 0:
        subtracted = 0
        largest = largest_of(READ, (target_ptr, other, subtracted, 1.0), vocab, TILE)
    return draw(READ, (target_ptr, other, subtracted, unit_of(largest)), vocab, uniform, TILE)
