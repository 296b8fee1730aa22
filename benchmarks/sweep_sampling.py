"""Blocks and threads of a row against the time it takes: the sweep behind layout_of() in csrc/gpu/sampling/launch.cu.

    python benchmarks/sweep_sampling.py --vocab 128256 --rows 1,16,64,256 --json sweep.jsonl

Every op is captured 20 times in a graph for every team (blocks that share a row, threads of a block; 0: what the
library would choose), the graphs of a size are replayed in turn, and the median counts.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from fusedcomm import native
from fusedcomm.ops import sampling, speculative

CALLS = 20
DRAFTS = 4
COLD_BYTES = 180 << 20  # of all sets together: what no cache holds
Call = Callable[[int], object]


def set_team(blocks: int, threads: int) -> None:
    gpu = native.load_gpu()
    assert gpu is not None, "the GPU library is not there, or torch sees no GPU"
    ctypes.CDLL(str(gpu.path)).fusedcomm_gpu_set_sampling_team(torch.cuda.current_device(), blocks, threads)


def calls_of(rows: int, vocab: int, scale: float, names: list[str]) -> dict[str, Call]:
    """Call i of each op: on the set that is its turn."""
    sets = -(-COLD_BYTES // (8 * rows * vocab))
    sets = sets if sets <= CALLS else 4
    logits = [torch.randn(rows, vocab, device="cuda") * scale for _ in range(sets)]
    probs = [torch.softmax(one, -1) for one in logits]
    outs = [torch.empty_like(one) for one in probs]
    ids = torch.empty(rows, dtype=torch.int32, device="cuda")
    u = torch.rand(rows, device="cuda")
    found: dict[str, Call] = {
        "copy": lambda i: outs[i % sets].copy_(probs[i % sets]),
        "top_p": lambda i: sampling.top_p_renorm_probs(probs[i % sets], 0.9, out=outs[i % sets]),
        "top_k": lambda i: sampling.top_k_renorm_probs(probs[i % sets], 50, out=outs[i % sets]),
        "both": lambda i: sampling.top_k_top_p_renorm_probs(probs[i % sets], 50, 0.9, out=outs[i % sets]),
        "min_p": lambda i: sampling.min_p_renorm_probs(probs[i % sets], 0.05, out=outs[i % sets]),
        "softmax": lambda i: sampling.softmax_temperature(logits[i % sets], 0.8, out=outs[i % sets]),
        "sample": lambda i: sampling.sampling_from_probs(probs[i % sets], u, out=ids),
        "joint": lambda i: sampling.top_k_top_p_sampling_from_probs(
            probs[i % sets], 50, 0.9, u, order="joint", out=ids
        ),
        "top_k_first": lambda i: sampling.top_k_top_p_sampling_from_probs(probs[i % sets], 50, 0.9, u, out=ids),
    }
    if rows <= 64 and "chain" in names:
        target = torch.softmax(torch.randn(rows, DRAFTS + 1, vocab, device="cuda") * scale, -1)
        draft = torch.softmax(torch.randn(rows, DRAFTS, vocab, device="cuda") * scale, -1)
        chosen = torch.multinomial(draft.view(-1, vocab), 1).view(rows, DRAFTS)
        uniforms = torch.rand(rows, DRAFTS, device="cuda")
        result = speculative.chain_speculative_sampling(draft, chosen, target, uniforms, u)
        found["chain"] = lambda i: speculative.chain_speculative_sampling(
            draft, chosen, target, uniforms, u, out=result
        )
    return {name: call for name, call in found.items() if name in names}


def capture(call: Call) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(CALLS):
            call(i)
    return graph


def measure(graphs: list[torch.cuda.CUDAGraph], rounds: int) -> list[float]:
    """Microseconds a call of each graph: the median over rounds."""
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in graphs]
        for graph, (begin, end) in zip(graphs, events, strict=True):
            graph.replay()  # not timed: the host is behind the GPU here
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        for own, (begin, end) in zip(samples, events, strict=True):
            own.append(begin.elapsed_time(end) * 1000 / CALLS)
    return [round(statistics.median(own), 2) for own in samples]


def main() -> None:
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=numbers, default=[32768, 128256])
    parser.add_argument("--rows", type=numbers, default=[1, 4, 16, 64, 256])
    parser.add_argument("--blocks", type=numbers, default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=numbers, default=[0, 128, 256, 384, 512])
    parser.add_argument("--scale", type=float, default=2.0, help="of the normal logits")
    parser.add_argument("--ops", default="copy,top_p,top_k,both,joint,sample,softmax,chain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="append the figures, a line each")
    options = parser.parse_args()
    for vocab, rows in itertools.product(options.vocab, options.rows):
        teams = [(0, 0), *((b, t) for b, t in itertools.product(options.blocks, options.threads) if b or t)]
        calls = calls_of(rows, vocab, options.scale, options.ops.split(","))
        cases: list[tuple[dict[str, Any], torch.cuda.CUDAGraph]] = []
        for name, call in calls.items():
            for blocks, threads in teams if name != "copy" else teams[:1]:
                set_team(blocks, threads)
                about = {"op": name, "vocab": vocab, "rows": rows, "blocks": blocks, "threads": threads}
                try:
                    cases.append((about, capture(call)))
                except RuntimeError as error:  # a slice that does not fit one block, say
                    print(json.dumps(about | {"absent": str(error).splitlines()[0]}), flush=True)
        set_team(0, 0)
        times = measure([graph for _, graph in cases], options.rounds)
        lines = [json.dumps(about | {"us": us}) for (about, _), us in zip(cases, times, strict=True)]
        print(*lines, sep="\n", flush=True)
        if options.json:
            with open(options.json, "a") as file:
                file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
