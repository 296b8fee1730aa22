"""The entry of a rank process of ``fusedcomm bench collectives`` on GPUs; rank 0 writes the records.

A record is a JSON line: the time of a case (``us``), the reason why it is ``absent``, what an eager call costs the host
(``host_us``; ``host_alloc_us`` where the library allocates the results), or its time beside a memory-bound kernel
(``loaded_us``).
"""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from fusedcomm.cli.bench import machine
from fusedcomm.cli.bench.cases import Case
from fusedcomm.cli.bench.gpu import harness, peers
from fusedcomm.cli.bench.gpu.catalogue import Catalogue
from fusedcomm.cli.bench.gpu.device import describe_gpu_versions, describe_gpus
from fusedcomm.cli.bench.gpu.interference import TOO_SHORT, measure_loaded
from fusedcomm.cli.bench.gpu.job import GpuJob, forbid_multicast
from fusedcomm.cli.bench.gpu.shape import Limits, Shape, make_shape
from fusedcomm.cli.bench.gpu.spec import Spec
from fusedcomm.cli.bench.worker import DTYPES


def run(spec: Spec, output: IO[str] | None) -> None:
    """Measures what ``spec`` says, on every rank; rank 0 has ``output`` and writes a JSON line a figure."""
    job = GpuJob(spec.patience_s)
    try:
        with job.device.active():
            about = describe_run("collectives", spec.command, job) | {"dtype": spec.dtype}
            for record in _records(spec, job):
                if output is not None and job.rank == 0:
                    print(json.dumps({**record, **about}), file=output, flush=True)
    except BaseException:
        traceback.print_exc()  # now: closing groups that are in disorder may take long, or not come back
        raise
    finally:
        job.close()


def describe_run(benchmark: str, command: str, job: GpuJob) -> dict[str, object]:
    """What every record of a run says."""
    return {
        "benchmark": benchmark,
        "device": "cuda",
        "world_size": job.world_size,
        "command": command,
        "date": machine.describe_date(),
        "machine": machine.describe_machine() | describe_gpus(),
        "versions": machine.describe_versions() | describe_gpu_versions(),
    }


def _records(spec: Spec, job: GpuJob) -> Iterator[dict[str, Any]]:
    dtype = DTYPES[spec.dtype]
    shapes = spec.shapes()
    limits = Limits(
        tokens=max(tokens for _, tokens, _ in shapes),
        hidden=max(spec.hidden),
        elements=max(hidden * tokens for hidden, tokens, _ in shapes),
        dtype=dtype,
    )
    symmetric = max(hidden * tokens * spec.calls_for(tokens) for hidden, tokens, _ in shapes)
    catalogue = Catalogue(job, spec, limits, symmetric)
    try:
        _compile(spec, job, catalogue)
        for hidden, tokens, ops in shapes:
            start = time.perf_counter()
            job.be_patient()
            case = Case(tokens, hidden, dtype)
            shape = make_shape(job, case, spec.calls_for(tokens), spec.sets, limits)
            absent = 0
            for record in _shape_records(spec, job, catalogue, shape, ops):
                absent += "absent" in record
                yield {**record, "hidden": hidden, "tokens": tokens, "message_bytes": case.message_bytes}
            job.say(
                f"{job.world_size} ranks, H {hidden}, {tokens} tokens: {time.perf_counter() - start:.1f} s"
                + (f", {absent} peers absent" if absent else "")
            )
            del shape
    finally:
        catalogue.close()


def _compile(spec: Spec, job: GpuJob, catalogue: Catalogue) -> None:
    """FlashInfer's kernels on one rank, and beside that the compiled peers of every shape on all."""
    start = time.perf_counter()
    job.be_patient(15 * 60)
    if catalogue.wants_flashinfer:
        catalogue.flashinfer.start_build()
    if catalogue.wants_compile:
        for hidden in spec.hidden:
            for tokens in spec.tokens:
                rows = torch.ones(tokens, hidden, dtype=DTYPES[spec.dtype], device=job.device.device)
                reason = ""
                try:
                    peers.compiled_tail()(rows, rows, rows[0])
                except Exception as error:  # the case itself will say so again
                    reason = str(error).strip().splitlines()[0]
                if reason := job.first_reason(reason):
                    job.say(f"torch.compile failed: {reason}")
                    break
    if catalogue.wants_flashinfer:
        catalogue.flashinfer.finish_build()
    job.say(f"compiled what peers compile: {time.perf_counter() - start:.1f} s")


def _shape_records(
    spec: Spec, job: GpuJob, catalogue: Catalogue, shape: Shape, ops: list[str]
) -> Iterator[dict[str, Any]]:
    tokens = shape.case.tokens
    effort = spec.effort(tokens)
    entries = harness.prepare(catalogue.prepare_kinds(ops, shape), job, job.device, effort)
    harness.measure(entries, job, job.device, effort)
    for entry in entries:
        yield {"op": entry.op, "peer": entry.name, **_figures(entry)}
    present = [e for e in entries if not e.absent]
    if tokens in spec.load_tokens and shape.case.hidden == spec.hidden[0]:
        # the copy too: what the load does to a kernel that waits for nobody
        yield from _loaded(spec, job, [e for e in present if "+eager" not in e.name], effort.calls)
    if tokens in spec.host_tokens and shape.case.hidden == spec.hidden[0]:
        for entry in present:
            yield from _host(job, entry)


def _host(job: GpuJob, entry: harness.Entry) -> Iterator[dict[str, Any]]:
    case = entry.case
    if case is None:
        return
    forms = {"host_us": case.call, "host_alloc_us": getattr(case, "call_new", None)}
    for figure, call in forms.items():
        if call is not None:
            seconds = harness.host_seconds(case, job.device, job, call=call)
            yield {"op": entry.op, "peer": entry.name, figure: round(seconds * 1e6, 3)}


def _loaded(spec: Spec, job: GpuJob, entries: list[harness.Entry], calls: int) -> Iterator[dict[str, Any]]:
    try:
        from fusedcomm.cli.bench.gpu.load import MemoryLoad
    except ImportError as error:  # on all ranks alike: they run the same installation
        job.say(f"no load on a second stream: {error}")
        yield {"op": "load", "peer": "*", "absent": f"Triton is not installed: {error}"}
        return
    load = MemoryLoad(job.device.device)
    figures = measure_loaded(entries, load, job, job.device, calls, spec.load_rounds)
    for entry, figure in zip(entries, figures, strict=True):
        if figure is None:
            yield {"op": "load", "peer": f"{entry.op}/{entry.name}", "absent": TOO_SHORT}
            continue
        yield {
            "op": entry.op,
            "peer": entry.name,
            "alone_us": round(figure.alone_s * 1e6, 3),
            "loaded_us": round(figure.loaded_s * 1e6, 3),
            "load_gbytes_per_s": round(load.gbytes_per_s),
        }


def _figures(entry: harness.Entry) -> dict[str, object]:
    if entry.absent:
        return {"absent": entry.absent}
    timing = entry.timing
    if timing is None:
        raise RuntimeError("timing: expected one of each case that is not absent")
    return {
        "us": round(timing.slowest_s * 1e6, 3),
        "rank_us": [round(s * 1e6, 3) for s in timing.rank_medians_s],
        "calls": timing.calls,
        "rounds": timing.rounds,
        **{k: v for k, v in entry.facts.items() if v is not None},
    }


def main() -> None:
    """``python -m fusedcomm.cli.bench.gpu.collectives SPEC`` under torchrun."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all ranks, and none tells where it was
    forbid_multicast()
    spec = Spec(**json.loads(sys.argv[1]))
    with Path(spec.output).open("a", encoding="utf-8") as output:
        run(spec, output)


if __name__ == "__main__":
    main()
