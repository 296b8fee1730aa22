"""Filters in Triton: what is at least a threshold, divided by its mass; 0 elsewhere."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.sampling.fixed_point import divisor_of, goal
from fusedcomm.kernels.sampling.rows import (
    as_given,
    count_aim,
    kept,
    kept_twice,
    open_row,
    parameter_of,
    renormalised,
    source_of,
    threshold_of,
    total_of,
)


@triton.jit
def write_quotients(READ: tl.constexpr, row, vocab, out_ptr, TILE: tl.constexpr):
    """The values of a row, divided by their mass."""
    divisor = divisor_of(total_of(READ, row, vocab, TILE))
    start = 0
    while start < vocab:
        column = start + tl.arange(0, TILE)
        tl.store(out_ptr + column, tl.div_rn(READ(row, column, vocab), divisor), mask=column < vocab)
        start += TILE


@triton.jit(do_not_specialize=["num_rows", "top_k"])
def top_k_renorm_kernel(
    probs_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    top_k_ptr,  # [programs], or None
    out_ptr,  # [programs, vocab]
    num_rows,
    vocab,
    row_stride,
    top_k,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(probs_ptr, indices_ptr, row, num_rows, row_stride)
    aim = count_aim(parameter_of(top_k_ptr, top_k, row), vocab)
    unit, largest = open_row(source, vocab, TILE)
    threshold = threshold_of(as_given, (source, unit), vocab, largest, aim, True, TILE)
    write_quotients(kept, (source, unit, threshold), vocab, out_ptr + row * vocab, TILE)


@triton.jit(do_not_specialize=["num_rows"])
def top_p_renorm_kernel(
    probs_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    top_p_ptr,  # [programs], or None
    out_ptr,  # [programs, vocab]
    num_rows,
    vocab,
    row_stride,
    top_p,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(probs_ptr, indices_ptr, row, num_rows, row_stride)
    unit, largest = open_row(source, vocab, TILE)
    aim = goal(parameter_of(top_p_ptr, top_p, row), unit)
    threshold = threshold_of(as_given, (source, unit), vocab, largest, aim, False, TILE)
    write_quotients(kept, (source, unit, threshold), vocab, out_ptr + row * vocab, TILE)


@triton.jit
def by_both(source, top_k, top_p, vocab, TILE: tl.constexpr):
    """The row ``(pointer, unit, threshold, divisor, second threshold)`` of top-k, then top-p of what that gives."""
    unit, largest = open_row(source, vocab, TILE)
    threshold = threshold_of(as_given, (source, unit), vocab, largest, count_aim(top_k, vocab), True, TILE)
    divisor = divisor_of(total_of(kept, (source, unit, threshold), vocab, TILE))
    largest = tl.div_rn(largest.to(tl.float32, bitcast=True), divisor).to(tl.int32, bitcast=True)
    # the largest of them is 1 / V or more, so 1 is their unit
    row = (source, unit, threshold, divisor)
    second = threshold_of(renormalised, row, vocab, largest, goal(top_p, 1.0), False, TILE)
    return source, unit, threshold, divisor, second


@triton.jit(do_not_specialize=["num_rows", "top_k"])
def top_k_top_p_renorm_kernel(
    probs_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    top_k_ptr,  # [programs], or None
    top_p_ptr,  # [programs], or None
    out_ptr,  # [programs, vocab]
    num_rows,
    vocab,
    row_stride,
    top_k,
    top_p,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(probs_ptr, indices_ptr, row, num_rows, row_stride)
    k, p = parameter_of(top_k_ptr, top_k, row), parameter_of(top_p_ptr, top_p, row)
    write_quotients(kept_twice, by_both(source, k, p, vocab, TILE), vocab, out_ptr + row * vocab, TILE)


@triton.jit(do_not_specialize=["num_rows"])
def min_p_renorm_kernel(
    probs_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    min_p_ptr,  # [programs], or None
    out_ptr,  # [programs, vocab]
    num_rows,
    vocab,
    row_stride,
    min_p,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(probs_ptr, indices_ptr, row, num_rows, row_stride)
    unit, largest = open_row(source, vocab, TILE)
    share = parameter_of(min_p_ptr, min_p, row)
    share = tl.where(share > 0.0, share, 0.0)
    share = tl.where(share < 1.0, share, 1.0)
    # the least fp32 that is not below the product, which is exact in fp64
    product = share.to(tl.float64) * largest.to(tl.float32, bitcast=True).to(tl.float64)
    nearest = product.to(tl.float32)
    is_below = nearest.to(tl.float64) < product
    threshold = nearest.to(tl.int32, bitcast=True) + is_below.to(tl.int32)
    write_quotients(kept, (source, unit, threshold), vocab, out_ptr + row * vocab, TILE)
