"""Records of a benchmark as tables and as a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.targets import judge

Record = Mapping[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def print_report(records: Sequence[Record], console: Console) -> None:
    """A table for each operation and world size, then the targets."""
    timed = [r for r in records if "us" in r]
    for world_size, op in _unique((r["world_size"], r["op"]) for r in timed):
        console.print(_title(world_size, op, timed[0]))
        console.print(_times([r for r in timed if (r["world_size"], r["op"]) == (world_size, op)]))
    verdicts = judge(records)
    if verdicts:
        table = Table("targets", "target", "measured", "")
        for v in verdicts:
            table.add_row(v.what, v.target, v.measured, "[green]met[/]" if v.is_met else "[red]not met[/]")
        console.print(table)


def _title(world_size: int, op: str, record: Record) -> str:
    rows = f"H {record['hidden']}, {record['dtype']}"
    return f"\n[bold]{op}[/], {world_size} ranks, {rows}: µs a call, slowest rank's median (its ratio to {OURS})"


def _times(records: Sequence[Record]) -> Table:
    table = Table()
    table.add_column("tokens")
    tokens = _unique(r["tokens"] for r in records)
    for count in tokens:
        table.add_column(str(count), justify="right")
    times = {(r["peer"], r["tokens"]): r["us"] for r in records}
    for peer in _unique(r["peer"] for r in records):
        cells = []
        for count in tokens:
            own, ours = times.get((peer, count)), times.get((OURS, count))
            ratio = f" ({own / ours:.2f})" if own and ours and peer != OURS else ""
            cells.append(f"{own:,.0f}{ratio}" if own else "")
        table.add_row(_escape(peer), *cells, style="bold" if peer == OURS else None)
    return table


def save_plot(records: Sequence[Record], path: Path) -> None:
    """Time a call over tokens, a panel for each operation and world size; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in records if "us" in r]
    sizes, ops = _unique(r["world_size"] for r in timed), _unique(r["op"] for r in timed)
    if not timed:
        return
    figure, axes = pyplot.subplots(
        len(sizes), len(ops), figsize=(6.5 * len(ops), 4.8 * len(sizes)), squeeze=False, sharey="row"
    )
    colors = {peer: f"C{i}" for i, peer in enumerate(_unique(r["peer"] for r in timed))}
    for axis, (world_size, op) in zip(axes.flat, itertools.product(sizes, ops), strict=True):
        own = [r for r in timed if (r["world_size"], r["op"]) == (world_size, op)]
        for peer in _unique(r["peer"] for r in own):
            points = sorted((r["tokens"], r["us"]) for r in own if r["peer"] == peer)
            is_ours = peer.startswith(OURS)
            axis.plot(
                *zip(*points, strict=True),
                label=peer,
                color=colors[peer],
                marker="o",
                linewidth=2.5 if peer == OURS else 1.2,
                linestyle="-" if peer == OURS or not is_ours else ":",
            )
        axis.set(title=f"{op}, {world_size} ranks", xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(sorted({r["tokens"] for r in own}), labels=sorted({str(r["tokens"]) for r in own}, key=int))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    first = timed[0]
    for axis in axes[:, 0]:
        axis.set_ylabel("µs a call, slowest rank's median")
    machine = first["machine"]
    figure.suptitle(
        f"H {first['hidden']}, {first['dtype']}; {machine['cpu']}, {machine['cores']} cores; {first['date'][:10]}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
