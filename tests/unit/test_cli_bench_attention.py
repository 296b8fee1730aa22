"""The benchmark of the attention ops, as far as it goes without a GPU: every case at tiny sizes, and what it says."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fusedcomm.cli.bench import report
from fusedcomm.cli.bench.attention import (
    dual_stream,
    flashinfer,
    indexer,
    indexer_cache,
    kv_materialize,
    logits,
    mla_prepare,
    qk_norm_rope,
    sparse_cache,
    sparse_mla,
)
from fusedcomm.cli.bench.attention.catalogue import ATTENTION
from fusedcomm.cli.bench.attention.sparse_cache import V4, V32
from fusedcomm.cli.bench.attention.targets import BARS
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.command import add_arguments
from fusedcomm.cli.bench.gpu.harness import AbsentError
from fusedcomm.cli.bench.gpu.targets import NOT_MEASURED
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.single import bars, command, worker
from fusedcomm.cli.bench.single import bench as bench_module
from fusedcomm.cli.bench.single import flashinfer as compiler
from fusedcomm.cli.bench.single.bench import Bench
from fusedcomm.cli.bench.single.benchmark import Benchmark
from fusedcomm.cli.bench.single.device import WallClock
from fusedcomm.cli.bench.single.machine import COPY, MACHINE, MATMUL
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.tables import markdown_tables, records_of
from fusedcomm.cli.bench.single.workload import Calls, Place, Plan, Workload
from fusedcomm.cli.main import main

FAMILIES = tuple(ATTENTION.makers)
TINY = Spec("", "", "cpu", calls=2, sets=2, budget_s=1e-3, min_rounds=2, tiny=True)
EAGER = ["copy", "torch", "separate+eager", "one_stream", "ours"]
"""The peers that need no compiler."""
PLACE = Place(torch.device("cpu"), Plan(2, 2, False))


def measured(spec: Spec) -> list[dict[str, Any]]:
    """The records of a run, also of one that ends with wrong results."""
    output = io.StringIO()
    try:
        worker.run(ATTENTION, spec, output)
    finally:
        RECORDS[:] = [json.loads(line) for line in output.getvalue().splitlines()]
    return list(RECORDS)


RECORDS: list[dict[str, Any]] = []
"""Those of the last run."""


# ---- every case ----


@pytest.mark.parametrize("op", FAMILIES)
def test_every_size_of_an_op(op: str) -> None:
    """Each checks its results in ``measured``: eager, replayed, and after the last round."""
    records = measured(dataclasses.replace(TINY, cases=[op], peers=EAGER))
    assert not [r for r in records if "absent" in r]
    own = [r for r in records if r["op"] == op]
    labels = [w.label for w in ATTENTION.workloads(TINY, op)]
    for label in labels:
        peers = {r["peer"] for r in own if r["label"] == label}
        assert peers >= ({"one_stream", "ours"} if op == "dual_stream" else {"copy", "torch", "ours"})
    for r in own:
        assert r["us"] > 0
        assert r["gbytes_per_s"] >= 0
        assert (r["calls"], r["sets"], r["device"], r["tiny"]) == (2, 2, "cpu", True)
        assert r["machine"]["cpu"]
        assert r["versions"]["torch"]
    assert [r["peer"] for r in records if r["op"] == MACHINE] == [COPY, MATMUL]


def broken(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with one element of what it writes off."""

    def run(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        target = options.get("out")
        if isinstance(target, tuple):
            target = target[1]
        if target is None:
            target = result[1] if isinstance(result, tuple) else args[1]  # k, or the tensor after the first
        flat = target.view(-1)
        if flat.dtype is torch.uint8:
            flat[-1] ^= 0x40
        else:
            flat[-1] += 1 + flat.abs().max()
        return result

    return run


@pytest.mark.parametrize(
    ("op", "module", "name"),
    [
        ("qk_norm_rope", qk_norm_rope, "fused_qk_norm_rope"),
        ("kv_materialize", kv_materialize, "fused_kv_materialize"),
        ("indexer_write", indexer, "indexer_k_quant_and_cache"),
        ("indexer_gather", indexer, "cp_gather_indexer_k_quant_cache"),
        ("indexer_logits", logits, "fp8_paged_mqa_logits"),
        ("sparse_mla_decode", sparse_mla, "sparse_mla_decode"),
        ("mla_prepare", mla_prepare, "fused_qk_rope_cat_and_cache_mla"),
    ],
)
def test_a_wrong_result_of_ours_is_an_error(
    op: str, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    sizes = [w.label for w in ATTENTION.workloads(TINY, op)]
    with pytest.raises(WrongResultError, match=f"{op}/{sizes[-1]}"):
        measured(dataclasses.replace(TINY, cases=[op], peers=["ours", "copy"]))
    own = {(r["label"], r["peer"]): r for r in RECORDS if r["op"] == op}
    for label in sizes:  # all of them were measured before it was said
        assert own[label, "ours"]["absent"].startswith("WrongResultError: ")
        assert own[label, "copy"]["us"] > 0


def one_result(op: str) -> tuple[Any, Any]:
    """A set of an op with what ours has made of it, and its check."""
    if op == "qk_norm_rope":
        qkv = qk_norm_rope.QKVSet(3, qk_norm_rope.Weights(PLACE), PLACE, 0)
        results = qk_norm_rope._ours(qkv)
        return dict(zip("qk", results, strict=True)), lambda: qkv.check(results)
    if op == "kv_materialize":
        kv = kv_materialize.KVSet(3, kv_materialize.rope_table(128, PLACE.device), PLACE, 0)
        kv_materialize.fused_kv_materialize(kv.kv, kv.weight, kv.cos_sin, kv.positions, kv_materialize.EPS, out=kv.out)
        return kv.out._asdict(), lambda: kv.check(kv.out)
    if op == "indexer_write":
        write = indexer.WriteSet(70, PLACE, 0)
        indexer.indexer_k_quant_and_cache(write.k, write.cache, write.slots, scale_fmt="ue8m0", preshuffle=True)
        found = indexer_cache.views(write.cache, True)
        return {"codes": found.codes, "scale": found.scales}, lambda: write.check(True)
    if op == "indexer_gather":
        gather = indexer.GatherSet(70, False, PLACE, 0)
        tables = gather.block_table, gather.cu_seq_lens
        indexer.cp_gather_indexer_k_quant_cache(gather.cache, gather.dst_k, gather.dst_scale, *tables)
        return {"dst_k": gather.dst_k, "dst_scale": gather.dst_scale}, lambda: gather.check(())
    prepare = mla_prepare.PrepareSet(3, 4, mla_prepare.rope_table(64, PLACE.device), PLACE, 0)
    parts = prepare.q_nope, prepare.q_pe, prepare.k_nope, prepare.k_pe
    where = prepare.cache, prepare.slots, prepare.positions, prepare.cos_sin, prepare.k_scale
    q = mla_prepare.fused_qk_rope_cat_and_cache_mla(*parts, *where, False, out=prepare.out)
    return {"q": q, "k": prepare.cache.view(torch.uint8)}, lambda: prepare.check((q, prepare.cache))


@pytest.mark.parametrize(
    ("op", "part"),
    [
        ("qk_norm_rope", "q"),
        ("qk_norm_rope", "k"),
        ("kv_materialize", "k"),
        ("kv_materialize", "v"),
        ("indexer_write", "codes"),
        ("indexer_write", "scale"),
        ("indexer_gather", "dst_k"),
        ("indexer_gather", "dst_scale"),
        ("mla_prepare", "q"),
        ("mla_prepare", "k"),
    ],
)
def test_each_part_of_a_result_is_looked_at(op: str, part: str) -> None:
    parts, check = one_result(op)
    check()
    wrong = parts[part]
    wrong.copy_(wrong ^ 0x80 if wrong.dtype is torch.uint8 else wrong * 1.05)  # FP8: the other sign
    with pytest.raises(WrongResultError, match=f"^{part}: "):
        check()


def test_two_streams_are_held_against_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side stream's results are compared with those that were made before, in order."""
    original = dual_stream.step
    calls = 0

    def racing(own: dual_stream.StepSet, overlapping: Any) -> Any:
        nonlocal calls
        calls += 1
        q, found = original(own, overlapping)
        if calls > TINY.sets:  # behind those that make what is expected
            found[0, 3] = 1e3
        return q, found

    monkeypatch.setattr(dual_stream, "step", racing)
    with pytest.raises(WrongResultError, match="dual_stream/h2/b2: WrongResultError: logits"):
        measured(dataclasses.replace(TINY, cases=["dual_stream"]))


def test_a_wrong_result_of_a_peer_makes_it_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_prepare, "unfused", broken(mla_prepare.unfused))
    records = measured(dataclasses.replace(TINY, cases=["mla_prepare"], peers=["torch", "ours"]))
    found = {r["peer"]: r for r in records if r["op"] == "mla_prepare"}
    assert "WrongResultError" in found["torch"]["absent"]
    assert found["ours"]["us"] > 0


def test_what_does_nothing_is_found_out() -> None:
    """Results that are there from the call before are poisoned before each replay."""
    works = True
    target = torch.zeros(3)

    def run(own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if works:
            target.copy_(own)
        return (target,)

    calls = Calls([torch.ones(3)], run, lambda own, results: check_close("out", results[0], own, 0.0))
    calls.reset()
    calls.call(0)
    calls.check()
    works = False
    calls.reset()
    calls.call(1)
    with pytest.raises(WrongResultError, match="out"):
        calls.check()


def test_calls_take_turns_with_the_sets() -> None:
    seen = []
    calls: Calls[int] = Calls([5, 6, 7], lambda own: seen.append(own) or (), lambda own, results: seen.append(-own))  # type: ignore[func-returns-value]
    for index in range(4):
        calls.call(index)
    calls.check()
    assert seen == [5, 6, 7, 5, -5]


def test_inputs_that_cannot_be_made() -> None:
    def fail(place: Place) -> list[Any]:
        raise RuntimeError("out of memory")

    size = Workload("qk_norm_rope", "7", {"tokens": 7}, fail, 1)
    [record] = worker._measured(TINY, Bench(TINY, WallClock()), size)
    assert record["absent"] == "RuntimeError: out of memory"
    assert (record["peer"], record["label"], record["tokens"]) == ("*", "7", 7)


class LostDevice(WallClock):
    """A device that breaks in a family."""

    def __init__(self, answers: int) -> None:
        self.answers = answers

    def finish(self) -> None:
        self.answers -= 1
        if self.answers < 0:
            raise RuntimeError("an illegal memory access was encountered")


def test_a_lost_device_ends_the_process_in_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Workload("indexer_write", "1", {}, lambda place: [], 1)
    monkeypatch.setattr(worker, "machine_workloads", lambda device, **options: [])
    makers = {op: lambda spec, op=op: [dataclasses.replace(fine, op=op)] for op in FAMILIES}
    broken = dataclasses.replace(ATTENTION, makers=makers)
    monkeypatch.setattr(worker, "open_device", lambda name: LostDevice(answers=2))
    spec = dataclasses.replace(TINY, cases=["indexer_*", "mla_prepare"])
    with pytest.raises(worker.DeviceLostError, match=r"^indexer_logits$"):
        worker.run(broken, spec, io.StringIO())
    rest = worker.after(ATTENTION, spec, "indexer_logits")
    assert ATTENTION.families(rest) == ["mla_prepare"]
    assert rest.broken == ["indexer_logits"]
    assert ATTENTION.families(worker.after(ATTENTION, rest, "mla_prepare")) == []


def test_the_process_begins_again_behind_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    spec = dataclasses.replace(TINY, output=str(tmp_path / "out"), cases=["mla_prepare", "dual_stream"])

    def lose(benchmark: Benchmark, spec: Spec, output: Any) -> None:
        raise worker.DeviceLostError(benchmark.families(spec)[0])

    monkeypatch.setattr(worker, "run", lose)
    monkeypatch.setattr(worker.os, "execv", lambda path, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["worker", spec.to_json()])
    with pytest.raises(SystemExit):
        worker.main(ATTENTION)  # which exec would not come back from
    again = Spec(**json.loads(started[0][-1]))
    assert started[0][1:3] == ["-m", "fusedcomm.cli.bench.attention"]
    assert (ATTENTION.families(again), again.broken) == (["dual_stream"], ["mla_prepare"])
    monkeypatch.setattr(sys, "argv", ["worker", again.to_json()])
    with pytest.raises(SystemExit, match="lost in mla_prepare, dual_stream"):
        worker.main(ATTENTION)
    assert len(started) == 1


def test_kernels_are_counted_when_all_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, device = dataclasses.replace(TINY, peers=EAGER), WallClock()
    bench = Bench(spec, device)
    [size] = ATTENTION.workloads(spec, "mla_prepare")
    list(bench.records(size))
    assert list(bench.kernel_records()) == []  # a CPU launches none
    monkeypatch.setattr(device, "device", SimpleNamespace(type="cuda"))

    def count(run: Callable[[], object], finish: Callable[[], None]) -> Counter[str]:
        run()
        return Counter({"fill": 1, "scatter": 2})

    monkeypatch.setattr(bench_module, "count_kernels", count)
    records = list(bench.kernel_records())
    assert [(r["peer"], r["kernels"]) for r in records] == [("copy", 3), ("torch", 3), ("ours", 3)]
    assert records[0]["kernel_names"] == {"scatter": 2, "fill": 1}
    assert records[0]["label"] == size.label


# ---- what the cases are made of ----


@pytest.mark.parametrize("preshuffle", [False, True])
def test_views_of_the_indexers_cache(preshuffle: bool) -> None:
    """Against the formulas of the two layouts, byte by byte."""
    cache = indexer_cache.new_cache(2, torch.device("cpu"))
    size = cache[0].numel()
    cache.view(2, size)[:] = torch.arange(size).to(torch.uint8)
    found = indexer_cache.views(cache, preshuffle)
    raw = cache.view(2, size)
    for block, o in [(0, 0), (1, 1), (0, 15), (1, 16), (0, 17), (1, 63)]:
        codes = indexer_cache.token_codes(found.codes, torch.tensor([block]), torch.tensor([o]))[0]
        for c in (0, 1, 15, 16, 100, 127):
            place = o // 16 * 2048 + c // 16 * 256 + o % 16 * 16 + c % 16 if preshuffle else o * 128 + c
            assert codes[c] == raw[block, place]
        scale = found.scales[block, o].reshape(1).view(torch.uint8)
        assert torch.equal(scale, raw[block, 64 * 128 + 4 * o :][:4])


def test_dequantised_tokens_of_both_sparse_caches() -> None:
    """Against the layouts' definitions, token by token."""
    for layout, stride in ((V4, 65 * 576), (V32, 64 * 656)):
        cache = sparse_cache.new_cache(layout, 130, PLACE)
        assert cache.stride() == (stride, layout.token_bytes, 1)
        assert len(cache) == 3
        for slot in (0, 1, 64, 191):
            block = bytes(cache[slot // 64].flatten().tolist())
            o = slot % 64
            if layout is V4:
                token = block[o * 576 : (o + 1) * 576]
                scales = [2.0 ** (b - 127) for b in block[64 * 576 + 8 * o :][:7]]
                rope = token[448:]
            else:
                token = block[o * 656 : (o + 1) * 656]
                scales = torch.frombuffer(bytearray(token[512:528]), dtype=torch.float32).tolist()
                rope = token[528:]
            codes = torch.frombuffer(bytearray(token[: layout.num_values]), dtype=torch.uint8)
            values = codes.view(torch.float8_e4m3fn).float()
            expected = [v * scales[i // layout.group] for i, v in enumerate(values.tolist())]
            expected += torch.frombuffer(bytearray(rope), dtype=torch.bfloat16).float().tolist()
            got = sparse_cache.dequantise(layout, cache, torch.tensor([slot]), torch.float32)[0]
            assert torch.equal(got, torch.tensor(expected))
            assert values.abs().amax() > 224  # a scale that is too large would waste the format


def test_indices_are_of_each_rows_own_tokens() -> None:
    slots, lens = sparse_mla._indices(3, 50, PLACE, 1)
    assert lens.tolist() == [50] * 3
    for row, own in enumerate(slots.tolist()):
        assert len(set(own)) == 50
        assert min(own) >= 200 * row
        assert max(own) < 200 * (row + 1)
    assert slots[0].tolist() != sorted(slots[0].tolist())


def test_bytes_and_operations_of_a_decode() -> None:
    size = sparse_mla.Size(V32, 128, 4, 2048)
    assert size.moved_bytes == 4 * (2048 * 656 + 128 * 576 * 2 + 128 * 512 * 2)
    assert size.flops == 4 * 2 * 128 * (576 + 512) * 2048
    small = sparse_mla.Size(V4, 64, 2, 128, 512)
    assert small.flops == 2 * 2 * 64 * 1024 * 640
    assert (small.label, size.label) == ("584/h64/b2/128+512", "656/h128/b4/2048")


def test_calls_and_sets_of_a_size() -> None:
    """A graph of about a millisecond; sets that do not fit the cache where the calls can take turns with as many."""
    cache = 60_000_000

    def plan(moved: int, flops: int = 0) -> Plan:
        return Workload("qk_norm_rope", "", {}, lambda place: [], moved, flops).plan(cache)

    assert plan(20_000) == Plan(64, 4, False)  # 1.3 MB in all: the cache serves them
    assert plan(4_000_000) == Plan(64, 45, True)
    assert plan(168_000_000) == Plan(23, 2, True)
    assert plan(314_000_000, 10**12).calls == 5
    bench = Bench(dataclasses.replace(TINY, calls=7, sets=3), WallClock())
    bench.cache_bytes = 299
    assert bench.plan(Workload("qk_norm_rope", "", {}, lambda place: [], 100)) == Plan(7, 3, True)
    bench.cache_bytes = 300
    assert bench.plan(Workload("qk_norm_rope", "", {}, lambda place: [], 100)) == Plan(7, 3, False)


def test_every_bar_is_about_a_default_size() -> None:
    spec = Spec("", "")
    labels = {op: {w.label for w in ATTENTION.workloads(spec, op)} for op in FAMILIES}
    for bar in BARS:
        assert set(bar.labels) <= labels[bar.op]
        assert bar.device == "cuda"


def test_sizes_where_a_bar_is_about_memory_do_not_fit_the_cache() -> None:
    spec = Spec("", "")
    for bar in BARS:
        if isinstance(bar, bars.BandwidthBar):
            for size in ATTENTION.workloads(spec, bar.op):
                if size.label in bar.labels:
                    assert size.plan(60 << 20).is_cold


# ---- FlashInfer ----


class FakeFlashInfer:
    """The functions of 0.6.12 that are used, in plain torch; ``wrong`` makes them so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[tuple[Any, ...]] = []
        self.built: list[str] = []
        self.build_error = ""
        modules: dict[str, dict[str, Any]] = {
            "norm": {"rmsnorm": self.rmsnorm},
            "rope": {"apply_rope_with_cos_sin_cache_inplace": self.rotate},
            "mla": {"BatchMLAPagedAttentionWrapper": self.wrapper},
            "utils": {"determine_mla_backend": lambda device: "fa3"},
            "jit": {"gen_batch_mla_module": lambda *args: self.spec(f"mla {args[0]} {args[5]} {args[6]}")},
            "jit.norm": {"gen_norm_module": lambda: self.spec("norm")},
            "jit.rope": {"gen_rope_module": lambda: self.spec("rope")},
        }
        for name, members in modules.items():
            module = ModuleType(f"flashinfer.{name}")
            for member, value in members.items():
                setattr(module, member, value)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(torch.nn.functional.rms_norm(x, weight.shape, weight, eps))

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head: int, table: torch.Tensor
    ) -> None:
        assert table.dtype is torch.float32
        for rows in (query, key):
            heads = rows.view(len(rows), -1, head)
            heads.copy_(qk_norm_rope.rotate(heads, table, positions))

    def wrapper(self, workspace: torch.Tensor, *, use_cuda_graph: bool, **buffers: torch.Tensor) -> Any:
        assert use_cuda_graph
        assert {len(buffers[name]) for name in ("qo_indptr", "kv_indptr")} == {len(buffers["kv_len_arr"]) + 1}
        return SimpleNamespace(plan=self.plan, run=self.run)

    def plan(self, *args: Any) -> None:
        self.plans.append(args)

    def run(self, nope: torch.Tensor, pe: torch.Tensor, keys: torch.Tensor, rope: torch.Tensor, out: Any) -> None:
        q = torch.cat((nope, pe), dim=-1).float()
        plan = next(p for p in self.plans if len(p[0]) == len(q) + 1 and p[4:9] == (q.shape[1], 512, 64, 1, False))
        for row in range(len(q)):
            slots = plan[2][plan[1][row] : plan[1][row] + plan[3][row]].long()
            values = keys[slots, 0].float()
            scores = plan[9] * (q[row] @ torch.cat((values, rope[slots, 0].float()), dim=-1).T)
            out[row] = scores.softmax(-1) @ values

    def spec(self, name: str) -> Any:
        def build(verbose: bool) -> None:
            if name == self.build_error:
                raise RuntimeError("ninja: build stopped\nnvcc: not found")
            self.built.append(name)

        return SimpleNamespace(is_aot=False, build=build)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    return FakeFlashInfer(monkeypatch)


def test_flashinfers_norm_and_rope(library: FakeFlashInfer) -> None:
    records = measured(dataclasses.replace(TINY, cases=["qk_norm_rope"], peers=["flashinfer"]))
    assert [r["label"] for r in records if r["peer"] == "flashinfer" and r["us"] > 0] == ["1", "3"]


def test_flashinfers_decode_of_a_bf16_cache(library: FakeFlashInfer) -> None:
    spec = dataclasses.replace(TINY, cases=["sparse_mla_decode"], peers=["flashinfer"], sets=1)
    v4, v32 = (r for r in measured(spec) if r["peer"] == "flashinfer")
    assert "for Blackwell" in v4["absent"]
    assert v32["us"] > 0


def test_flashinfer_not_installed() -> None:
    with pytest.raises(AbsentError, match="not installed"):
        flashinfer.norm_and_rope()


def test_flashinfers_modules_are_built(library: FakeFlashInfer) -> None:
    assert compiler.build(["norm", "rope", "mla"]) == []
    assert sorted(library.built) == ["mla fa3 512 64", "norm", "rope"]
    library.build_error = "rope"
    assert compiler.build(["norm", "rope"]) == ["rope: nvcc: not found"]


def test_which_modules_are_built_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    ended: list[int] = []

    def popen(arguments: list[str], *, start_new_session: bool) -> Any:
        assert start_new_session
        started.append(arguments)
        return SimpleNamespace(pid=42, poll=lambda: None, wait=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(command.os, "killpg", lambda group, number: ended.append(group))
    for cases, peers in ((["*"], ["*"]), (["sparse*"], ["ours", "flash*"]), (["indexer_*"], ["*"]), (["*"], ["ours"])):
        with command.building(ATTENTION, dataclasses.replace(Spec("", ""), cases=cases, peers=peers)):
            pass
    with command.building(ATTENTION, TINY):
        pass
    assert [arguments[3:] for arguments in started] == [["norm", "rope", "mla"], ["mla"]]
    assert ended == [42, 42]


# ---- what it says ----


def record(op: str, label: str, peer: str = "ours", **fields: Any) -> dict[str, Any]:
    about = {
        "benchmark": "attention",
        "device": "cuda",
        "world_size": 1,
        "date": "2026-11-20T00:00:00",
        "machine": {"cpu": "c", "cores": 2, "gpu": "G", "gpus": 1},
    }
    return {"op": op, "label": label, "peer": peer, "gbytes_per_s": 1.0, **about, **fields}


def verdict(records: list[dict[str, Any]], part: str) -> Any:
    [found] = [v for v in bars.judge(BARS, records) if part in v.what]
    return found


def test_the_bar_about_separate_kernels_is_about_the_fastest() -> None:
    records = [
        record("qk_norm_rope", "64", us=3.0),
        record("qk_norm_rope", "64", "separate", us=8.0),
        record("qk_norm_rope", "64", "flashinfer", us=5.0),
        record("qk_norm_rope", "64", "torch", us=4.0),  # none of them
        record("qk_norm_rope", "64", "copy", us=2.0),
    ]
    found = verdict(records, "qk_norm_rope/64")
    assert (found.target, found.is_met) == ("<= 0.50", False)
    assert found.measured == "0.60 (3.00 / 5.00 us, flashinfer); a copy of the same bytes takes 2.00 us"
    records[2]["us"] = 6.0
    found = verdict(records, "qk_norm_rope/64")
    assert (found.is_met, found.measured) == (True, "0.50 (3.00 / 6.00 us, flashinfer)")
    assert verdict(records[:1], "qk_norm_rope/64").measured == NOT_MEASURED
    assert bars.judge(BARS, records[1:]) == []  # nothing of ours: nothing to judge


@pytest.mark.parametrize(("ours", "met"), [(12.0, True), (13.0, False)])
def test_the_bars_about_bandwidth(ours: float, met: bool) -> None:
    label = "16384/preshuffled"
    records = [record("indexer_write", label, us=ours), record("indexer_write", label, "copy", us=10.0)]
    found = verdict(records, label)
    assert (found.target, found.is_met) == (">= 80%", met)
    assert found.measured == f"{10 / ours:.0%} (10.00 us the copy, {ours:.2f} ours)"
    assert verdict(records[:1], label).measured == NOT_MEASURED


@pytest.mark.parametrize(("tflops", "met"), [(350.0, True), (300.0, False)])
def test_the_bar_about_products(tflops: float, met: bool) -> None:
    label = sparse_mla.COMPUTING[0].label
    records = [
        record("sparse_mla_decode", label, us=200.0, tflops=tflops, flops=70e9),
        record(MACHINE, MATMUL, MATMUL, us=1400.0, tflops=700.0),
    ]
    found = verdict(records, label)
    assert found.is_met == met
    assert ("100.0 us at the 700 of a large product" in found.measured) != met


@pytest.mark.parametrize(("us", "met"), [(12.0, True), (12.5, False)])
def test_the_bar_about_small_decodes(us: float, met: bool) -> None:
    label = sparse_mla.SMALL[-1].label
    records = [record("sparse_mla_decode", label, us=us), record("sparse_mla_decode", label, "copy", us=2.5)]
    found = verdict(records, label)
    assert (found.target, found.is_met) == ("<= 12 us", met)
    assert ("a copy of the same bytes takes 2.50 us" in found.measured) != met


def test_a_cpu_is_not_judged() -> None:
    assert bars.judge(BARS, [record("qk_norm_rope", "1", us=1.0, device="cpu")]) == []


def example() -> list[dict[str, Any]]:
    size = sparse_mla.COMPUTING[0].label
    return [
        record(MACHINE, COPY, COPY, us=500.0, gbytes_per_s=4300.0, bytes=1 << 30),
        record(MACHINE, MATMUL, MATMUL, us=1400.0, tflops=780.0, size=8192),
        record("qk_norm_rope", "16", "copy", us=1.5, tokens=16),
        record("qk_norm_rope", "16", "torch", us=30.0, tokens=16),
        record("qk_norm_rope", "16", us=2.0, tokens=16),
        record("qk_norm_rope", "16", kernels=1, kernel_names={"k": 1}),
        record("qk_norm_rope", "16", "torch", kernels=11, kernel_names={}),
        record("sparse_mla_decode", size, us=200.0, tflops=343.5, flops=1),
        record("sparse_mla_decode", size, "flashinfer", absent="[not] installed"),
    ]


def test_report_and_plot(tmp_path: Path) -> None:
    other = record("all_reduce", "", benchmark="collectives", us=4.5, tokens=1, hidden=4096, dtype="bf16")
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    report.print_report([*example(), other], console)
    text = console.export_text()
    for part in (
        "A copy of 1,024 MiB: 4,300 GB/s, read and written.",
        "780 TFLOP/s",
        "30.00 (15.00)",
        "75%",
        "344",
        "sparse_mla_decode/flashinfer (584/h128/b128/2048): [not] installed",
        "qk_norm_rope/16",
        "4.50",  # the other benchmark's table
        "not met",
    ):
        assert part in text
    assert "wall clock" not in text
    assert report.save_plot(example(), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 1000
    assert not report.save_plot(example()[:2], tmp_path / "none.png")


def test_tables_for_a_readme() -> None:
    records = [*example(), record("all_reduce", "", benchmark="collectives", us=1.0)]
    text = markdown_tables(records_of("attention", records))
    assert "| qk_norm_rope | copy | torch | **ours** | of the copy's rate |" in text
    assert "| 16 | 1.5 | 30.0 | 2.0 | 75% |" in text
    assert "| kernels, 16 |  | 11 | 1 |  |" in text
    assert "| 584/h128/b128/2048 | 200.0 | 344 |" in text
    assert "all_reduce" not in text
    assert markdown_tables([{**r, "device": "cpu", "tiny": True} for r in example()]) == ""


# ---- the command line ----


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["attention", *arguments])


def test_specs_from_the_command_line() -> None:
    plain = command.make_spec(ATTENTION, parse(), "cuda", "out")
    assert plain == Spec("out", plain.command)
    changed = command.make_spec(
        ATTENTION,
        parse("--cases", "qk_norm_rope,sparse_mla_decode/584*", "--tokens", "1,9", "--peers", "ours,torch", "--budget",
              "0.1", "--rounds", "5", "--calls", "3", "--sets", "8", "--patience", "60"),
        "cuda",
        "out",
    )  # fmt: skip
    assert changed == Spec(
        "out", changed.command, cases=["qk_norm_rope", "sparse_mla_decode/584*"], tokens=[1, 9],
        peers=["ours", "torch"], budget_s=0.1, min_rounds=5, calls=3, sets=8, patience_s=60,
    )  # fmt: skip
    assert Spec(**json.loads(changed.to_json())) == changed
    on_cpu = command.make_spec(ATTENTION, parse("--calls", "4"), "cpu", "out")
    assert (on_cpu.tiny, on_cpu.calls, on_cpu.sets) == (True, 4, 2)


def test_choosing_cases() -> None:
    spec = dataclasses.replace(Spec("", ""), cases=["qk_norm_rope", "sparse_mla_decode/584/h64*"], tokens=[5])
    assert ATTENTION.families(spec) == ["qk_norm_rope", "sparse_mla_decode"]
    assert [w.label for w in ATTENTION.workloads(spec, "qk_norm_rope")] == ["5"]
    small = [size.label for size in sparse_mla.SMALL if size.heads == 64]
    assert [w.label for w in ATTENTION.workloads(spec, "sparse_mla_decode")] == small
    assert ATTENTION.workloads(spec, "mla_prepare") == []
    assert dataclasses.replace(spec, peers=["ours"]).wants_peer(MACHINE, COPY)
    assert not dataclasses.replace(spec, peers=["qk_norm_rope/copy"]).wants_peer("mla_prepare", "copy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "softmax"], "--cases: expected patterns of qk_norm_rope, "),
        (["--budget", "0"], "--budget, --rounds, --calls, --sets, --patience: expected positive numbers"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--device", "cpu", *arguments]) == 2
    assert f"fusedcomm bench: {message}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--device", "cuda"]) == 2
    assert "--device: expected a GPU" in capsys.readouterr().err


def test_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own; records are appended, and a plot drawn."""
    path = tmp_path / "records" / "attention.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({**record("qk_norm_rope", "77", us=1.0), "device": "cpu"}) + "\n")
    arguments = ["--device", "cpu", "--cases", "indexer_gather", "--tokens", "5,130", "--peers", "ours,copy"]
    assert main(["bench", "attention", *arguments, "--output", str(path.parent)]) == 0
    records = report.read_records(path)
    assert records[0]["label"] == "77"
    layouts = [f"{tokens}/{layout}" for tokens in (5, 130) for layout in indexer_cache.LAYOUTS]
    assert [r["label"] for r in records if r["op"] == "indexer_gather" and r["peer"] == "ours"] == layouts
    assert (path.parent / "attention.png").stat().st_size > 1000
    out = capfd.readouterr().out
    assert "no measurement" in out
    assert "130/preshuffled" in out
    assert "qk_norm_rope" not in out  # what was there before is not of this run
