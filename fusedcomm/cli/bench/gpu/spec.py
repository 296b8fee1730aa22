"""What to measure on GPUs; travels to the ranks as JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedcomm.cli.bench.cases import GROUP_SIZE
from fusedcomm.cli.bench.gpu.harness import Effort
from fusedcomm.cli.bench.gpu.ops import OPS
from fusedcomm.comm.tuning import GpuTuning

WAYS: dict[str, dict[str, Any]] = {
    "process_group": {"disable": True},
    "custom": {"disable_fused_ar_norm": True, "disable_fused_ar_quant": True},
    "fused_norm": {"disable_fused_ar_quant": True},
    "fused": {},
}
"""Settings under which a decode step's collectives go each way; the first is the process group and torch's own
operations."""

FEW_TOKENS = 64
"""Up to here a graph holds MANY_CALLS calls: they are short, and the start of a graph should not show."""
MANY_CALLS = 50


@dataclass(frozen=True)
class Spec:
    """The settings of ``bench collectives`` on GPUs."""

    output: str
    command: str
    ops: list[str] = field(default_factory=lambda: list(OPS))
    tokens: list[int] = field(default_factory=lambda: [1, 4, 16, 32, 64, 128, 512, 2048])
    bare_tokens: list[int] = field(default_factory=lambda: [4096])
    """More sizes, for the bare all-reduce alone."""
    hidden: list[int] = field(default_factory=lambda: [4096, 7168])
    dtype: str = "bf16"
    peers: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns of names; ``op/name`` or ``name``."""
    tunings: list[dict[str, int]] = field(default_factory=list)
    """Ours is also measured with each of these in place of its own."""
    calls: int = 0
    """In a graph; 0: 50 for few tokens, else 20."""
    sets: int = 4
    """Of inputs that calls take turns with."""
    budget_s: float = Effort.budget_s
    """For one shape."""
    min_rounds: int = Effort.min_rounds
    host_tokens: list[int] = field(default_factory=lambda: [1])
    load_tokens: list[int] = field(default_factory=lambda: [1, 16, 128])
    load_rounds: int = 15
    patience_s: float = 120.0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def check(self) -> None:
        """Refuses what the ranks could not measure, before any is started.

        Raises:
            ValueError: an operation or size that is not there.
        """
        if unknown := [op for op in self.ops if op not in OPS]:
            raise ValueError(f"--ops: expected {' or '.join(OPS)}, got {unknown[0]}")
        if odd := [hidden for hidden in self.hidden if hidden % GROUP_SIZE]:
            raise ValueError(f"--hidden: expected a multiple of {GROUP_SIZE}, got {odd[0]}")
        for tuning in self.tunings:
            check_gpu_tuning(tuning)
        if not self.budget_s > 0 or self.min_rounds < 1 or self.sets < 1 or self.calls < 0:
            raise ValueError("--budget, --rounds, --sets, --calls: expected positive numbers")

    def calls_for(self, tokens: int) -> int:
        """How many calls a graph of this size holds."""
        return self.calls or (MANY_CALLS if tokens <= FEW_TOKENS else Effort.calls)

    def effort(self, tokens: int) -> Effort:
        return Effort(calls=self.calls_for(tokens), budget_s=self.budget_s, min_rounds=self.min_rounds)

    def shapes(self) -> list[tuple[int, int, list[str]]]:
        """Hidden size, tokens, and the operations to measure there; a hidden size's shapes follow each other."""
        bare = [op for op in self.ops if op == OPS[0]]
        found = []
        for hidden in self.hidden:
            found += [(hidden, tokens, self.ops) for tokens in self.tokens]
            found += [(hidden, tokens, bare) for tokens in self.bare_tokens if bare and tokens not in self.tokens]
        return found

    def wants(self, op: str, name: str) -> bool:
        """Whether a peer is among those to measure."""
        patterns = [pattern.replace("[", "[[]") for pattern in self.peers]  # "[...]" in a name stands for itself
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(f"{op}/{name}", p) for p in patterns)


def check_gpu_tuning(overrides: Mapping[str, int]) -> None:
    """ValueError unless all are fields of GpuTuning."""
    known = {f.name for f in dataclasses.fields(GpuTuning)}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"tuning: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}")


@dataclass(frozen=True)
class DecodeSpec:
    """The settings of ``bench decode``."""

    output: str
    command: str
    batches: list[int] = field(default_factory=lambda: [1, 16])
    layers: int = 36
    context: int = 1024
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    rounds: int = 50
    patience_s: float = 180.0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def check(self) -> None:
        """ValueError for what the ranks could not measure."""
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise ValueError(f"--ways: expected {', '.join(WAYS)}, got {unknown[0]}")
        if min(self.layers, self.context, self.rounds) < 1:
            raise ValueError("--layers, --context, --rounds: expected numbers of at least 1")
