"""The demonstration from end to end."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusedcomm.cli.demo.checkpoints import cache_folder, ensure_checkpoints
from fusedcomm.cli.launch import run_on_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the tokens with fusion are those without, else 1."""
    parser = argparse.ArgumentParser(
        prog="launch/demo", description="Decodes with a small model on several ranks, with fusion and without."
    )
    parser.add_argument("--tp", type=int, default=8, metavar="N", help="ranks (default 8)")
    parser.add_argument("--prompt", default="All ranks together: ", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to decode (default 32)")
    parser.add_argument("--png", type=Path, help="where the picture goes (default: into the cache folder)")
    arguments = parser.parse_args(argv)
    if arguments.tp < 1 or arguments.tokens < 2:
        parser.error("expected --tp of at least 1 and --tokens of at least 2")

    from rich.console import Console

    from fusedcomm.cli.bench.machine import cpu_model, describe_date
    from fusedcomm.cli.demo.report import print_results, read_results, same_tokens, save_picture

    console = Console(width=None if sys.stdout.isatty() else 120)
    checkpoints = ensure_checkpoints(cache_folder())
    console.print(f"checkpoints: {', '.join(map(str, checkpoints.values()))}", highlight=False, soft_wrap=True)
    console.print(f"decoding {arguments.tokens} tokens of {arguments.prompt!r} on {arguments.tp} ranks ...")
    with tempfile.TemporaryDirectory(prefix="fusedcomm-demo-") as folder:
        report = Path(folder) / "results.json"
        outcome = run_on_ranks(
            arguments.tp,
            "fusedcomm.cli.demo.decode:decode_on_rank",
            {
                "checkpoints": {kind: str(path) for kind, path in checkpoints.items()},
                "prompt": arguments.prompt,
                "num_tokens": arguments.tokens,
                "report": str(report),
            },
        )
        if outcome.code:
            for line in outcome.errors:
                print(f"demo: {line}", file=sys.stderr)
            return outcome.code
        results = read_results(report)
    print_results(results, console)
    png = arguments.png or cache_folder() / "demo.png"
    cores = len(os.sched_getaffinity(0))
    save_picture(results, png, f"{arguments.tp} ranks on {cores} cores, {cpu_model()}, {describe_date()[:10]}")
    console.print(f"picture: {png}", highlight=False, soft_wrap=True)
    if not same_tokens(results):
        console.print("[red]the tokens with fusion differ from those without[/]")
        return 1
    console.print("[green]the same tokens with fusion and without[/]")
    return 0
