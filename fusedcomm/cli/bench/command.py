"""``fusedcomm bench collectives``: starts the ranks, shows and keeps what they measured."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from fusedcomm.cli.bench.machine import describe_command
from fusedcomm.cli.bench.worker import DTYPES, Spec
from fusedcomm.cli.launch import find_mpiexec, has_mpi4py

TOKENS = {2: [1, 4, 16, 64, 256, 1024, 4096]}
DEFAULT_TOKENS = [1, 4, 16, 64, 256]
SWEEP = {
    "piece_bytes": (64 << 10, 256 << 10, 1 << 20),
    "min_chunk_bytes": (512, 1 << 10, 4 << 10, 8 << 10),
    "max_chunk_bytes": (16 << 10, 32 << 10, 64 << 10, 128 << 10),
    "spins": (0, 200, 2000),
    "yield_ns": (0, 50_000, 200_000),
}
"""What ``--tune`` tries, one field at a time; the algorithms are peers anyway."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("benchmark", choices=("collectives",), help="what to measure")
    add("--tp", type=_numbers, default=[8], metavar="N[,N…]", help="ranks; several are measured in turn (default 8)")
    add("--tokens", type=_numbers, metavar="T[,T…]", help="rows of x (default: 1 to 256; 2 ranks: to 4096)")
    add("--hidden", type=int, default=4096, metavar="H", help="row length (default 4096)")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--ops", type=_names, default=list(Spec("", "").ops), metavar="OP[,OP…]", help="default: both")
    add(
        "--peers",
        type=_names,
        default=["*"],
        metavar="P[,P…]",
        help="names or shell patterns: memcpy, gloo, mpi, ours, ours:one_shot, ours:two_shot, ours:custom, "
        "ours:process_group, …; all_reduce/ours for one operation (default: all)",
    )
    add(
        "--vary",
        action="append",
        default=[],
        type=_variation,
        metavar="FIELD=V[,V…]",
        help="also measure ours with these values of a tuning field (each by itself); repeatable",
    )
    add("--with-tuning", action="append", default=[], type=_tuning, metavar="F=V[,F=V…]", help="also ours with these")
    add("--tune", action="store_true", help="short for --vary over every tuning field")
    add("--rounds", type=int, default=Spec("", "").rounds, help="batches a peer (default %(default)s)")
    add("--batch-ms", type=float, default=Spec("", "").batch_ms, help="length of a batch (default %(default)g)")
    add("--no-set-up", action="store_true", help="skip the set-up time of a group")
    add(
        "--launcher",
        choices=("mpiexec", "torchrun"),
        help="default: mpiexec where there is one; torchrun has no MPI peers",
    )
    add("--json", type=Path, metavar="FILE", help="append the records, a JSON line each")
    add("--plot", type=Path, metavar="FILE.png", help="time over tokens (matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """The exit code; prints tables on stdout, progress on stderr."""
    from rich.console import Console

    from fusedcomm.cli.bench.report import print_report, read_records, save_plot

    launcher = arguments.launcher or ("mpiexec" if find_mpiexec() and has_mpi4py() else "torchrun")
    with tempfile.TemporaryDirectory(prefix="fusedcomm-bench-") as folder:
        output = Path(folder) / "records.jsonl"
        specs = {ranks: _spec(arguments, ranks, str(output)) for ranks in arguments.tp}
        for spec in specs.values():
            spec.check()
        if launcher == "torchrun":
            print("without mpiexec (pip install 'fusedcomm[mpi]'): no MPI among the peers", file=sys.stderr)
        code = 0
        for ranks, spec in specs.items():
            code = code or subprocess.run(_command(launcher, ranks, spec), check=False).returncode
        records = read_records(output) if output.exists() else []
        if arguments.json and records:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(output.read_text(encoding="utf-8"))
    print_report(records, Console(width=None if sys.stdout.isatty() else 160))
    if arguments.plot and records:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        save_plot(records, arguments.plot)
        print(f"plot: {arguments.plot}")
    if code:
        print(f"fusedcomm bench: the ranks failed under {launcher} (exit code {code})", file=sys.stderr)
    return 1 if code else 0


def _spec(arguments: argparse.Namespace, ranks: int, output: str) -> Spec:
    tunings = [*arguments.with_tuning, *(t for variation in arguments.vary for t in variation)]
    if arguments.tune:
        tunings += [{name: value} for name, values in SWEEP.items() for value in values]
    return Spec(
        output=output,
        command=describe_command(),
        ops=arguments.ops,
        tokens=arguments.tokens or TOKENS.get(ranks, DEFAULT_TOKENS),
        hidden=arguments.hidden,
        dtype=arguments.dtype,
        peers=arguments.peers,
        tunings=tunings,
        rounds=arguments.rounds,
        batch_ms=arguments.batch_ms,
        set_up=not arguments.no_set_up,
    )


def _command(launcher: str, ranks: int, spec: Spec) -> list[str]:
    worker = ["-m", "fusedcomm.cli.bench.worker", spec.to_json()]
    if launcher == "mpiexec":
        return [find_mpiexec() or "mpiexec", "-n", str(ranks), sys.executable, *worker]
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *worker]


def _numbers(text: str) -> list[int]:
    numbers = _numbers_from_0(text)
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text!r}")
    return numbers


def _numbers_from_0(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,16, got {text!r}")
    return [int(part) for part in parts]


def _names(text: str) -> list[str]:
    return text.split(",")


def _tuning(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    return {name: _numbers_from_0(value)[0] for name, _, value in pairs}


def _variation(text: str) -> list[dict[str, int]]:
    name, _, values = text.partition("=")
    return [{name: value} for value in _numbers_from_0(values)]
