"""Records of a benchmark as tables and as a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusedcomm.cli.bench.benchmarks import BENCHMARKS
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu import targets as gpu_targets
from fusedcomm.cli.bench.single import bars, tables
from fusedcomm.cli.bench.targets import Verdict, judge

Record = Mapping[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines."""
    return parse_records(path.read_text(encoding="utf-8"))


def parse_records(text: str) -> list[Record]:
    """The records of JSON lines."""
    return [json.loads(line) for line in text.splitlines() if line]


def print_report(records: Sequence[Record], console: Console) -> None:
    """A table for each operation, world size and row length, what is absent, then the targets."""
    verdicts: list[Verdict] = []
    for name, benchmark in BENCHMARKS.items():
        if own := tables.records_of(name, records):
            tables.print_tables(own, console)
            verdicts += bars.judge(benchmark.bars, own)
    records = [r for r in records if r.get("benchmark") not in BENCHMARKS]
    timed = _timed(records)
    for key in _unique(_table_key(r) for r in timed):
        own = [r for r in timed if _table_key(r) == key]
        console.print(_title(own[0]))
        console.print(_times(own))
    _print_decode([r for r in records if r.get("benchmark") == "decode" and "us" in r], console)
    for figure, title in _SMALL_TABLES.items():
        _print_small([r for r in records if figure in r], figure, title, console)
    _print_absent([r for r in records if "absent" in r], console)
    verdicts += judge([r for r in records if r.get("device") != "cuda"]) + gpu_targets.judge(records)
    if verdicts:
        table = Table("targets", "target", "measured", "")
        for v in verdicts:
            table.add_row(v.what, v.target, v.measured, "[green]met[/]" if v.is_met else "[red]not met[/]")
        console.print(table)


_SMALL_TABLES = {
    "host_us": "µs that an eager call costs the host",
    "host_alloc_us": "the same where the library allocates the results",
    "loaded_us": "µs a call beside a memory-bound kernel (over alone)",
}


def _timed(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if "us" in r and "tokens" in r]


def _table_key(record: Record) -> tuple[int, str, int]:
    return record["world_size"], record["op"], record["hidden"]


def _title(record: Record) -> str:
    what = f"[bold]{record['op']}[/], {record['world_size']} ranks, H {record['hidden']}, {record['dtype']}"
    return f"\n{what}: µs a call, slowest rank's median (its ratio to {OURS})"


def _number(us: float, record: Record) -> str:
    return f"{us:.2f}" if record.get("device") == "cuda" and us < 1000 else f"{us:,.0f}"


def _print_small(records: Sequence[Record], figure: str, title: str, console: Console) -> None:
    for world_size, hidden in _unique((r["world_size"], r["hidden"]) for r in records):
        own = [r for r in records if (r["world_size"], r["hidden"]) == (world_size, hidden)]
        tokens = _unique(r["tokens"] for r in own)
        table = Table("operation", "peer")
        for count in tokens:
            table.add_column(f"{count} tokens", justify="right")
        figures = {(r["op"], r["peer"], r["tokens"]): r for r in own}
        for op, peer in _unique((r["op"], r["peer"]) for r in own):
            cells = []
            for count in tokens:
                r = figures.get((op, peer, count))
                ratio = f" ({r[figure] / r['alone_us']:.2f})" if r and "alone_us" in r else ""
                cells.append(f"{r[figure]:.2f}{ratio}" if r else "")
            table.add_row(op, _escape(peer), *cells)
        console.print(f"\n{world_size} ranks, H {hidden}: {title}")
        console.print(table)


def _print_decode(records: Sequence[Record], console: Console) -> None:
    for world_size, batch in _unique((r["world_size"], r["batch"]) for r in records):
        own = [r for r in records if (r["world_size"], r["batch"]) == (world_size, batch)]
        table = Table("way", "kernels a layer", "step, µs", "without communication", "communication", "sums as fused")
        for r in own:
            table.add_row(
                r["way"],
                f"{r['kernels_per_layer']:.1f}",
                f"{r['us']:,.1f}",
                f"{r['local_us']:,.1f}",
                f"{r['communication_share']:.1%}",
                "same bits" if r["same_bits"] else f"off by {r['difference']:.2g}",
            )
        layers, context = own[0]["layers"], own[0]["context"]
        console.print(f"\ndecode step, {world_size} ranks, batch {batch}, {layers} layers, {context} tokens of context")
        console.print(table)


def _print_absent(records: Sequence[Record], console: Console) -> None:
    if not records:
        return
    console.print("\nnot measured:")
    for op, peer, reason in _unique((r["op"], r["peer"], r["absent"]) for r in records):
        own = [r for r in records if (r["op"], r["peer"], r["absent"]) == (op, peer, reason)]
        sizes = _unique((r.get("hidden"), r.get("tokens")) for r in own)
        hidden, tokens = (_unique(size[i] for size in sizes) for i in (0, 1))
        where = f"H {_list(hidden)}, {_list(tokens)} tokens"
        console.print(f"  {_escape(f'{op}/{peer}')} ({where}): {_escape(str(reason))}", soft_wrap=True, highlight=False)


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


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
            cells.append(f"{_number(own, records[0])}{ratio}" if own else "")
        table.add_row(_escape(peer), *cells, style="bold" if peer == OURS else None)
    return table


def save_plot(records: Sequence[Record], path: Path) -> bool:
    """Time a call over tokens, a panel for each operation, world size and row length; needs matplotlib.

    Of records of a benchmark of ops on one device, a panel for each op. False where there is nothing to draw.
    """
    for name in BENCHMARKS:
        if own := tables.records_of(name, records):
            return tables.save_plot(own, path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = _timed(records)
    sizes, ops = _unique((r["world_size"], r["hidden"]) for r in timed), _unique(r["op"] for r in timed)
    if not timed:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(
        len(sizes), len(ops), figsize=(6.5 * len(ops), 4.8 * len(sizes)), squeeze=False, sharey="row"
    )
    peers = _unique(r["peer"] for r in timed)
    palette = pyplot.get_cmap("tab10" if len(peers) <= 10 else "tab20")
    colors = {peer: palette(i % palette.N) for i, peer in enumerate(peers)}
    for axis, ((world_size, hidden), op) in zip(axes.flat, itertools.product(sizes, ops), strict=True):
        own = [r for r in timed if _table_key(r) == (world_size, op, hidden)]
        if not own:
            axis.set_axis_off()
            continue
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
        axis.set(title=f"{op}, {world_size} ranks, H {hidden}", xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(sorted({r["tokens"] for r in own}), labels=sorted({str(r["tokens"]) for r in own}, key=int))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    first = timed[0]
    for axis in axes[:, 0]:
        axis.set_ylabel("µs a call, slowest rank's median")
    machine = first["machine"]
    on = f"{machine['gpus']} × {machine['gpu']}" if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(f"{first['dtype']}; {on}; {first['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
