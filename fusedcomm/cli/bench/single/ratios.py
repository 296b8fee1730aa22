"""Our times over those of each peer, a line an op: what a README has room for."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.single.bars import Figures
from fusedcomm.cli.bench.single.machine import MACHINE

Record = Mapping[str, Any]


def ratio_tables(records: Iterable[Record]) -> str:
    """In markdown, for each type of device: the median over an op's sizes, and the smallest and the largest ratio.

    Tiny sizes are no measurement, and left out.
    """
    own = [r for r in records if "us" in r and not r.get("tiny") and r["op"] != MACHINE]
    devices = list(dict.fromkeys(r["device"] for r in own))
    return "\n\n".join(_table([r for r in own if r["device"] == device], device) for device in devices)


def _table(records: Sequence[Record], device: str) -> str:
    figures = Figures(records, device)
    ops, peers = (list(dict.fromkeys(r[key] for r in records)) for key in ("op", "peer"))
    peers = [peer for peer in peers if peer != OURS]
    machine = records[0]["machine"]
    lines = [_line([f"ours / peer, {machine.get('gpu', machine['cpu'])}", *peers]), "|---" * (len(peers) + 1) + "|"]
    for op in ops:
        labels = dict.fromkeys(r["label"] for r in records if r["op"] == op)
        lines.append(_line([op, *(_cell(figures, op, labels, peer) for peer in peers)]))
    return "\n".join(lines)


def _cell(figures: Figures, op: str, labels: Iterable[str], peer: str) -> str:
    pairs = [(figures.us(op, label), figures.us(op, label, peer)) for label in labels]
    ratios = [ours / us for ours, us in pairs if ours is not None and us is not None]
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2g} ({min(ratios):.2g} to {max(ratios):.2g})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
