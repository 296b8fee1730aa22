"""aiter's part in sampling, against a package recorded from the signatures of amd-aiter 0.1.20: no AMD hardware."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import make
from qk_bodies import all_same, compiles
from sampling_bodies import real_top_k, real_top_k_top_p, real_top_p, rows

from fusedcomm import Settings, native
from fusedcomm.aiter_package import MIN_VERSION, resolve
from fusedcomm.errors import SettingError
from fusedcomm.ops import sampling
from fusedcomm.ops.sampling import aiter, dispatch
from fusedcomm.ops.sampling.aiter import CONTRACT, why_not
from fusedcomm.ops.sampling.dispatch import sampling_backend
from fusedcomm.ops.sampling.plan import OPERATORS

OP = "top_k_renorm_probs"
RELEASED, PROPOSED = (OP,), ("top_p_renorm_probs", "top_k_top_p_renorm_probs")
V = 73

# What the fakes do with data is what the kernels of that version do: dense rows, whatever their strides are; a sum in
# fp32, and a product with its reciprocal; no test of what is no probability. As many indices as a row's own k are
# written into a workspace that the k of the host lays out: one past it would be a write to somebody's memory.
SAMPLING = """
import torch
from typing import Optional

calls = []

def kept(probs, threshold):
    masked = torch.where(probs >= threshold, probs, 0.0)
    return masked * (1 / masked.sum(-1, keepdim=True).clamp(min=1e-8))

def checked(probs):
    assert probs.is_contiguous() and probs.dim() == 2 and probs.shape[0] > 0
    assert not (probs.isnan() | (probs < 0) | probs.isinf()).any()
    return probs.float()

def top_k_renorm_probs(probs: torch.Tensor, maybe_top_k_arr: Optional[torch.Tensor], top_k_val: int) -> torch.Tensor:
    calls.append(("top_k_renorm_probs", maybe_top_k_arr, top_k_val))
    probs, vocab = checked(probs), probs.shape[1]
    stride = min(top_k_val if top_k_val > 0 else 50, vocab)
    k = torch.full((probs.shape[0],), stride) if maybe_top_k_arr is None else maybe_top_k_arr.int()
    assert (k >= 1).all() and (k <= stride).all(), "written past the workspace"
    return kept(probs, probs.sort(-1, descending=True).values.gather(-1, k.long().unsqueeze(-1) - 1))

def top_p_sampling_from_probs(probs: torch.Tensor, indices: torch.Tensor, maybe_top_p_arr: Optional[torch.Tensor],
                              top_p_val: float, deterministic: bool = False) -> torch.Tensor:
    raise AssertionError("called")

def top_k_top_p_sampling_from_probs(probs: torch.Tensor, indices: torch.Tensor, maybe_top_k_arr: Optional[torch.Tensor],
                                    top_k_val: int, maybe_top_p_arr: Optional[torch.Tensor], top_p_val: float,
                                    deterministic: bool = False) -> torch.Tensor:
    raise AssertionError("called")
"""
# in no release; as its authors proposed it
PROPOSAL = """
def top_p_renorm_probs(probs: torch.Tensor, maybe_top_p_arr: Optional[torch.Tensor], top_p_val: float) -> torch.Tensor:
    calls.append(("top_p_renorm_probs", maybe_top_p_arr, top_p_val))
    probs = checked(probs)
    p = torch.full((probs.shape[0],), top_p_val) if maybe_top_p_arr is None else maybe_top_p_arr.float()
    assert not p.isnan().any()
    above = torch.stack([torch.where(probs > v.unsqueeze(-1), probs, 0.0).sum(-1) for v in probs.t()], -1)
    nucleus = torch.where((above < p.unsqueeze(-1)) | (p.unsqueeze(-1) >= 1), probs, 0.0)
    return nucleus / nucleus.sum(-1, keepdim=True).clamp(min=1e-8)

def top_k_top_p_renorm_probs(probs: torch.Tensor, maybe_top_k_arr: Optional[torch.Tensor], top_k_val: int,
                             maybe_top_p_arr: Optional[torch.Tensor], top_p_val: float) -> torch.Tensor:
    return top_p_renorm_probs(top_k_renorm_probs(probs, maybe_top_k_arr, top_k_val), maybe_top_p_arr, top_p_val)

def chain_speculative_sampling(candidates, target_probs, uniform_samples, uniform_samples_for_final_sampling,
                               threshold_single: float, threshold_acc: float, deterministic: bool = True):
    raise AssertionError("called")
"""
FILES = {
    "__init__.py": "",
    "jit/core.py": "",
    "dist/__init__.py": "",
    "dist/parallel_state.py": "",
    "ops/__init__.py": "",
    "ops/sampling.py": SAMPLING,
}
NEXT = {"ops/sampling.py": SAMPLING + PROPOSAL}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a fake amd-aiter on sys.path, on a machine with a GPU that it serves and no compiled GPU library."""

    def do(*, arch: str = "gfx950", version: str = "0.1.20", replace: tuple[str, str] = ("", ""), **files: str) -> None:
        every = {**FILES, **files}
        assert replace[0] in "".join(every.values())
        for name, text in every.items():
            path = tmp_path / "aiter" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(*replace) if replace[0] else text)
        metadata = tmp_path / f"amd_aiter-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: amd-aiter\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(dispatch, "_arch", lambda device_type: arch)

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]
        aiter._function.cache_clear()

    forget()
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "aiter")
    monkeypatch.setattr(native, "load_gpu", lambda: object())
    monkeypatch.setattr(aiter, "_device", [])
    # its operators run on the CPU here, where no rule leads to them
    chosen = {("cpu", op): "aiter" if op in CONTRACT else "torch" for op in OPERATORS}
    monkeypatch.setattr(dispatch, "_chosen", chosen)
    yield do
    forget()


def calls() -> list[Any]:
    return list(sys.modules["aiter.ops.sampling"].calls)


# ---- signatures ----


@pytest.mark.parametrize(("files", "ops"), [({}, RELEASED), (NEXT, RELEASED + PROPOSED)])
def test_recorded_signatures_take_our_calls(install: Install, files: dict[str, str], ops: tuple[str, ...]) -> None:
    install(**files)
    for op in ops:
        inspect.signature(resolve(CONTRACT[op])).bind(*CONTRACT[op].parameters)
    assert set(CONTRACT) == {*RELEASED, *PROPOSED}


@pytest.mark.parametrize(("files", "by_aiter"), [({}, RELEASED), (NEXT, RELEASED + PROPOSED)])
def test_what_is_there_is_used(install: Install, files: dict[str, str], by_aiter: tuple[str, ...]) -> None:
    """The rest goes where it goes without aiter, and nothing that draws or verifies goes to it."""
    install(**files)
    chosen = {op: sampling_backend("cuda", op) for op in OPERATORS}
    assert chosen == {op: "aiter" if op in by_aiter else "native" for op in OPERATORS}
    reasons = {op: sampling.explain(op, "cuda").reasons.get("aiter", "") for op in OPERATORS}
    assert reasons["sampling_from_probs"] == "its samplers take no uniforms"
    assert reasons["chain_speculative_sampling"] == "aiter has no such op"
    assert "ids out of range" in reasons["dflash_chain_verify"]
    for op in set(CONTRACT) - set(by_aiter):
        assert reasons[op] == f"aiter.ops.sampling has no {op}"
    assert all((reasons[op] == "") is (op in by_aiter) for op in OPERATORS)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (
            ("maybe_top_k_arr: Optional[torch.Tensor], top_k_val: int) ->", "top_k_val: int, maybe_top_k_arr) ->"),
            "(probs, ",
        ),
        (
            ("top_k_val: int) ->", "k: int) ->"),
            "expected parameters (probs, maybe_top_k_arr, top_k_val, …), got (probs",
        ),
        (("top_k_val: int) ->", "top_k_val: int, out) ->"), "it wants out as well"),
        (("def top_k_renorm_probs", "def renamed"), "aiter.ops.sampling has no top_k_renorm_probs"),
    ],
)
def test_what_has_changed_is_not_called(install: Install, replace: tuple[str, str], reason: str) -> None:
    install(replace=replace)
    plan = sampling.explain(OP, "cuda")
    assert plan.backend == sampling_backend("cuda", OP) == "native"
    assert reason in plan.reasons["aiter"]


def test_parameters_that_we_do_not_pass_may_come(install: Install) -> None:
    install(replace=("top_k_val: int) ->", "top_k_val: int, later: int = 0) ->"))
    assert sampling_backend("cuda", OP) == "aiter"


# ---- who is called ----


@pytest.mark.parametrize(
    ("settings", "arch", "expected"),
    [
        ({"backend": "aiter"}, "gfx942", ""),
        ({"backend": "aiter"}, "gfx950", ""),
        ({}, "gfx950", "FUSEDCOMM_BACKEND=aiter has to ask for it"),
        ({"backend": "native"}, "gfx950", "FUSEDCOMM_BACKEND=aiter has to ask for it"),
        ({"backend": "aiter", "disable": True}, "gfx950", "FUSEDCOMM_DISABLE=1"),
        ({"backend": "aiter", "disable_aiter": True}, "gfx950", "FUSEDCOMM_DISABLE_AITER=1"),
        ({"backend": "aiter", "disable_aiter_sampling": True}, "gfx950", "FUSEDCOMM_DISABLE_AITER_SAMPLING=1"),
        ({"backend": "aiter"}, "gfx90a", "not gfx90a"),
        ({"backend": "aiter"}, "sm_90", "not sm_90"),
        ({"backend": "aiter"}, "cpu", "not the CPU"),
        ({"backend": "aiter"}, "", "torch sees no GPU"),
    ],
)
def test_which_devices(settings: dict[str, Any], arch: str, expected: str) -> None:
    got = why_not(OP, Settings(**settings), arch)
    assert expected in got
    assert (got == "") is (expected == "")


@pytest.mark.parametrize("switch", ["FUSEDCOMM_DISABLE", "FUSEDCOMM_DISABLE_AITER", "FUSEDCOMM_DISABLE_AITER_SAMPLING"])
def test_what_is_switched_off_is_not_imported(install: Install, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    install(**{"__init__.py": "raise AssertionError('imported')"})
    monkeypatch.setenv(switch, "1")
    assert sampling_backend("cuda", OP) == ("torch" if switch == "FUSEDCOMM_DISABLE" else "native")
    assert sampling.explain(OP, "cuda").reasons["aiter"] == f"{switch}=1"
    assert "aiter" not in sys.modules


def test_it_never_serves_by_itself(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(**{"__init__.py": "raise AssertionError('imported')"})
    monkeypatch.delenv("FUSEDCOMM_BACKEND")
    assert sampling_backend("cuda", OP) == "native"
    assert "has to ask for it" in sampling.explain(OP, "cuda").reasons["aiter"]
    assert "aiter" not in sys.modules


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"version": "0.1.19"}, f"aiter is 0.1.19, {MIN_VERSION} or later is needed"),
        ({"__init__.py": "raise RuntimeError('no gfx here')"}, "RuntimeError: no gfx here"),
        ({"ops/sampling.py": "import csrc_of_aiter"}, "No module named 'csrc_of_aiter'"),
        # not taken for a function that is not there
        ({"ops/sampling.py": "raise KeyError('AITER_REBUILD')"}, "KeyError: 'AITER_REBUILD'"),
    ],
)
def test_asked_for_it_is_an_error_if_it_cannot_be_used(install: Install, facts: dict[str, str], expected: str) -> None:
    install(**facts)
    for ask in (sampling_backend, lambda device_type, op: sampling.explain(op, device_type)):
        with pytest.raises(SettingError, match="FUSEDCOMM_BACKEND: aiter cannot serve top_k_renorm_probs: ") as error:
            ask("cuda", OP)
        assert expected in str(error.value)
    assert sampling_backend("cuda", "sampling_from_probs") == "native"  # which it would not serve anyway


def test_another_package_of_that_name(install: Install, tmp_path: Path) -> None:
    install()
    (tmp_path / "aiter/jit/core.py").unlink()
    with pytest.raises(SettingError, match="is not AMD's"):
        sampling_backend("cuda", OP)
    assert "aiter" not in sys.modules


def test_it_is_looked_for_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    looked: list[Any] = []
    monkeypatch.setattr(aiter, "resolve", lambda call: looked.append(call) or resolve(call))
    assert sampling_backend("cuda", OP) == "aiter"
    for _ in range(3):
        sampling.top_k_renorm_probs(rows("peaked", 2, V), 5)
    assert looked == [CONTRACT[OP]]
    assert len(calls()) == 3


# ---- calls ----

K = torch.tensor([1, 0, 40, V, 7, -3, V - 1, 10**10])
P = torch.tensor([0.5, 0.0, 1.0, 0.9, torch.nan, 0.1, 1e-6, 0.99])


def close(got: torch.Tensor, probs: torch.Tensor, keeps: Callable[[int, Any], Any]) -> None:
    """The specification's sets, renormalised; the fake sums 73 values in fp32, an error of 73 * 2^-24 at most."""
    assert got.dtype is torch.float32
    for row, x in enumerate(probs.double().numpy()):
        found = keeps(row, x)
        assert found.margin > 1e-6, "the data does not say on which side a sum falls"
        want = np.where(found.kept, x, 0.0)
        np.testing.assert_allclose(got[row].numpy(), want / want.sum(), rtol=2.0**-18, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [True, False])
def test_top_k(install: Install, per_row: bool, dtype: torch.dtype) -> None:
    install()
    probs = rows("peaked", len(K), V).to(dtype)
    out = torch.full((len(K), V), torch.nan)
    for k in [K] if per_row else [1, 7, 60, V, 0]:
        assert sampling.top_k_renorm_probs(probs, k, out=out) is out
        limit = k if per_row else torch.full((len(K),), k)
        close(out, probs, lambda row, x, limit=limit: real_top_k(x, int(limit[row])))
    _, given, value = calls()[-1]
    # V for no limit, and beside k of the rows: the kernel writes that many indices a row
    assert value == V
    assert (given is None) is not per_row
    if per_row:
        assert given.dtype is torch.int32
        assert given.tolist() == [1, V, 40, V, 7, V, V - 1, V]


@pytest.mark.parametrize("per_row", [True, False])
def test_top_p(install: Install, per_row: bool) -> None:
    """Where it is there; a share of 0 keeps the largest, and NaN all."""
    install(**NEXT)
    probs = rows("peaked", len(P), V)
    for p in [P] if per_row else [0.0, 0.5, 0.9, 1.0]:
        share = p.nan_to_num(1.0) if per_row else torch.full((len(P),), p)
        got = sampling.top_p_renorm_probs(probs, p)
        close(got, probs, lambda row, x, share=share: real_top_p(x, float(share[row])))


@pytest.mark.parametrize("per_row", [True, False])
def test_top_k_top_p(install: Install, per_row: bool) -> None:
    install(**NEXT)
    probs = rows("peaked", len(P), V)
    k, p = (K, P) if per_row else (20, 0.8)
    got = sampling.top_k_top_p_renorm_probs(probs, k, p)
    ks, ps = (K, P.nan_to_num(1.0)) if per_row else (torch.full((len(P),), 20), torch.full((len(P),), 0.8))
    close(got, probs, lambda row, x: real_top_k_top_p(x, int(ks[row]), float(ps[row])))
    assert [name for name, *_ in calls()] == ["top_k_renorm_probs", "top_p_renorm_probs"]  # by the fake of the third


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_by_index(install: Install, dtype: torch.dtype) -> None:
    """Of rows that lie apart, in any order, and at the ends for indices past them."""
    install()
    wide = rows("peaked", 5, 3 * V)
    probs = wide[:, V : 2 * V]
    before = wide.clone()
    named = torch.tensor([4, 0, 4, -7, 99], dtype=dtype)
    got = sampling.top_k_renorm_probs(probs, 9, indices=named)
    close(got, probs[[4, 0, 4, 0, 4]], lambda row, x: real_top_k(x, 9))
    close(sampling.top_k_renorm_probs(probs, 9), probs, lambda row, x: real_top_k(x, 9))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("op", [OP, *PROPOSED])
def test_what_is_no_probability_counts_as_0(install: Install, op: str) -> None:
    """The fake would raise for what gets there. Nothing of the caller's is changed."""
    install(**NEXT)
    probs = make(3, (6, V), torch.float32, "bits")
    probs[0], probs[1, 3] = torch.nan, torch.inf
    before = probs.clone()
    arguments = {OP: (5,), "top_p_renorm_probs": (0.5,), "top_k_top_p_renorm_probs": (5, 0.5)}[op]
    got = getattr(sampling, op)(probs, *arguments)
    assert bool(got.isfinite().all())
    assert bool((got >= 0).all())
    assert bool((got[~(probs > 0)] == 0).all())
    assert not got[0].any()
    assert all_same(probs, before)


@pytest.mark.parametrize("named", [True, False])
def test_nothing_to_do_is_no_call(install: Install, named: bool) -> None:
    """Whose grid would be empty, which HIP refuses."""
    install()
    probs, indices = (torch.ones(2, V), torch.ones(0, dtype=torch.int64)) if named else (torch.ones(0, V), None)
    assert sampling.top_k_renorm_probs(probs, 5, indices=indices).shape == (0, V)
    importlib.import_module("aiter.ops.sampling")
    assert calls() == []


def test_a_graph_is_refused(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on using a workspace that a later call frees."""
    install()
    out = torch.full((2, V), 7.0)
    capturing = functools.partial(aiter._top_k_renorm_probs_out, OnGpu(torch.ones(2, V)), None, None, 5, out)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(SettingError, match="aiter cannot serve top_k_renorm_probs: a graph is being captured"):
        capturing()
    importlib.import_module("aiter.ops.sampling")
    assert calls() == []
    assert bool((out == 7.0).all())


class OnGpu:
    """Takes a tensor for one on a GPU."""

    def __init__(self, t: torch.Tensor) -> None:
        self.device, self.shape = torch.device("cuda", 0), t.shape


def test_one_gpu_a_process(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the workspace lies, which is where the first call was."""
    install()
    probs = rows("peaked", 2, V)
    sampling.top_k_renorm_probs(probs, 5)
    assert aiter._device == [torch.device("cpu")]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(SettingError, match="its workspace lies on cpu, where the first call was, not on cuda:0"):
        aiter._top_k_renorm_probs_out(OnGpu(probs), None, None, 5, torch.empty(2, V))
    assert len(calls()) == 1


def test_an_exception_of_aiter_is_raised(install: Install) -> None:
    install(replace=('    calls.append(("top_k', '    raise RuntimeError("HIP error")\n    calls.append(("top_k'))
    with pytest.raises(RuntimeError, match="HIP error"):
        sampling.top_k_renorm_probs(torch.ones(2, V), 5)


def test_bad_input_is_told_as_ever(install: Install) -> None:
    install()
    with pytest.raises(ValueError, match=r"top_k: expected shape \(2,\), got \(8,\)"):
        sampling.top_k_renorm_probs(torch.ones(2, V), K)


# ---- torch ----


def filters(probs: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, named = probs * 1.0, torch.arange(probs.shape[0] - 1, -1, -1)
    return (
        sampling.top_k_renorm_probs(x, k),
        sampling.top_k_renorm_probs(x, 3, indices=named) + 1,
        sampling.top_p_renorm_probs(x, p),
        sampling.top_k_top_p_renorm_probs(x, k, 0.5, indices=named),
    )


def filter_arguments(count: int) -> tuple[torch.Tensor, ...]:
    return rows("peaked", count, V), torch.arange(count) * 5, torch.linspace(0, 1, count)


def test_compiles_without_graph_breaks(install: Install) -> None:
    install(**NEXT)
    compiles("cpu", filters, filter_arguments)


def test_operators_are_registered_as_torch_wants_it(install: Install) -> None:
    install(**NEXT)
    probs, k, p = filter_arguments(4)
    named, out = torch.tensor([0, 3]), torch.empty(2, V)
    for name, parameters in {
        "top_k_renorm_probs_out": (k[:2], 0),
        "top_p_renorm_probs_out": (None, 0.5),
        "top_k_top_p_renorm_probs_out": (None, 5, p[:2], 0.0),
    }.items():
        operator = getattr(torch.ops.fusedcomm_aiter, name).default
        torch.library.opcheck(operator, (probs, named, *parameters, out))
        ours = getattr(torch.ops.fusedcomm, name, None) if native.load() is not None else None
        if ours is not None:
            assert str(operator._schema).partition("(")[2] == str(ours.default._schema).partition("(")[2]
