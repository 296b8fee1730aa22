"""How kernels are laid out on a GPU against how long they take: the sweep behind Geometry in csrc/gpu/kernels.h.

    torchrun --nproc-per-node 4 benchmarks/sweep_geometry.py --tokens 1,16,128,2048 --json sweep.jsonl

Every layout is a communicator of its own, in one-shot and in two-shot; each call is captured 20 times in a graph, the
graphs of a shape are replayed in turn, and the slowest rank's median counts. The library's own communicator is timed
without the Python of a group.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from fusedcomm import native
from fusedcomm.comm.custom_gpu import GpuCustomAllReduce
from fusedcomm.comm.tuning import GpuTuning
from fusedcomm.ops.types import ScaleLayout

CALLS = 20
MOST_ONE_SHOT_BYTES = 1 << 21
FEWEST_TWO_SHOT_BYTES = 1 << 16


class Layout(NamedTuple):
    """One way to lay kernels out; the fields after the first are those of Geometry."""

    one_shot: bool
    overlaps: int = 1
    cluster_threads: int = 128
    sum_threads: int = 128
    sender_threads: int = 1024
    receiver_threads: int = 1024
    lead: int = 2


LAYOUTS = (
    *(Layout(True, cluster_threads=c, sum_threads=s) for c, s in ((0, 128), (64, 256), (128, 128), (256, 512))),
    Layout(True, overlaps=0),
    *(
        Layout(False, cluster_threads=c, sender_threads=senders, receiver_threads=receivers, lead=lead)
        for c, (senders, receivers), lead in itertools.product(
            (0, 128), ((512, 1024), (1024, 512), (768, 768), (1024, 1024)), (1, 2, 8)
        )
    ),
)


def exchange(data: bytes) -> list[bytes]:
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return [part.numpy().tobytes() for part in parts]


def make(layout: Layout, device: torch.device, pids: list[int]) -> GpuCustomAllReduce:
    library, gpu = native.load(), native.load_gpu()
    assert library is not None
    assert gpu is not None, "the GPU library is not there, or torch sees no GPU"
    ctypes.CDLL(str(gpu.path)).fusedcomm_gpu_set_geometry(device.index, *layout[1:])
    return GpuCustomAllReduce(
        library,
        gpu,
        exchange,
        dist.get_rank(),
        dist.get_world_size(),
        device=device,
        buffer_bytes=160 << 20,
        tuning=GpuTuning(one_shot_max_bytes=1 << 60 if layout.one_shot else 0),
        timeout_s=20,
        pids=pids,
    )


def capture(call: Callable[[], object], calls: int = CALLS) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph


def measure(graphs: list[torch.cuda.CUDAGraph], align: torch.cuda.CUDAGraph, rounds: int) -> list[float]:
    """Microseconds a call of each graph: the median over rounds of the slowest rank."""
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in graphs] for _ in range(rounds)]
    for turn in events:
        align.replay()
        graphs[0].replay()  # not timed: the host is behind the GPU here, and ahead of it from now on
        for graph, (begin, end) in zip(graphs, turn, strict=True):
            align.replay()
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
    own = torch.tensor([[begin.elapsed_time(end) * 1000 / CALLS for begin, end in turn] for turn in events])
    all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, own)
    slowest = torch.stack(all_ranks).amax(0)
    return [round(us, 2) for us in slowest.median(0).values.tolist()]


def calls_of(
    made: dict[Layout, GpuCustomAllReduce], tokens: int, hidden: int, device: torch.device
) -> dict[tuple[Layout, str], Callable[[], object]]:
    """What to time for one shape: each layout that serves such messages, bare and with all that is fused."""
    x, residual = (torch.randn(tokens, hidden, device=device).bfloat16() for _ in range(2))
    weight = torch.randn(hidden, device=device).bfloat16()
    options = (1e-6, 0.0, 128, False, ScaleLayout.ROW_MAJOR)
    calls: dict[tuple[Layout, str], Callable[[], object]] = {}
    for layout, custom in made.items():
        if x.nbytes > MOST_ONE_SHOT_BYTES if layout.one_shot else x.nbytes < FEWEST_TWO_SHOT_BYTES:
            continue
        calls[layout, "all_reduce"] = functools.partial(custom.all_reduce, x)
        fused = functools.partial(custom.allreduce_rmsnorm_quant, x, residual, weight, *options)
        calls[layout, "allreduce_rmsnorm_quant"] = fused
    return calls


def main() -> None:
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=numbers, default=[4096, 7168])
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="append the figures, a line each")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    pids = [int.from_bytes(data, "little") for data in exchange(os.getpid().to_bytes(8, "little"))]
    made = {layout: make(layout, device, pids) for layout in LAYOUTS}
    token = torch.zeros(4096, device=device, dtype=torch.bfloat16)
    first = made[LAYOUTS[0]]
    align = capture(lambda: first.all_reduce(token), 1)
    for hidden, tokens in itertools.product(options.hidden, options.tokens):
        calls = calls_of(made, tokens, hidden, device)
        times = measure([capture(call) for call in calls.values()], align, options.rounds)
        if dist.get_rank() == 0:
            lines = [
                json.dumps({"op": op, "hidden": hidden, "tokens": tokens, "us": us, **layout._asdict()})
                for (layout, op), us in zip(calls, times, strict=True)
            ]
            print(*lines, sep="\n", flush=True)
            if options.json:
                with open(options.json, "a") as file:
                    file.writelines(line + "\n" for line in lines)
    dist.barrier()
    for custom in made.values():
        custom.close()


if __name__ == "__main__":
    main()
