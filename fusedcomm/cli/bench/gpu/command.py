"""``fusedcomm bench`` on GPUs: starts the ranks under torchrun, shows and keeps what they measured."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fusedcomm.cli.bench.gpu.job import NO_MULTICAST
from fusedcomm.cli.bench.gpu.spec import DecodeSpec, Spec
from fusedcomm.cli.bench.machine import describe_command

WORKERS = {"collectives": "fusedcomm.cli.bench.gpu.collectives", "decode": "fusedcomm.cli.bench.gpu.decode"}


def run(arguments: argparse.Namespace) -> int:
    """The exit code; prints tables on stdout, progress on stderr."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError("--device: expected a GPU for cuda, got none")
    with tempfile.TemporaryDirectory(prefix="fusedcomm-bench-") as folder:
        written = Path(folder) / "records.jsonl"
        spec = make_spec(arguments, str(written))
        spec.check()
        code = 0
        for ranks in arguments.tp or [gpus]:
            command = launch_command(arguments.benchmark, ranks, spec)
            code = code or subprocess.run(command, check=False, env=launch_environ(ranks)).returncode
        text = written.read_text(encoding="utf-8") if written.exists() else ""
        keep(text, arguments)
    if code:
        print(f"fusedcomm bench: the ranks failed (exit code {code})", file=sys.stderr)
    return 1 if code else 0


def keep(text: str, arguments: argparse.Namespace) -> None:
    """Appends the records to their file, prints the report, and draws the plot."""
    json_path, _ = output_paths(arguments)
    if json_path is not None and text:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        with json_path.open("a", encoding="utf-8") as file:
            file.write(text)
    show(text, arguments)


def show(text: str, arguments: argparse.Namespace) -> None:
    """Prints the report of JSON lines, and draws the plot."""
    from rich.console import Console

    from fusedcomm.cli.bench.report import parse_records, print_report, save_plot

    records = parse_records(text)
    print_report(records, Console(width=None if sys.stdout.isatty() else 200))
    _, plot_path = output_paths(arguments)
    if plot_path is not None and save_plot(records, plot_path):
        print(f"plot: {plot_path}")


def output_paths(arguments: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Where the records and the plot go: as said one by one, else into the folder of ``--output``."""
    folder, name = arguments.output, arguments.benchmark
    inside = (None, None) if folder is None else (folder / f"{name}.jsonl", folder / f"{name}.png")
    return arguments.json or inside[0], arguments.plot or inside[1]


def make_spec(arguments: argparse.Namespace, output: str) -> Spec | DecodeSpec:
    """The spec that the command line describes; what it leaves out is the spec's default."""
    chosen: dict[str, object] = {}

    def take(name: str, value: object) -> None:
        if value is not None:
            chosen[name] = value

    take("patience_s", arguments.patience)
    take("rounds" if arguments.benchmark == "decode" else "min_rounds", arguments.rounds)
    if arguments.benchmark == "decode":
        for name in ("batches", "layers", "context", "ways"):
            take(name, getattr(arguments, name))
        return DecodeSpec(output, describe_command(), **chosen)  # type: ignore[arg-type]
    for name in ("ops", "tokens", "hidden", "dtype", "peers", "calls", "sets", "host_tokens", "load_tokens"):
        take(name, getattr(arguments, name))
    take("budget_s", arguments.budget)
    if arguments.tune:
        raise ValueError("--tune: expected a run on CPU; on GPUs use --vary one_shot_max_bytes=…")
    chosen["tunings"] = [*arguments.with_tuning, *(t for variation in arguments.vary for t in variation)]
    if arguments.tokens is not None:
        chosen["bare_tokens"] = []
    return Spec(output, describe_command(), **chosen)  # type: ignore[arg-type]


def launch_command(benchmark: str, ranks: int, spec: Spec | DecodeSpec) -> list[str]:
    """The command that runs ``ranks`` workers."""
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", WORKERS[benchmark], spec.to_json()]


def launch_environ(ranks: int) -> dict[str, str]:
    """The environment of the workers: no multicast, and no more threads than cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **NO_MULTICAST}
