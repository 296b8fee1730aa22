"""The out= forms: the same bits, the caller's memory, the aliases that are allowed, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, make

from fusedcomm import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout, ops
from fusedcomm.ops import dispatch

SHAPES = [(128,), (1, 128), (7, 384), (2, 3, 1280), (0, 256)]
LAYOUTS = list(ScaleLayout)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends of the local ops behind the same functions."""
    monkeypatch.setenv("FUSEDCOMM_BACKEND", request.param)
    monkeypatch.setattr(dispatch, "_chosen", {})
    assert dispatch.local_backend("cpu") == request.param
    return str(request.param)


def poisoned(t: torch.Tensor) -> torch.Tensor:
    """A tensor like t (strides too) of bytes that no result has."""
    poison = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    torch.as_strided(poison, (poison.untyped_storage().nbytes() // poison.element_size(),), (1,)).view(
        torch.uint8
    ).fill_(0xA5)
    return poison


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_write_to_out(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = make(1, shape, dtype, "ordinary"), make(2, shape, dtype, "ordinary")
    weight = make(3, shape[-1:], dtype, "ordinary")
    want = ops.rms_norm(x, weight, 1e-6)
    out = poisoned(want)
    assert ops.rms_norm(x, weight, 1e-6, out=out) is out
    assert same(out, want)

    pair = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    into = AddRMSNorm(poisoned(pair.norm), poisoned(pair.residual))
    got = ops.fused_add_rms_norm(x, residual, weight, 1e-6, out=into)
    assert got.norm is into.norm
    assert got.residual is into.residual
    assert same(got.norm, pair.norm)
    assert same(got.residual, pair.residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("emit", [False, True])
def test_quantisation_writes_to_out(backend: str, shape: tuple[int, ...], layout: ScaleLayout, emit: bool) -> None:
    x, weight = make(1, shape, torch.bfloat16, "ordinary"), make(3, shape[-1:], torch.bfloat16, "ordinary")
    want = ops.per_group_quant_fp8(x, scale_layout=layout)
    out = GroupQuant(poisoned(want.fp8), poisoned(want.scale), layout)
    got = ops.per_group_quant_fp8(x, scale_layout=layout, out=out)
    assert got.fp8 is out.fp8
    assert got.scale is out.scale
    assert same(got.fp8, want.fp8)
    assert same(got.scale, want.scale)

    full = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=emit)
    into = AddRMSNormQuant(*(t if t is None else poisoned(t) for t in full[:4]), layout)
    assert into.norm is None or into.norm is not full.norm
    result = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=emit, out=into)
    assert all(a is b for a, b in zip(result, into, strict=True))
    assert all(same(a, b) for a, b in zip(result[:4], full[:4], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_in_place(backend: str, dtype: torch.dtype) -> None:
    x, weight = make(1, (7, 1000), dtype, "ordinary"), make(2, (1000,), dtype, "ordinary")
    want = ops.rms_norm(x, weight, 1e-6)
    assert ops.rms_norm(x, weight, 1e-6, out=x) is x
    assert same(x, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [96, 1000, 4096])
def test_results_may_take_the_place_of_inputs(backend: str, dtype: torch.dtype, hidden: int) -> None:
    """The documented aliases, as the engines use them: the residual in place, the norm over x."""
    weight = make(3, (hidden,), dtype, "ordinary")

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return make(1, (7, hidden), dtype, "ordinary"), make(2, (7, hidden), dtype, "ordinary")

    want = ops.fused_add_rms_norm(*inputs(), weight, 1e-6)
    aliases: list[Callable[[torch.Tensor, torch.Tensor], AddRMSNorm]] = [
        lambda x, residual: AddRMSNorm(x, residual),
        lambda x, residual: AddRMSNorm(torch.empty_like(x), residual),
        lambda x, residual: AddRMSNorm(x, torch.empty_like(x)),
        lambda x, residual: AddRMSNorm(residual, x),
    ]
    for alias in aliases:
        x, residual = inputs()
        got = ops.fused_add_rms_norm(x, residual, weight, 1e-6, out=alias(x, residual))
        assert same(got.norm, want.norm)
        assert same(got.residual, want.residual)


def test_quantising_in_place_of_inputs(backend: str) -> None:
    weight = torch.ones(256)
    x, residual = make(1, (5, 256), torch.bfloat16, "ordinary"), make(2, (5, 256), torch.bfloat16, "ordinary")
    want = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, emit_bf16=True)
    out = AddRMSNormQuant(torch.empty_like(want.fp8), torch.empty_like(want.scale), residual, x, ScaleLayout.ROW_MAJOR)
    got = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, emit_bf16=True, out=out)
    assert all(same(a, b) for a, b in zip(got[:4], want[:4], strict=True))


def test_an_empty_input_of_numpy(backend: str) -> None:
    """Its strides are 0, and it is contiguous all the same: results have ordinary strides."""
    x = torch.from_numpy(np.empty((0, 256), dtype=np.float32))
    for layout in LAYOUTS:
        quant = ops.per_group_quant_fp8(x, scale_layout=layout)
        assert quant.fp8.stride() == (256, 1)
        got = ops.per_group_quant_fp8(x, scale_layout=layout, out=quant)
        assert got.fp8 is quant.fp8


# ---- refusals ----

X = torch.ones(4, 256, dtype=torch.bfloat16)
W = torch.ones(256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.empty(4, 255, dtype=torch.bfloat16), r"out: expected shape \(4, 256\) like x, got \(4, 255\)"),
        (torch.empty(4, 256), r"out: expected dtype torch.bfloat16 like x, got torch.float32"),
        (torch.empty(256, 4, dtype=torch.bfloat16).t(), r"out: expected a contiguous tensor, got strides"),
        (torch.empty(4, 256, dtype=torch.bfloat16, device="meta"), r"out: expected device cpu like x, got meta"),
        ("a string", r"out: expected a torch.Tensor, got str"),
    ],
)
def test_an_out_that_does_not_fit(backend: str, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(X, W, 1e-6, out=bad)
    good = torch.empty_like(X)
    with pytest.raises(ValueError, match=message.replace("out", r"out\.norm")):
        ops.fused_add_rms_norm(X, X, W, 1e-6, out=AddRMSNorm(bad, good))
    with pytest.raises(ValueError, match=message.replace("out", r"out\.residual")):
        ops.fused_add_rms_norm(X, X, W, 1e-6, out=AddRMSNorm(good, bad))


@pytest.mark.parametrize("view", [False, True])
def test_norm_and_residual_in_one_memory(backend: str, view: bool) -> None:
    out = torch.empty_like(X)
    both = AddRMSNorm(out, out.view(256, 4).view(4, 256) if view else out)
    with pytest.raises((ValueError, RuntimeError), match=r"norm: expected another tensor than (out\.)?residual"):
        ops.fused_add_rms_norm(X, X, W, 1e-6, out=both)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_of_another_layout(backend: str, layout: ScaleLayout) -> None:
    for other in LAYOUTS:
        if other is layout:
            continue
        wrong = ops.per_group_quant_fp8(X, scale_layout=other)
        with pytest.raises(ValueError, match=r"out\.scale: expected"):
            ops.per_group_quant_fp8(X, scale_layout=layout, out=GroupQuant(wrong.fp8, wrong.scale, layout))


def test_an_fp8_of_another_format_or_shape(backend: str) -> None:
    right = ops.per_group_quant_fp8(X)
    fnuz = ops.per_group_quant_fp8(X, fp8_dtype=torch.float8_e4m3fnuz)
    with pytest.raises(ValueError, match=r"out\.fp8: expected .*float8_e4m3fn"):
        ops.per_group_quant_fp8(X, out=GroupQuant(fnuz.fp8, right.scale, ScaleLayout.ROW_MAJOR))
    with pytest.raises(ValueError, match=r"out\.fp8: expected shape \(4, 256\)"):
        ops.per_group_quant_fp8(X, out=GroupQuant(right.fp8[:2], right.scale, ScaleLayout.ROW_MAJOR))


@pytest.mark.parametrize("emit", [False, True])
def test_a_norm_to_write_to_exactly_if_it_is_emitted(backend: str, emit: bool) -> None:
    full = ops.fused_add_rms_norm_quant(X, X, W, 1e-6, emit_bf16=not emit)
    with pytest.raises(ValueError, match=r"out\.norm: expected a tensor exactly if emit_bf16"):
        ops.fused_add_rms_norm_quant(X, X, W, 1e-6, emit_bf16=emit, out=full)
