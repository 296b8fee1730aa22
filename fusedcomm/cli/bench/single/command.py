"""``fusedcomm bench`` of ops on one device: starts the process that measures, shows what it found, and keeps it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedcomm.cli.bench.gpu.command import output_paths, show
from fusedcomm.cli.bench.machine import describe_command
from fusedcomm.cli.bench.single import flashinfer
from fusedcomm.cli.bench.single.benchmark import Benchmark
from fusedcomm.cli.bench.single.spec import Spec

TINY = {"calls": 2, "sets": 2, "budget_s": 1e-3, "min_rounds": 2, "tiny": True}
"""On a CPU where nothing is measured."""
ON_CPU = {"calls": 2, "sets": 2, "budget_s": 0.5, "min_rounds": 5}
"""On a CPU that is measured: calls last milliseconds there, so a few of them make a round."""


def run(benchmark: Benchmark, arguments: argparse.Namespace, device: str) -> int:
    """The exit code; prints tables on stdout, progress on stderr. Records are written as they come."""
    if device == "cuda" and not torch.cuda.device_count():
        raise ValueError("--device: expected a GPU for cuda, got none")
    json_path, _ = output_paths(arguments)
    with tempfile.TemporaryDirectory(prefix="fusedcomm-bench-") as folder:
        written = json_path or Path(folder) / "records.jsonl"
        spec = make_spec(benchmark, arguments, device, str(written.absolute()))
        benchmark.check(spec)
        written.parent.mkdir(parents=True, exist_ok=True)
        before = written.stat().st_size if written.exists() else 0
        with building(benchmark, spec):
            code = subprocess.run([sys.executable, "-m", benchmark.module, spec.to_json()], check=False).returncode
        text = written.read_bytes()[before:].decode() if written.exists() else ""
    show(text, arguments)
    if code:
        print(f"fusedcomm bench: the process that measures failed (exit code {code})", file=sys.stderr)
    return 1 if code else 0


def make_spec(benchmark: Benchmark, arguments: argparse.Namespace, device: str, output: str) -> Spec:
    """The spec that the command line describes; what it leaves out is the default of the benchmark or the spec."""
    chosen = {
        "cases": arguments.cases,
        "tokens": arguments.tokens,
        "vocabs": arguments.vocabs,
        "peers": arguments.peers,
        "calls": arguments.calls,
        "sets": arguments.sets,
        "budget_s": arguments.budget,
        "min_rounds": arguments.rounds,
        "patience_s": arguments.patience,
    }
    defaults: dict[str, object] = {"budget_s": benchmark.budget_s}
    if device == "cpu":
        defaults |= ON_CPU if benchmark.measures_cpu and not arguments.tiny else TINY
    elif arguments.tiny:
        raise ValueError("--tiny: expected --device cpu, got a run on a GPU")
    chosen |= {name: value for name, value in defaults.items() if chosen.get(name) is None}
    given = {name: value for name, value in chosen.items() if value is not None}
    return Spec(output, describe_command(), device, **given)


@contextlib.contextmanager
def building(benchmark: Benchmark, spec: Spec) -> Iterator[None]:
    """Inside, FlashInfer's kernels are compiled in a process of their own, beside what is measured before them."""
    ops = [op for op in benchmark.families(spec) if spec.wants_peer(op, flashinfer.FLASHINFER)]
    names = list(dict.fromkeys(name for op in ops for name in benchmark.flashinfer_modules.get(op, ())))
    if spec.device != "cuda" or not names:
        yield
        return
    # a group of its own: the compilers that it starts end with it
    process = subprocess.Popen([sys.executable, "-m", flashinfer.MODULE, *names], start_new_session=True)
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
