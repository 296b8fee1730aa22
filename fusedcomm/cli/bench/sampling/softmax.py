"""softmax_temperature of fp32 logits, temperature 0.7 for all rows.

    torch       torch.softmax of the logits over the temperature: two kernels
    flashinfer  its softmax

A call has to read and to write every row once.
"""

from __future__ import annotations

import torch

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.sampling.checks import EXACT, Precision
from fusedcomm.cli.bench.sampling.rows import TORCH, RowsOp, Size, logits
from fusedcomm.cli.bench.single.workload import Place, Results
from fusedcomm.ops.sampling import softmax_temperature

OP = "softmax_temperature"
TEMPERATURE = 0.7


class LogitsSet:
    """Logits ``[B, V]``, and a place for their softmax."""

    def __init__(self, size: Size, place: Place, seed: int) -> None:
        self.logits = logits((size.batch, size.vocab), place, seed)
        self.out = torch.empty_like(self.logits)


def check(own: LogitsSet, results: Results, precision: Precision, peer: str) -> None:
    """Holds the probabilities against fp64, value by value."""
    [got] = results
    z = own.logits.double() / TEMPERATURE
    z -= z.amax(-1, keepdim=True)
    expected = z.softmax(-1)
    # ours: docs/sampling.md; others may take a faster exp and sums of fp32, each of which loses some bits more
    unit = 2**-22 if precision is EXACT else 2**-18
    error = (got.double() - expected).abs()
    if got.shape != expected.shape or not bool((error <= unit * (8 - z) * expected + 2**-126).all()):
        raise WrongResultError(f"probs: off by up to {(error / expected).max().item():.3g} of a value")


SOFTMAX = RowsOp(
    OP,
    2,
    LogitsSet,
    check,
    {
        TORCH: lambda own: (torch.softmax(own.logits / TEMPERATURE, dim=-1),),
        OURS: lambda own: (softmax_temperature(own.logits, TEMPERATURE, out=own.out),),
    },
    lambda library: lambda own: (library.softmax(own.logits, TEMPERATURE),),
)
