"""``fusedcomm bench``: its arguments; on CPU it starts the ranks, shows and keeps what they measured.

On GPUs gpu.command does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fusedcomm.cli.bench.benchmarks import BENCHMARKS
from fusedcomm.cli.bench.collectives import OPS
from fusedcomm.cli.bench.gpu import command as gpu_command
from fusedcomm.cli.bench.machine import describe_command
from fusedcomm.cli.bench.single import command as single_command
from fusedcomm.cli.bench.worker import DTYPES, Spec
from fusedcomm.cli.launch import find_mpiexec, has_mpi4py

DEFAULT_TP = [8]
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
    add(
        "benchmark",
        choices=("collectives", "decode", *BENCHMARKS),
        help="what to measure; decode: a decode step, on GPUs; attention: the ops around attention, on one GPU; "
        "sampling: sampling and speculative verification, on one GPU or a CPU",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--tp", type=_numbers, metavar="N[,N…]", help="ranks; several in turn (default: 8; on GPUs their number)")
    add("--tokens", type=_numbers, metavar="T[,T…]", help="rows (default: 1 to 256; 2 ranks: to 4096; GPU: 4096)")
    add("--hidden", type=_numbers, metavar="H[,H…]", help="row length (default 4096; on GPUs also 7168)")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--ops", type=_names, metavar="OP[,OP…]", help="default: all")
    add(
        "--peers",
        type=_names,
        default=["*"],
        metavar="P[,P…]",
        help="names or shell patterns: memcpy, gloo, mpi, nccl, nccl+eager, nccl+compile, symm_mem:*, flashinfer:*, "
        "ours, ours:one_shot, ours:two_shot, ours:custom, ours:process_group, …; all_reduce/ours for one operation "
        "(default: all)",
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
    add("--rounds", type=int, help="batches a peer (default 9; on GPUs at least 7, a decode step 50)")
    add("--batch-ms", type=float, default=Spec("", "").batch_ms, help="length of a batch (default %(default)g)")
    add("--no-set-up", action="store_true", help="skip the set-up time of a group")
    add(
        "--launcher",
        choices=("mpiexec", "torchrun"),
        help="default: mpiexec where there is one; torchrun has no MPI peers",
    )
    add("--json", type=Path, metavar="FILE", help="append the records, a JSON line each")
    add("--plot", type=Path, metavar="FILE.png", help="time over tokens (matplotlib)")
    add("--output", type=Path, metavar="FOLDER", help="short for --json and --plot in a folder")
    gpu = parser.add_argument_group("on GPUs").add_argument
    gpu("--budget", type=float, metavar="SECONDS", help="replaying one shape's graphs (default 1.5)")
    gpu("--calls", type=int, metavar="N", help="calls in a graph (default: 50 for few tokens, else 20)")
    gpu("--sets", type=int, metavar="N", help="sets of inputs that calls take turns with (default 4)")
    gpu(
        "--host-tokens", type=_sizes, metavar="T[,T…]", help="where to measure eager calls' host cost (default 1; none)"
    )
    gpu("--load-tokens", type=_sizes, metavar="T[,T…]", help="where to run beside a memory-bound kernel (or none)")
    gpu("--patience", type=float, metavar="SECONDS", help="a rank that takes longer for one shape ends the run")
    gpu(
        "--cases",
        type=_names,
        metavar="C[,C…]",
        help="attention, sampling: patterns of ops (qk_norm_rope, indexer_*, top_p_renorm, *_sampling, …) or of op/size"
        " (default: all)",
    )
    gpu("--vocabs", type=_numbers, metavar="V[,V…]", help="sampling: vocabularies (default: 32768,128256,151936)")
    gpu("--tiny", action="store_true", help="attention, sampling: sizes that show that it runs (--device cpu)")
    gpu("--batches", type=_numbers, metavar="B[,B…]", help="decode: sequences (default 1,16)")
    gpu("--layers", type=int, metavar="N", help="decode: decoder layers (default 36)")
    gpu("--context", type=int, metavar="N", help="decode: positions in the cache (default 1024)")
    gpu("--ways", type=_names, metavar="W[,W…]", help="decode: process_group, custom, fused_norm, fused")


def run(arguments: argparse.Namespace) -> int:
    """The exit code; prints tables on stdout, progress on stderr."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.benchmark in BENCHMARKS:
        return single_command.run(BENCHMARKS[arguments.benchmark], arguments, device)
    if device == "cuda":
        return gpu_command.run(arguments)
    if arguments.benchmark == "decode":
        raise ValueError("decode: expected GPUs, got --device cpu")
    return _run_on_cpu(arguments)


def _run_on_cpu(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fusedcomm.cli.bench.report import print_report, read_records, save_plot

    json_path, plot_path = gpu_command.output_paths(arguments)
    launcher = arguments.launcher or ("mpiexec" if find_mpiexec() and has_mpi4py() else "torchrun")
    with tempfile.TemporaryDirectory(prefix="fusedcomm-bench-") as folder:
        output = Path(folder) / "records.jsonl"
        specs = {ranks: _spec(arguments, ranks, str(output)) for ranks in arguments.tp or DEFAULT_TP}
        for spec in specs.values():
            spec.check()
        if launcher == "torchrun":
            print("without mpiexec (pip install 'fusedcomm[mpi]'): no MPI among the peers", file=sys.stderr)
        code = 0
        for ranks, spec in specs.items():
            code = code or subprocess.run(_command(launcher, ranks, spec), check=False).returncode
        records = read_records(output) if output.exists() else []
        if json_path and records:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            with json_path.open("a", encoding="utf-8") as file:
                file.write(output.read_text(encoding="utf-8"))
    print_report(records, Console(width=None if sys.stdout.isatty() else 160))
    if plot_path and save_plot(records, plot_path):
        print(f"plot: {plot_path}")
    if code:
        print(f"fusedcomm bench: the ranks failed under {launcher} (exit code {code})", file=sys.stderr)
    return 1 if code else 0


def _spec(arguments: argparse.Namespace, ranks: int, output: str) -> Spec:
    tunings = [*arguments.with_tuning, *(t for variation in arguments.vary for t in variation)]
    if arguments.tune:
        tunings += [{name: value} for name, values in SWEEP.items() for value in values]
    hidden = arguments.hidden or [4096]
    if len(hidden) > 1:
        raise ValueError(f"--hidden: expected one row length on CPU, got {len(hidden)}")
    return Spec(
        output=output,
        command=describe_command(),
        ops=arguments.ops or list(OPS),
        tokens=arguments.tokens or TOKENS.get(ranks, DEFAULT_TOKENS),
        hidden=hidden[0],
        dtype=arguments.dtype,
        peers=arguments.peers,
        tunings=tunings,
        rounds=Spec.rounds if arguments.rounds is None else arguments.rounds,
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


def _sizes(text: str) -> list[int]:
    return [] if text == "none" else _numbers(text)


def _names(text: str) -> list[str]:
    return text.split(",")


def _tuning(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    return {name: _numbers_from_0(value)[0] for name, _, value in pairs}


def _variation(text: str) -> list[dict[str, int]]:
    name, _, values = text.partition("=")
    return [{name: value} for value in _numbers_from_0(values)]
