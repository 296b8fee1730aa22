"""Which backend serves the ops of sampling and verification, op by op, and what is said of those that do not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedcomm import Settings, kernels, native
from fusedcomm.errors import SettingError
from fusedcomm.ops import sampling, speculative
from fusedcomm.ops.sampling import aiter, dispatch, operators
from fusedcomm.ops.sampling.dispatch import sampling_backend
from fusedcomm.ops.sampling.plan import (
    AS_GOOD_IN_TRITON,
    BACKENDS,
    OPERATORS,
    choose_sampling_backend,
    explain_choice,
)
from fusedcomm.platform import DeviceFacts

OP = "chain_speculative_sampling"
FILTER = "top_p_renorm_probs"  # for which Triton has to be asked


class Machine:
    """What can serve here; notes which backends it was asked about, which on a real one takes an import."""

    def __init__(self, can: Iterable[str]) -> None:
        self.can = {"torch", *can}
        self.asked: list[str] = []

    def why_not(self, backend: str) -> str:
        self.asked.append(backend)
        return "" if backend in self.can else f"no {backend} here"


# ---- the rule ----


@pytest.mark.parametrize(
    ("device_type", "settings", "can", "chosen"),
    [
        ("cpu", {}, [], "torch"),
        ("cpu", {}, ["native"], "native"),
        ("cpu", {}, ["triton"], "torch"),  # its interpreter, which has to be asked for
        ("cpu", {"disable": True}, ["native"], "torch"),
        ("cpu", {"backend": "torch"}, ["native"], "torch"),
        ("cpu", {"backend": "native"}, ["native"], "native"),
        ("cpu", {"backend": "triton"}, ["native", "triton"], "triton"),
        ("cuda", {}, [], "torch"),
        ("cuda", {}, ["native", "triton"], "native"),
        ("cuda", {}, ["triton"], "triton"),
        ("cuda", {}, ["native", "triton", "aiter"], "native"),
        ("cuda", {}, ["aiter"], "torch"),  # it has to be asked for, whatever there is
        ("cuda", {"backend": "torch"}, ["native", "triton"], "torch"),
        ("cuda", {"backend": "native"}, ["native", "triton"], "native"),
        ("cuda", {"backend": "triton"}, ["native", "triton"], "triton"),
        ("cuda", {"disable": True}, ["native", "triton"], "torch"),
        ("cuda", {"disable": True, "backend": "native"}, ["native"], "native"),
        ("cuda", {"disable": True, "backend": "triton"}, ["triton"], "triton"),
        ("cuda", {"backend": "aiter"}, ["native", "triton", "aiter"], "aiter"),
        ("cuda", {"backend": "aiter"}, ["native", "triton"], "native"),  # it is about collectives too
        ("cuda", {"backend": "aiter"}, ["triton"], "triton"),
        ("cuda", {"backend": "aiter"}, [], "torch"),
        ("cuda", {"backend": "aiter", "disable": True}, ["native", "triton"], "torch"),
    ],
)
def test_the_rule(device_type: str, settings: dict[str, Any], can: list[str], chosen: str) -> None:
    machine = Machine(can)
    assert choose_sampling_backend(Settings(**settings), OP, device_type, machine.why_not) == chosen
    assert explain_choice(Settings(**settings), OP, device_type, machine.why_not).backend == chosen


@pytest.mark.parametrize(
    ("settings", "can", "chosen"),
    [
        ({}, ["native", "triton"], "native"),
        ({}, ["triton"], "torch"),
        ({"backend": "triton"}, ["native", "triton"], "triton"),
        ({"backend": "aiter"}, ["triton"], "torch"),
    ],
)
def test_the_rule_for_filters(settings: dict[str, Any], can: list[str], chosen: str) -> None:
    """And for what draws: on a GPU Triton has to be asked for."""
    for op in OPERATORS.keys() - AS_GOOD_IN_TRITON:
        assert choose_sampling_backend(Settings(**settings), op, "cuda", Machine(can).why_not) == chosen
        plan = explain_choice(Settings(**settings), op, "cuda", Machine(can).why_not)
        assert plan.backend == chosen
        if chosen in ("native", "torch"):
            assert "FUSEDCOMM_BACKEND=triton has to ask for it" in plan.reasons["triton"]


@pytest.mark.parametrize(
    ("device_type", "settings", "can", "asked"),
    [
        ("cpu", {}, ["native"], ["native"]),
        ("cpu", {}, [], ["native"]),
        ("cuda", {}, ["native", "triton"], ["native"]),
        ("cuda", {}, ["triton"], ["native", "triton"]),
        ("cuda", {"disable": True}, ["native"], []),
        ("cuda", {"backend": "torch"}, ["native"], ["torch"]),
        ("cuda", {"backend": "aiter"}, ["aiter", "native"], ["aiter"]),
    ],
)
def test_nothing_is_loaded_that_does_not_come_into_question(
    device_type: str, settings: dict[str, Any], can: list[str], asked: list[str]
) -> None:
    machine = Machine(can)
    choose_sampling_backend(Settings(**settings), OP, device_type, machine.why_not)
    assert machine.asked == asked


@pytest.mark.parametrize(
    ("device_type", "backend", "can", "usable"),
    [
        ("cpu", "native", [], "torch"),
        ("cpu", "triton", [], "torch"),
        ("cuda", "native", [], "torch"),
        ("cuda", "native", ["triton"], "torch or triton"),
        ("cuda", "triton", ["native"], "torch or native"),
        ("cpu", "aiter", ["native"], "torch or native"),
    ],
)
def test_a_forced_backend_that_cannot_serve(device_type: str, backend: str, can: list[str], usable: str) -> None:
    message = (
        f"FUSEDCOMM_BACKEND: expected {usable} for {OP} on {device_type} here, got '{backend}': no {backend} here$"
    )
    for rule in (choose_sampling_backend, explain_choice):
        with pytest.raises(SettingError, match=message):
            rule(Settings(backend=backend), OP, device_type, Machine(can).why_not)


# ---- what is said of it ----

INTERPRETER = "not taken: on the CPU it is Triton's interpreter, which FUSEDCOMM_BACKEND=triton has to ask for"


@pytest.mark.parametrize(
    ("device_type", "settings", "can", "verdicts"),
    [
        ("cpu", {}, ["native"], ["<- taken", INTERPRETER, "eligible, slower"]),
        ("cpu", {}, [], ["not taken: no native here", INTERPRETER, "<- taken"]),
        ("cpu", {"disable": True}, ["native"], ["not taken: FUSEDCOMM_DISABLE=1"] * 2 + ["<- taken"]),
        ("cpu", {"backend": "torch"}, ["native"], ["not taken: FUSEDCOMM_BACKEND=torch"] * 2 + ["<- taken"]),
        ("cuda", {}, ["native", "triton"], ["<- taken", "eligible, slower", "eligible, slower"]),
        ("cuda", {}, ["native"], ["<- taken", "not taken: no triton here", "eligible, slower"]),
        ("cuda", {}, ["triton"], ["not taken: no native here", "<- taken", "eligible, slower"]),
        ("cuda", {"disable": True}, ["native", "triton"], ["not taken: FUSEDCOMM_DISABLE=1"] * 2 + ["<- taken"]),
        (
            "cuda",
            {"backend": "triton"},
            ["native", "triton"],
            ["not taken: FUSEDCOMM_BACKEND=triton", "<- taken", "not taken: FUSEDCOMM_BACKEND=triton"],
        ),
        ("cuda", {"backend": "aiter"}, ["native"], ["<- taken", "not taken: no triton here", "eligible, slower"]),
    ],
)
def test_the_reasons(device_type: str, settings: dict[str, Any], can: list[str], verdicts: list[str]) -> None:
    plan = explain_choice(Settings(**settings), OP, device_type, Machine(can).why_not)
    expected = [*verdicts, "not taken: no aiter here"]
    lines = [f"{OP}: {backend}   {verdict}" for backend, verdict in zip(BACKENDS, expected, strict=True)]
    assert str(plan) == "\n".join(lines)
    assert (plan.op, plan.device_type) == (OP, device_type)


def test_aiter_taken() -> None:
    plan = explain_choice(Settings(backend="aiter"), OP, "cuda", Machine(["native", "aiter"]).why_not)
    assert str(plan).splitlines() == [
        *(f"{OP}: {other}   not taken: FUSEDCOMM_BACKEND=aiter" for other in ("native", "triton", "torch")),
        f"{OP}: aiter   <- taken",
    ]


def test_every_op_can_be_explained() -> None:
    """By the names of the functions that users call."""
    assert all(hasattr(sampling, op) or hasattr(speculative, op) for op in OPERATORS)
    taken = "torch" if native.load() is None else "native"
    for op in OPERATORS:
        plan = sampling.explain(op, "cpu")
        assert (plan.op, plan.device_type, plan.backend) == (op, "cpu", taken)
        assert plan.reasons["aiter"] == "aiter serves gfx94x and gfx95x, not the CPU"
        assert sampling_backend("cpu", op) == taken


@pytest.mark.parametrize(
    ("op", "device_type", "message"),
    [
        ("top_p", "cpu", "op: expected one of top_k_renorm_probs, .*, got 'top_p'"),
        ("top_p_renorm_probs_out", "cpu", "op: expected one of .*, got 'top_p_renorm_probs_out'"),
        (OP, "gpu", "device_type: expected 'cpu' or 'cuda', got 'gpu'"),
    ],
)
def test_bad_arguments_of_explain(op: str, device_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.explain(op, device_type)


# ---- what the machine is asked ----


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that is pretended: ``native`` and ``triton`` say what is installed, ``registered`` which Triton kernels."""
    machine = SimpleNamespace(native=None, triton=True, registered=[], arch="sm_90")
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(native, "load_gpu", lambda: machine.native)
    monkeypatch.setattr(native, "library_path", lambda name: None)
    monkeypatch.setattr(kernels, "available", lambda device_type: machine.triton)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "device_facts", lambda device: DeviceFacts(machine.arch, "", b"", 0))

    class Operators:
        def __getattr__(self, name: str) -> str:
            if name not in machine.registered:
                raise AttributeError(name)
            return name

    monkeypatch.setattr(torch.ops, "fusedcomm_triton", Operators(), raising=False)
    return machine


def test_each_op_goes_its_own_way(gpu: SimpleNamespace) -> None:
    """Without a compiled library Triton serves the ops that it has, torch the others."""
    gpu.registered = ["chain_speculative_sampling_out", "top_p_renorm_probs_out"]
    chosen = {op: sampling_backend("cuda", op) for op in OPERATORS}
    assert chosen == {op: "triton" if op == OP else "torch" for op in OPERATORS}
    assert "no Triton kernel" in sampling.explain("greedy_chain_verify", "cuda").reasons["triton"]


def test_without_triton(gpu: SimpleNamespace) -> None:
    gpu.triton = False
    plan = sampling.explain(OP, "cuda")
    assert plan.backend == sampling_backend("cuda", OP) == "torch"
    assert plan.reasons == {
        "native": "the compiled GPU library is not installed",
        "triton": "Triton is not installed",
        "aiter": "aiter serves gfx94x and gfx95x, not sm_90",
    }


def test_triton_forced_where_it_lacks_the_op(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "triton")
    gpu.registered, gpu.native = ["top_p_renorm_probs_out"], object()
    assert sampling_backend("cuda", FILTER) == "triton"
    message = "expected torch or native for greedy_chain_verify on cuda here, got 'triton': it has no Triton kernel"
    with pytest.raises(SettingError, match=message):
        sampling_backend("cuda", "greedy_chain_verify")


@pytest.mark.parametrize(
    ("settings", "arch", "reason"),
    [
        ({}, "gfx942", "FUSEDCOMM_BACKEND=aiter has to ask for it: it sums in an order of its own"),
        ({"FUSEDCOMM_BACKEND": "aiter"}, "sm_90", "aiter serves gfx94x and gfx95x, not sm_90"),
        ({"FUSEDCOMM_BACKEND": "aiter", "FUSEDCOMM_DISABLE_AITER": "1"}, "gfx942", "FUSEDCOMM_DISABLE_AITER=1"),
        (
            {"FUSEDCOMM_BACKEND": "aiter", "FUSEDCOMM_DISABLE_AITER_SAMPLING": "1"},
            "gfx950",
            "FUSEDCOMM_DISABLE_AITER_SAMPLING=1",
        ),
        ({"FUSEDCOMM_DISABLE_AITER_SAMPLING": "1"}, "gfx950", "FUSEDCOMM_DISABLE_AITER_SAMPLING=1"),
    ],
)
def test_aiter_is_not_looked_for_where_it_may_not_serve(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], arch: str, reason: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(aiter, "why_absent", lambda op: pytest.fail("looked for"))
    gpu.arch, gpu.native = arch, object()
    assert sampling_backend("cuda", "top_k_renorm_probs") == "native"
    plan = sampling.explain("top_k_renorm_probs", "cuda")
    assert (plan.backend, plan.reasons["aiter"]) == ("native", reason)


def test_it_is_decided_once(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.registered = ["chain_speculative_sampling_out"]
    assert sampling_backend("cuda", OP) == "triton"
    monkeypatch.setattr(dispatch, "choose_sampling_backend", lambda *arguments: pytest.fail("decided again"))
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "torch")
    assert sampling_backend("cuda", OP) == "triton"


def test_settings_are_read_at_the_first_call() -> None:
    """And a child without an interpreter has no Triton for the CPU."""
    program = "import torch; from fusedcomm.ops import sampling; sampling.sampling_from_probs(torch.ones(1, 2))"
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = run(program, environ | {"FUSEDCOMM_BACKEND": "triton"})
    assert result.returncode == 1
    usable = "torch" if native.load() is None else "torch or native"
    message = f"FUSEDCOMM_BACKEND: expected {usable} for sampling_from_probs on cpu here, got 'triton': Triton is not"
    assert f"SettingError: {message}" in result.stderr


def test_nothing_heavy_is_imported() -> None:
    program = """
import sys, torch
from fusedcomm.ops import sampling, speculative
sampling.top_p_renorm_probs(torch.ones(1, 2), 0.5)
speculative.greedy_chain_verify(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
assert {"triton", "aiter", "fusedcomm.ops.sampling.aiter", "fusedcomm.kernels.sampling"}.isdisjoint(sys.modules)
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEDCOMM_", "TRITON_"))}
    result = run(program, environ)
    assert result.returncode == 0, result.stderr


def run(program: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)


# ---- operators ----


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_by_tritons_interpreter() -> None:
    """Every op has the operator of the backend that was asked for, and it gives what torch gives."""
    program = """
import torch
from fusedcomm.ops import sampling
from fusedcomm.ops.sampling import dispatch, operators, reference
probs, got, want = torch.rand(2, 5), torch.full((2, 5), torch.nan), torch.full((2, 5), torch.nan)
assert sampling.top_p_renorm_probs(probs, 0.5, out=got) is got
reference.top_p_renorm_probs_out(probs, None, None, 0.5, want)
assert torch.equal(got, want)
assert list(operators._operators) == [("triton", "top_p_renorm_probs")]
assert dispatch.sampling_backend("cpu") == "triton"
print(sampling.explain("top_p_renorm_probs", "cpu"))
"""
    result = run(program, os.environ | {"FUSEDCOMM_BACKEND": "triton", "TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr
    assert f"{FILTER}: triton   <- taken" in result.stdout


def test_a_new_choice_is_a_new_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached by backend is not taken for that of another."""
    monkeypatch.setattr(operators, "_operators", {})
    for _ in range(2):
        for backend in ("torch", *(["native"] if native.load() is not None else [])):
            monkeypatch.setattr(dispatch, "_chosen", {("cpu", FILTER): backend})
            found = operators.sampling_operator(FILTER, "cpu")
            assert (found.__module__ == "fusedcomm.ops.sampling.reference") is (backend == "torch")


def test_fullgraph_from_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has called the op before: what it runs on is found while it is compiled."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(operators, "_operators", {})
    torch._dynamo.reset()
    probs = torch.rand(3, 11)

    def body(x: torch.Tensor) -> torch.Tensor:
        return sampling.top_p_renorm_probs(sampling.top_k_renorm_probs(x * 2, 5), 0.7) + 1

    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(probs), body(probs))
    assert set(dispatch._chosen) == {("cpu", "top_k_renorm_probs"), ("cpu", FILTER)}
