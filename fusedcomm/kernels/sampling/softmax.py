"""Probabilities from logits in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import widen
from fusedcomm.kernels.sampling.fixed_point import divisor_of, mass_of
from fusedcomm.kernels.sampling.rows import parameter_of, source_of

LARGEST_FLOAT: tl.constexpr = tl.constexpr(float.fromhex("0x1.fffffep+127"))
LEAST: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def logits(pointer, column, vocab):
    """fp32; what is NaN counts as -inf, and +inf as the largest number."""
    x = widen(tl.load(pointer + column, mask=column < vocab, other=LEAST))
    x = tl.where(x > LEAST, x, LEAST)
    return tl.where(x < LARGEST_FLOAT, x, LARGEST_FLOAT)


@triton.jit
def weights(x, largest, temperature):
    """``exp((x - largest) / temperature)``, 0 for -inf."""
    return tl.where(x > LEAST, tl.exp(tl.div_rn(x - largest, temperature)), 0.0)


@triton.jit
def write_softmax(pointer, vocab, largest, temperature, out_ptr, TILE: tl.constexpr):
    masses = tl.zeros([TILE], tl.int64)
    start = 0
    while start < vocab:
        x = logits(pointer, start + tl.arange(0, TILE), vocab)
        masses += mass_of(weights(x, largest, temperature))
        start += TILE
    divisor = divisor_of(tl.sum(masses, axis=0))
    start = 0
    while start < vocab:
        column = start + tl.arange(0, TILE)
        w = weights(logits(pointer, column, vocab), largest, temperature)
        tl.store(out_ptr + column, tl.div_rn(w, divisor), mask=column < vocab)
        start += TILE


@triton.jit
def write_one_hot(pointer, vocab, largest, out_ptr, TILE: tl.constexpr):
    """1 for the first of the largest, unless that is -inf."""
    first = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    start = 0
    while start < vocab:
        column = start + tl.arange(0, TILE)
        is_largest = logits(pointer, column, vocab) == largest
        first = tl.minimum(first, tl.where(is_largest, column, 0x7FFFFFFF))
        start += TILE
    chosen = tl.where(largest > LEAST, tl.min(first, axis=0), -1)
    start = 0
    while start < vocab:
        column = start + tl.arange(0, TILE)
        tl.store(out_ptr + column, (column == chosen).to(tl.float32), mask=column < vocab)
        start += TILE


@triton.jit(do_not_specialize=["num_rows"])
def softmax_temperature_kernel(
    logits_ptr,  # [num_rows, vocab]
    indices_ptr,  # [programs], or None
    temperature_ptr,  # [programs], or None
    out_ptr,  # [programs, vocab]
    num_rows,
    vocab,
    row_stride,
    temperature,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = source_of(logits_ptr, indices_ptr, row, num_rows, row_stride)
    out_ptr += row * vocab
    largest = tl.full([TILE], LEAST, tl.float32)
    start = 0
    while start < vocab:
        largest = tl.maximum(largest, logits(source, start + tl.arange(0, TILE), vocab))
        start += TILE
    largest = tl.max(largest, axis=0)
    t = parameter_of(temperature_ptr, temperature, row)
    if t >= 2.0**-126:
        write_softmax(source, vocab, largest, tl.where(t < 2.0**126, t, 2.0**126), out_ptr, TILE)
    else:
        write_one_hot(source, vocab, largest, out_ptr, TILE)
