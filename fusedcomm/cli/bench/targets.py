"""What the collectives are meant to reach on a CPU machine with two cores (bf16, hidden size 4096)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedcomm.cli.bench.collectives import ALL_REDUCE, FUSED, OURS

FEW = (1, 4, 16)
MANY = (64, 256)


@dataclass(frozen=True)
class Target:
    """``peer``'s time over ours, for one operation, is to be at least ``ratio``."""

    world_size: int
    op: str
    peer: str
    tokens: tuple[int, ...]
    ratio: float


TARGETS = (
    Target(8, FUSED, "gloo", FEW, 40),
    Target(8, FUSED, "mpi", FEW, 6),
    Target(8, FUSED, "gloo", MANY, 8),
    Target(8, FUSED, "mpi", MANY, 6),
    Target(8, ALL_REDUCE, "mpi", FEW + MANY, 2),
    Target(2, FUSED, "mpi", (1,), 3),
    Target(2, ALL_REDUCE, "mpi", (1,), 3),
    Target(2, ALL_REDUCE, "memcpy", (4096,), 0.6),
)
SET_UP_S = 1.0
SLAB_BYTES = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured."""

    what: str
    target: str
    measured: str
    is_met: bool


def judge(records: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """The targets that the records say something about."""
    records = list(records)
    times = {(r["world_size"], r["op"], r["peer"], r["tokens"]): r["us"] for r in records if "us" in r}
    verdicts = []
    for target in TARGETS:
        for tokens in target.tokens:
            ours = times.get((target.world_size, target.op, OURS, tokens))
            peer = times.get((target.world_size, target.op, target.peer, tokens))
            if ours and peer:
                what = f"{target.world_size} ranks, {tokens} tokens: {target.op} against {target.peer}"
                ratio = peer / ours
                verdicts.append(Verdict(what, f">= {target.ratio:g}x", f"{ratio:.3g}x", ratio >= target.ratio))
    for record in records:
        if record["op"] == "set_up":
            seconds, slab = record["seconds"], record["slab_bytes"]
            ranks = f"{record['world_size']} ranks"
            verdicts.append(
                Verdict(f"{ranks}: set-up of a group", f"< {SET_UP_S:g} s", f"{seconds:.3f} s", seconds < SET_UP_S)
            )
            verdicts.append(
                Verdict(
                    f"{ranks}: slab of a rank",
                    f"<= {SLAB_BYTES >> 20} MiB",
                    f"{slab / 2**20:.1f} MiB",
                    slab <= SLAB_BYTES,
                )
            )
    return verdicts
