"""What figures are held against; where a bar is missed, the verdict has the floor beside the figure."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.targets import NOT_MEASURED
from fusedcomm.cli.bench.single.machine import COPY, MACHINE, MATMUL
from fusedcomm.cli.bench.targets import Verdict

Record = Mapping[str, Any]


class Figures:
    """The measured records of a run on one type of device, by op, size and peer; a later one of the same counts.

    Tiny sizes are no measurement, and left out.
    """

    def __init__(self, records: Iterable[Record], device: str = "cuda") -> None:
        timed = [r for r in records if "us" in r and r.get("device") == device and not r.get("tiny")]
        self._records = {(r["op"], r["label"], r["peer"]): r for r in timed}

    def us(self, op: str, label: str, peer: str = OURS) -> float | None:
        found = self._records.get((op, label, peer))
        return None if found is None else float(found["us"])

    def best(self, op: str, label: str, peers: Iterable[str]) -> tuple[str, float] | None:
        """The fastest of the peers that were measured, and its time."""
        times = {peer: us for peer in peers if (us := self.us(op, label, peer)) is not None}
        return min(times.items(), key=lambda item: item[1]) if times else None

    def tflops(self, op: str, label: str, peer: str = OURS) -> float | None:
        found = self._records.get((op, label, peer))
        return None if found is None else float(found["tflops"])

    def flops(self, op: str, label: str) -> int:
        return int(self._records[op, label, OURS]["flops"])

    def floor(self, op: str, label: str) -> str:
        """What a copy takes, as the end of a sentence; empty where it was not measured."""
        copy = self.us(op, label, COPY)
        return "" if copy is None else f"; a copy of the same bytes takes {copy:.2f} us"


@dataclass(frozen=True)
class Bar(ABC):
    """Something about an op at some sizes, where this library was measured on a type of device."""

    op: str
    labels: tuple[str, ...]

    @property
    def device(self) -> str:
        return "cuda"

    @abstractmethod
    def verdicts(self, figures: Figures) -> list[Verdict]:
        """On what was measured of it."""


class _SizeBar(Bar):
    """A bar for each size by itself."""

    def verdicts(self, figures: Figures) -> list[Verdict]:
        """One for each size."""
        times = {label: figures.us(self.op, label) for label in self.labels}
        return [self.verdict(figures, label, us) for label, us in times.items() if us is not None]

    @abstractmethod
    def verdict(self, figures: Figures, label: str, ours: float) -> Verdict:
        """On one of them."""


@dataclass(frozen=True)
class PeerBar(_SizeBar):
    """Our time over that of the fastest of some peers: at most ``ratio``."""

    peers: tuple[str, ...]
    ratio: float

    def verdict(self, figures: Figures, label: str, ours: float) -> Verdict:
        what = f"{self.op}/{label}: over the fastest of {', '.join(self.peers)}"
        target = f"<= {self.ratio:.2f}"
        best = figures.best(self.op, label, self.peers)
        if best is None:
            return Verdict(what, target, NOT_MEASURED, False)
        peer, us = best
        is_met = ours / us <= self.ratio
        measured = f"{ours / us:.2f} ({ours:.2f} / {us:.2f} us, {peer})"
        return Verdict(what, target, measured + ("" if is_met else figures.floor(self.op, label)), is_met)


@dataclass(frozen=True)
class BandwidthBar(_SizeBar):
    """The bytes that a call has to move over our time: at least ``share`` of what a copy of as many does."""

    share: float

    def verdict(self, figures: Figures, label: str, ours: float) -> Verdict:
        what = f"{self.op}/{label}: bandwidth, of a copy of the same bytes"
        target = f">= {self.share:.0%}"
        copy = figures.us(self.op, label, COPY)
        if copy is None:
            return Verdict(what, target, NOT_MEASURED, False)
        share = copy / ours
        return Verdict(what, target, f"{share:.0%} ({copy:.2f} us the copy, {ours:.2f} ours)", share >= self.share)


@dataclass(frozen=True)
class ComputeBar(_SizeBar):
    """Operations of matrix products a second."""

    tflops: float

    def verdict(self, figures: Figures, label: str, ours: float) -> Verdict:
        what = f"{self.op}/{label}: products"
        tflops = figures.tflops(self.op, label) or 0.0
        measured = f"{tflops:.0f} TFLOP/s ({ours:.1f} us)"
        is_met = tflops >= self.tflops
        best = figures.tflops(MACHINE, MATMUL, MATMUL)
        if not is_met and best:
            floor = figures.flops(self.op, label) / best / 1e6
            measured += f"; {floor:.1f} us at the {best:.0f} of a large product"
        return Verdict(what, f">= {self.tflops:.0f} TFLOP/s", measured, is_met)


@dataclass(frozen=True)
class LatencyBar(_SizeBar):
    """Our time."""

    us: float

    def verdict(self, figures: Figures, label: str, ours: float) -> Verdict:
        is_met = ours <= self.us
        measured = f"{ours:.2f} us{'' if is_met else figures.floor(self.op, label)}"
        return Verdict(f"{self.op}/{label}: time", f"<= {self.us:g} us", measured, is_met)


@dataclass(frozen=True)
class _RatiosBar(Bar):
    """Our times over those of the fastest of some peers, all sizes together."""

    peers: tuple[str, ...]
    ratio: float
    on: str = "cuda"
    """The type of device."""

    @property
    def device(self) -> str:
        return self.on

    def verdicts(self, figures: Figures) -> list[Verdict]:
        """One, where any of the sizes was measured; a size of which no peer was is left out, and counted."""
        ours = {label: us for label in self.labels if (us := figures.us(self.op, label)) is not None}
        if not ours:
            return []
        bests = {label: figures.best(self.op, label, self.peers) for label in ours}
        ratios = {label: ours[label] / best[1] for label, best in bests.items() if best is not None}
        name, of_ratios = self._summary()
        what = f"{self.op} on {self.device}: {name} ratio to the fastest of {', '.join(self.peers)}"
        target = f"<= {self.ratio:.3g}"
        if not ratios:
            return [Verdict(what, target, NOT_MEASURED, False)]
        ratio = of_ratios(ratios.values())
        worst = max(ratios, key=ratios.__getitem__)
        met = sum(r <= self.ratio for r in ratios.values())
        peer, us = bests[worst] or ("", 0.0)
        measured = (
            f"{ratio:.3g}; at most that bar at {met} of {len(ratios)} sizes; "
            f"worst {worst}: {ours[worst]:.2f} / {us:.2f} us, {peer}"
        )
        if missing := len(ours) - len(ratios):
            measured += f"; {missing} sizes without a peer"
        return [Verdict(what, target, measured, ratio <= self.ratio)]

    @abstractmethod
    def _summary(self) -> tuple[str, Callable[[Iterable[float]], float]]:
        """What is held against the bar."""


@dataclass(frozen=True)
class WorstBar(_RatiosBar):
    """The largest of these ratios: at most ``ratio``."""

    def _summary(self) -> tuple[str, Callable[[Iterable[float]], float]]:
        return "worst", max


@dataclass(frozen=True)
class MedianBar(_RatiosBar):
    """Their median: at most ``ratio``."""

    def _summary(self) -> tuple[str, Callable[[Iterable[float]], float]]:
        return "median", statistics.median


def judge(bars: Sequence[Bar], records: Iterable[Record]) -> list[Verdict]:
    """Every bar where this library was measured on its type of device; one whose peer was not is not met."""
    records = list(records)
    figures = {device: Figures(records, device) for device in {bar.device for bar in bars}}
    return [verdict for bar in bars for verdict in bar.verdicts(figures[bar.device])]


def shares(figures: Figures, op: str, labels: Sequence[str]) -> list[float | None]:
    """Our bandwidth at each size, as a share of the copy's; None where one was not measured."""
    found = []
    for label in labels:
        ours, copy = figures.us(op, label), figures.us(op, label, COPY)
        found.append(copy / ours if ours and copy else None)
    return found
