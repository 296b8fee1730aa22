"""The entry of a rank process of ``fusedcomm bench decode``: one decode step, its collectives done in four ways.

A step is one CUDA graph: all layers and the final norm for a batch of sequences, a token each, with the embedding's sum
at the start and without the output projection. The ways take turns. Beside each runs the same step with its collectives
replaced by what is local in them; the difference is the time spent in communication.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

import fusedcomm
from fusedcomm.cli.bench.gpu.collectives import describe_run
from fusedcomm.cli.bench.gpu.decode_stack import (
    QWEN3_8B,
    DecodeInputs,
    DecodeStack,
    LocalGroup,
    make_inputs,
    shortened,
)
from fusedcomm.cli.bench.gpu.harness import Device, Ranks
from fusedcomm.cli.bench.gpu.job import GpuJob, forbid_multicast
from fusedcomm.cli.bench.gpu.spec import WAYS, DecodeSpec

EAGER_STEPS = 3
"""Before a capture: what is chosen, compiled or allocated at first use is then done."""
MOST_LISTED = 24
"""Kernels by name in a record."""


def time_steps(
    steps: dict[str, Callable[[], None]], device: Device, ranks: Ranks, rounds: int
) -> dict[str, list[float]]:
    """The median seconds of each replayed step on every rank; the steps take turns."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):  # the first two warm up
        marks = {}
        device.hold()
        for name, replay in steps.items():
            ranks.align()
            start = device.mark()
            replay()
            marks[name] = (start, device.mark())
        device.finish()
        for name, (start, end) in marks.items():
            if number >= 2:
                samples[name].append(device.seconds(start, end))
    return {name: ranks.of_all_ranks(statistics.median(own)) for name, own in samples.items()}


def run(spec: DecodeSpec, output: IO[str] | None) -> None:
    """Measures what ``spec`` says, on every rank; rank 0 writes a JSON line for each way and batch size."""
    job = GpuJob(spec.patience_s)
    groups: list[fusedcomm.GroupCoordinator] = []
    try:
        with job.device.active():
            about = describe_run("decode", spec.command, job) | {"dtype": "bf16", "hidden": QWEN3_8B.hidden_size}
            for record in _records(spec, job, groups):
                if output is not None and job.rank == 0:
                    print(json.dumps({**record, **about}), file=output, flush=True)
    except BaseException:
        traceback.print_exc()  # see collectives.py
        raise
    finally:
        for group in groups:
            group.close()
        job.close()


def _records(spec: DecodeSpec, job: GpuJob, groups: list[fusedcomm.GroupCoordinator]) -> Iterator[dict[str, Any]]:
    config = shortened(QWEN3_8B, spec.layers)
    config.check_world_size(job.world_size)
    stacks: dict[str, DecodeStack] = {}
    first: DecodeStack | None = None
    for way in spec.ways:
        job.be_patient()
        settings = dataclasses.replace(fusedcomm.Settings.from_environ(), **WAYS[way])
        groups.append(fusedcomm.GroupCoordinator(device=job.device.device, settings=settings))
        for name, group in ((way, groups[-1]), (_local(way), LocalGroup(groups[-1], way))):
            stacks[name] = DecodeStack(config, group)
            if first is None:
                first = stacks[name]
                first.fill()
            else:
                stacks[name].share_weights(first)
    job.say(f"{len(stacks)} stacks of {config.num_layers} layers")
    for batch in spec.batches:
        job.be_patient()
        inputs = make_inputs(config, job.group, batch, spec.context)
        yield from _batch_records(spec, job, stacks, inputs)


def _batch_records(
    spec: DecodeSpec, job: GpuJob, stacks: dict[str, DecodeStack], inputs: DecodeInputs
) -> Iterator[dict[str, Any]]:
    batch = inputs.rows.shape[0]
    steps: dict[str, Callable[[], None]] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, stack in stacks.items():
        job.be_patient()
        captured = CapturedStep(stack, inputs, job.device)
        captured.output.fill_(torch.nan)
        captured.replay()
        job.device.finish()
        steps[name], outputs[name] = captured.replay, captured.output.clone()
    times = time_steps(steps, job.device, job, spec.rounds)
    # last: a profiler may leave something behind that costs time
    kernels = {name: job.count_kernels(functools.partial(stack.forward, inputs)) for name, stack in stacks.items()}
    expected = outputs.get("fused", outputs[spec.ways[0]])
    for way in spec.ways:
        seconds, local = max(times[way]), max(times[_local(way)])
        difference = max(job.of_all_ranks(float((outputs[way].float() - expected.float()).abs().max())))
        same = min(job.of_all_ranks(float(torch.equal(outputs[way], expected)))) > 0
        yield {
            "op": "decode",
            "way": way,
            "peer": way,
            "batch": batch,
            "layers": spec.layers,
            "context": spec.context,
            "us": round(seconds * 1e6, 2),
            "rank_us": [round(s * 1e6, 2) for s in times[way]],
            "local_us": round(local * 1e6, 2),
            "communication_share": round(max(0.0, 1 - local / seconds), 4),
            "kernels_per_layer": round(sum(kernels[way].values()) / spec.layers, 2),
            "kernels_per_layer_local": round(sum(kernels[_local(way)].values()) / spec.layers, 2),
            "kernels": dict(kernels[way].most_common(MOST_LISTED)),
            "same_bits": same,
            "difference": difference,
            "finite": bool(outputs[way].isfinite().all()),
            "rounds": spec.rounds,
        }
        job.say(f"{job.world_size} ranks, batch {batch}: {way} {seconds * 1e6:,.0f} µs, {local * 1e6:,.0f} local")


class CapturedStep:
    """A stack's step as a graph, and the rows that it writes."""

    def __init__(self, stack: DecodeStack, inputs: DecodeInputs, device: Device) -> None:
        self.output = torch.empty(0)
        for _ in range(EAGER_STEPS):
            stack.forward(inputs)
        device.finish()
        self.replay = device.capture(lambda: self._step(stack, inputs))

    def _step(self, stack: DecodeStack, inputs: DecodeInputs) -> None:
        self.output = stack.forward(inputs)


def _local(way: str) -> str:
    return f"{way}, local"


def main() -> None:
    """``python -m fusedcomm.cli.bench.gpu.decode SPEC`` under torchrun."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    forbid_multicast()
    spec = DecodeSpec(**json.loads(sys.argv[1]))
    with Path(spec.output).open("a", encoding="utf-8") as output:
        run(spec, output)


if __name__ == "__main__":
    main()
