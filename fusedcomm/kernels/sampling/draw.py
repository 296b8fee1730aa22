"""Tokens by inverse CDF in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.sampling.filters import by_both
from fusedcomm.kernels.sampling.fixed_point import goal, mass_of, part_of
from fusedcomm.kernels.sampling.rows import (
    as_given,
    count_aim,
    given_where_kept_twice,
    kept,
    open_row,
    parameter_of,
    part_of_tile,
    source_of,
    threshold_of,
    total_of,
)


@triton.jit
def masses_of(READ: tl.constexpr, row, start, vocab, TILE: tl.constexpr):
    return mass_of(READ(row, start + tl.arange(0, TILE), vocab))


@triton.jit
def skip_tiles(READ: tl.constexpr, row, start, before, target, vocab, TILE: tl.constexpr):
    """Where the first tile begins with which the mass is above a target, and the mass before it; else past the row."""
    mass = tl.sum(masses_of(READ, row, start, vocab, TILE), axis=0)
    while (before + mass <= target) & (start < vocab):
        before += mass
        start += TILE
        mass = tl.sum(masses_of(READ, row, start, vocab, TILE), axis=0)
    return start, before


@triton.jit
def draw(READ: tl.constexpr, row, vocab, uniform, TILE: tl.constexpr):
    """The first id whose mass, with those before it, is above the uniform's part of all; 0 without any mass."""
    PART: tl.constexpr = part_of_tile(TILE)
    total = total_of(READ, row, vocab, TILE)
    target = part_of(total, uniform)
    start, before = skip_tiles(READ, row, tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), target, vocab, TILE)
    start, before = skip_tiles(READ, row, start, before, target, vocab, PART)
    sums = before + tl.cumsum(masses_of(READ, row, start, vocab, PART), axis=0)
    token = start + tl.min(tl.where(sums > target, tl.arange(0, PART), PART), axis=0)
    return tl.where(total > 0, tl.minimum(token, vocab - 1), 0)


@triton.jit(do_not_specialize=["num_rows"])
def sampling_kernel(
    probs_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    uniforms_ptr,  # [programs]
    out_ptr,  # [programs] int32
    num_rows,
    vocab,
    row_stride,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(probs_ptr, indices_ptr, row, num_rows, row_stride)
    unit, _ = open_row(source, vocab, TILE)
    token = draw(as_given, (source, unit), vocab, tl.load(uniforms_ptr + row), TILE)
    tl.store(out_ptr + row, token)


@triton.jit(do_not_specialize=["num_rows", "top_k"])
def top_k_top_p_sampling_kernel(
    probs_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    top_k_ptr,  # [programs], or None
    top_p_ptr,  # [programs], or None
    uniforms_ptr,  # [programs]
    out_ptr,  # [programs] int32
    num_rows,
    vocab,
    row_stride,
    top_k,
    top_p,
    JOINT: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(probs_ptr, indices_ptr, row, num_rows, row_stride)
    k, p = parameter_of(top_k_ptr, top_k, row), parameter_of(top_p_ptr, top_p, row)
    uniform = tl.load(uniforms_ptr + row)
    if JOINT:
        unit, largest = open_row(source, vocab, TILE)
        given = (source, unit)
        by_k = threshold_of(as_given, given, vocab, largest, count_aim(k, vocab), True, TILE)
        by_p = threshold_of(as_given, given, vocab, largest, goal(p, unit), False, TILE)
        token = draw(kept, (source, unit, tl.maximum(by_k, by_p)), vocab, uniform, TILE)
    else:
        token = draw(given_where_kept_twice, by_both(source, k, p, vocab, TILE), vocab, uniform, TILE)
    tl.store(out_ptr + row, token)
