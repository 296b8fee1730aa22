"""What ``bench attention`` is to measure; travels to its process as JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from dataclasses import dataclass, field

from fusedcomm.cli.bench.gpu.harness import Effort

WORKER = "fusedcomm.cli.bench.attention.worker"
FAMILIES = (
    "qk_norm_rope",
    "kv_materialize",
    "indexer_write",
    "indexer_gather",
    "indexer_logits",
    "sparse_mla_decode",
    "mla_prepare",
    "dual_stream",
)
"""The ops, in the order in which they are measured."""


@dataclass(frozen=True)
class Spec:
    """The settings of ``bench attention``."""

    output: str
    command: str
    device: str = "cuda"
    cases: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns: ``op``, or ``op/label`` for one size of it."""
    tokens: list[int] = field(default_factory=list)
    """In place of the numbers of tokens of the ops that have one; empty: theirs."""
    peers: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns of names; ``op/name`` or ``name``."""
    calls: int = 0
    """In a graph; 0: as many as last about a millisecond, 5 to 64."""
    sets: int = 0
    """Of inputs that calls take turns with; 0: as many as the last cache does not hold, where 64 do."""
    budget_s: float = 0.3
    """For one size of an op."""
    min_rounds: int = Effort.min_rounds
    patience_s: float = 240.0
    tiny: bool = False
    """Sizes that a CPU does at once; they show that the benchmark runs."""
    over: list[str] = field(default_factory=list)
    """Ops that a process before this one has measured, or broke in: they are left out."""
    broken: list[str] = field(default_factory=list)
    """Those that it broke in."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def check(self) -> None:
        """ValueError for what cannot be measured."""
        if not self.budget_s > 0 or min(self.min_rounds, self.patience_s) < 1 or min(self.calls, self.sets) < 0:
            raise ValueError("--budget, --rounds, --calls, --sets, --patience: expected positive numbers")
        for pattern in self.cases:
            if not any(fnmatch.fnmatchcase(op, pattern.partition("/")[0]) for op in FAMILIES):
                raise ValueError(f"--cases: expected patterns of {', '.join(FAMILIES)}, got {pattern}")

    def families(self) -> list[str]:
        """The ops that ``cases`` asks for and that are not over."""
        heads = [pattern.partition("/")[0] for pattern in self.cases]
        wanted = [op for op in FAMILIES if any(fnmatch.fnmatchcase(op, head) for head in heads)]
        return [op for op in wanted if op not in self.over]

    def wants(self, op: str, label: str) -> bool:
        """Whether a size of an op is among those to measure."""
        return any(fnmatch.fnmatchcase(op, p) or fnmatch.fnmatchcase(f"{op}/{label}", p) for p in self.cases)

    def wants_peer(self, op: str, name: str) -> bool:
        """Whether a peer is; what the machine does is measured in any case."""
        return op not in FAMILIES or any(
            fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(f"{op}/{name}", p) for p in self.peers
        )
