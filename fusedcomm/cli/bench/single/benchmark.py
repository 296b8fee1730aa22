"""What a benchmark of ops on one device is made of."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fusedcomm.cli.bench.single.bars import Bar
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Workload


@dataclass(frozen=True)
class Benchmark:
    """Ops with their sizes and peers, and what their figures are held against."""

    name: str
    """Of the command, and in the records."""
    module: str
    """``python -m`` runs its worker."""
    makers: Mapping[str, Callable[[Spec], list[Workload]]]
    """The sizes of each op, in the order in which the ops are measured."""
    bars: Sequence[Bar]
    flashinfer_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What FlashInfer compiles for an op."""
    budget_s: float = Spec.budget_s
    measures_cpu: bool = False
    """On a CPU it measures; without that, tiny sizes show there that it runs."""
    has_products: bool = False
    """Its ops multiply matrices, so the machine's rate of that is measured too."""

    def check(self, spec: Spec) -> None:
        """ValueError for what cannot be measured."""
        spec.check()
        for pattern in spec.cases:
            if not any(fnmatch.fnmatchcase(op, pattern.partition("/")[0]) for op in self.makers):
                raise ValueError(f"--cases: expected patterns of {', '.join(self.makers)}, got {pattern}")
        for op in self.families(spec):
            self.makers[op](spec)

    def families(self, spec: Spec) -> list[str]:
        """The ops that ``spec`` asks for and that are not over."""
        heads = [pattern.partition("/")[0] for pattern in spec.cases]
        wanted = [op for op in self.makers if any(fnmatch.fnmatchcase(op, head) for head in heads)]
        return [op for op in wanted if op not in spec.over]

    def workloads(self, spec: Spec, op: str) -> list[Workload]:
        """The sizes of an op that ``spec`` asks for."""
        return [workload for workload in self.makers[op](spec) if spec.wants(op, workload.label)]
