"""The benchmark of sampling and speculative verification: which ops there are, and what they are held against."""

from __future__ import annotations

from typing import Any

from fusedcomm.cli.bench.sampling import chain, greedy, tree
from fusedcomm.cli.bench.sampling.draws import DRAWS
from fusedcomm.cli.bench.sampling.filters import FILTERS
from fusedcomm.cli.bench.sampling.rows import RowsOp
from fusedcomm.cli.bench.sampling.softmax import SOFTMAX
from fusedcomm.cli.bench.sampling.targets import BARS, IN_FLASHINFER
from fusedcomm.cli.bench.single.benchmark import Benchmark

_ROWS_OPS: tuple[RowsOp[Any], ...] = (*reversed(FILTERS), SOFTMAX, *DRAWS)

SAMPLING = Benchmark(
    name="sampling",
    module="fusedcomm.cli.bench.sampling",
    # the ops that FlashInfer does not have come first: its module is compiled meanwhile
    makers={
        greedy.OP: greedy.workloads,
        tree.OP: tree.workloads,
        **{family.op: family.workloads for family in _ROWS_OPS},
        chain.OP: chain.workloads,
    },
    bars=BARS,
    flashinfer_modules=dict.fromkeys(IN_FLASHINFER, ("sampling",)),
    budget_s=0.12,
    measures_cpu=True,
)
