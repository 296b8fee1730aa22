"""``fusedcomm bench attention``: starts the process that measures, shows what it found, and keeps it."""

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

from fusedcomm.cli.bench.attention import flashinfer
from fusedcomm.cli.bench.attention.spec import WORKER, Spec
from fusedcomm.cli.bench.gpu.command import output_paths, show
from fusedcomm.cli.bench.machine import describe_command

FLASHINFER_MODULES = {"qk_norm_rope": ("norm", "rope"), "sparse_mla_decode": ("mla",)}
"""What FlashInfer compiles for an op."""


def run(arguments: argparse.Namespace, device: str) -> int:
    """The exit code; prints tables on stdout, progress on stderr. Records are written as they come."""
    if device == "cuda" and not torch.cuda.device_count():
        raise ValueError("--device: expected a GPU for cuda, got none")
    json_path, _ = output_paths(arguments)
    with tempfile.TemporaryDirectory(prefix="fusedcomm-bench-") as folder:
        written = json_path or Path(folder) / "records.jsonl"
        spec = make_spec(arguments, device, str(written.absolute()))
        spec.check()
        written.parent.mkdir(parents=True, exist_ok=True)
        before = written.stat().st_size if written.exists() else 0
        with building(spec):
            code = subprocess.run([sys.executable, "-m", WORKER, spec.to_json()], check=False).returncode
        text = written.read_bytes()[before:].decode() if written.exists() else ""
    show(text, arguments)
    if code:
        print(f"fusedcomm bench: the process that measures failed (exit code {code})", file=sys.stderr)
    return 1 if code else 0


def make_spec(arguments: argparse.Namespace, device: str, output: str) -> Spec:
    """The spec that the command line describes; what it leaves out is the spec's default."""
    chosen = {
        "cases": arguments.cases,
        "tokens": arguments.tokens,
        "peers": arguments.peers,
        "calls": arguments.calls,
        "sets": arguments.sets,
        "budget_s": arguments.budget,
        "min_rounds": arguments.rounds,
        "patience_s": arguments.patience,
    }
    if device == "cpu":  # nothing is measured there
        tiny = {"calls": 2, "sets": 2, "budget_s": 1e-3, "min_rounds": 2, "tiny": True}
        chosen |= {name: value for name, value in tiny.items() if chosen.get(name) is None}
    given = {name: value for name, value in chosen.items() if value is not None}
    return Spec(output, describe_command(), device, **given)


@contextlib.contextmanager
def building(spec: Spec) -> Iterator[None]:
    """Inside, FlashInfer's kernels are compiled in a process of their own, beside what is measured before them."""
    ops = [op for op in spec.families() if spec.wants_peer(op, flashinfer.NAME)]
    names = [name for op in ops for name in FLASHINFER_MODULES.get(op, ())]
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
