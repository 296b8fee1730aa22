"""The figures of a benchmark of ops for a terminal, for a README, and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.single.bars import Figures, shares
from fusedcomm.cli.bench.single.machine import COPY, MACHINE, MATMUL

Record = Mapping[str, Any]


def records_of(benchmark: str, records: Iterable[Record]) -> list[Record]:
    """The records of a benchmark by its name."""
    return [r for r in records if r.get("benchmark") == benchmark]


def print_tables(records: Sequence[Record], console: Console) -> None:
    """For each type of device what it does, a table for each op, kernels, and what is absent."""
    for device in _unique(r["device"] for r in records):
        _print_device([r for r in records if r["device"] == device], console)


def _print_device(records: Sequence[Record], console: Console) -> None:
    if any(r.get("tiny") for r in records):
        console.print("[bold]tiny sizes, timed by the wall clock: that the benchmark runs, and no measurement")
    for line in _machine_lines(records):
        console.print(line, highlight=False)
    for op in _ops(records):
        own = [r for r in records if r["op"] == op and "us" in r]
        columns, rows = _cells(own, lambda us, ratio: f"{us:,.2f}" + (f" ({ratio:.2f})" if ratio else ""))
        table = Table("size", *map(escape, columns))
        for cells in rows:
            table.add_row(*cells)
        console.print(f"\n[bold]{op}[/], {_device(records)}: µs a call, median (its ratio to {OURS})")
        console.print(table)
    _print_kernels(records, console)
    _print_absent(records, console)


def markdown_tables(records: Iterable[Record]) -> str:
    """The README's tables, one for each op and type of device; tiny sizes are no measurement, and left out."""
    records = [r for r in records if not r.get("tiny")]
    devices = _unique(r["device"] for r in records)
    return "\n\n".join(filter(None, (_markdown([r for r in records if r["device"] == d]) for d in devices)))


def _markdown(own: Sequence[Record]) -> str:
    tables = _machine_lines(own)
    for op in _ops(own):
        columns, rows = _cells([r for r in own if r["op"] == op and "us" in r], lambda us, ratio: _short(us))
        counted = {(r["label"], r["peer"]): r["kernels"] for r in own if r["op"] == op and "kernels" in r}
        lines = [_line([op, *(f"**{c}**" if c == OURS else c for c in columns)]), "|---" * (len(columns) + 1) + "|"]
        lines += [_line(row) for row in rows]
        for label in _unique(label for label, _ in counted):
            kernels = [str(counted.get((label, column), "")) for column in columns]
            lines.append(_line([f"kernels, {label}", *kernels]))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def save_plot(records: Sequence[Record], path: Path) -> bool:
    """Time a call by size on the first record's type of device, a panel for each op; needs matplotlib.

    False where there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in records if "us" in r and r["op"] != MACHINE and r["device"] == records[0]["device"]]
    ops = _unique(r["op"] for r in timed)
    if not ops:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(3, len(ops))
    rows = -(-len(ops) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 5.2 * rows), squeeze=False)
    peers = _unique(r["peer"] for r in timed)
    palette = pyplot.get_cmap("tab10")
    colors = {peer: palette(i % palette.N) for i, peer in enumerate(peers)}
    for axis in axes.flat[len(ops) :]:
        axis.set_axis_off()
    for axis, op in zip(axes.flat, ops, strict=False):
        own = [r for r in timed if r["op"] == op]
        labels = _unique(r["label"] for r in own)
        places = {label: i for i, label in enumerate(labels)}
        for peer in _unique(r["peer"] for r in own):
            points = sorted({places[r["label"]]: r["us"] for r in own if r["peer"] == peer}.items())
            style = {"color": colors[peer], "marker": "o", "linewidth": 2.5 if peer == OURS else 1.2}
            axis.plot(*zip(*points, strict=True), label=peer, linestyle=":" if peer == COPY else "-", **style)
        axis.set(title=op, yscale="log", ylabel="µs a call")
        axis.set_xticks(range(len(labels)), labels=labels, rotation=45, ha="right", fontsize="small")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    first = timed[0]
    inch = 1 / figure.get_figheight()
    figure.suptitle(f"{_device(timed)}; {first['date'][:10]}", y=1 - 0.1 * inch, verticalalignment="top")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 * inch))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _cells(records: Sequence[Record], show: Callable[[float, float | None], str]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row for each size: its label, each peer's time, and what ours amounts to."""
    op = records[0]["op"]
    times = {(r["label"], r["peer"]): r["us"] for r in records}
    labels, peers = _unique(r["label"] for r in records), _unique(r["peer"] for r in records)
    ours = {r["label"]: r for r in records if r["peer"] == OURS}
    figures = Figures(records, records[0]["device"])
    copied = shares(figures, op, labels)
    has_copy, has_flops = any(copied), any(r.get("tflops") for r in ours.values())
    titles = [*peers, *(["of the copy's rate"] if has_copy else []), *(["TFLOP/s"] if has_flops else [])]
    rows = []
    for label, share in zip(labels, copied, strict=True):
        row = [label]
        for peer in peers:
            us, own = times.get((label, peer)), times.get((label, OURS))
            row.append("" if us is None else show(us, us / own if own and peer != OURS else None))
        if has_copy:
            row.append("" if share is None else f"{share:.0%}")
        if has_flops:
            row.append(f"{ours[label]['tflops']:.0f}" if label in ours else "")
        rows.append(row)
    return titles, rows


def _machine_lines(records: Sequence[Record]) -> list[str]:
    found = {r["peer"]: r for r in records if r["op"] == MACHINE and "us" in r}
    lines = []
    if COPY in found:
        size = found[COPY]["bytes"] / 2**20
        lines.append(f"A copy of {size:,.0f} MiB: {found[COPY]['gbytes_per_s']:,.0f} GB/s, read and written.")
    if MATMUL in found:
        n = found[MATMUL]["size"]
        lines.append(f"A product of {n} x {n} bf16 matrices: {found[MATMUL]['tflops']:,.0f} TFLOP/s.")
    return lines


def _print_kernels(records: Sequence[Record], console: Console) -> None:
    counted = [r for r in records if "kernels" in r]
    if not counted:
        return
    peers = _unique(r["peer"] for r in counted)
    table = Table("kernels a call", *map(escape, peers))
    found = {(r["op"], r["label"], r["peer"]): r["kernels"] for r in counted}
    for op, label in _unique((r["op"], r["label"]) for r in counted):
        table.add_row(f"{op}/{label}", *(str(found.get((op, label, peer), "")) for peer in peers))
    console.print()
    console.print(table)


def _print_absent(records: Sequence[Record], console: Console) -> None:
    absent = [r for r in records if "absent" in r]
    if absent:
        console.print("\nnot measured:")
    for op, peer, reason in _unique((r["op"], r["peer"], r["absent"]) for r in absent):
        labels = [r["label"] for r in absent if (r["op"], r["peer"], r["absent"]) == (op, peer, reason)]
        text = f"  {op}/{peer} ({', '.join(labels)}): {reason}"
        console.print(escape(text), soft_wrap=True, highlight=False)


def _device(records: Sequence[Record]) -> str:
    machine = records[0]["machine"]
    return str(machine.get("gpu", machine["cpu"]))


def _ops(records: Iterable[Record]) -> list[str]:
    return _unique(r["op"] for r in records if "us" in r and r["op"] != MACHINE)


def _short(us: float) -> str:
    return f"{us:,.1f}" if us < 1000 else f"{us:,.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
