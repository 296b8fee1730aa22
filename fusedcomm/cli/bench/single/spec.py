"""What a benchmark of ops is to measure; travels to its process as JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from dataclasses import dataclass, field

from fusedcomm.cli.bench.gpu.harness import Effort
from fusedcomm.cli.bench.single.machine import MACHINE


@dataclass(frozen=True)
class Spec:
    """The settings of a benchmark of ops on one device."""

    output: str
    command: str
    device: str = "cuda"
    cases: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns: ``op``, or ``op/label`` for one size of it."""
    tokens: list[int] = field(default_factory=list)
    """In place of the numbers of tokens, or rows, of the ops that have one; empty: theirs."""
    vocabs: list[int] = field(default_factory=list)
    """In place of the vocabularies of the ops that have one; empty: theirs."""
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
        """ValueError for numbers that cannot be."""
        if not self.budget_s > 0 or min(self.min_rounds, self.patience_s) < 1 or min(self.calls, self.sets) < 0:
            raise ValueError("--budget, --rounds, --calls, --sets, --patience: expected positive numbers")

    def wants(self, op: str, label: str) -> bool:
        """Whether a size of an op is among those to measure."""
        return any(fnmatch.fnmatchcase(op, p) or fnmatch.fnmatchcase(f"{op}/{label}", p) for p in self.cases)

    def wants_peer(self, op: str, name: str) -> bool:
        """Whether a peer is; what the machine does is measured in any case."""
        return op == MACHINE or any(
            fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(f"{op}/{name}", p) for p in self.peers
        )
