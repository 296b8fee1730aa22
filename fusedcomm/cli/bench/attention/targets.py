"""What the figures on one H200 are held against; where a bar is missed, the verdict has the floor beside the figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedcomm.cli.bench.attention import flashinfer, indexer, qk_norm_rope, sparse_mla
from fusedcomm.cli.bench.attention.indexer_cache import LAYOUTS
from fusedcomm.cli.bench.attention.machine import COPY, MACHINE, MATMUL
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.targets import NOT_MEASURED
from fusedcomm.cli.bench.targets import Verdict

Record = Mapping[str, Any]

SEPARATE = ("separate", "separate+eager", flashinfer.NAME)
"""The ways that norm and rotate in kernels of their own; a bar about them is about the fastest."""


@dataclass(frozen=True)
class PeerBar:
    """Our time over that of the fastest of some peers: at most ``ratio``."""

    op: str
    labels: tuple[str, ...]
    peers: tuple[str, ...]
    ratio: float


@dataclass(frozen=True)
class BandwidthBar:
    """The bytes that a call has to move over our time: at least ``share`` of what a copy of as many does."""

    op: str
    labels: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class ComputeBar:
    """Operations of matrix products a second."""

    op: str
    labels: tuple[str, ...]
    tflops: float


@dataclass(frozen=True)
class LatencyBar:
    """Our time."""

    op: str
    labels: tuple[str, ...]
    us: float


_16K = tuple(f"16384/{layout}" for layout in LAYOUTS)
BARS: tuple[PeerBar | BandwidthBar | ComputeBar | LatencyBar, ...] = (
    PeerBar(qk_norm_rope.OP, tuple(map(str, qk_norm_rope.TOKENS)), SEPARATE, 0.5),
    BandwidthBar(qk_norm_rope.OP, ("8192",), 0.80),
    BandwidthBar(indexer.WRITE, _16K, 0.80),
    BandwidthBar(indexer.GATHER, _16K, 0.80),
    BandwidthBar(sparse_mla.OP, tuple(size.label for size in sparse_mla.GATHERING), 0.70),
    ComputeBar(sparse_mla.OP, tuple(size.label for size in sparse_mla.COMPUTING), 350.0),
    LatencyBar(sparse_mla.OP, tuple(size.label for size in sparse_mla.SMALL), 12.0),
)


class Figures:
    """The measured records of a run by op, size and peer; a later one of the same counts."""

    def __init__(self, records: Iterable[Record]) -> None:
        timed = [r for r in records if "us" in r and r.get("device") == "cuda"]
        self._records = {(r["op"], r["label"], r["peer"]): r for r in timed}

    def us(self, op: str, label: str, peer: str = OURS) -> float | None:
        found = self._records.get((op, label, peer))
        return None if found is None else float(found["us"])

    def tflops(self, op: str, label: str, peer: str = OURS) -> float | None:
        found = self._records.get((op, label, peer))
        return None if found is None else float(found["tflops"])

    def flops(self, op: str, label: str) -> int:
        return int(self._records[op, label, OURS]["flops"])


def judge(records: Iterable[Record]) -> list[Verdict]:
    """Every bar at every size where this library was measured on a GPU; one whose peer was not is not met."""
    figures = Figures(records)
    verdicts = []
    for bar in BARS:
        for label in bar.labels:
            ours = figures.us(bar.op, label)
            if ours is not None:
                verdicts.append(_verdict(figures, bar, label, ours))
    return verdicts


def _verdict(
    figures: Figures, bar: PeerBar | BandwidthBar | ComputeBar | LatencyBar, label: str, ours: float
) -> Verdict:
    if isinstance(bar, PeerBar):
        return _judge_peers(figures, bar, label, ours)
    if isinstance(bar, BandwidthBar):
        return _judge_bandwidth(figures, bar, label, ours)
    if isinstance(bar, ComputeBar):
        return _judge_compute(figures, bar, label, ours)
    return _judge_latency(figures, bar, label, ours)


def _judge_peers(figures: Figures, bar: PeerBar, label: str, ours: float) -> Verdict:
    what = f"{bar.op}/{label}: over the fastest of {', '.join(bar.peers)}"
    target = f"<= {bar.ratio:.2f}"
    times = _measured({peer: figures.us(bar.op, label, peer) for peer in bar.peers})
    if not times:
        return Verdict(what, target, NOT_MEASURED, False)
    best = min(times, key=times.__getitem__)
    ratio = ours / times[best]
    is_met = ratio <= bar.ratio
    measured = f"{ratio:.2f} ({ours:.2f} / {times[best]:.2f} us, {best})"
    return Verdict(what, target, measured + _floor(figures, bar.op, label, is_met), is_met)


def _judge_bandwidth(figures: Figures, bar: BandwidthBar, label: str, ours: float) -> Verdict:
    what = f"{bar.op}/{label}: bandwidth, of a copy of the same bytes"
    target = f">= {bar.share:.0%}"
    copy = figures.us(bar.op, label, COPY)
    if copy is None:
        return Verdict(what, target, NOT_MEASURED, False)
    share = copy / ours
    return Verdict(what, target, f"{share:.0%} ({copy:.2f} us the copy, {ours:.2f} ours)", share >= bar.share)


def _judge_compute(figures: Figures, bar: ComputeBar, label: str, ours: float) -> Verdict:
    what = f"{bar.op}/{label}: products"
    tflops = figures.tflops(bar.op, label) or 0.0
    measured = f"{tflops:.0f} TFLOP/s ({ours:.1f} us)"
    is_met = tflops >= bar.tflops
    best = figures.tflops(MACHINE, MATMUL, MATMUL)
    if not is_met and best:
        floor = figures.flops(bar.op, label) / best / 1e6
        measured += f"; {floor:.1f} us at the {best:.0f} of a large product"
    return Verdict(what, f">= {bar.tflops:.0f} TFLOP/s", measured, is_met)


def _judge_latency(figures: Figures, bar: LatencyBar, label: str, ours: float) -> Verdict:
    is_met = ours <= bar.us
    measured = f"{ours:.2f} us{_floor(figures, bar.op, label, is_met)}"
    return Verdict(f"{bar.op}/{label}: time", f"<= {bar.us:g} us", measured, is_met)


def _floor(figures: Figures, op: str, label: str, is_met: bool) -> str:
    copy = figures.us(op, label, COPY)
    return "" if is_met or copy is None else f"; a copy of the same bytes takes {copy:.2f} us"


def _measured(times: Mapping[str, float | None]) -> dict[str, float]:
    return {name: us for name, us in times.items() if us is not None}


def shares(figures: Figures, op: str, labels: Sequence[str]) -> list[float | None]:
    """Our bandwidth at each size, as a share of the copy's; None where one was not measured."""
    found = []
    for label in labels:
        ours, copy = figures.us(op, label), figures.us(op, label, COPY)
        found.append(copy / ours if ours and copy else None)
    return found
