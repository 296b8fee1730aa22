"""The benchmark of sampling and verification, as far as it goes without a GPU: tiny sizes, checks, and what it says."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fusedcomm.cli.bench import report
from fusedcomm.cli.bench.command import add_arguments
from fusedcomm.cli.bench.gpu.targets import NOT_MEASURED
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.sampling import chain, checks, draws, filters, greedy, rows, softmax, torch_forms, tree
from fusedcomm.cli.bench.sampling.catalogue import SAMPLING
from fusedcomm.cli.bench.sampling.checks import EXACT, FP32, check_draw, check_filtered_draw, check_renormalised
from fusedcomm.cli.bench.sampling.rows import CPU_BATCHES, Rows, Size
from fusedcomm.cli.bench.sampling.targets import BARS
from fusedcomm.cli.bench.single import bars, command, worker
from fusedcomm.cli.bench.single import flashinfer as compiler
from fusedcomm.cli.bench.single.machine import COPY, MACHINE
from fusedcomm.cli.bench.single.ratios import ratio_tables
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.tables import markdown_tables
from fusedcomm.cli.bench.single.workload import Place, Plan
from fusedcomm.cli.main import main

TINY = Spec("", "", "cpu", calls=2, sets=2, budget_s=1e-3, min_rounds=2, tiny=True)
FAMILIES = tuple(SAMPLING.makers)
PLACE = Place(torch.device("cpu"), Plan(2, 2, False))
SIZE = Size(300, 3)
RECORDS: list[dict[str, Any]] = []
"""Those of the last run."""


def measured(spec: Spec) -> list[dict[str, Any]]:
    """The records of a run, also of one that ends with wrong results."""
    output = io.StringIO()
    try:
        worker.run(SAMPLING, spec, output)
    finally:
        RECORDS[:] = [json.loads(line) for line in output.getvalue().splitlines()]
    return list(RECORDS)


# ---- every case ----

PEERS = {
    filters.BOTH_OP: {"torch", "two_calls"},
    draws.PLAIN_OP: {"torch", "torch:exponential"},
    chain.OP: {"torch", "loop"},
    tree.OP: {"torch", "loop"},
    greedy.OP: {"torch", "loop"},
}


@pytest.mark.parametrize("op", FAMILIES)
def test_every_size_of_an_op(op: str) -> None:
    """Each checks its results in ``measured``: eager, replayed, and after the last round."""
    records = measured(dataclasses.replace(TINY, cases=[op]))
    assert {r["peer"] for r in records if "absent" in r} <= {"flashinfer"}
    own = [r for r in records if r["op"] == op and "us" in r]
    labels = [w.label for w in SAMPLING.workloads(TINY, op)]
    assert labels == (["1", "3"] if op == greedy.OP else ["97/1", "97/3", "2048/1", "2048/3"])
    for label in labels:
        assert {r["peer"] for r in own if r["label"] == label} == {"copy", "ours"} | PEERS.get(op, {"torch"})
    for r in own:
        assert r["us"] > 0
        assert (r["calls"], r.get("eager", False)) == ((1, True) if r["peer"] == "loop" else (2, False))
        assert (r["benchmark"], r["device"], r["tiny"]) == ("sampling", "cpu", True)
        assert r["threads"] == torch.get_num_threads()
        assert r["moved_bytes"] > 0
    assert [r["peer"] for r in records if r["op"] == MACHINE] == [COPY]


OURS = {
    "top_p_renorm": (filters, "top_p_renorm_probs"),
    "top_k_renorm": (filters, "top_k_renorm_probs"),
    "top_k_top_p_renorm": (filters, "top_k_top_p_renorm_probs"),
    "min_p_renorm": (filters, "min_p_renorm_probs"),
    "softmax_temperature": (softmax, "softmax_temperature"),
    "sampling_from_probs": (draws, "sampling_from_probs"),
    "joint_sampling": (draws, "top_k_top_p_sampling_from_probs"),
    "top_k_first_sampling": (draws, "top_k_top_p_sampling_from_probs"),
    "chain_speculative_sampling": (chain, "chain_speculative_sampling"),
    "tree_speculative_sampling": (tree, "tree_speculative_sampling_target_only"),
    "greedy_chain_verify": (greedy, "greedy_chain_verify"),
}


def broken(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with the last element of its first result off, just so."""

    def run(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        target = options.get("predicts", result)
        target = target[0] if isinstance(target, tuple) else target
        flat = target.view(-1)
        if flat.is_floating_point():
            flat[-1] += 1e-3
        else:
            flat[-1] += 1
        return result

    return run


@pytest.mark.parametrize("op", FAMILIES)
def test_a_wrong_result_of_ours_is_an_error(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = OURS[op]
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    size = [w.label for w in SAMPLING.workloads(TINY, op)][-1]
    with pytest.raises(WrongResultError, match=f"{op}/{size}"):
        measured(dataclasses.replace(TINY, cases=[op], peers=["ours", "copy"]))
    own = {(r["label"], r["peer"]): r for r in RECORDS if r["op"] == op}
    assert own[size, "ours"]["absent"].startswith("WrongResultError: ")
    assert own[size, "copy"]["us"] > 0


# ---- what results are held against ----


def tied(seed: int) -> torch.Tensor:
    """Rows of few different values."""
    weights = torch.randint(1, 6, (4, 40), generator=torch.Generator().manual_seed(seed)).float()
    return weights / weights.sum(-1, keepdim=True)


def kept_by_definition(probs: torch.Tensor, top_k: int, top_p: float, joint: bool) -> torch.Tensor:
    """A loop over rows in Python's own numbers: equal values stay or go together."""
    found = torch.zeros_like(probs, dtype=torch.bool)
    for row, values in enumerate(probs.tolist()):
        ranked = sorted(values, reverse=True)
        kth = ranked[min(top_k, len(ranked)) - 1]
        among = ranked if joint else [v for v in ranked if v >= kth]
        total = sum(among) if not joint else 1.0
        for i, value in enumerate(values):
            is_within = sum(v for v in among if v > value) / total < top_p
            found[row, i] = value >= kth and is_within
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("top_k", "top_p"), [(40, 0.5), (40, 0.93), (7, 0.97), (7, 0.61), (1, 0.2)])
def test_bands_are_the_filters_by_their_definition(top_k: int, top_p: float, seed: int) -> None:
    """p is none of the sums, so without a slack the band is one threshold, also among ties."""
    for probs in (tied(seed), rows.probabilities((4, 40), PLACE, seed)):
        made = {
            "first": (checks.top_k_first_filter(top_k, top_p), False),
            "joint": (checks.joint_filter(top_k, top_p), True),
        }
        for kept, joint in made.values():
            band = kept(probs, 1e-9)
            expected = kept_by_definition(probs, top_k, top_p, joint)
            assert torch.equal(probs >= band.surely, expected)
            assert torch.equal(probs >= band.possibly, expected)
    by_k = checks.top_k_filter(top_k)(probs, 0.0)
    assert torch.equal(probs >= by_k.surely, kept_by_definition(probs, top_k, 2.0, True))
    by_p = checks.top_p_filter(top_p)(probs, 1e-9)
    assert torch.equal(probs >= by_p.surely, kept_by_definition(probs, 40, top_p, True))


def test_a_slack_leaves_values_open() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    strict, loose = (checks.top_p_filter(0.7)(probs, slack) for slack in (1e-9, 0.25))
    assert strict.surely.item() == pytest.approx(0.3)
    assert (loose.surely.item(), loose.possibly.item()) == (pytest.approx(0.3), pytest.approx(0.1))
    assert checks.top_p_filter(0.71)(probs, 0.05).possibly.item() == pytest.approx(0.2)


def filtered() -> tuple[torch.Tensor, torch.Tensor, checks.Band]:
    """Probabilities, what top-k makes of them, and its band."""
    probs = rows.probabilities((3, 300), PLACE, 5)
    return probs, torch_forms.top_k_renorm(probs, 20), checks.top_k_filter(20)(probs, 0.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda probs, got: got[1].masked_fill_(got[1] == got[1][got[1] > 0].min(), 0.0), "1 of 900 are kept or"),
        (lambda probs, got: got[2].masked_fill_(probs[2] == probs[2].min(), 1e-5), "1 of 900 are kept or"),
        (lambda probs, got: got[0].mul_(1 + 1e-5), "off by up to 1.*e-05 of a value"),
        (lambda probs, got: got[0].fill_(torch.nan), "numbers >= 0"),
        (lambda probs, got: got[0].neg_(), "numbers >= 0"),
        (lambda probs, got: got[0, got[0].argmax()].fill_(torch.inf), "off by"),
    ],
)
def test_filters_that_are_wrong(spoil: Callable[..., Any], message: str) -> None:
    probs, got, band = filtered()
    check_renormalised(probs, got, band, EXACT)
    spoil(probs, got)
    with pytest.raises(WrongResultError, match=message):
        check_renormalised(probs, got, band, EXACT)


def test_filters_of_another_shape_or_dtype() -> None:
    probs, got, band = filtered()
    for other in (got[:, :-1], got.double()):
        with pytest.raises(WrongResultError, match=r"expected torch\.float32"):
            check_renormalised(probs, other, band, FP32)


def test_draws_are_held_against_the_inverse_cdf() -> None:
    weights = torch.tensor([[0.1, 0.0, 0.3, 0.1], [0.0, 2.0, 1.0, 1.0]])
    uniforms = torch.tensor([0.5, 0.6])
    check_draw(weights, torch.tensor([2, 2]), uniforms, 1e-9)
    check_draw(weights, torch.tensor([0, 3]), None, 1e-9)
    check_draw(weights, torch.tensor([2, 1]), uniforms, 0.1001)
    wrong = {(2, 1): "not those", (3, 2): "not those", (1, 2): "1 of 2 are not kept", (2, 4): "0 to 3"}
    for tokens, message in wrong.items():
        with pytest.raises(WrongResultError, match=message):
            check_draw(weights, torch.tensor(tokens), uniforms, 1e-9)
    with pytest.raises(WrongResultError, match="each of 2 rows"):
        check_draw(weights, torch.tensor([2]), None, 1e-9)


def test_a_draw_may_be_off_by_what_is_open() -> None:
    probs = torch.tensor([[0.25, 0.25, 0.125, 0.375]])
    strict, wide = (checks.Band(torch.tensor([[0.25]]), torch.tensor([[low]])) for low in (0.25, 0.125))
    uniforms = torch.tensor([0.55])
    check_filtered_draw(probs, torch.tensor([1]), strict, uniforms, EXACT)  # 0.25 to 0.5 of 0.875
    with pytest.raises(WrongResultError, match="not kept"):
        check_filtered_draw(probs, torch.tensor([2]), strict, uniforms, EXACT)
    check_filtered_draw(probs, torch.tensor([2]), wide, uniforms, EXACT)
    check_filtered_draw(probs, torch.tensor([1]), wide, uniforms, EXACT)  # as where token 2 is dropped
    with pytest.raises(WrongResultError, match="not those"):
        check_filtered_draw(probs, torch.tensor([0]), wide, uniforms, EXACT)


@pytest.mark.parametrize("peer", ["torch", "two_calls", "ours"])
def test_our_own_ways_are_held_to_the_precision_that_they_promise(peer: str) -> None:
    """A relative error of 1e-5 is one of fp32 sums."""
    [both] = [op for op in filters.FILTERS if op.op == filters.BOTH_OP]
    own = Rows(SIZE, PLACE, 0)
    ways = {name: lambda own, way=way: (way(own)[0] * (1 + 1e-5),) for name, way in both.ways.items()}
    made = {found.name: found.make() for found in rows.peers_of([own], ways, both.check)}
    made[peer].call(0)
    if peer == "torch":
        made[peer].check()
    else:
        with pytest.raises(WrongResultError, match="off by up to 1"):
            made[peer].check()


def test_softmax_within_its_bound() -> None:
    own = softmax.LogitsSet(SIZE, PLACE, 0)
    [got] = softmax.SOFTMAX.ways["torch"](own)
    softmax.check(own, (got,), EXACT, "ours")
    softmax.check(own, (got * (1 + 2e-5),), FP32, "torch")
    for other, precision in ((got * (1 + 2e-5), EXACT), (got * 1.001, FP32), (got * torch.nan, FP32)):
        with pytest.raises(WrongResultError, match="probs: off"):
            softmax.check(own, (other,), precision, "")


def test_bands_are_made_once() -> None:
    calls = []

    def kept(probs: torch.Tensor, slack: float) -> checks.Band:
        calls.append(slack)
        return checks.everything(probs, slack)

    own = Rows(SIZE, PLACE, 0)
    for precision in (EXACT, FP32, EXACT):
        own.band(kept, precision)
    assert calls == [EXACT.slack, FP32.slack]


# ---- chains and trees whose outcome is known ----


def test_chains_accept_what_they_are_made_for() -> None:
    """By the rule, in Python's numbers, whatever the uniforms are."""
    own = chain.ChainSet(Size(50, 6), PLACE, 3)
    assert own.accepted.tolist() == [2, 4, 1, 3, 0, 2]
    for request, accepted in enumerate(own.accepted.tolist()):
        for i in range(accepted + (accepted < chain.DRAFTS)):
            token = int(own.draft_ids[request, i])
            q, p = own.draft_probs[request, i, token].item(), own.target_probs[request, i, token].item()
            assert q > 0
            assert p == (q if i < accepted else 0.0)
        if accepted < chain.DRAFTS:
            target, draft = own.target_probs[request, accepted], own.draft_probs[request, accepted]
            assert (target - draft).clamp(min=0).sum() > 0.1  # so the residual is a distribution of its own


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own, ids, accepted: accepted[0].add_(1), "accepted: "),
        (lambda own, ids, accepted: ids[1, 0].add_(1), "output_ids: "),
        (lambda own, ids, accepted: ids[2, 4].zero_(), "output_ids: "),
        (lambda own, ids, accepted: ids[0, 2].copy_(own.draft_ids[0, 2]), "tokens: "),
    ],
)
def test_chains_that_are_wrong(spoil: Callable[..., Any], message: str) -> None:
    own = chain.ChainSet(SIZE, PLACE, 3)
    ids, accepted = chain.loop(own)
    chain.check(own, (ids, accepted), FP32, "loop")
    spoil(own, ids, accepted)
    with pytest.raises(WrongResultError, match=message):
        chain.check(own, (ids, accepted), FP32, "loop")


def test_trees_are_trees() -> None:
    own = tree.TreeSet(Size(50, 2), PLACE, 3)
    for node, children in tree.CHILDREN.items():
        found = []
        child = int(own.next_token[0, node])
        while child >= 0:
            found.append(child)
            child = int(own.next_sibling[0, child])
        assert found == children
    assert [tree.path_to(end) for end in tree.ENDS] == [[0, 2], [0, 2, 6, 9], [0], [0, 1, 5]]
    assert [tree.is_full(end) for end in tree.ENDS] == [False, True, False, False]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own, predicts, paths, counts: counts[3].add_(1), "not the path"),
        (lambda own, predicts, paths, counts: paths[1, 3].sub_(1), "not the path"),
        (lambda own, predicts, paths, counts: predicts[tree.NODES].add_(1), "predicts: "),
        (lambda own, predicts, paths, counts: predicts[2].copy_(own.candidates[0, 6]), "tokens: "),
        (lambda own, predicts, paths, counts: predicts[1].zero_(), "predicts: "),
    ],
)
def test_trees_that_are_wrong(spoil: Callable[..., Any], message: str) -> None:
    own = tree.TreeSet(Size(300, 5), PLACE, 3)
    results = tree.loop(own)
    tree.check(own, results, FP32, "loop")
    spoil(own, *results)
    with pytest.raises(WrongResultError, match=message):
        tree.check(own, results, FP32, "loop")


def test_bytes_that_a_call_has_to_move() -> None:
    spec = Spec("", "")
    size = Size(32768, 16)

    def moved(op: str, label: str = size.label) -> int:
        [found] = [w for w in SAMPLING.workloads(spec, op) if w.label == label]
        return found.moved_bytes

    assert moved("top_p_renorm") == moved("softmax_temperature") == 2 * 16 * 32768 * 4
    assert moved("joint_sampling") == 16 * 32768 * 4
    # requests 1, 6 and 11 accept all four drafts, so only the target's row is read
    assert moved(chain.OP) == (2 * 16 - 3) * 32768 * 4
    # a quarter of the walks fills its path
    assert moved(tree.OP) == (2 * 16 - 4) * 32768 * 4
    assert moved(greedy.OP, "16") == 16 * (3 * 40 + 8 + 4)


def test_sizes_that_take_too_much_memory_are_left_out() -> None:
    spec = Spec("", "")
    every = {f"{vocab}/{batch}" for vocab in (32768, 128256, 151936) for batch in (1, 4, 16, 64, 256)}
    labels = {op: {w.label for w in SAMPLING.workloads(spec, op)} for op in FAMILIES}
    for op in set(FAMILIES) - {chain.OP, tree.OP, greedy.OP}:
        assert labels[op] == every
    assert labels[chain.OP] == labels[tree.OP] == every - {"128256/256", "151936/256"}
    on_cpu = dataclasses.replace(spec, device="cpu")
    assert [w.label for w in SAMPLING.workloads(on_cpu, "top_p_renorm")] == [f"128256/{b}" for b in CPU_BATCHES]
    chosen = dataclasses.replace(spec, vocabs=[64, 99], tokens=[7])
    assert [w.label for w in SAMPLING.workloads(chosen, chain.OP)] == ["64/7", "99/7"]


# ---- FlashInfer ----


class FakeFlashInfer:
    """The functions of 0.6.12 that are used, in plain torch, by their signatures, with random numbers of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[str] = []
        self.bonus = 0
        self.first_token = False
        sampling, jit = ModuleType("flashinfer.sampling"), ModuleType("flashinfer.jit.sampling")
        for name in (
            "top_p_renorm_probs",
            "top_k_renorm_probs",
            "softmax",
            "sampling_from_probs",
            "top_k_top_p_sampling_from_probs",
            "chain_speculative_sampling",
        ):
            setattr(sampling, name, getattr(self, name))
        spec = SimpleNamespace(is_aot=False, build=lambda verbose: self.built.append("sampling"))
        jit.gen_sampling_module = lambda: spec  # type: ignore[attr-defined]
        for module in (sampling, jit):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def top_p_renorm_probs(self, probs: torch.Tensor, top_p: float, is_deterministic: bool = False) -> torch.Tensor:
        return torch_forms.top_p_renorm(probs, top_p)

    def top_k_renorm_probs(self, probs: torch.Tensor, top_k: int) -> torch.Tensor:
        return torch_forms.top_k_renorm(probs, top_k)

    def softmax(self, logits: torch.Tensor, temperature: float, enable_pdl: bool | None = None) -> torch.Tensor:
        return torch.softmax(logits / temperature, -1)

    def sampling_from_probs(
        self, probs: torch.Tensor, indices: None = None, *, seed: torch.Tensor, offset: torch.Tensor
    ) -> torch.Tensor:
        for t in (seed, offset):
            assert (t.dtype, tuple(t.shape)) == (torch.int64, (1,))
        if self.first_token:
            return torch.zeros(len(probs), dtype=torch.int32)
        return torch.multinomial(probs, 1).squeeze(-1).int()

    def top_k_top_p_sampling_from_probs(
        self, probs: torch.Tensor, top_k: int, top_p: float, *, filter_apply_order: str, **philox: torch.Tensor
    ) -> torch.Tensor:
        form = {"joint": torch_forms.joint_draw, "top_k_first": torch_forms.top_k_first_draw}[filter_apply_order]
        if self.first_token:
            return self.sampling_from_probs(probs, **philox)
        return form(probs, top_k, top_p, torch.rand(len(probs))).int()

    def chain_speculative_sampling(
        self,
        draft_probs: torch.Tensor,
        draft_token_ids: torch.Tensor,
        target_probs: torch.Tensor,
        accepted: torch.Tensor,
        emitted: torch.Tensor,
        *,
        seed: torch.Tensor,
        offset: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        batch = len(draft_token_ids)
        own = SimpleNamespace(
            draft_probs=draft_probs,
            draft_ids=draft_token_ids,
            target_probs=target_probs,
            uniforms=torch.rand(draft_token_ids.shape),
            final_uniforms=torch.rand(batch),
        )
        ids, counts = chain.loop(own)  # type: ignore[arg-type]
        ids[:, 0] += self.bonus
        return ids, accepted.add_(counts), emitted.add_(counts)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    return FakeFlashInfer(monkeypatch)


def with_flashinfer(op: str) -> list[dict[str, Any]]:
    records = measured(dataclasses.replace(TINY, cases=[op], peers=["flashinfer"]))
    return [r for r in records if r["peer"] == "flashinfer"]


def test_flashinfers_forms(library: FakeFlashInfer) -> None:
    """What they draw is theirs, and right all the same."""
    ops = [op for op, modules in SAMPLING.flashinfer_modules.items() if modules]
    assert set(ops) == set(FAMILIES) - {filters.MIN_P_OP, tree.OP, greedy.OP}
    for op in ops:
        assert [r["label"] for r in with_flashinfer(op) if r["us"] > 0] == ["97/1", "97/3", "2048/1", "2048/3"]


def test_flashinfer_gone_wrong_is_absent(library: FakeFlashInfer) -> None:
    library.bonus, library.first_token = 1, True
    for op in (chain.OP, "joint_sampling", "top_k_first_sampling"):
        assert all("WrongResultError" in r["absent"] for r in with_flashinfer(op))


def test_flashinfer_not_installed() -> None:
    assert all("not installed" in r["absent"] for r in with_flashinfer("top_p_renorm"))


def test_its_module_is_built_ahead_once(library: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.build(["sampling"]) == []
    assert library.built == ["sampling"]
    started: list[list[str]] = []

    def popen(arguments: list[str], *, start_new_session: bool) -> Any:
        started.append(arguments)
        return SimpleNamespace(pid=42, poll=lambda: 0, wait=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", popen)
    for cases in (["*"], ["min_p*", "tree*"]):
        with command.building(SAMPLING, dataclasses.replace(Spec("", ""), cases=cases)):
            pass
    assert [arguments[1:] for arguments in started] == [["-m", compiler.MODULE, "sampling"]]


# ---- what it says ----


def record(op: str, label: str, peer: str = "ours", **fields: Any) -> dict[str, Any]:
    about = {
        "benchmark": "sampling",
        "device": "cuda",
        "world_size": 1,
        "date": "2026-11-20T00:00:00",
        "machine": {"cpu": "c", "cores": 2, "gpu": "G", "gpus": 1},
    }
    return {"op": op, "label": label, "peer": peer, "gbytes_per_s": 1.0, **about, **fields}


def cells(op: str, peer: str, times: dict[str, tuple[float, float]], **fields: Any) -> list[dict[str, Any]]:
    """Our time and the peer's by label."""
    ours = [record(op, label, us=us, **fields) for label, (us, _) in times.items()]
    return ours + [record(op, label, peer, us=us, **fields) for label, (_, us) in times.items()]


def verdicts(records: list[dict[str, Any]], part: str) -> list[Any]:
    return [v for v in bars.judge(BARS, records) if part in v.what]


def test_every_bar_is_about_a_size_that_is_measured() -> None:
    for bar in BARS:
        spec = Spec("", "", bar.device)
        labels = {w.label for w in SAMPLING.workloads(spec, bar.op)}
        assert set(bar.labels) & labels, bar


def test_the_worst_size_and_the_median_are_judged() -> None:
    op = "top_k_renorm"
    records = cells(op, "flashinfer", {"32768/1": (9.0, 10.0), "128256/1": (4.0, 10.0), "128256/4": (3.0, 10.0)})
    records.append(record(op, "128256/16", us=1.0))
    [worst] = verdicts(records, "worst ratio to the fastest of flashinfer")
    assert (worst.target, worst.is_met) == ("<= 1", True)
    assert worst.measured == (
        "0.9; at most that bar at 3 of 3 sizes; worst 32768/1: 9.00 / 10.00 us, flashinfer; 1 sizes without a peer"
    )
    [median] = verdicts(records, "median ratio")
    assert (median.target, median.is_met) == ("<= 0.5", True)
    assert median.measured.startswith("0.4; at most that bar at 2 of 3 sizes; worst 32768/1")
    records[0]["us"], records[1]["us"] = 10.1, 5.1
    assert not verdicts(records, "worst ratio to the fastest of flashinfer")[0].is_met
    assert not verdicts(records, "median ratio")[0].is_met


def test_the_fastest_of_torchs_forms_counts() -> None:
    op = draws.PLAIN_OP
    records = cells(op, "torch", {"128256/1": (9.0, 20.0)})
    [met] = verdicts(records, f"{op} on cuda: worst ratio to the fastest of torch, torch:exponential")
    assert met.is_met
    records.append(record(op, "128256/1", "torch:exponential", us=8.0))
    [missed] = verdicts(records, f"{op} on cuda: worst ratio to the fastest of torch, torch:exponential")
    assert (missed.is_met, missed.measured.split(";")[0]) == (False, "1.12")


def test_bars_of_single_sizes() -> None:
    records = [record("top_p_renorm", "32768/4", us=12.5), record("top_p_renorm", "32768/4", "copy", us=1.5)]
    records += [record("top_p_renorm", "32768/64", us=31.0), record("top_p_renorm", "32768/64", "copy", us=10.0)]
    [latency] = verdicts(records, "top_p_renorm/32768/4: time")
    assert (latency.target, latency.is_met) == ("<= 12 us", False)
    [bandwidth] = verdicts(records, "top_p_renorm/32768/64: bandwidth")
    assert (bandwidth.target, bandwidth.is_met) == (">= 33%", False)
    records[2]["us"] = 30.0
    assert verdicts(records, "top_p_renorm/32768/64: bandwidth")[0].is_met


def test_the_loop_is_to_be_a_hundred_times_slower_at_16_requests() -> None:
    records = cells(chain.OP, "loop", {"128256/16": (10.0, 1000.0), "128256/1": (10.0, 100.0)})
    [found] = verdicts(records, "fastest of loop")
    assert (found.target, found.is_met, found.measured.split(";")[0]) == ("<= 0.01", True, "0.01")
    records[0]["us"] = 10.2
    assert not verdicts(records, "fastest of loop")[0].is_met


def test_a_peer_that_was_not_measured_is_no_success() -> None:
    found = verdicts([record("top_p_renorm", "32768/1", us=1.0)], "flashinfer")
    assert len(found) == 2
    assert all((v.measured, v.is_met) == (NOT_MEASURED, False) for v in found)


def test_a_cpu_has_bars_of_its_own() -> None:
    records = cells("top_p_renorm", "torch", {"128256/16": (40.0, 100.0)}, device="cpu")
    [found] = bars.judge(BARS, records)
    assert found.what == "top_p_renorm on cpu: worst ratio to the fastest of torch"
    assert (found.target, found.is_met) == ("<= 0.333", False)
    records[0]["us"] = 33.0
    assert bars.judge(BARS, records)[0].is_met
    assert bars.judge(BARS, [{**r, "tiny": True} for r in records]) == []


def example() -> list[dict[str, Any]]:
    return [
        record(MACHINE, COPY, COPY, us=500.0, gbytes_per_s=4300.0, bytes=1 << 30),
        *cells("top_p_renorm", "torch", {"128256/1": (10.0, 80.0), "128256/4": (12.0, 240.0)}),
        record("top_p_renorm", "128256/4", "copy", us=6.0),
        *cells("top_p_renorm", "torch", {"128256/4": (300.0, 9000.0)}, device="cpu", machine={"cpu": "c", "cores": 2}),
    ]


def test_report_tables_and_plot(tmp_path: Path) -> None:
    console = Console(width=220, record=True, file=(tmp_path / "out").open("w"))
    report.print_report(example(), console)
    text = console.export_text()
    for part in ("top_p_renorm, G:", "top_p_renorm, c:", "80.00 (8.00)", "50%", "9,000.00 (30.00)", "on cpu: worst"):
        assert part in text
    markdown = markdown_tables(example())
    assert "| top_p_renorm | **ours** | torch | copy | of the copy's rate |" in markdown
    assert "| 128256/4 | 12.0 | 240.0 | 6.0 | 50% |" in markdown
    assert "| 128256/4 | 300.0 | 9,000 |" in markdown
    assert report.save_plot(example(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_ratios_for_a_readme() -> None:
    lines = ratio_tables([*example(), record("top_p_renorm", "97/1", us=1.0, tiny=True)]).splitlines()
    assert lines == [
        "| ours / peer, G | torch | copy |",
        "|---|---|---|",
        "| top_p_renorm | 0.087 (0.05 to 0.12) | 2 (2 to 2) |",
        "",
        "| ours / peer, c | torch |",
        "|---|---|",
        "| top_p_renorm | 0.033 (0.033 to 0.033) |",
    ]


# ---- the command line ----


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["sampling", *arguments])


def test_specs_from_the_command_line() -> None:
    on_gpu = command.make_spec(SAMPLING, parse(), "cuda", "out")
    assert on_gpu == Spec("out", on_gpu.command, budget_s=0.12)
    chosen = parse("--vocabs", "99,128256", "--tokens", "2", "--cases", "top_p*", "--budget", "0.5")
    changed = command.make_spec(SAMPLING, chosen, "cuda", "out")
    assert (changed.vocabs, changed.tokens, changed.cases, changed.budget_s) == ([99, 128256], [2], ["top_p*"], 0.5)
    on_cpu = command.make_spec(SAMPLING, parse("--rounds", "9"), "cpu", "out")
    assert (on_cpu.tiny, on_cpu.calls, on_cpu.sets, on_cpu.min_rounds) == (False, 2, 2, 9)
    tiny = command.make_spec(SAMPLING, parse("--tiny"), "cpu", "out")
    assert (tiny.tiny, tiny.budget_s) == (True, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "argmax"], "--cases: expected patterns of greedy_chain_verify, "),
        (["--vocabs", "64,50"], "--vocabs: expected more than 50 tokens, as k is 50, got 50"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sampling", "--device", "cpu", *arguments]) == 2
    assert f"fusedcomm bench: {message}" in capsys.readouterr().err


def test_tiny_sizes_are_for_a_cpu() -> None:
    with pytest.raises(ValueError, match="--tiny: expected --device cpu"):
        command.make_spec(SAMPLING, parse("--tiny"), "cuda", "out")


def test_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, measuring: two small sizes, records and a plot."""
    sizes = ["--vocabs", "1000", "--tokens", "1,5", "--cases", "joint_sampling"]
    assert main(["bench", "sampling", "--device", "cpu", *sizes, "--budget", "0.01", "--output", str(tmp_path)]) == 0
    records = report.read_records(tmp_path / "sampling.jsonl")
    own = [r for r in records if r["op"] == "joint_sampling" and r["peer"] == "ours"]
    assert [(r["label"], r["calls"], r["cache"], r["vocab"], r["batch"]) for r in own] == [
        ("1000/1", 2, own[0]["cache"], 1000, 1),
        ("1000/5", 2, own[1]["cache"], 1000, 5),
    ]
    assert all("tiny" not in r and r["threads"] >= 1 for r in records)
    assert (tmp_path / "sampling.png").stat().st_size > 1000
    out = capfd.readouterr().out
    assert "no measurement" not in out
    assert "1000/5" in out


def test_it_is_a_script_of_a_checkout(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "bench_sampling.py"
    arguments = ["--device", "cpu", "--tiny", "--cases", "greedy_chain_verify", "--peers", "ours"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stderr
    assert "that the benchmark runs" in run.stdout
    assert "greedy_chain_verify" in run.stdout
