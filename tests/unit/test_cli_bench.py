"""The benchmark's measuring, its peers and what it reports, without ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusedcomm.cli.bench import harness, report
from fusedcomm.cli.bench.cases import Case, Inputs
from fusedcomm.cli.bench.collectives import ALL_REDUCE, FUSED, OurAllReduce, OurFused, eager_add_norm_quant
from fusedcomm.cli.bench.command import TOKENS
from fusedcomm.cli.bench.harness import Effort, OneRank, measure
from fusedcomm.cli.bench.job import Job, tuned
from fusedcomm.cli.bench.registry import Peer, Registry, WrongResultError
from fusedcomm.cli.bench.targets import TARGETS, judge
from fusedcomm.cli.bench.worker import Spec
from fusedcomm.cli.main import main
from fusedcomm.comm.tuning import Tuning
from fusedcomm.groups import custom_setup


class Clock:
    """Time that passes only when a runner says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Takes the given seconds a call in turn, and can be wrong."""

    def __init__(self, clock: Clock, seconds: float | Iterator[float], log: list[str] | None = None) -> None:
        self.clock, self.log = clock, [] if log is None else log
        self.seconds = seconds
        self.ready = 0
        self.right = True
        self.name = "runner"

    def reset(self, calls: int) -> None:
        self.ready = calls
        self.batch_seconds = self.seconds if isinstance(self.seconds, float) else next(self.seconds)
        self.log.append(self.name)

    def call(self, index: int) -> None:
        assert index < self.ready  # inputs were made ready for every call
        self.clock.now += self.batch_seconds

    def check(self) -> None:
        if not self.right:
            raise WrongResultError("sum: wrong")


def test_median_of_rounds_and_enough_calls_a_batch() -> None:
    clock = Clock()
    [timing] = measure([FakeRunner(clock, 0.001)], OneRank(), Effort(rounds=5, batch_s=0.04), clock)
    assert timing.slowest_s == pytest.approx(0.001)
    assert 40 <= timing.calls <= 42
    assert timing.rounds == 5


def test_one_slow_round_does_not_count() -> None:
    def seconds() -> Iterator[float]:
        yield from [0.01] * 2  # warm-up and calibration
        yield from [0.01, 0.5, 0.01, 0.01, 0.01]

    clock = Clock()
    [timing] = measure([FakeRunner(clock, seconds())], OneRank(), Effort(rounds=5, batch_s=0.04), clock)
    assert timing.slowest_s == pytest.approx(0.01)


def test_peers_take_turns() -> None:
    clock, log = Clock(), []
    runners = [FakeRunner(clock, 0.01, log), FakeRunner(clock, 0.02, log)]
    runners[0].name, runners[1].name = "a", "b"
    measure(runners, OneRank(), Effort(rounds=3, batch_s=0.01), clock)
    assert log[-6:] == ["a", "b"] * 3


def test_calls_follow_rank_0_and_the_slowest_rank_counts() -> None:
    class TwoRanks(OneRank):
        def from_first_rank(self, number: int) -> int:
            return 7

        def of_all_ranks(self, number: float) -> list[float]:
            return [number, 3 * number]

    clock = Clock()
    [timing] = measure([FakeRunner(clock, 0.002)], TwoRanks(), Effort(rounds=3), clock)
    assert timing.calls == 7
    assert timing.slowest_s == pytest.approx(0.006)
    assert len(timing.rank_medians_s) == 2


def test_wrong_result_stops_the_measurement() -> None:
    clock = Clock()
    runner = FakeRunner(clock, 0.01)
    runner.right = False
    with pytest.raises(WrongResultError, match="sum"):
        measure([runner], OneRank(), Effort(rounds=2), clock)


def test_calls_are_bounded() -> None:
    clock = Clock()
    [timing] = measure([FakeRunner(clock, 1e-9)], OneRank(), Effort(rounds=1), clock)
    assert timing.calls == harness.MAX_CALLS


def test_peer_registered_twice() -> None:
    registry = Registry()
    peer = Peer("op", "name", lambda job, inputs: FakeRunner(Clock(), 1.0))
    registry.add(peer)
    with pytest.raises(ValueError, match="name"):
        registry.add(peer)
    assert registry.peers("op") == [peer]
    assert registry.peers("other") == []


def names(spec: Spec, *, with_mpi: bool = True) -> list[str]:
    return [f"{p.op}/{p.name}" for p in spec.chosen_peers(with_mpi=with_mpi)]


def test_choosing_peers() -> None:
    everything = names(Spec("", ""))
    assert {f"{ALL_REDUCE}/mpi", f"{FUSED}/gloo", f"{FUSED}/ours:fused_norm"} <= set(everything)
    assert not any("mpi" in name for name in names(Spec("", ""), with_mpi=False))
    assert names(Spec("", "", peers=["ours"])) == [f"{ALL_REDUCE}/ours", f"{FUSED}/ours"]
    assert names(Spec("", "", peers=[f"{FUSED}/gl*"])) == [f"{FUSED}/gloo"]
    assert names(Spec("", "", ops=[FUSED], tunings=[{"spins": 0}], peers=["*[spins=0]"])) == [f"{FUSED}/ours[spins=0]"]


def test_spec_survives_the_way_to_the_ranks() -> None:
    spec = Spec("out", "command", tunings=[{"spins": 3}], tokens=[5])
    assert Spec(**json.loads(spec.to_json())) == spec


def test_tuned() -> None:
    plain = custom_setup.choose_tuning(8, 2, 1 << 20)
    with tuned(spins=123):
        assert custom_setup.choose_tuning(8, 2, 1 << 20) == Tuning(**{**vars(plain), "spins": 123})
    assert custom_setup.choose_tuning(8, 2, 1 << 20) == plain
    with pytest.raises(ValueError, match=r"spin.*got nonsense"), tuned(nonsense=1):
        pass


@pytest.fixture
def job() -> Iterator[Job]:
    threads = torch.get_num_threads()
    job = Job()
    yield job
    job.close()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [OurAllReduce, OurFused])
def test_our_runners_on_one_rank(job: Job, kind: Any) -> None:
    inputs = Inputs(Case(3, 256, torch.bfloat16), 0, 1)
    runner = kind(job, inputs)
    timings = measure([runner], job, Effort(rounds=2, batch_s=0.001))
    assert timings[0].slowest_s > 0
    runner.reset(1)
    with pytest.raises((WrongResultError, ValueError)):
        runner.check()  # poisoned


def test_eager_is_what_the_reference_does() -> None:
    inputs = Inputs(Case(4, 512, torch.bfloat16), 1, 3)
    inputs.check_result_close(*eager_add_norm_quant(inputs.sum, inputs.residual, inputs.weight))
    fp8, scale, residual = eager_add_norm_quant(inputs.sum, inputs.residual, inputs.weight)
    with pytest.raises(WrongResultError, match="residual"):
        inputs.check_result_close(fp8, scale, residual + 1)
    with pytest.raises(WrongResultError, match="fp8"):
        inputs.check_result_close(fp8, scale * torch.nan, residual)


def test_sums_are_checked() -> None:
    inputs = Inputs(Case(2, 64, torch.bfloat16), 0, 4)
    inputs.check_sum_equal(inputs.sum)
    inputs.check_sum_close(inputs.sum)
    off = inputs.sum.clone()
    off[1, 3] += 1
    with pytest.raises(WrongResultError, match="1 of 128"):
        inputs.check_sum_equal(off)
    with pytest.raises(WrongResultError):
        inputs.check_sum_close(torch.full_like(off, torch.nan))


def record(**fields: Any) -> dict[str, Any]:
    about = {"hidden": 4096, "dtype": "bf16", "date": "2026-11-20T00:00:00", "machine": {"cpu": "c", "cores": 2}}
    return {"op": FUSED, "peer": "ours", "tokens": 1, "us": 100.0, "world_size": 8, **about, **fields}


def test_targets() -> None:
    records = [record(), record(peer="gloo", us=5000.0), record(peer="mpi", us=500.0)]
    verdicts = {v.what: v for v in judge(records)}
    gloo = verdicts[f"8 ranks, 1 tokens: {FUSED} against gloo"]
    assert (gloo.measured, gloo.is_met) == ("50x", True)
    assert not verdicts[f"8 ranks, 1 tokens: {FUSED} against mpi"].is_met
    assert len(verdicts) == 2  # nothing is said about what was not measured
    [set_up, slab] = judge([set_up_record()])
    assert (set_up.is_met, slab.is_met) == (False, True)


def set_up_record() -> dict[str, Any]:
    fields = record(op="set_up", seconds=1.5, slab_bytes=16 << 20)
    del fields["us"], fields["tokens"]
    return fields


def test_default_sizes_serve_every_target() -> None:
    for target in TARGETS:
        assert set(target.tokens) <= set(TOKENS.get(target.world_size, Spec("", "").tokens))


def test_report_and_plot(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    records = [record(), record(peer="mpi", us=500.0), record(peer="ours[spins=0]", tokens=4), set_up_record()]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert report.read_records(file) == records
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    report.print_report(records, console)
    text = console.export_text()
    assert "500 (5.00)" in text
    assert "ours[spins=0]" in text
    assert "not met" in text
    report.save_plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "speed=11"], "tuning: expected fields among"),
        (["--peers", "nccl"], "--peers: expected names of peers, got nccl"),
        (["--ops", "all_gather"], "--ops: expected all_reduce or"),
        (["--hidden", "100"], "--hidden: expected a multiple of 128, got 100"),
        (["--hidden", "256,512"], "--hidden: expected one row length on CPU, got 2"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_input_starts_no_ranks(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "collectives", "--device", "cpu", *arguments]) == 2
    assert f"fusedcomm bench: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--tp", "0"], ["--tokens", "1,x"], ["--vary", "spins"], ["--with-tuning", "a=b"]]
)
def test_bad_numbers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "collectives", "--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert "expected" in capsys.readouterr().err
