"""The results of the demonstration as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusedcomm.cli.demo.decode import FUSED, UNFUSED, WAYS, Result
from fusedcomm.cli.demo.launches import DEFINITION


def read_results(path: Path) -> list[Result]:
    """What decode_on_rank wrote."""
    return [Result(**fields) for fields in json.loads(path.read_text())]


def same_tokens(results: Sequence[Result]) -> bool:
    """Whether every checkpoint gave the same tokens with fusion and without."""
    tokens = {(r.checkpoint, r.way): r.tokens for r in results}
    return all(tokens[r.checkpoint, UNFUSED] == tokens[r.checkpoint, FUSED] for r in results)


def print_results(results: Sequence[Result], console: Console) -> None:
    """One table for all checkpoints and ways."""
    tokens = {(r.checkpoint, r.way): r.tokens for r in results}
    table = Table("checkpoint", "way", "tokens")
    table.add_column("calls, by stage", no_wrap=True)
    for name in ("collectives\na layer", "launches\na layer", "ms a token"):
        table.add_column(name, justify="right")
    for index, r in enumerate(results):
        ends = index + 1 == len(results) or results[index + 1].checkpoint != r.checkpoint
        table.add_row(
            r.checkpoint,
            r.way,
            _compare(r, tokens[r.checkpoint, FUSED]),
            "\n".join(f"{n} {name}" for name, n in r.stats.items()),
            str(r.collectives_per_layer),
            str(r.launches_per_layer),
            f"{r.ms_per_token:.2f}",
            end_section=ends,
            style="bold" if r.way == FUSED else None,
        )
    for way, text in WAYS.items():
        console.print(f"[bold]{way:8}[/] {text}")
    console.print(table)
    console.print(DEFINITION)
    for r in results:
        if r.way == FUSED:
            console.print(f"{r.checkpoint}: {escape(repr(r.text))}", highlight=False)


def _compare(result: Result, fused: Sequence[int]) -> str:
    """Whether the tokens are those of the fused way."""
    if result.way == FUSED:
        return f"{len(fused)}"
    if result.tokens == fused:
        return "[green]the same[/]"
    first = next(i for i, (a, b) in enumerate(zip(result.tokens, fused, strict=True)) if a != b)
    if result.way == UNFUSED:
        return f"[red]the first {first} the same[/]"
    return f"the first {first} the same\n(sums in another order)"


def save_picture(results: Sequence[Result], path: Path, title: str) -> None:
    """Time a token and launches a layer, side by side; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    checkpoints = list(dict.fromkeys(r.checkpoint for r in results))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2))
    width = 0.8 / len(WAYS)
    for i, way in enumerate(WAYS):
        own = [r for r in results if r.way == way]
        places = [checkpoints.index(r.checkpoint) + (i - (len(WAYS) - 1) / 2) * width for r in own]
        for axis, values, form in (
            (axes[0], [r.ms_per_token for r in own], "%.1f"),
            (axes[1], [r.launches_per_layer for r in own], "%d"),
        ):
            bars = axis.bar(places, values, width, label=way)
            axis.bar_label(bars, fmt=form, fontsize="small")
    axes[0].set(ylabel="ms a token, slowest rank's median")
    axes[1].set(ylabel="launches a layer and token")
    for axis in axes:
        axis.set_xticks(range(len(checkpoints)), labels=checkpoints)
        axis.margins(y=0.12)
    axes[1].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
