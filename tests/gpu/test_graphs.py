"""CUDA graphs, streams, other kernels at the same time, two groups at once: any mix of calls gives the right bits."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from oracle import Options
from ranked import new_group
from trials import OPS, Case, Findings, Graph, Prepared, algorithm, naming, random_case, spoil, varied

from fusedcomm import GroupCoordinator, Settings

MIB = 1 << 20


# ---- streams and noise; on CPU there are none ----


class Side:
    """A second stream, ordered after the first before it is used, and the first after it."""

    def __init__(self, where: torch.device) -> None:
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        first = torch.cuda.current_stream()
        self._stream.wait_stream(first)
        with torch.cuda.stream(self._stream):
            yield
        first.wait_stream(self._stream)


class Noise:
    """Copies of 256 MiB on a stream of their own: memory-bound kernels beside the collectives."""

    def __init__(self, where: torch.device, mib: int = 256) -> None:
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None
        if self._stream is not None:
            self._from, self._to = (torch.zeros(mib * MIB, dtype=torch.uint8, device=where) for _ in range(2))
            self._stream.wait_stream(torch.cuda.current_stream())

    def make(self, copies: int) -> None:
        """Queues some more, unless there is enough to do."""
        if self._stream is not None and self._stream.query():
            with torch.cuda.stream(self._stream):
                for _ in range(copies):
                    self._to.copy_(self._from)


def dawdle(own: random.Random, where: torch.device) -> None:
    """Lets this rank's stream or its host fall behind now and then, differently on each rank."""
    if own.random() < 0.05:
        if where.type == "cuda" and own.random() < 0.7:
            torch.cuda._sleep(own.randrange(400_000))  # cycles: up to a fifth of a millisecond
        else:
            time.sleep(own.random() / 2000)


# ---- graphs ----


def replayed(forced: str | None, rows: tuple[int, ...]) -> None:
    """Graphs of one call each, of different shapes: replayed in random order among eager calls, results spoilt."""
    findings = Findings()
    rng = np.random.default_rng(5)
    with algorithm(forced), new_group() as group:
        graphs = []
        for seed, t in enumerate(rows):
            for op in OPS:
                with naming(f"capture of {op}, {t} rows"):
                    graphs.append(
                        Graph(group, [Prepared(group, varied(seed, op, (t, 1024 + 512 * seed), torch.bfloat16))])
                    )
        for graph in graphs:
            graph.replay()
            findings.check(f"first replay, {graph}", graph.complaint())
        for step in range(4 * len(graphs)):
            graph = graphs[int(rng.integers(0, len(graphs)))]
            if rng.random() < 0.4:
                prepared = graph.calls[0]
                findings.check(f"eager call {step}, {prepared.case}", prepared.complaint(prepared.call(group)))
            else:
                graph.replay()
                findings.check(f"replay {step}, {graph}", graph.complaint())
        group.check()
    findings.settle()


@pytest.mark.smoke
@pytest.mark.parametrize("forced", ["one_shot", "two_shot"])
def test_graphs_among_eager_calls(world: Any, forced: str) -> None:
    world.run(replayed, forced, (1, 16) if world.light else (1, 3, 16, 130, 600))


def new_inputs() -> None:
    """A graph reads what its inputs hold when it is replayed, and a chain of calls feeds itself."""
    findings = Findings()
    with new_group() as group:
        case = Case("allreduce_rmsnorm_quant", (8, 2048), torch.bfloat16, options=Options(emit_bf16=True))
        graph = Graph(group, [Prepared(group, case)])
        inside = graph.calls[0]
        for seed in range(1, 9):
            fresh = Prepared(group, Case(case.op, case.shape, case.dtype, seed, options=case.options))
            for name in ("x", "residual", "weight"):
                getattr(inside, name).copy_(getattr(fresh, name))
            inside.want = fresh.want
            graph.replay()
            findings.check(f"inputs {seed}", graph.complaint())
    findings.settle()


@pytest.mark.worlds("main+shared")
def test_a_graph_reads_its_inputs_anew(world: Any) -> None:
    world.run(new_inputs)


def decode_steps(layers: int, steps: int) -> None:
    """A decode step as engines capture it: each layer's collectives feed the next; replays equal the eager step."""
    with new_group() as group:
        where = group.device
        generator = torch.Generator(where).manual_seed(7 + group.rank)
        hidden = torch.empty(4, 2048, dtype=torch.bfloat16, device=where)
        residual = torch.empty_like(hidden)
        weight = torch.ones(2048, dtype=torch.bfloat16, device=where)
        projections = [
            torch.randn(2048, 2048, generator=generator, device=where).mul_(0.02).bfloat16() for _ in range(layers)
        ]

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            x, r = hidden, residual
            for projection in projections:
                x, r = group.allreduce_rmsnorm(x @ projection, r, weight, 1e-6)
                quant = group.allreduce_rmsnorm_quant(x @ projection, r, weight, 1e-6)
                x = (quant.fp8.float().unflatten(-1, (-1, 128)) * quant.scale.unsqueeze(-1)).flatten(-2).bfloat16()
                r = quant.residual
            return group.all_reduce(x), r

        def fill(seed: int) -> None:
            for t, own in ((hidden, 0), (residual, 1)):
                source = torch.Generator(where).manual_seed(2 * seed + own)
                t.copy_(torch.randn(t.shape, generator=source, device=where))

        fill(0)
        if where.type != "cuda":
            return
        stream = torch.cuda.Stream(where)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with group.graph_capture() as capture, torch.cuda.graph(graph, stream=capture.stream):
            captured = step()
        for seed in range(steps):
            fill(seed)
            want = [t.clone() for t in step()]
            spoil(captured[0])
            graph.replay()
            for name, got, expected in zip(("sum", "residual"), captured, want, strict=True):
                assert torch.equal(got, expected), f"step {seed}: the replayed {name} differs from the eager one"


@pytest.mark.needs_cuda
@pytest.mark.worlds("main+shared")
def test_a_captured_decode_step(world: Any) -> None:
    world.run(decode_steps, world.few(8, 2), world.few(20, 3))


# ---- everything at once ----


def random_calls(seed: int, calls: int, num_cases: int, num_graphs: int, most: int, noisy: bool, rounds: int) -> int:
    """Random calls, eager and replayed, on two streams, with ranks that fall behind; every result is checked.

    The counts of wrong values stay on the device until the end: the host waits for nothing, and runs far ahead.
    """
    rng = np.random.default_rng(seed)  # the same on every rank
    own = random.Random(seed * 100 + dist.get_rank())
    findings = Findings()
    with new_group() as group, new_group(settings=Settings(buffer_mb=1)) as small:
        side = Side(group.device)
        noise = Noise(group.device) if noisy else None
        for first in range(0, calls, calls // rounds):
            counts: list[tuple[str, torch.Tensor]] = []
            owner = [group, group, small]
            prepared = []
            for number in range(num_cases):
                case = random_case(rng, seed * 1000 + first + number, most)
                with naming(f"preparing {case}"):
                    prepared.append((owner[number % 3], Prepared(group, case)))
            graphs = []
            for _ in range(num_graphs):
                which, chosen = owner[len(graphs) % 3], rng.integers(0, num_cases, int(rng.integers(1, 6)))
                graphs.append(Graph(which, [prepared[int(i)][1] for i in chosen]))
            for call in range(first, first + calls // rounds):
                dawdle(own, group.device)
                if noise is not None:
                    noise.make(8)
                on_side = rng.random() < 0.15
                with side() if on_side else contextlib.nullcontext():
                    if num_graphs and rng.random() < 0.25:
                        graph = graphs[int(rng.integers(0, num_graphs))]
                        graph.replay()
                        counts.append((f"call {call}{' on a side stream' * on_side}: {graph}", graph.different()))
                    else:
                        which, item = prepared[int(rng.integers(0, num_cases))]
                        with naming(f"call {call}: {item.case}"):
                            results = item.call(which)
                        what = f"call {call}{' on a side stream' * on_side}: {item.case}"
                        counts.append((what, item.different(results)))
                        spoil(results)  # so that no later call finds a right result in its memory
                if call % 500 == 499:
                    group.check()
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            group.check()
            small.check()
            found = torch.stack([count for _, count in counts]).tolist()
            for (what, _), wrong in zip(counts, found, strict=True):
                findings.check(what, f"{wrong} values are wrong" if wrong else "")
        totals = group.stats()
    findings.settle()
    assert totals["algorithm.one_shot"] > 0
    return findings.checks


@pytest.mark.smoke
@pytest.mark.worlds("main+shared")
def test_some_hundred_random_calls(world: Any) -> None:
    world.run(random_calls, 1, world.few(800, 120), world.few(40, 20), world.few(12, 4), 1 << 20, False, 1)


def test_ten_thousand_random_calls(world: Any) -> None:
    """Eager and graph mixed; where ranks share a GPU, and each call takes milliseconds, some hundred."""
    calls, cases, graphs = (10_000, 120, 30) if not world.light else (300, 30, 6)
    checked = world.run(random_calls, 2, calls, cases, graphs, world.few(1 << 21, 1 << 17), False, 2, timeout=150)
    assert checked == [calls] * world.size


@pytest.mark.needs_cuda
@pytest.mark.worlds("main+shared")
def test_beside_memory_heavy_kernels(world: Any) -> None:
    world.run(random_calls, 3, world.few(2000, 60), world.few(60, 20), world.few(16, 4), 1 << 20, True, 1)


# ---- two groups ----


def several_groups(calls: int) -> None:
    """Halves, pairs across them, and the world: calls interleaved, one half sometimes far ahead of the other."""
    me, world = dist.get_rank(), dist.get_world_size()
    half = [r for r in range(world) if r // (world // 2) == me // (world // 2)]
    across = sorted({me % (world // 2), me % (world // 2) + world // 2})
    rng = np.random.default_rng(3)
    findings = Findings()
    with new_group(half) as first, new_group(across) as second, new_group() as everyone:
        groups = {"half": first, "across": second, "world": everyone}
        assert (first.world_size, second.world_size, everyone.world_size) == (world // 2, 2, world)
        cases = [random_case(rng, 50 + number, 1 << 17) for number in range(12)]
        prepared = {name: [Prepared(group, case) for case in cases] for name, group in groups.items()}
        graphs = {name: Graph(group, prepared[name][:3]) for name, group in groups.items()}
        counts = []
        for call in range(calls):
            name = ("half", "half", "across", "across", "world")[int(rng.integers(0, 5))]
            if rng.random() < 0.3:
                graphs[name].replay()
                counts.append((f"call {call}, {name}: {graphs[name]}", graphs[name].different()))
            else:
                item = prepared[name][int(rng.integers(0, len(cases)))]
                counts.append((f"call {call}, {name}: {item.case}", item.different(item.call(groups[name]))))
            if call % 50 == 49 and me // (world // 2):  # only one half, many times
                counts += [
                    (f"call {call}, half alone", prepared["half"][1].different(prepared["half"][1].call(first)))
                ] * 20
        found = torch.stack([count for _, count in counts]).tolist()
        for (what, _), wrong in zip(counts, found, strict=True):
            findings.check(what, f"{wrong} values are wrong" if wrong else "")
        for group in groups.values():
            group.check()
    findings.settle()


@pytest.mark.worlds("even")
def test_groups_that_overlap(world: Any) -> None:
    world.run(several_groups, world.few(400, 60))


def the_same_ranks_twice(calls: int) -> None:
    """Two groups of all ranks, of different buffers: nothing of one is the other's."""
    findings = Findings()
    with new_group() as first, new_group(settings=Settings(buffer_mb=1)) as second:
        groups: tuple[GroupCoordinator, ...] = (first, second)
        prepared = [Prepared(first, varied(n, OPS[n % 3], (1 + 9 * n, 1024), torch.float16)) for n in range(6)]
        for call in range(calls):
            item = prepared[call % 6]
            for number, group in enumerate(groups):
                findings.check(f"call {call}, group {number}: {item.case}", item.complaint(item.call(group)))
        first.close()
        for item in prepared:
            findings.check(f"after the first has closed: {item.case}", item.complaint(item.call(second)))
    findings.settle()


@pytest.mark.worlds("main+shared")
def test_two_groups_of_the_same_ranks(world: Any) -> None:
    world.run(the_same_ranks_twice, world.few(30, 6))


# ---- the allocator ----


def with_expandable_segments() -> None:
    """Nothing of a caller's is registered or exported, so the allocator may move its memory as it likes."""
    rng = np.random.default_rng(9)
    findings = Findings()
    with new_group() as group:
        for call in range(40):
            case = random_case(rng, call, 1 << 20)
            prepared = Prepared(group, case)
            findings.check(f"eager {case}", prepared.complaint(prepared.call(group)))
            if call % 8 == 0:
                graph = Graph(group, [prepared])
                graph.replay()
                findings.check(f"replayed {case}", graph.complaint())
                del graph
            if call % 10 == 9:
                torch.cuda.empty_cache()
        assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()), "they are not on"
    findings.settle()


@pytest.mark.needs_cuda
def test_expandable_segments(pair_on: int | None) -> None:
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "FUSEDCOMM_TIMEOUT_S": "12"}
    run_ranks(2, with_expandable_segments, env=env, gpus=pair_on)
