"""The benchmarks on GPUs, as far as they go without one: measuring, peers, verdicts, tables, and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import fusedcomm
from fusedcomm.cli.bench import report
from fusedcomm.cli.bench.cases import Case, Inputs
from fusedcomm.cli.bench.gpu import collectives, command, decode, flashinfer, harness, markdown, ours, peers
from fusedcomm.cli.bench.gpu.catalogue import Catalogue
from fusedcomm.cli.bench.gpu.decode_stack import QWEN3_8B, DecodeStack, LocalGroup, make_inputs
from fusedcomm.cli.bench.gpu.harness import AbsentError, Eager, Effort, Entry
from fusedcomm.cli.bench.gpu.interference import measure_loaded
from fusedcomm.cli.bench.gpu.job import NO_MULTICAST, forbid_multicast
from fusedcomm.cli.bench.gpu.kernels import kernels_of
from fusedcomm.cli.bench.gpu.ops import ALL_REDUCE, FUSED, NORM, OPS
from fusedcomm.cli.bench.gpu.shape import Limits, Shape, poison
from fusedcomm.cli.bench.gpu.spec import FEW_TOKENS, MANY_CALLS, WAYS, DecodeSpec, Spec
from fusedcomm.cli.bench.gpu.targets import BARS, NOT_MEASURED, best_peer, judge
from fusedcomm.cli.bench.job import tuned
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.main import main
from fusedcomm.comm import tuning


class FakeDevice:
    """Time passes as the cases say; a graph is its calls again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.device = torch.device("cpu")
        self.captures = 0

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        return queue

    def hold(self) -> None:
        self.now += 1e-3

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def finish(self) -> None:
        return None


class FakeRanks:
    """One rank that speaks for several; another rank may object."""

    def __init__(self, objections: list[str] | None = None, others: float = 1.0) -> None:
        self.objections, self.others = objections or [], others
        self.aligned = 0
        self.aligned_beside_load = 0

    def align(self) -> None:
        self.aligned += 1

    def align_beside_load(self) -> None:
        self.aligned_beside_load += 1

    def first_reason(self, reason: str) -> str:
        other = self.objections.pop(0) if self.objections else ""
        return reason or (f"rank 1: {other}" if other else "")

    def from_first_rank(self, number: int) -> int:
        return number

    def of_all_ranks(self, number: float) -> list[float]:
        return [number, self.others * number]


class FakeCase:
    """Takes the given seconds a call."""

    def __init__(self, device: FakeDevice, seconds: float, log: list[str] | None = None, name: str = "case") -> None:
        self.device, self.seconds, self.name = device, seconds, name
        self.log = [] if log is None else log
        self.right: Callable[[], bool] = lambda: True

    def reset(self) -> None:
        self.log.append(self.name)

    def call(self, index: int) -> None:
        self.device.now += self.seconds

    def check(self) -> None:
        if not self.right():
            raise WrongResultError("sum: wrong")

    def facts(self) -> dict[str, object]:
        return {"algorithm": "one_shot"}


def prepared(device: FakeDevice, ranks: FakeRanks, *cases: FakeCase, calls: int = 4) -> list[Entry]:
    made = [(ALL_REDUCE, case.name, lambda case=case: case) for case in cases]
    return harness.prepare(made, ranks, device, Effort(calls=calls))


# ---- measuring ----


def test_time_of_a_call_on_the_slowest_rank() -> None:
    device, ranks = FakeDevice(), FakeRanks(others=2.0)
    [entry] = prepared(device, ranks, FakeCase(device, 5e-6))
    harness.measure([entry], ranks, device, Effort(calls=4, budget_s=0.01), clock=lambda: device.now)
    assert entry.timing is not None
    assert entry.timing.slowest_s == pytest.approx(1e-5)
    assert entry.timing.rank_medians_s[0] == pytest.approx(5e-6)
    assert entry.timing.calls == 4
    assert entry.facts == {"algorithm": "one_shot"}


def test_cases_take_turns_and_ranks_align_before_each() -> None:
    device, ranks, log = FakeDevice(), FakeRanks(), []
    entries = prepared(device, ranks, FakeCase(device, 1e-6, log, "a"), FakeCase(device, 2e-6, log, "b"))
    log.clear()
    aligned = ranks.aligned
    harness.measure(entries, ranks, device, Effort(calls=4, min_rounds=3, max_rounds=3), clock=lambda: device.now)
    assert log == ["a", "b"] * 6  # two rounds to warm up, three that count, and the last check
    assert ranks.aligned - aligned == 10


def test_a_case_that_waits_for_the_device_is_called_in_place_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts on an idle device, and the device is held up again for the graphs behind it."""
    device, ranks, log = FakeDevice(), FakeRanks(), []
    cases = [FakeCase(device, seconds, log, name) for name, seconds in (("a", 1e-6), ("b", 2e-6), ("c", 3e-6))]
    made = [(ALL_REDUCE, c.name, lambda c=c: Eager(c, calls=2) if c.name == "b" else c) for c in cases]
    entries = harness.prepare(made, ranks, device, Effort(calls=4))
    assert device.captures == 2
    assert entries[1].facts == {"algorithm": "one_shot", "eager": True}
    for name in ("hold", "finish"):
        original = getattr(device, name)
        monkeypatch.setattr(device, name, lambda name=name, original=original: (log.append(name), original()))
    log.clear()
    harness.measure(entries, ranks, device, Effort(calls=4, min_rounds=1, max_rounds=1), clock=lambda: device.now)
    assert log[:8] == ["hold", "a", "b", "finish", "hold", "c", "finish", "hold"]
    for entry, seconds, calls in zip(entries, (1e-6, 2e-6, 3e-6), (4, 2, 4), strict=True):
        assert entry.timing is not None
        assert (entry.timing.rank_medians_s[0], entry.timing.calls) == (pytest.approx(seconds), calls)


def test_rounds_fill_the_budget() -> None:
    effort = Effort(budget_s=1.0, min_rounds=7, max_rounds=100)
    assert [effort.rounds(s) for s in (0.02, 1.0, 1e-9)] == [50, 7, 100]


@pytest.mark.parametrize("error", [AbsentError("no such thing here"), RuntimeError("CUDA error: out of memory")])
def test_a_case_that_cannot_be_made_is_absent_with_the_reason(error: Exception) -> None:
    device, ranks = FakeDevice(), FakeRanks()

    def fail() -> FakeCase:
        raise error

    [absent, present] = harness.prepare(
        [(FUSED, "broken", fail), (FUSED, "fine", lambda: FakeCase(device, 1e-6))], ranks, device, Effort(calls=2)
    )
    assert str(error) in absent.absent
    assert absent.absent.startswith("RuntimeError") == isinstance(error, RuntimeError)
    assert absent.case is None
    harness.measure([absent, present], ranks, device, Effort(calls=2))
    assert absent.timing is None
    assert present.timing is not None


def test_what_one_rank_cannot_do_no_rank_does() -> None:
    device = FakeDevice()
    ranks = FakeRanks(objections=["", "", "out of memory"])
    [entry] = prepared(device, ranks, FakeCase(device, 1e-6))
    assert entry.absent == "rank 1: out of memory"
    assert entry.case is None
    assert device.captures == 1  # it stopped after that step, and not before


@pytest.mark.parametrize("wrong_at", [1, 2, 3])  # eager, first replay, last replay
def test_wrong_results_count_for_nothing(wrong_at: int) -> None:
    device, ranks = FakeDevice(), FakeRanks()
    case = FakeCase(device, 1e-6)
    checks = iter(range(1, 10))
    case.right = lambda: next(checks) != wrong_at
    entries = prepared(device, ranks, case)
    harness.measure(entries, ranks, device, Effort(calls=4))
    assert entries[0].absent == "WrongResultError: sum: wrong"
    assert entries[0].timing is None


def test_host_cost_is_the_slowest_ranks() -> None:
    device, ranks = FakeDevice(), FakeRanks(others=3.0)
    seconds = harness.host_seconds(FakeCase(device, 2e-6), device, ranks, clock=lambda: device.now)
    assert seconds == pytest.approx(6e-6)


def test_host_cost_of_another_form() -> None:
    device, ranks = FakeDevice(), FakeRanks()
    case, slower = FakeCase(device, 2e-6), FakeCase(device, 3e-6)
    seconds = harness.host_seconds(case, device, ranks, clock=lambda: device.now, call=slower.call)
    assert seconds == pytest.approx(3e-6)


class FakeLoad:
    """Slows cases down while it runs; it may be short at first."""

    def __init__(self, device: FakeDevice, case: FakeCase, factor: float, lasts: float = 1.0) -> None:
        self.device, self.case, self.factor, self.lasts = device, case, factor, lasts
        self.asked: list[float] = []
        self.alone = case.seconds

    def run(self, seconds: float) -> float:
        self.asked.append(seconds)
        self.case.seconds = self.alone * self.factor
        return self.device.now + self.lasts * seconds


def test_a_load_on_another_stream() -> None:
    device, ranks = FakeDevice(), FakeRanks()
    case = FakeCase(device, 1e-4)
    entries = prepared(device, ranks, case)
    load = FakeLoad(device, case, factor=1.5)
    aligned = ranks.aligned
    [figure] = measure_loaded(entries, load, ranks, device, calls=4, rounds=1)
    assert (ranks.aligned - aligned, ranks.aligned_beside_load) == (1, 1)
    assert figure is not None
    assert figure.loaded_s == pytest.approx(1.5 * figure.alone_s)


def test_a_load_that_ends_early_is_repeated_longer() -> None:
    device, ranks = FakeDevice(), FakeRanks()
    case = FakeCase(device, 1e-4)
    entries = prepared(device, ranks, case)
    load = FakeLoad(device, case, factor=1.0, lasts=0.1)
    measure_loaded(entries, load, ranks, device, calls=4, rounds=1)
    assert load.asked == sorted(load.asked)
    assert len(load.asked) > 1


def test_a_graph_that_waits_for_the_load_has_no_figure_and_others_have() -> None:
    device, ranks = FakeDevice(), FakeRanks()
    waits, runs = FakeCase(device, 1e-4, name="waits"), FakeCase(device, 1e-4, name="runs")
    entries = prepared(device, ranks, waits, runs)

    class FullDevice(FakeLoad):
        def run(self, seconds: float) -> float:
            self.asked.append(seconds)
            waits.seconds = seconds  # four of them: longer than the load
            return self.device.now + seconds

    load = FullDevice(device, waits, 1.0)
    first, second = measure_loaded(entries, load, ranks, device, calls=4, rounds=3)
    assert first is None
    assert second is not None
    assert second.loaded_s == pytest.approx(1e-4)
    assert len(load.asked) == 8 + 3  # what has no figure is not tried again


# ---- peers ----


def make_shape(tokens: int = 6, hidden: int = 256, ranks: int = 1, calls: int = 5, sets: int = 2) -> Shape:
    case = Case(tokens, hidden, torch.bfloat16)
    inputs = [Inputs(case, 0, ranks, seed=seed) for seed in range(sets)]
    return Shape(case, inputs, calls, Limits(tokens, hidden, tokens * hidden, torch.bfloat16))


def run_case(case: Any, calls: int) -> None:
    case.reset()
    for index in range(calls):
        case.call(index)
    case.check()


def test_sets_of_inputs_differ_but_for_the_weight() -> None:
    first, second = make_shape().inputs
    assert not torch.equal(first.x, second.x)
    assert torch.equal(first.weight, second.weight)


def test_poison_is_nan_in_every_format() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        tensor = torch.zeros(3).to(dtype)
        poison(tensor)
        assert tensor.float().isnan().all()


class InPlace(peers._InPlace):
    """A sum that some rows miss."""

    missed: tuple[int, ...] = ()

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.inputs[0].x.new_empty(shape.calls, *shape.inputs[0].x.shape))
        self.calls = 0

    def sum(self, row: torch.Tensor) -> None:
        index = self.calls % self.shape.calls
        self.calls += 1
        if index not in self.missed:
            row.copy_(self.shape.at(index).sum)


def test_sums_in_place_are_checked_row_by_row() -> None:
    shape = make_shape(ranks=2)
    case = InPlace(shape)
    run_case(case, 3)  # eager: only these rows are looked at
    case.reset()
    with pytest.raises(WrongResultError):
        case.check()  # replayed: all rows count, and none was summed
    case = InPlace(shape)
    case.missed = (4,)
    with pytest.raises(WrongResultError):
        run_case(case, shape.calls)


def test_copy_copies_the_rows_in_turn() -> None:
    shape = make_shape()
    case = peers.Copy(SimpleNamespace(), shape)  # type: ignore[arg-type]
    run_case(case, 2)
    assert torch.equal(case.outs[1], shape.inputs[1].x)


def test_a_replayed_graph_of_several_steps_is_checked() -> None:
    """A replay passes no call: the results are those of the last captured one, and stale ones are found."""
    shape = make_shape(calls=2)
    case = peers.NcclThenEager(SimpleNamespace(nccl=None), shape)  # type: ignore[arg-type]
    case.sum = lambda row: None  # type: ignore[method-assign]  # one rank: its rows are the sum
    case.reset()
    with pytest.raises(ValueError, match="expected a call before it"):
        case.check()
    for index in range(2):
        case.call(index)
    case.check()
    result = case.result
    case.reset()
    with pytest.raises(WrongResultError):
        case.check()
    assert result is not None
    last = shape.at(1)
    for target, source in zip(result, case.tail(case.rows[1], last.residual, last.weight), strict=True):
        target.copy_(source)
    case.check()


class FakeJob:
    """A job as the peers see it."""

    def __init__(self, world_size: int = 2, rank: int = 0, nccl: object = "group") -> None:
        self.world_size, self.rank, self._nccl = world_size, rank, nccl

    @property
    def nccl(self) -> object:
        if self._nccl is None:
            raise AbsentError("ranks share GPUs")
        return self._nccl

    def first_reason(self, reason: str) -> str:
        return reason


class FakeFlashInfer:
    """flashinfer.comm and flashinfer.jit.comm with the signatures of 0.6.12; it knows the inputs' sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.workspaces: list[dict[str, Any]] = []
        self.results: dict[int, Inputs] = {}
        self.destroyed = self.built = 0
        self.is_aot, self.build_error = False, ""
        comm, jit = ModuleType("flashinfer.comm"), ModuleType("flashinfer.jit.comm")
        comm.allreduce_fusion = self.fusion  # type: ignore[attr-defined]
        comm.AllReduceFusionPattern = SimpleNamespace(kAllReduce=0, kARResidualRMSNorm=1)  # type: ignore[attr-defined]
        comm.create_allreduce_fusion_workspace = self.create  # type: ignore[attr-defined]
        jit.gen_trtllm_comm_module = lambda: self  # type: ignore[attr-defined]
        for name, module in (("flashinfer.comm", comm), ("flashinfer.jit.comm", jit)):
            monkeypatch.setitem(sys.modules, name, module)

    def create(self, **options: Any) -> FakeFlashInfer:
        self.workspaces.append(options)
        return self

    def build(self, verbose: bool) -> None:
        self.built += 1
        if self.build_error:
            raise RuntimeError(self.build_error)

    def destroy(self) -> None:
        self.destroyed += 1

    def fusion(self, *, input: torch.Tensor, pattern: int, output: torch.Tensor, **options: Any) -> None:
        self.calls.append(options)
        own = self.results[input.data_ptr()]
        if pattern == 0:
            output.copy_(own.sum)
        else:
            assert own.result.norm is not None
            options["norm_out"].copy_(own.result.norm)
            options["residual_out"].copy_(own.result.residual)

    def serve(self, shape: Shape) -> None:
        self.results = {own.x.data_ptr(): own for own in shape.inputs}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    return FakeFlashInfer(monkeypatch)


def ready(job: FakeJob, shape: Shape) -> flashinfer.FlashInfer:
    found = flashinfer.FlashInfer(job, shape.limits)  # type: ignore[arg-type]
    found.start_build()
    found.finish_build()
    return found


@pytest.mark.parametrize("variant", flashinfer.VARIANTS)
@pytest.mark.parametrize("kind", [flashinfer.FlashInferAllReduce, flashinfer.FlashInferNorm])
def test_flashinfer_is_called_as_asked(library: FakeFlashInfer, kind: Any, variant: flashinfer.Variant) -> None:
    shape = make_shape(ranks=2)
    library.serve(shape)
    found = ready(FakeJob(), shape)
    case = flashinfer.make_case(found, kind, variant, shape)
    run_case(case, 3)
    assert {(c["use_oneshot"], c["launch_with_pdl"]) for c in library.calls} == {tuple(variant)}
    [workspace] = library.workspaces
    assert workspace["backend"] == "trtllm"
    assert workspace["max_token_num"] * workspace["hidden_dim"] >= shape.limits.elements
    case.reset()
    with pytest.raises(WrongResultError):
        case.check()
    found.close()
    found.close()
    assert library.destroyed == 1


def test_flashinfer_is_built_by_the_first_rank_unless_it_comes_built(library: FakeFlashInfer) -> None:
    shape = make_shape(ranks=2)
    ready(FakeJob(rank=1), shape)
    assert library.built == 0
    ready(FakeJob(), shape)
    assert library.built == 1
    library.is_aot = True
    ready(FakeJob(), shape)
    assert library.built == 1


@pytest.mark.parametrize(
    ("job", "reason"), [(FakeJob(world_size=3), "2, 4, 8, 16 ranks, got 3"), (FakeJob(nccl=None), "ranks share GPUs")]
)
def test_flashinfer_absent_with_the_reason(library: FakeFlashInfer, job: FakeJob, reason: str) -> None:
    shape = make_shape(ranks=2)
    with pytest.raises(AbsentError, match=reason):
        flashinfer.make_case(ready(job, shape), flashinfer.FlashInferNorm, flashinfer.VARIANTS[0], shape)


def test_flashinfer_that_does_not_compile(library: FakeFlashInfer, capsys: pytest.CaptureFixture[str]) -> None:
    shape = make_shape(ranks=2)
    library.build_error = "Ninja build failed.\nnvcc: not found"
    with pytest.raises(AbsentError, match="its build failed: nvcc: not found"):
        flashinfer.make_case(ready(FakeJob(), shape), flashinfer.FlashInferNorm, flashinfer.VARIANTS[0], shape)
    assert "Ninja" in capsys.readouterr().err


def test_flashinfer_not_installed() -> None:
    shape = make_shape(ranks=2)
    with pytest.raises(AbsentError, match="not installed"):
        ready(FakeJob(), shape).workspace()


def test_flashinfers_two_shot_form_takes_more_tokens_than_ranks(library: FakeFlashInfer) -> None:
    shape = make_shape(tokens=2, ranks=2)
    two_shot = next(v for v in flashinfer.VARIANTS if not v.one_shot)
    with pytest.raises(AbsentError, match="more tokens than there are ranks"):
        flashinfer.make_case(ready(FakeJob(), shape), flashinfer.FlashInferNorm, two_shot, shape)


@pytest.fixture
def group() -> Iterator[fusedcomm.GroupCoordinator]:
    with fusedcomm.GroupCoordinator() as group:
        yield group


@pytest.mark.parametrize("op", OPS)
def test_ours_on_one_rank(op: str, group: fusedcomm.GroupCoordinator) -> None:
    shape = make_shape()
    case = ours.KINDS[op](group, shape, None)
    run_case(case, 3)
    assert case.facts()["stage"] == {ALL_REDUCE: "custom", NORM: "fused_norm", FUSED: "fused"}[op]
    case.reset()
    with pytest.raises(WrongResultError):
        case.check()  # poisoned
    before = group.stats()
    case.call_new(1)
    assert sum(group.stats().values()) > sum(before.values())
    with pytest.raises(WrongResultError):
        case.check()  # into other tensors


def test_ours_writes_to_the_tensors_of_each_set(group: fusedcomm.GroupCoordinator) -> None:
    shape = make_shape(sets=3)
    for kind in (ours.OurNorm, ours.OurFused):
        case: Any = kind(group, shape, None)
        pointers = [t.data_ptr() for out in case.outs for t in out if isinstance(t, torch.Tensor)]
        assert len(set(pointers)) == len(pointers)
        run_case(case, 5)
        assert case.last == 1
        assert bool(case.outs[2].residual.isfinite().all())
        assert pointers == [t.data_ptr() for out in case.outs for t in out if isinstance(t, torch.Tensor)]


def test_an_algorithm_that_was_not_taken_is_absent(group: fusedcomm.GroupCoordinator) -> None:
    case = ours.OurAllReduce(group, make_shape(), "two_shot")
    run_case(case, 2)
    with pytest.raises(AbsentError, match="neither algorithm, not two_shot"):
        case.facts()  # one rank has nobody to share with


def test_no_algorithm_where_the_process_group_serves() -> None:
    with fusedcomm.GroupCoordinator(settings=fusedcomm.Settings(disable=True)) as group:
        with pytest.raises(AbsentError, match="process_group serves"):
            ours.OurFused(group, make_shape(), "one_shot")
        assert not ours.OurFused(group, make_shape(), None).is_exact


def test_catalogue() -> None:
    limits = Limits(8, 256, 2048, torch.bfloat16)
    tunings = [{"one_shot_max_bytes": 7}]
    everything = Catalogue(FakeJob(), Spec("", "", tunings=tunings), limits, 1)  # type: ignore[arg-type]
    assert {"copy", "nccl", "symm_mem:one_shot", "symm_mem:two_shot", "flashinfer:two_shot+pdl", "ours"} <= set(
        everything.names(ALL_REDUCE)
    )
    assert {"flashinfer:one_shot", "ours", "ours:custom"} <= set(everything.names(NORM))
    assert {"nccl+eager", "nccl+compile", "ours:one_shot", "ours:two_shot", "ours:fused_norm"} <= set(
        everything.names(FUSED)
    )
    chosen = Catalogue(FakeJob(), Spec("", "", peers=[f"{FUSED}/ours*"]), limits, 1)  # type: ignore[arg-type]
    assert chosen.names(ALL_REDUCE) == chosen.names(NORM) == []
    assert all(name.startswith("ours") for name in chosen.names(FUSED))
    tuned_only = Spec("", "", tunings=tunings, peers=["ours[one_shot_max_bytes=7]"])
    assert Catalogue(FakeJob(), tuned_only, limits, 1).names(NORM) == tuned_only.peers  # type: ignore[arg-type]
    assert not chosen.wants_flashinfer
    assert not chosen.wants_compile
    assert everything.wants_flashinfer
    assert everything.wants_compile


def test_forced_algorithms_reach_the_tuning_of_gpus() -> None:
    plain = tuning.choose_gpu_tuning(4)
    with tuned(one_shot_max_bytes=0):
        assert tuning.choose_gpu_tuning(4).one_shot_max_bytes == 0
    with tuned(spins=3):  # a field that GPUs do not have
        assert tuning.choose_gpu_tuning(4) == plain
    assert tuning.choose_gpu_tuning(4) == plain


# ---- the run ----


class OneRankJob(FakeRanks):
    """What a rank process has, on the CPU and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.rank, self.world_size = FakeDevice(), 0, 1
        self.groups: list[fusedcomm.GroupCoordinator] = []
        self.group = self.group_with()

    @property
    def nccl(self) -> object:
        raise AbsentError("one rank has no process group")

    def group_with(self, stage: str = "fused", tuning: Any = None) -> fusedcomm.GroupCoordinator:
        self.groups.append(fusedcomm.GroupCoordinator())
        return self.groups[-1]

    def inputs(self, case: Case, sets: int) -> list[Inputs]:
        return [Inputs(case, 0, 1, seed=seed) for seed in range(sets)]

    def of_all_ranks(self, number: float) -> list[float]:
        return [number]

    def be_patient(self, seconds: float | None = None) -> None:
        return None

    def say(self, text: str) -> None:
        return None

    def count_kernels(self, run: Callable[[], object]) -> Counter[str]:
        run()
        return Counter({"kernel": 14})

    def close(self) -> None:
        for group in self.groups:
            group.close()


@pytest.fixture
def job() -> Iterator[OneRankJob]:
    job = OneRankJob()
    yield job
    job.close()


def test_records_of_a_run(job: OneRankJob) -> None:
    spec = Spec("", "", tokens=[1, 3], bare_tokens=[9], hidden=[256], peers=["copy", "nccl", "ours"], calls=3)
    spec = dataclasses.replace(spec, load_tokens=[], budget_s=1e-4)
    records = list(collectives._records(spec, job))  # type: ignore[arg-type]
    timed = {(r["op"], r["peer"], r["tokens"]): r for r in records if "us" in r}
    assert {key for key in timed if key[1] == "ours"} == {
        *((op, "ours", tokens) for op in OPS for tokens in (1, 3)),
        (ALL_REDUCE, "ours", 9),
    }
    assert timed[FUSED, "ours", 3]["stage"] == "fused"
    assert all(r["calls"] == 3 and r["hidden"] == 256 and r["message_bytes"] for r in timed.values())
    absent = [r for r in records if "absent" in r]
    assert {(r["peer"], r["absent"]) for r in absent} == {("nccl", "one rank has no process group")}
    assert {(r["op"], r["peer"], r["tokens"]) for r in records if "host_us" in r} == {
        (ALL_REDUCE, "copy", 1),
        *((op, "ours", 1) for op in OPS),
    }
    allocating = {(r["op"], r["peer"]) for r in records if r.get("host_alloc_us", 0) > 0}
    assert allocating == {(op, "ours") for op in OPS}
    assert not [r for r in records if "host_us" in r and "host_alloc_us" in r]


TINY = dataclasses.replace(
    QWEN3_8B, hidden_size=256, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=2
)


def test_decode_stack_is_the_same_by_every_way() -> None:
    results = {}
    first: DecodeStack | None = None
    with torch.inference_mode():
        for way, settings in WAYS.items():
            with fusedcomm.GroupCoordinator(settings=fusedcomm.Settings(**settings)) as group:
                for own in (group, LocalGroup(group, way)):
                    stack = DecodeStack(TINY, own)
                    if first is None:
                        first = stack
                        stack.fill()
                    stack.share_weights(first)
                    results[way, type(own).__name__] = stack.forward(make_inputs(TINY, group, 3, 4))
    expected = results["fused", "GroupCoordinator"]
    assert expected.shape == (3, TINY.hidden_size)
    assert expected.isfinite().all()
    assert expected.float().std() > 0.1
    for result in results.values():  # a sum of one rank is what is local of it
        assert torch.equal(result, expected)


def test_records_of_a_decode_run(job: OneRankJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "QWEN3_8B", TINY)
    spec = DecodeSpec("", "", batches=[1, 2], layers=2, context=3, ways=["custom", "fused"], rounds=2)
    job.device.hold = lambda: None  # type: ignore[method-assign]
    real_seconds = job.device.seconds
    job.device.seconds = lambda start, end: real_seconds(start, end) + 1e-3  # type: ignore[method-assign]
    with torch.inference_mode():
        records = list(decode._records(spec, job, job.groups))  # type: ignore[arg-type]
    assert [(r["way"], r["batch"]) for r in records] == [("custom", 1), ("fused", 1), ("custom", 2), ("fused", 2)]
    for r in records:
        assert r["same_bits"]
        assert r["finite"]
        assert r["kernels_per_layer"] == 7
        assert r["communication_share"] == 0


def test_steps_take_turns() -> None:
    device, ranks = FakeDevice(), FakeRanks(others=2.0)
    log: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            device.now += seconds

        return run

    times = decode.time_steps({"a": step("a", 1.0), "b": step("b", 3.0)}, device, ranks, rounds=3)
    assert log == ["a", "b"] * 5
    assert times == {"a": [pytest.approx(1.0), pytest.approx(2.0)], "b": [pytest.approx(3.0), pytest.approx(6.0)]}


def test_kernels_of_a_trace() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm"},
        {"ph": "X", "cat": "kernel", "name": "gemm"},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD"},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "nccl:all_reduce"},
        {"ph": "M", "name": "process_name"},
    ]
    assert kernels_of(events) == {"gemm": 2, "Memcpy DtoD": 1}


def test_multicast_stays_off() -> None:
    environ = {"NCCL_NVLS_ENABLE": "1", "HOME": "/"}
    forbid_multicast(environ)
    assert environ == {"HOME": "/", **NO_MULTICAST}
    assert command.launch_environ(4).items() >= NO_MULTICAST.items()


# ---- what it says ----


def record(**fields: Any) -> dict[str, Any]:
    about = {
        "benchmark": "collectives",
        "device": "cuda",
        "world_size": 4,
        "hidden": 4096,
        "dtype": "bf16",
        "date": "2026-11-20T00:00:00",
        "machine": {"cpu": "c", "cores": 2, "gpu": "G", "gpus": 4},
    }
    return {"op": FUSED, "peer": "ours", "tokens": 1, "us": 4.0, **about, **fields}


def verdict(records: list[dict[str, Any]], part: str) -> Any:
    [found] = [v for v in judge(records) if part in v.what]
    return found


def test_bars_compare_with_the_best_form_of_a_peer() -> None:
    records = [
        record(),
        record(op=NORM, peer="flashinfer:two_shot", us=9.0),
        record(op=NORM, peer="flashinfer:one_shot+pdl", us=5.0),
        record(op=NORM, peer="ours", us=1.0),
        record(op=ALL_REDUCE, peer="flashinfer:one_shot", us=4.5),
        record(peer="nccl+eager", us=29.0),
        record(peer="ours:one_shot", us=3.0),
    ]
    found = verdict(records, f"/ flashinfer's {NORM}")
    assert (found.is_met, found.target) == (False, "<= 0.70")
    assert "0.80 (4.00 / 5.00 us, flashinfer:one_shot+pdl)" in found.measured
    assert verdict(records, "moonshot").is_met
    assert verdict(records, "nccl+eager").is_met
    records[0]["us"] = 3.5
    assert verdict(records, f"/ flashinfer's {NORM}").is_met


def test_a_bar_without_its_peer_is_not_met_and_says_so() -> None:
    found = verdict([record()], f"/ flashinfer's {NORM}")
    assert (found.measured, found.is_met) == (NOT_MEASURED, False)
    assert judge([record(peer="nccl+eager")]) == []  # nothing of ours: nothing to judge


def test_bare_sums_are_held_against_every_library_but_not_a_copy() -> None:
    own = record(op=ALL_REDUCE, tokens=512, us=20.0)
    others = [
        record(op=ALL_REDUCE, tokens=512, peer="copy", us=2.0),
        record(op=ALL_REDUCE, tokens=512, peer="nccl", us=45.0),
        record(op=ALL_REDUCE, tokens=512, peer="symm_mem:two_shot", us=25.0),
        record(op=ALL_REDUCE, tokens=512, peer="ours:one_shot", us=1.0),
    ]
    assert best_peer(others, ALL_REDUCE, 4096, 512, ("nccl", "symm_mem:")).name == "symm_mem:two_shot"  # type: ignore[union-attr]
    found = verdict([own, *others], f"{ALL_REDUCE} / nccl or symm_mem or flashinfer")
    assert found.is_met
    assert "20.00 / 25.00" in found.measured


def test_every_default_size_has_a_bar() -> None:
    measured = {(op, tokens) for _, tokens, ops in Spec("", "").shapes() for op in ops}
    assert {(bar.op, tokens) for bar in BARS for tokens in bar.tokens} <= measured


def test_host_and_load_bars() -> None:
    host = record(host_us=7.0)
    load = record(alone_us=4.0, loaded_us=6.0)
    del host["us"], load["us"]
    allocating = {k: v for k, v in host.items() if k != "host_us"} | {"host_alloc_us": 11.0}  # no target is on it
    others = [allocating, {**host, "peer": "nccl+eager", "host_us": 90.0}]
    verdicts = {v.measured: v.is_met for v in judge([host, load, *others])}
    assert verdicts == {"7.00 us": True, "1.50 (6.00 / 4.00 us)": False}


def decode_record(way: str, us: float, **fields: Any) -> dict[str, Any]:
    more = {"way": way, "batch": 1, "local_us": us / 2, "communication_share": 0.5, "kernels_per_layer": 9.0}
    about = {"layers": 36, "context": 1024, "same_bits": way != "process_group", "difference": 0.25}
    found = record(**{"benchmark": "decode", "op": "decode", "peer": way, "us": us, **more, **about, **fields})
    del found["tokens"]
    return found


@pytest.mark.parametrize(("fused_us", "met"), [(4000.0, True), (6000.0, False)])
def test_fused_is_to_be_the_fastest_way(fused_us: float, met: bool) -> None:
    records = [decode_record("custom", 5000.0), decode_record("fused", fused_us)]
    [found] = judge(records)
    assert found.is_met == met
    assert judge(records[1:]) == []


def test_report_and_plot(tmp_path: Path) -> None:
    host, load = record(host_us=7.5), record(op=ALL_REDUCE, alone_us=4.0, loaded_us=6.0)
    del host["us"], load["us"]
    absent = record(peer="nccl", absent="ranks [of this run] share GPUs")
    del absent["us"]
    records = [
        record(),
        record(hidden=7168, us=5.25),
        record(peer="nccl+eager", us=2000.0),
        record(op=NORM, peer="flashinfer:one_shot", us=8.0),
        *(record(peer=f"peer {i}", us=10.0 + i) for i in range(12)),
        host,
        {k: v for k, v in host.items() if k != "host_us"} | {"host_alloc_us": 9.25},
        load,
        absent,
        decode_record("process_group", 9000.0),
        decode_record("fused", 4000.0),
    ]
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    report.print_report(records, console)
    text = console.export_text()
    for part in (
        "H 7168",
        "5.25",
        "2,000 (500.00)",
        "7.50",
        "9.25",
        "6.00 (1.50)",
        "same bits",
        "off by 0.25",
        "50.0%",
    ):
        assert part in text
    assert "allreduce_rmsnorm_quant/nccl (H 4096, 1 tokens): ranks [of this run] share GPUs" in text
    assert "fused (4,000 us)" in text
    report.save_plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_markdown() -> None:
    records = [
        record(),
        record(tokens=2048, us=80.0),
        record(op=NORM, peer="flashinfer:one_shot", us=8.0),
        record(op=NORM, peer="flashinfer:two_shot", us=6.0),
        decode_record("fused", 4000.0),
        decode_record("custom", 5000.0, batch=16),
    ]
    table = markdown.collectives_tables(records)
    assert "| 4 ranks, H = 4096 | 1 | 2,048 |" in table
    assert "| **fusedcomm, with FP8 quantisation** | 4.0 | 80.0 |" in table
    assert "| with quantisation / FlashInfer without | 0.67 |  |" in table
    decoded = markdown.decode_tables(records)
    assert "| decode step, 4 ranks | batch 1 | batch 16 |" in decoded
    assert "| fused | 4.00 ms, 9 kernels a layer, 50% communication |  |" in decoded


# ---- the command line ----


def parse(*arguments: str) -> argparse.Namespace:
    from fusedcomm.cli.bench.command import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_specs_from_the_command_line() -> None:
    plain = command.make_spec(parse("collectives"), "out")
    assert plain == Spec("out", plain.command)
    changed = command.make_spec(
        parse("collectives", "--tokens", "1,8", "--hidden", "256", "--peers", "ours,nccl", "--budget", "0.5",
              "--rounds", "3", "--load-tokens", "none", "--patience", "60", "--vary", "one_shot_max_bytes=1,2"),
        "out",
    )  # fmt: skip
    assert isinstance(changed, Spec)
    assert (changed.tokens, changed.bare_tokens, changed.hidden) == ([1, 8], [], [256])
    assert (changed.peers, changed.budget_s, changed.min_rounds) == (["ours", "nccl"], 0.5, 3)
    assert (changed.load_tokens, changed.patience_s) == ([], 60)
    assert changed.tunings == [{"one_shot_max_bytes": 1}, {"one_shot_max_bytes": 2}]
    with pytest.raises(ValueError, match="--tune"):
        command.make_spec(parse("collectives", "--tune"), "out")
    decoded = command.make_spec(parse("decode", "--batches", "4", "--ways", "custom,fused", "--rounds", "9"), "out")
    assert decoded == DecodeSpec("out", decoded.command, batches=[4], ways=["custom", "fused"], rounds=9)
    assert Spec(**json.loads(changed.to_json())) == changed
    assert DecodeSpec(**json.loads(decoded.to_json())) == decoded


def test_calls_in_a_graph() -> None:
    assert [Spec("", "").calls_for(t) for t in (1, FEW_TOKENS, FEW_TOKENS + 1)] == [
        MANY_CALLS,
        MANY_CALLS,
        Effort.calls,
    ]
    assert Spec("", "", calls=3).effort(1).calls == 3


def test_only_the_bare_sum_at_the_largest_size() -> None:
    shapes = Spec("", "", tokens=[1], hidden=[256, 512]).shapes()
    assert shapes == [(h, t, ops) for h in (256, 512) for t, ops in ((1, list(OPS)), (4096, [ALL_REDUCE]))]
    assert Spec("", "", ops=[FUSED], tokens=[1], hidden=[256]).shapes() == [(256, 1, [FUSED])]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("", "", ops=["all_gather"]), "--ops"),
        (Spec("", "", hidden=[4096, 100]), "--hidden: expected a multiple of 128, got 100"),
        (Spec("", "", budget_s=0), "--budget"),
        (Spec("", "", tunings=[{"spins": 1}]), "expected fields among one_shot_max_bytes, got spins"),
        (DecodeSpec("", "", ways=["fast"]), "--ways"),
        (DecodeSpec("", "", layers=0), "--layers"),
    ],
)
def test_bad_specs(spec: Spec | DecodeSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.check()


def test_where_the_results_go() -> None:
    assert command.output_paths(parse("collectives")) == (None, None)
    json_path, plot = command.output_paths(parse("decode", "--output", "folder", "--plot", "p.png"))
    assert (json_path, plot) == (Path("folder/decode.jsonl"), Path("p.png"))


def test_launch_command() -> None:
    spec = Spec("out", "command")
    launched = command.launch_command("collectives", 4, spec)
    assert launched[launched.index("--nproc-per-node") + 1] == "4"
    assert launched[-2:] == ["fusedcomm.cli.bench.gpu.collectives", spec.to_json()]


def test_decode_takes_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--device", "cpu"]) == 2
    assert "decode: expected GPUs" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "collectives", "--device", "cuda"]) == 2
    assert "--device: expected a GPU" in capsys.readouterr().err
