"""The benchmarks of ops on one device, by name."""

from __future__ import annotations

from fusedcomm.cli.bench.attention.catalogue import ATTENTION
from fusedcomm.cli.bench.sampling.catalogue import SAMPLING

BENCHMARKS = {benchmark.name: benchmark for benchmark in (ATTENTION, SAMPLING)}
