"""What goes wrong on GPUs: ranks that die, stay away or leave, memory that runs out, arguments that do not fit.

A wait on the device ends at the deadline or when its peer is gone; the next call, or check(), says so.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import DEAD, device, run_ranks
from ranked import new_group, raises, works
from trials import OPS, Case, Graph, Prepared, algorithm

import fusedcomm
from fusedcomm import (
    GroupBrokenError,
    GroupClosedError,
    GroupCoordinator,
    PeerDiedError,
    PeerTimeoutError,
    ScaleLayout,
    Settings,
    native,
)

DIED_S = 4.0  # two seconds until a watcher sees it, and room for a busy machine
ROWS = {"one_shot": 4, "two_shot": 256}


def until_raised(group: GroupCoordinator, call: Callable[[], Any], kind: type[GroupBrokenError], *parts: str) -> float:
    """Seconds until `call`, repeated with a check after each, raises; what it says must hold every part."""
    start = time.monotonic()

    def again() -> None:
        while time.monotonic() - start < 60:
            call()
            if group.device.type == "cuda":
                torch.cuda.synchronize()  # the kernel ends, whatever happened
            group.check()

    text = raises(kind, again, *parts)
    elapsed = time.monotonic() - start
    refused(group, text)
    return elapsed


def refused(group: GroupCoordinator, text: str) -> None:
    """After a failure every call is refused, with what happened; closing works, and closing twice."""
    x, w = torch.ones(4, 256, device=group.device), torch.ones(256, device=group.device)
    calls: list[Callable[[], Any]] = [
        lambda: group.all_reduce(x),
        lambda: group.allreduce_rmsnorm(x, x, w, 1e-6),
        lambda: group.allreduce_rmsnorm_quant(x, x, w, 1e-6),
        lambda: group.fused_allreduce_rmsnorm(x, x, w, 1e-6),
        lambda: group.all_gather(x),
        group.barrier,
        group.check,
    ]
    for call in calls:
        again = raises(GroupBrokenError, call, "failed earlier", "refuses")
        assert text in again
    assert "broken" in repr(group)
    start = time.monotonic()
    group.close()
    group.close()
    assert "closed" in repr(group)
    assert time.monotonic() - start < 5, "close waited for a peer"


# ---- a rank that dies ----


def killed(op: str, forced: str, dead: int, replayed: bool) -> float:
    """`dead` is killed while the others wait for it, in eager calls or in a replayed graph."""
    group = fusedcomm.init_distributed(device=device())
    group.close()
    with algorithm(forced):
        group = new_group()
    works(group)
    prepared = Prepared(group, Case(op, (ROWS[forced], 1024), torch.bfloat16))
    graph = Graph(group, [prepared]) if replayed else None
    dist.barrier()
    if group.rank == dead:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    call = graph.replay if graph is not None else lambda: prepared.call(group)
    elapsed = until_raised(group, call, PeerDiedError, f"rank {dead}")
    assert elapsed < 0.3 + DIED_S, f"noticed after {elapsed:.1f} s"
    fusedcomm.destroy_distributed()
    return elapsed


@pytest.mark.parametrize(
    ("op", "forced", "replayed"),
    [
        pytest.param(OPS[0], "one_shot", False, marks=pytest.mark.smoke),
        (OPS[2], "two_shot", False),
        (OPS[1], "one_shot", True),
    ],
)
def test_a_killed_rank(pair_on: int | None, op: str, forced: str, replayed: bool) -> None:
    times = run_ranks(2, killed, op, forced, 1, replayed, launcher="spawn", expect_dead={1}, gpus=pair_on)
    assert times[1] is DEAD


def test_a_killed_rank_among_three(gpus: int, pair_on: int | None) -> None:
    where = None if pair_on is None else min(gpus, 3)
    times = run_ranks(3, killed, OPS[2], "one_shot", 0, False, launcher="spawn", expect_dead={0}, gpus=where)
    assert times[0] is DEAD


def killed_in_mid_run(dead: int) -> None:
    """In a long run of large calls that nothing waits for: the queue drains, and the error names the rank."""
    group = fusedcomm.init_distributed(device=device())
    works(group)
    x = torch.ones(600, 4096, dtype=torch.bfloat16, device=group.device)
    dist.barrier()
    start = time.monotonic()
    if group.rank == dead:
        while time.monotonic() - start < 0.5:
            group.all_reduce(x)
        os.kill(os.getpid(), signal.SIGKILL)

    def call() -> None:
        for _ in range(20):
            group.all_reduce(x)

    elapsed = until_raised(group, call, PeerDiedError, f"rank {dead}")
    assert elapsed < 0.5 + DIED_S, f"noticed after {elapsed:.1f} s"
    fusedcomm.destroy_distributed()


def test_a_rank_killed_in_mid_run(pair_on: int | None) -> None:
    run_ranks(2, killed_in_mid_run, 1, launcher="spawn", expect_dead={1}, gpus=pair_on)


# ---- a rank that stays away ----


def stays_away(op: str, forced: str) -> None:
    with algorithm(forced):
        group = new_group(timeout=1.5)
    last = group.world_size - 1
    works(group)
    prepared = Prepared(group, Case(op, (ROWS[forced], 1024), torch.bfloat16))
    dist.barrier()
    if group.rank == last:
        dist.barrier()
        # It comes late: what the others had sent may still complete a call, but not many.
        until_raised(group, lambda: prepared.call(group), PeerDiedError, "rank")
    else:
        parts = (op, f"rank {group.rank}", f"rank {last}")
        elapsed = until_raised(group, lambda: prepared.call(group), PeerTimeoutError, *parts)
        assert 1.0 < elapsed < 8.0, f"raised after {elapsed:.1f} s"
        dist.barrier()
    dist.barrier()
    with new_group() as another:  # the ranks live on, and may try again
        works(another)


@pytest.mark.worlds("main+shared")
@pytest.mark.parametrize(("op", "forced"), [("all_reduce", "one_shot"), ("allreduce_rmsnorm", "two_shot")])
def test_a_rank_that_stays_away(world: Any, op: str, forced: str) -> None:
    world.run(stays_away, op, forced)


def late_but_there() -> None:
    """The deadline is that of one wait: a rank that comes before it is no error."""
    with new_group(timeout=4.0) as group:
        for late in range(min(group.world_size, 2)):
            if group.rank == late:
                time.sleep(1.5)
            works(group)
            group.check()


def test_a_late_rank_is_no_error(world: Any) -> None:
    world.run(late_but_there)


def closes_early() -> None:
    group = new_group()
    works(group)
    dist.barrier()
    if group.rank == 1:
        time.sleep(0.2)
        group.close()
        raises(GroupClosedError, lambda: group.all_reduce(torch.ones(3, device=group.device)), "closed")
        raises(GroupClosedError, group.check, "closed")
    else:
        x = torch.ones(4, 256, device=group.device)
        elapsed = until_raised(group, lambda: group.all_reduce(x), PeerDiedError, "rank 1")
        assert elapsed < DIED_S
    dist.barrier()
    with new_group() as another:
        works(another)


@pytest.mark.worlds("pair")
def test_a_rank_that_closes_early(world: Any) -> None:
    world.run(closes_early)


def one_broken_among_two() -> None:
    """A failure is its group's own: another one of the same ranks goes on."""
    broken, sound = new_group(timeout=1.0), new_group()
    dist.barrier()
    if broken.rank == 0:
        x = torch.ones(8, device=broken.device)
        until_raised(broken, lambda: broken.all_reduce(x), PeerTimeoutError, "all_reduce")
    dist.barrier()
    works(sound)
    sound.check()
    broken.close()
    works(sound)
    sound.close()


@pytest.mark.needs_cuda
@pytest.mark.worlds("pair")
def test_a_failure_stays_within_its_group(world: Any) -> None:
    world.run(one_broken_among_two)


# ---- memory ----


def without_memory(failing: str) -> None:
    """Rank 1 cannot allocate (or map) its slab: all take the process group together, and rank 0 warns once."""
    gpu = native.load_gpu()
    assert gpu is not None, "the GPU library is not there"

    def fails(*arguments: Any) -> int:
        arguments[-1].value = b"out of memory (injected)"
        return 0

    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dist.get_rank() == 1:
            monkeypatch.setattr(gpu, failing, fails)
        group = new_group(settings=Settings(deterministic=True))
    with group:
        plan = group.explain("all_reduce", (4, 128), torch.float32)
        assert plan.stage == "process_group", str(plan)
        assert "rank 1" in str(plan)
        assert "injected" in str(plan)
        for op in OPS:
            prepared = Prepared(group, Case(op, (5, 512), torch.bfloat16))
            assert prepared.complaint(prepared.call(group)) == ""
    texts = [str(w.message) for w in caught if "custom all-reduce" in str(w.message)]
    assert len(texts) == (dist.get_rank() == 0), texts
    with new_group() as another:  # nothing of the failed set-up stands in the way
        assert another.explain("all_reduce", (4, 128), torch.float32).stage == "custom"
        works(another)


@pytest.mark.needs_cuda
@pytest.mark.worlds("main")
@pytest.mark.parametrize("failing", [pytest.param("slab_allocate", marks=pytest.mark.smoke), "slab_open"])
def test_no_memory_on_one_rank(world: Any, failing: str) -> None:
    world.run(without_memory, failing)


def more_than_there_is() -> None:
    """A slab larger than what the GPU of rank 0 has left (the largest: 2 GiB): really out of memory."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(free - (1 << 30), 0), dtype=torch.uint8, device=device()) if dist.get_rank() == 0 else None
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with new_group(settings=Settings(buffer_mb=16384, deterministic=True)) as group:
            assert group.explain("all_reduce", (4, 128), torch.float32).stage == "process_group"
            works(group)
    del taken
    torch.cuda.empty_cache()
    dist.barrier()
    with new_group() as group:
        works(group)


@pytest.mark.needs_cuda
@pytest.mark.worlds("pair")
def test_more_memory_than_there_is(world: Any) -> None:
    if world.shared:
        pytest.skip("ranks that share a GPU cannot leave one of them without memory")
    world.run(more_than_there_is)


# ---- arguments ----


def bad_arguments() -> None:
    """On one rank alone, before anything is sent: the others never notice."""
    with new_group() as group:
        where = group.device
        x, w = torch.ones(4, 256, device=where), torch.ones(256, device=where)
        cpu, cpu_w = torch.ones(4, 256), torch.ones(256)
        elsewhere = [cpu]
        if torch.cuda.device_count() > 1:
            elsewhere.append(cpu.to(torch.device("cuda", (where.index + 1) % torch.cuda.device_count())))
        calls: list[tuple[Callable[[], Any], tuple[str, ...]]] = []
        for other in elsewhere:
            place = str(other.device)
            calls += [
                (lambda other=other: group.all_reduce(other), ("x: expected", f"got {place}")),
                (lambda other=other: group.all_reduce(x, out=other), ("out: expected device", place)),
                (lambda other=other: group.allreduce_rmsnorm(other, None, w, 1e-6), ("x: expected", place)),
                (lambda other=other: group.allreduce_rmsnorm(x, other, w, 1e-6), ("residual: expected device", place)),
                (lambda other=other: group.allreduce_rmsnorm_quant(other, x, w, 1e-6), ("x: expected", place)),
                (
                    lambda other=other: group.fused_allreduce_rmsnorm_quant_per_group(x, other, w, 1e-6),
                    ("residual: expected device", place),
                ),
            ]
        calls += [
            (lambda: group.allreduce_rmsnorm(x, x, cpu_w, 1e-6), ("weight: expected device", "cpu")),
            (lambda: group.allreduce_rmsnorm_quant(x, x, cpu_w, 1e-6), ("weight: expected device", "cpu")),
            (lambda: group.all_reduce(x.double()), ("x: expected dtype", "float64")),
            (lambda: group.all_reduce(x.int()), ("x: expected dtype", "int32")),
            (lambda: group.all_reduce(torch.tensor(1.0, device=where)), ("x: expected at least one dimension",)),
            (lambda: group.all_reduce(x, out=x[:2]), ("out: expected shape (4, 256)", "(2, 256)")),
            (lambda: group.all_reduce(x, out=x.bfloat16()), ("out: expected dtype",)),
            (lambda: group.all_reduce(x, out=torch.ones(256, 4, device=where).t()), ("out: expected a contiguous",)),
            (lambda: group.allreduce_rmsnorm(x, x[:3], w, 1e-6), ("residual: expected shape",)),
            (lambda: group.allreduce_rmsnorm(x, x.half(), w, 1e-6), ("residual: expected dtype",)),
            (lambda: group.allreduce_rmsnorm(x, x, w[:255], 1e-6), ("weight: expected shape (256,)",)),
            (lambda: group.allreduce_rmsnorm(x, x, w, -1.0), ("eps: expected",)),
            (lambda: group.allreduce_rmsnorm(x, x, w, float("nan")), ("eps: expected",)),
            (lambda: group.allreduce_rmsnorm_quant(x, x, w, 1e-6, group_size=100), ("group_size: expected one of",)),
            (
                lambda: group.allreduce_rmsnorm_quant(x[:, :96].contiguous(), None, w[:96], 1e-6, group_size=64),
                ("group_size: expected a divisor of H = 96",),
            ),
            (
                lambda: group.allreduce_rmsnorm_quant(x, x, w, 1e-6, scale_layout="row_major"),  # type: ignore[arg-type]
                ("scale_layout: expected a ScaleLayout",),
            ),
        ]
        for _ in range(2):  # before any good call of these shapes, and after it
            for number, (call, parts) in enumerate(calls):
                if group.rank == number % group.world_size:
                    try:
                        raises(ValueError, call, *parts)
                    except BaseException as error:
                        raise AssertionError(f"bad call {number}, expected {parts}: {error!r}") from error
            works(group)
            group.allreduce_rmsnorm_quant(x, x, w, 1e-6, scale_layout=ScaleLayout.ROW_MAJOR)
        group.check()


@pytest.mark.smoke
@pytest.mark.needs_cuda
@pytest.mark.worlds("main")
def test_bad_arguments(world: Any) -> None:
    world.run(bad_arguments)


def overlapping_out() -> None:
    with new_group() as group:
        room = torch.ones(5, 256, device=group.device)
        raises(ValueError, lambda: group.all_reduce(room[:4], out=room[1:]), "out: expected", "overlaps")
        works(group)


@pytest.mark.worlds("pair")
def test_an_out_that_overlaps_x(world: Any) -> None:
    world.run(overlapping_out)


# ---- what the group tells ----


def traced() -> None:
    with new_group() as group:
        calls = [
            ("all_reduce", (3, 512), torch.float32),
            ("allreduce_rmsnorm", (5, 1024), torch.bfloat16),
            ("allreduce_rmsnorm_quant", (7, 2048), torch.float16),
        ]
        prepared = [Prepared(group, Case(*call)) for call in calls]
        for item in prepared:
            item.call(group)
        graph = Graph(group, prepared[:2])
        graph.replay()
        records = group.trace()
        if group.device.type != "cuda":
            assert records == []
            return
        # three eager calls, the graph's warm-up, its replay; a capture runs nothing
        assert len(records) == 3 + 2 + 2, records
        numbers = [record.op_number for record in records]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), numbers
        for record, index in zip(records, (0, 1, 2, 0, 1, 0, 1), strict=True):
            op, shape, dtype = calls[index]
            assert (record.op, record.dtype, record.algorithm) == (op, dtype, "one_shot"), record
            # the bare sum has no rows of its own
            assert record.rows * record.hidden == shape[0] * shape[1], record
            if op != "all_reduce":
                assert (record.rows, record.hidden) == shape, record
        for _ in range(600):
            prepared[0].call(group)
        many = group.trace()
        assert len(many) >= 100  # the last ones
        assert many[-1].op_number == numbers[-1] + 600
    assert group.trace() == []


@pytest.mark.smoke
@pytest.mark.worlds("main")
def test_trace(world: Any) -> None:
    world.run(traced)


def explained() -> None:
    with new_group() as group:
        plans = [
            group.explain(op, shape, torch.bfloat16)
            for op in OPS
            for shape in ((1, 4096), (3, 100), (16, 16384), (16, 16392), (4096, 7168))
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [str(plan) for plan in plans])
        assert all(texts == everyone[0] for texts in everyone), "the ranks explain differently"
        by_name = {(plan.op, index % 5): plan for index, plan in enumerate(plans)}
        assert by_name["all_reduce", 1].stage == "custom"
        if group.device.type == "cuda":
            for index, number in ((1, "100"), (3, "16392")):
                plan = by_name["allreduce_rmsnorm", index]
                assert plan.stage == "custom", str(plan)
                assert number in plan.reasons[fusedcomm.Stage.FUSED_NORM], str(plan)
            assert by_name["allreduce_rmsnorm_quant", 0].algorithm == "one_shot"
        assert by_name["allreduce_rmsnorm", 2].stage == "fused_norm"
        assert by_name["allreduce_rmsnorm_quant", 0].stage == "fused"
        assert by_name["allreduce_rmsnorm_quant", 4].algorithm == "two_shot"


@pytest.mark.worlds("main+shared")
def test_explain(world: Any) -> None:
    world.run(explained)


def debugged() -> None:
    """FUSEDCOMM_DEBUG=1: calls that differ by rank fail on all before anything is launched."""
    with new_group(settings=Settings(debug=True)) as group:
        works(group)
        x = torch.ones(3 + (group.rank == 0), 256, device=group.device)
        raises(fusedcomm.CallMismatchError, lambda: group.all_reduce(x), "different calls", "rank 0")
    with new_group() as another:
        works(another)


@pytest.mark.worlds("pair")
def test_debug_compares_calls(world: Any) -> None:
    world.run(debugged)
