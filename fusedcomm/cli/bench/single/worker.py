"""The process of a benchmark of ops on one device: measures what its spec says, a JSON line a figure.

A kernel that breaks the GPU's context takes with it what the process would measure after it. So the process then begins
again with the op that comes next, and ends with an error.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from fusedcomm.cli.bench import machine
from fusedcomm.cli.bench.gpu.device import describe_gpu_versions, describe_gpus
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.single.bench import Bench, Record, describe
from fusedcomm.cli.bench.single.benchmark import Benchmark
from fusedcomm.cli.bench.single.device import open_device
from fusedcomm.cli.bench.single.machine import machine_workloads
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Workload


class DeviceLostError(RuntimeError):
    """The device does not answer any more; the text is the op that it happened in."""


def run(benchmark: Benchmark, spec: Spec, output: IO[str]) -> None:
    """Measures what ``spec`` says.

    Raises:
        WrongResultError: this library computed something wrong somewhere; everything else has been measured.
        DeviceLostError: the device is of no more use to this process.
    """
    device = open_device(spec.device)
    with device.active():
        bench = Bench(spec, device)
        about = {
            "benchmark": benchmark.name,
            "device": device.device.type,
            "world_size": 1,
            "command": spec.command,
            "date": machine.describe_date(),
            "machine": machine.describe_machine() | (describe_gpus() if spec.device == "cuda" else {}),
            "versions": machine.describe_versions() | describe_gpu_versions(),
        }
        if device.device.type == "cpu":
            about["threads"] = torch.get_num_threads()
        if spec.tiny:
            about["tiny"] = True
        try:
            for record in _records(benchmark, spec, bench):
                print(json.dumps({**record, **about}), file=output, flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
    if bench.wrong:
        raise WrongResultError("; ".join(bench.wrong))


def _records(benchmark: Benchmark, spec: Spec, bench: Bench) -> Iterator[Record]:
    for workload in machine_workloads(spec.device, tiny=spec.tiny, with_product=benchmark.has_products):
        yield from _measured(spec, bench, workload)
    for op in benchmark.families(spec):
        start = time.perf_counter()
        for workload in benchmark.workloads(spec, op):
            yield from _measured(spec, bench, workload)
        bench.say(f"{op}: {time.perf_counter() - start:.1f} s")
    be_patient(spec)
    yield from bench.kernel_records()


def _measured(spec: Spec, bench: Bench, workload: Workload) -> Iterator[Record]:
    be_patient(spec)
    try:
        yield from bench.records(workload)
    except Exception as error:  # its inputs cannot be made, say: the other sizes are measured all the same
        reason = f"{type(error).__name__}: {error}"
        yield {**describe(workload), "peer": "*", "absent": reason}
    try:
        bench.device.finish()
    except RuntimeError as error:
        bench.say(f"{workload.name}: {error}")
        raise DeviceLostError(workload.op) from error


def be_patient(spec: Spec) -> None:
    """From now on, unless called again in time, a process that is stuck says where, and ends."""
    faulthandler.dump_traceback_later(spec.patience_s, exit=True)


def after(benchmark: Benchmark, spec: Spec, op: str) -> Spec:
    """What is left when the device was lost in ``op``."""
    families = benchmark.families(spec)
    done = families[: families.index(op) + 1] if op in families else families
    return dataclasses.replace(spec, over=[*spec.over, *done], broken=[*spec.broken, op])


def main(benchmark: Benchmark) -> None:
    """``python -m MODULE SPEC``; the exit code is 1 where something of ours was wrong."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    spec = Spec(**json.loads(sys.argv[1]))
    with Path(spec.output).open("a", encoding="utf-8") as output:
        try:
            run(benchmark, spec, output)
        except WrongResultError as error:
            sys.exit(f"wrong results: {error}")
        except DeviceLostError as error:
            spec = after(benchmark, spec, str(error))
            if not benchmark.families(spec):
                sys.exit(f"the device was lost in {', '.join(spec.broken)}")
            output.flush()
            os.execv(sys.executable, [sys.executable, "-m", benchmark.module, spec.to_json()])
    if spec.broken:
        sys.exit(f"the device was lost in {', '.join(spec.broken)}")
