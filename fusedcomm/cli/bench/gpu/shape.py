"""One shape on its way through the peers: what they all read, and what a graph holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedcomm.cli.bench.cases import Case, Inputs
from fusedcomm.cli.bench.gpu.job import GpuJob


@dataclass(frozen=True)
class Limits:
    """The largest shapes of a run: what is allocated once is made for them."""

    tokens: int
    hidden: int
    elements: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Shape:
    """Rows of one shape on this rank; calls take turns with the sets of ``inputs``, which no peer writes to."""

    case: Case
    inputs: list[Inputs]
    calls: int
    """In one graph."""
    limits: Limits

    def at(self, index: int) -> Inputs:
        return self.inputs[index % len(self.inputs)]

    def outputs(self) -> list[torch.Tensor]:
        """A result for each set."""
        return [torch.empty_like(own.x) for own in self.inputs]


def make_shape(job: GpuJob, case: Case, calls: int, sets: int, limits: Limits) -> Shape:
    return Shape(case, job.inputs(case, sets), calls, limits)


def poison(*tensors: torch.Tensor) -> None:
    """All bits set: NaN in every floating-point format, FP8 among them."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(255)
