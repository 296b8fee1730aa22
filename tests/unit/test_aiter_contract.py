"""The aiter adapter against a package recorded from the signatures of amd-aiter 0.1.20: no AMD hardware is needed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fusedcomm.aiter_package import MIN_VERSION, find_aiter, resolve, why_unusable
from fusedcomm.comm.aiter import (
    CONTRACT,
    AiterCollectives,
    Ballot,
    cast_ballot,
    why_not_all,
    why_not_call,
    why_not_group,
)
from fusedcomm.comm.local import local_ops
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops import reference
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

RANKS = [0, 1]
DEVICE = torch.device("cpu")
MI355 = ["gfx950", "gfx950"]

# What the fake does: a group of two ranks whose other one contributes the same addend.
PARALLEL_STATE = """
import torch

class Buffer:
    data_ptr, max_size = 4096, 1 << 30

class Communicator:
    disabled = False
    _ptr = 1234
    _pool = {"input": Buffer()}

class DeviceCommunicator:
    ca_comm = Communicator()

class Group:
    device = torch.device("cpu")
    device_communicator = DeviceCommunicator()

    def __init__(self, ranks):
        self.ranks = ranks

_TP = Group([0, 1])
calls = []

def model_parallel_is_initialized():
    return _TP is not None

def has_custom_group() -> bool:
    return False

def get_tp_group():
    assert _TP is not None, "tensor model parallel group is not initialized"
    return _TP

def init_distributed_environment(world_size: int = -1, rank: int = -1, distributed_init_method: str = "env://",
                                 local_rank: int = -1, backend: str = "nccl", data_parallel_size: int = 1,
                                 data_parallel_rank: int = 0):
    calls.append(("world", world_size, rank, distributed_init_method, local_rank, backend))

def ensure_model_parallel_initialized(tensor_model_parallel_size: int, pipeline_model_parallel_size: int,
                                      decode_context_model_parallel_size=1, backend=None, data_parallel_size: int = 1,
                                      prefill_context_model_parallel_size: int = 1, custom_group_config=None) -> None:
    global _TP
    calls.append(("group", tensor_model_parallel_size, pipeline_model_parallel_size))
    _TP = Group(list(range(tensor_model_parallel_size)))

def destroy_model_parallel():
    global _TP
    _TP = None
"""
COMMUNICATION_OP = """
import torch

def tensor_model_parallel_all_reduce(input_, use_new=True, open_fp8_quant=False, prefill_support=False):
    return input_ + input_

def tensor_model_parallel_fused_allreduce_rmsnorm(input_, residual_inp_, weight_, eps, prefill_support=False,
                                                  x_pad_to_multiple=0, gemma_norm=False):
    assert weight_.dtype == input_.dtype and input_.is_contiguous() and residual_inp_.is_contiguous()
    assert not prefill_support and x_pad_to_multiple == 0
    residual = input_ + input_ + residual_inp_
    r, w = residual.float(), weight_.float() + (1.0 if gemma_norm else 0.0)
    return (r / (r.square().mean(-1, keepdim=True) + eps).sqrt() * w).to(input_.dtype), residual
"""
CUSTOM_ALL_REDUCE = """
import ctypes
import torch
from aiter.dist.communication_op import tensor_model_parallel_fused_allreduce_rmsnorm as fused_norm

calls = []

def fused_allreduce_rmsnorm_quant_per_group(_fa: int, inp: torch.Tensor, res_inp: torch.Tensor, res_out: torch.Tensor,
                                            out: torch.Tensor, scale_out: torch.Tensor, w: torch.Tensor, eps: float,
                                            group_size: int, reg_ptr: int, reg_bytes: int, use_1stage: bool,
                                            bf16_out_ptr: int = 0, transpose_scale: bool = False) -> None:
    calls.append((_fa, reg_ptr, reg_bytes, use_1stage))
    norm, residual = fused_norm(inp, res_inp, w, eps)
    res_out.copy_(residual)
    groups = norm.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    scale_out.copy_(scale)
    out.copy_((groups / scale.unsqueeze(-1)).flatten(-2).to(out.dtype))
    if bf16_out_ptr:
        ctypes.memmove(bf16_out_ptr, norm.contiguous().data_ptr(), norm.nbytes)
"""
FILES = {
    "__init__.py": "",
    "jit/core.py": "",
    "ops/__init__.py": "",
    "dist/__init__.py": "",
    "dist/parallel_state.py": PARALLEL_STATE,
    "dist/communication_op.py": COMMUNICATION_OP,
    "ops/custom_all_reduce.py": CUSTOM_ALL_REDUCE,
}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a fake amd-aiter on sys.path; its files can be replaced, and a text in them."""

    def do(version: str | None = "0.1.20", replace: tuple[str, str] = ("", ""), **files: str) -> None:
        for name, text in {**FILES, **files}.items():
            assert replace[0] in "".join(FILES.values())
            path = tmp_path / "aiter" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(*replace) if replace[0] else text)
        if version is not None:
            metadata = tmp_path / f"amd_aiter-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: amd-aiter\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]

    forget()
    yield do
    forget()


def initialize() -> None:
    """As an engine does before it makes a group of ours."""
    __import__("aiter.dist.parallel_state")


def vote_alone(ballot: bytes) -> list[bytes]:
    return [ballot, ballot]


def make_collectives() -> AiterCollectives:
    initialize()
    found, why_not = AiterCollectives.set_up(vote_alone, Settings(), MI355, RANKS, DEVICE, local_ops("torch"))
    assert why_not == ""
    assert found is not None
    return found


# ---- which package ----


@pytest.mark.parametrize(
    ("version", "usable"),
    [
        ("0.1.20", True),
        ("0.1.20.post1", True),
        ("0.2.0", True),
        ("1.0", True),
        ("0.1.21.dev3+g1234567", True),
        (MIN_VERSION, True),
        ("0.1.19", False),
        ("0.1.19.post0", False),
        ("0.1.9.post2", False),
        ("unknown", False),
    ],
)
def test_version(install: Install, version: str, usable: bool) -> None:
    install(version)
    why_not = why_unusable(find_aiter())
    assert (why_not == "") is usable
    assert usable or (version in why_not and MIN_VERSION in why_not)


def test_without_metadata_it_is_not_used(install: Install) -> None:
    install(version=None)
    assert "no metadata of amd-aiter" in why_unusable(find_aiter())


def test_nothing_installed() -> None:
    assert "not installed" in cast_ballot(RANKS, DEVICE, may_initialize=True).why_not


@pytest.mark.parametrize("forced", [False, True])
def test_impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    """PyPI's aiter, even beside metadata of the real one."""
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "not AMD's" in cast_ballot(RANKS, DEVICE, may_initialize=forced).why_not
    assert "aiter" not in sys.modules


# ---- signatures ----


def test_recorded_signatures_take_our_calls(install: Install) -> None:
    install()
    for call in CONTRACT:
        inspect.signature(resolve(call)).bind(*call.parameters)


@pytest.mark.parametrize(
    ("replace", "expected"),
    [
        (
            ("res_inp: torch.Tensor, res_out: torch.Tensor", "res_out: torch.Tensor, res_inp: torch.Tensor"),
            "_per_group",
        ),
        (("group_size: int, reg_ptr", "group: int, reg_ptr"), "_per_group"),
        (("eps, prefill_support=False,\n", "eps, x_bias, prefill_support=False,\n"), "_rmsnorm"),
        (("(input_, use_new=True", "(input_, *, group, use_new=True"), "it wants group"),
        (("def tensor_model_parallel_all_reduce", "def renamed"), "has no tensor_model_parallel_all_reduce"),
        (("_pool =", "_buffers ="), "AttributeError"),
        (("disabled = False", "disabled = True"), "custom all-reduce is disabled"),
        (("return False", "return True"), "custom_group_config"),
        (("Group([0, 1])", "Group([2, 3])"), "has the ranks [2, 3], this group [0, 1]"),
        (('device("cpu")', 'device("cuda:1")'), "is on cuda:1, this group on cpu"),
    ],
)
def test_what_has_changed_is_a_vote_against_it(install: Install, replace: tuple[str, str], expected: str) -> None:
    install(replace=replace)
    initialize()
    assert expected in cast_ballot(RANKS, DEVICE, may_initialize=False).why_not


@pytest.mark.parametrize(
    "replace",
    [
        ("transpose_scale: bool = False", "transpose_scale: bool = False, later: int = 0"),
        (", transpose_scale: bool = False", ""),  # as in 0.1.19.post1
    ],
)
def test_parameters_that_we_do_not_pass_may_come_and_go(install: Install, replace: tuple[str, str]) -> None:
    install(replace=replace)
    initialize()
    assert cast_ballot(RANKS, DEVICE, may_initialize=False).why_not == ""


@pytest.mark.parametrize("error", ["RuntimeError('no gfx here')", "ImportError('libamdhip64')", "OSError('HIP')"])
def test_import_that_fails_is_a_vote_against_it(install: Install, error: str) -> None:
    install(**{"__init__.py": f"raise {error}"})
    ballot = cast_ballot(RANKS, DEVICE, may_initialize=True)
    assert ballot.why_not == error.replace("('", ": ").replace("')", "")


def test_not_imported_where_nobody_uses_it(install: Install) -> None:
    install(**{"__init__.py": "raise RuntimeError('imported')"})
    assert "nobody has initialized" in cast_ballot(RANKS, DEVICE, may_initialize=False).why_not
    assert "aiter" not in sys.modules


# ---- votes ----

YES = Ballot("", "0.1.20", bytes(32), True)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (YES, ""),
        (YES._replace(why_not="AMD's aiter is not installed"), "rank 1: AMD's aiter is not installed"),
        (YES._replace(version="0.1.21"), "rank 1 has aiter 0.1.21, rank 0 0.1.20"),
        (YES._replace(environment=b"x" * 32), "rank 1 has other AITER_* variables than rank 0"),
        (YES._replace(initialized=False), "initialized on some ranks only"),
    ],
)
def test_vote(other: Ballot, expected: str) -> None:
    assert expected in why_not_all([YES, other])
    assert (why_not_all([YES, other]) == "") is (expected == "")


@pytest.mark.parametrize("text", ["", "é" * 300, "x" * 256, "a\nb"])
def test_ballot_crosses_the_wire(text: str) -> None:
    received = Ballot.unpack(YES._replace(why_not=text).pack())
    assert received._replace(why_not="") == YES
    assert text.startswith(received.why_not.rstrip("\ufffd"))
    assert bool(received.why_not) is bool(text)


def test_own_variables_of_aiter_are_part_of_the_vote(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    initialize()
    plain = cast_ballot(RANKS, DEVICE, may_initialize=False)
    monkeypatch.setenv("AITER_AR_1STAGE", "1")
    assert "AITER_*" in why_not_all([plain, cast_ballot(RANKS, DEVICE, may_initialize=False)])


@pytest.mark.parametrize(
    ("settings", "archs", "expected"),
    [
        ({}, MI355, ""),
        ({}, ["gfx942", "gfx942"], ""),
        ({}, ["gfx942"] * 8, ""),
        ({"backend": "aiter"}, MI355, ""),
        ({"disable_aiter": True}, MI355, "FUSEDCOMM_DISABLE_AITER=1"),
        ({"disable_aiter": True, "backend": "aiter"}, MI355, "FUSEDCOMM_DISABLE_AITER=1"),
        ({"disable": True}, MI355, "FUSEDCOMM_DISABLE=1"),
        ({"deterministic": True}, MI355, "FUSEDCOMM_DETERMINISTIC=1"),
        ({"backend": "native"}, MI355, "FUSEDCOMM_BACKEND=native"),
        ({}, ["sm_90", "sm_90"], "not sm_90"),
        ({}, ["gfx950", "gfx90a"], "not gfx90a"),
        ({}, [], "not the CPU"),
        ({}, ["gfx950"] * 6, "not 6"),
        ({}, ["gfx950"], "not 1"),
    ],
)
def test_which_groups(settings: dict[str, object], archs: list[str], expected: str) -> None:
    why_not = why_not_group(Settings(**settings), archs, len(archs))
    assert expected in why_not
    assert (why_not == "") is (expected == "")


@pytest.mark.parametrize(
    ("stage", "shape", "dtype", "group_size", "arch", "expected"),
    [
        ("fused", (1, 4096), torch.bfloat16, 128, "gfx950", ""),
        ("fused", (512, 8192), torch.float16, 32, "gfx950", ""),
        ("fused", (1, 4096), torch.bfloat16, 128, "gfx942", "gfx95x only"),
        ("fused", (1, 4224), torch.bfloat16, 256, "gfx950", "group_size 256 at hidden size 4224"),
        ("fused", (1, 6144), torch.bfloat16, 96, "gfx950", "group_size 96"),
        ("fused", (1, 8192), torch.bfloat16, 1024, "gfx950", "group_size 1024"),
        ("fused_norm", (1, 4096), torch.bfloat16, 0, "gfx942", ""),
        ("fused_norm", (1, 8200), torch.bfloat16, 0, "gfx942", "8200"),
        ("fused_norm", (1, 504), torch.bfloat16, 0, "gfx942", "504"),
        ("fused_norm", (2, 4100), torch.bfloat16, 0, "gfx942", "4100"),
        ("fused_norm", (8192, 4096), torch.bfloat16, 0, "gfx942", "67108864"),
        ("fused_norm", (8191, 4096), torch.bfloat16, 0, "gfx942", ""),
        ("fused_norm", (0, 4096), torch.bfloat16, 0, "gfx942", "not 0"),
        ("custom", (3, 8), torch.bfloat16, 0, "gfx942", ""),
        ("custom", (3, 7), torch.bfloat16, 0, "gfx942", "whole 16 bytes"),
        ("custom", (1, 4096), torch.float32, 0, "gfx942", "not float32"),
    ],
)
def test_which_calls(
    stage: str, shape: tuple[int, int], dtype: torch.dtype, group_size: int, arch: str, expected: str
) -> None:
    why_not = why_not_call(stage, *shape, dtype, group_size, [arch, arch])
    assert expected in why_not
    assert (why_not == "") is (expected == "")


def test_one_rank_without_it(install: Install) -> None:
    install()
    initialize()
    other = YES._replace(why_not="AMD's aiter is not installed").pack()
    arguments = (MI355, RANKS, DEVICE, local_ops("torch"))
    found, why_not = AiterCollectives.set_up(lambda own: [own, other], Settings(), *arguments)
    assert found is None
    assert why_not == "rank 1: AMD's aiter is not installed"
    with pytest.raises(SettingError, match="FUSEDCOMM_BACKEND: aiter cannot serve this group: rank 1"):
        AiterCollectives.set_up(lambda own: [own, other], Settings(backend="aiter"), *arguments)


def test_what_all_ranks_know_takes_no_vote(install: Install) -> None:
    install(**{"__init__.py": "raise RuntimeError('imported')"})

    def exchange(data: bytes) -> list[bytes]:
        raise AssertionError("a rank that knows better would not take part")

    found = AiterCollectives.set_up(exchange, Settings(disable_aiter=True), MI355, RANKS, DEVICE, local_ops("torch"))
    assert found == (None, "FUSEDCOMM_DISABLE_AITER=1")


def test_forced_it_is_initialized_and_given_up(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(replace=("_TP = Group([0, 1])", "_TP = None"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    settings = Settings(backend="aiter")
    made, why_not = AiterCollectives.set_up(vote_alone, settings, MI355, RANKS, DEVICE, local_ops("torch"))
    assert made is not None, why_not
    state = sys.modules["aiter.dist.parallel_state"]
    assert state.calls == [("world", 2, 1, "env://", None, "nccl"), ("group", 2, 1)]
    made.close()
    made.close()
    assert not state.model_parallel_is_initialized()


def test_initialization_that_fails_is_raised_on_all_ranks(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(replace=("_TP = Group([0, 1])", "_TP = None"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    errors = iter(["", "OutOfMemoryError: HIP out of memory"])

    def exchange(own: bytes) -> list[bytes]:
        return [own, Ballot.unpack(own)._replace(why_not=next(errors)).pack()]

    arguments = (Settings(backend="aiter"), MI355, RANKS, DEVICE, local_ops("torch"))
    with pytest.raises(SettingError, match=r"rank 1: OutOfMemoryError"):
        AiterCollectives.set_up(exchange, *arguments)


def test_a_group_of_some_ranks_is_not_initialized(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(replace=("_TP = Group([0, 1])", "_TP = None"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert "all ranks only" in cast_ballot(RANKS, DEVICE, may_initialize=True).why_not


# ---- calls ----


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(shape) % 1000)).to(dtype)


def test_all_reduce(install: Install) -> None:
    install()
    group = make_collectives()
    x = draw(3, 512)
    assert torch.equal(group.all_reduce(x), x + x)
    out = torch.full_like(x, torch.nan)
    assert group.all_reduce(x.t().contiguous().t(), out) is out
    assert torch.equal(out, x + x)


@pytest.mark.parametrize("bias", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_residual", [True, False])
def test_allreduce_rmsnorm(install: Install, bias: float, weight_dtype: torch.dtype, with_residual: bool) -> None:
    install()
    x, weight = draw(2, 3, 512), draw(512, dtype=weight_dtype)
    residual = draw(2, 3, 512).flip(0) if with_residual else None
    norm, residual_out = make_collectives().allreduce_rmsnorm(x, residual, weight, 1e-5, bias)
    expected = reference.fused_add_rms_norm(x + x, residual, weight, 1e-5, weight_bias=bias)
    # the fake rounds the sum once, not twice, and a weight in another dtype is rounded before it is used
    torch.testing.assert_close(norm, expected.norm, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(residual_out, expected.residual, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("layout", list(ScaleLayout))
@pytest.mark.parametrize(("tokens", "hidden", "group_size"), [(1, 512, 128), (6, 1024, 64), (65, 1024, 128)])
@pytest.mark.parametrize("emit_norm", [False, True])
def test_allreduce_rmsnorm_quant(
    install: Install, layout: ScaleLayout, tokens: int, hidden: int, group_size: int, emit_norm: bool
) -> None:
    install()
    x, weight, residual = draw(tokens, hidden), draw(hidden), draw(tokens, hidden).flip(0)
    arguments = (x, residual, weight, 1e-5, 0.0, group_size, emit_norm, layout)
    result = make_collectives().allreduce_rmsnorm_quant(*arguments)
    expected = reference.fused_add_rms_norm_quant(
        x + x, residual, weight, 1e-5, group_size=group_size, emit_bf16=emit_norm, scale_layout=layout
    )
    assert result.scale_layout is layout
    for name in ("fp8", "scale", "residual", "norm"):
        got, wanted = getattr(result, name), getattr(expected, name)
        assert (got is None) is (wanted is None), name
        if wanted is not None:
            assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype), name
    torch.testing.assert_close(result.residual, expected.residual, rtol=2**-7, atol=2**-7)
    # one step of e4m3 is 1/8 of a value
    torch.testing.assert_close(result.fp8.float(), expected.fp8.float(), rtol=2**-3, atol=2.0)
    if layout is not ScaleLayout.UE8M0_PACKED:
        torch.testing.assert_close(result.scale, expected.scale, rtol=2**-6, atol=0.0)
        message = 2 * tokens * hidden
        calls = sys.modules["aiter.ops.custom_all_reduce"].calls
        assert calls == [(1234, 4096, 1 << 30, message <= 128 << 10)]
    if expected.norm is not None:
        torch.testing.assert_close(result.norm, expected.norm, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("layout", list(ScaleLayout))
def test_results_into_given_tensors(install: Install, layout: ScaleLayout) -> None:
    """Inputs among them: what aiter reads is not written before it is done."""
    install()
    group, weight = make_collectives(), draw(1024)
    x, residual = draw(6, 1024), draw(6, 1024).flip(0)
    pair = group.allreduce_rmsnorm(x, residual, weight, 1e-5, 0.0)
    arguments = (weight, 1e-5, 0.0, 64, True, layout)
    full = group.allreduce_rmsnorm_quant(x, residual, *arguments)
    own_x, own_residual = x.clone(), residual.clone()
    into = AddRMSNorm(own_x, own_residual)
    assert group.allreduce_rmsnorm(own_x, own_residual, weight, 1e-5, 0.0, into) is into
    assert torch.equal(own_x, pair.norm)
    assert torch.equal(own_residual, pair.residual)
    own_x, own_residual = x.clone(), residual.clone()
    out = AddRMSNormQuant(torch.zeros_like(full.fp8), torch.zeros_like(full.scale), own_residual, own_x, layout)
    assert group.allreduce_rmsnorm_quant(own_x, own_residual, *arguments, out) is out
    for name in ("scale", "residual", "norm"):
        assert torch.equal(getattr(out, name), getattr(full, name))
    assert torch.equal(out.fp8.view(torch.uint8), full.fp8.view(torch.uint8))


def test_an_exception_of_aiter_is_raised(install: Install) -> None:
    install(replace=("    calls.append((_fa", "    raise RuntimeError('unsupported n')\n    calls.append((_fa"))
    group = make_collectives()
    x, weight = draw(1, 512), draw(512)
    with pytest.raises(RuntimeError, match="unsupported n"):
        group.allreduce_rmsnorm_quant(x, x, weight, 1e-5, 0.0, 128, False, ScaleLayout.ROW_MAJOR)
