"""The operations that are measured on GPUs."""

from __future__ import annotations

from fusedcomm.cli.bench.collectives import ALL_REDUCE, FUSED, OURS

NORM = "allreduce_rmsnorm"
OPS = (ALL_REDUCE, NORM, FUSED)

__all__ = ["ALL_REDUCE", "FUSED", "NORM", "OPS", "OURS"]
