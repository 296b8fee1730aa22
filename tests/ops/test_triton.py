"""The Triton backend to the bit against the specification, under Triton's interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import spec
import torch
import triton_bodies as bodies
from cases import (
    DTYPES,
    FP8_DTYPES,
    GROUP_SIZES,
    KINDS,
    NormRecipe,
    dtypes,
    grouped,
    kinds,
    make,
    norm_recipes,
    seeds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_backend import InterpretedOps, TritonOps, on_gpu

from fusedcomm import ScaleLayout

LAYOUTS = list(ScaleLayout)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module", params=["interpreter", "gpu"])
def triton_ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    """fusedcomm.ops on the Triton backend."""
    if request.param == "interpreter":
        interpreted = InterpretedOps()
        yield interpreted
        interpreted.close()
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    with pytest.MonkeyPatch.context() as monkeypatch, on_gpu(monkeypatch) as gpu:
        yield gpu


def check_quant(got: Any, y: np.ndarray, group_size: int, fp8: torch.dtype, layout: ScaleLayout) -> None:
    """fp8 and scale of a result are those of the rows y."""
    want = spec.quantise(y, group_size, fp8, ue8m0=layout is ScaleLayout.UE8M0_PACKED)
    assert got.scale_layout is layout
    assert got.fp8.dtype is fp8
    assert got.fp8.is_contiguous()
    spec.assert_codes(got.fp8, want.codes)
    spec.assert_scale(got.scale, want, layout.value)


# ---- to the bit ----


@given(norm_recipes(st.one_of(st.integers(1, 300), st.sampled_from([1000, 1024, 1025, 4096, 7168]))))
@settings(max_examples=60)
def test_norms(triton_ops: TritonOps, recipe: NormRecipe) -> None:
    x, residual, weight, eps, bias = recipe.make()
    want = spec.add_norm(spec.widen(x), residual, weight, eps, x.dtype, bias)
    got = triton_ops.fused_add_rms_norm(x, residual, weight, eps, weight_bias=bias)
    spec.assert_same(got.residual, want.residual, "residual")
    spec.assert_same(got.norm, want.norm, "norm")
    alone = spec.add_norm(spec.widen(x), None, weight, eps, x.dtype, bias)
    spec.assert_same(triton_ops.rms_norm(x, weight, eps, weight_bias=bias), alone.norm, "rms_norm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_every_kind_of_values(triton_ops: TritonOps, dtype: torch.dtype, kind: str) -> None:
    """Subnormals, infinities, NaN, -0: also where eps hides nothing."""
    x, residual = make(1, (4, 384), dtype, kind), make(2, (4, 384), dtype, kind)
    weight = make(3, (384,), torch.float32, "specials")
    for eps in (0.0, 1e-6):
        want = spec.add_norm(spec.widen(x), residual, weight, eps, dtype, 1.0)
        got = triton_ops.fused_add_rms_norm(x, residual, weight, eps, weight_bias=1.0)
        spec.assert_same(got.residual, want.residual, "residual")
        spec.assert_same(got.norm, want.norm, "norm")


def test_every_magnitude_of_the_mean(triton_ops: TritonOps) -> None:
    """The root and the quotient from the smallest subnormal mean to the largest, eps hiding nothing."""
    x = make(1, (140, 32), torch.float32, "ordinary")
    x *= torch.exp2(torch.linspace(-76, 63, len(x)))[:, None] / x.abs().amax(-1, keepdim=True)
    want = spec.add_norm(spec.widen(x), None, torch.ones(32), 0.0, torch.float32)
    spec.assert_same(triton_ops.rms_norm(x, torch.ones(32), 0.0), want.norm)


@pytest.mark.parametrize("hidden", [16384, 32767, 32768])
def test_long_rows(triton_ops: TritonOps, hidden: int) -> None:
    x, residual = make(1, (2, hidden), torch.bfloat16, "ordinary"), make(2, (2, hidden), torch.bfloat16, "ordinary")
    weight = make(3, (hidden,), torch.bfloat16, "ordinary")
    want = spec.add_norm(spec.widen(x), residual, weight, 1e-6, torch.bfloat16)
    if hidden % 128:
        norm, r = triton_ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    else:
        got = triton_ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, emit_bf16=True)
        norm, r = got.norm, got.residual
        check_quant(got, want.norm, 128, torch.float8_e4m3fn, ScaleLayout.ROW_MAJOR)
    spec.assert_same(norm, want.norm, "norm")
    spec.assert_same(r, want.residual, "residual")


def test_the_order_of_the_tree(triton_ops: TritonOps) -> None:
    """Big and small squares whose fp32 sum depends on the order."""
    x = torch.ones(1, 4096)
    x[0, ::2] = 2.0**-6
    x[0, 0] = 2.0**6
    x *= torch.linspace(0.5, 2.0, 4096)
    squares = spec.widen(x) ** 2
    assert np.add.accumulate(squares[0], dtype=np.float32)[-1] != spec.tree_sum(squares)[0]
    want = spec.add_norm(spec.widen(x), None, torch.ones(4096), 0.0, torch.float32)
    spec.assert_same(triton_ops.rms_norm(x, torch.ones(4096), 0.0), want.norm)


@given(grouped(), dtypes, kinds, seeds, st.sampled_from(FP8_DTYPES), st.sampled_from(LAYOUTS), st.integers(0, 3))
@settings(max_examples=60)
def test_quantisation(
    triton_ops: TritonOps,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    seed: int,
    fp8: torch.dtype,
    layout: ScaleLayout,
    rows: int,
) -> None:
    group_size, hidden = sizes
    x = make(seed, (rows, hidden), dtype, kind)
    got = triton_ops.per_group_quant_fp8(x, group_size=group_size, scale_layout=layout, fp8_dtype=fp8)
    check_quant(got, spec.widen(x), group_size, fp8, layout)


@given(
    norm_recipes(st.sampled_from([256, 512, 768, 1280, 4096])),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(FP8_DTYPES),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
@settings(max_examples=60)
def test_fused_norm_and_quantisation(
    triton_ops: TritonOps, recipe: NormRecipe, group_size: int, fp8: torch.dtype, layout: ScaleLayout, emit: bool
) -> None:
    x, residual, weight, eps, bias = recipe.make()
    want = spec.add_norm(spec.widen(x), residual, weight, eps, x.dtype, bias)
    got = triton_ops.fused_add_rms_norm_quant(
        x,
        residual,
        weight,
        eps,
        group_size=group_size,
        emit_bf16=emit,
        scale_layout=layout,
        fp8_dtype=fp8,
        weight_bias=bias,
    )
    spec.assert_same(got.residual, want.residual, "residual")
    check_quant(got, want.norm, group_size, fp8, layout)
    assert (got.norm is not None) == emit
    if emit:
        spec.assert_same(got.norm, want.norm, "norm")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [32, 4096 + 32, 3 * 4096])
def test_rows_that_several_programs_quantise(triton_ops: TritonOps, hidden: int, layout: ScaleLayout) -> None:
    x = make(hidden, (3, hidden), torch.bfloat16, "ordinary")
    got = triton_ops.per_group_quant_fp8(x, group_size=32, scale_layout=layout)
    check_quant(got, spec.widen(x), 32, torch.float8_e4m3fn, layout)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_16_bit_type(triton_ops: TritonOps, fp8: torch.dtype, dtype: torch.dtype) -> None:
    """Divided by a scale of one where it can hold them, and in groups of any."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    groups = in_groups_of_scale_one(values, fp8)
    got = triton_ops.per_group_quant_fp8(groups, group_size=32, fp8_dtype=fp8)
    assert (got.scale == 1).all()
    check_quant(got, spec.widen(groups), 32, fp8, ScaleLayout.ROW_MAJOR)
    shuffled = values[torch.from_numpy(np.random.default_rng(3).permutation(len(values)))].view(-1, 4096)
    got = triton_ops.per_group_quant_fp8(shuffled, group_size=32, fp8_dtype=fp8)
    check_quant(got, spec.widen(shuffled), 32, fp8, ScaleLayout.ROW_MAJOR)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_every_rounding_boundary(triton_ops: TritonOps, fp8: torch.dtype) -> None:
    """The middles between neighbours of the format, and the fp32 numbers next to them."""
    table = spec.fp8_values(fp8)[:128]
    table = table[np.isfinite(table)]
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)  # exact: one bit more than FP8 has
    values = np.concatenate([middles, *(np.nextafter(middles, np.float32(far)) for far in (9e9, -9e9))])
    x = in_groups_of_scale_one(torch.from_numpy(np.concatenate([values, -values])), fp8)
    got = triton_ops.per_group_quant_fp8(x, group_size=32, fp8_dtype=fp8)
    assert (got.scale == 1).all()
    spec.assert_codes(got.fp8, spec.to_fp8(spec.widen(x), fp8))


def in_groups_of_scale_one(values: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """Rows of 4096 in groups of 32 whose first is FP8_MAX, so the scale is exactly 1; no infinities, no NaN."""
    limit = spec.FP8_MAX[fp8]
    values = values[values.abs() <= limit]
    values = torch.nn.functional.pad(values, (0, -len(values) % (31 * 128))).view(-1, 31)
    return torch.cat([torch.full((len(values), 1), limit, dtype=values.dtype), values], dim=1).view(-1, 4096)


# ---- memory ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [96, 1000, 4096])
def test_results_may_take_the_place_of_inputs(triton_ops: TritonOps, dtype: torch.dtype, hidden: int) -> None:
    triton_ops.run(bodies.results_in_place_of_inputs, dtype, hidden)


@pytest.mark.parametrize("groups", [1, 3, 4, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_its_own_memory_is_written(triton_ops: TritonOps, layout: ScaleLayout, groups: int) -> None:
    triton_ops.run(bodies.only_its_own_memory_is_written, layout, groups)


@pytest.mark.parametrize("layout", [ScaleLayout.COLUMN_MAJOR, ScaleLayout.UE8M0_PACKED])
def test_memory_under_columns_is_of_whole_fours_of_rows(triton_ops: TritonOps, layout: ScaleLayout) -> None:
    triton_ops.run(bodies.memory_under_columns_is_of_whole_fours_of_rows, layout)


def test_strided_inputs(triton_ops: TritonOps) -> None:
    x, weight = make(1, (6, 5, 64), torch.bfloat16, "ordinary"), make(2, (64, 2), torch.bfloat16, "ordinary")[:, 1]
    view = x.transpose(0, 1)
    want = spec.add_norm(spec.widen(view), view, weight, 1e-6, x.dtype)
    got = triton_ops.fused_add_rms_norm(view, view, weight, 1e-6)
    spec.assert_same(got.norm, want.norm)
    spec.assert_same(got.residual, want.residual)


# ---- inside torch ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_without_graph_breaks(triton_ops: TritonOps, layout: ScaleLayout) -> None:
    triton_ops.run(bodies.compiles_without_graph_breaks, "aot_eager", layout)


def test_inductor(triton_ops: TritonOps) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler: found neither g++ nor clang++")
    # strides that are not those of a contiguous tensor: what a compiler may lose
    triton_ops.run(bodies.compiles_without_graph_breaks, "inductor", ScaleLayout.COLUMN_MAJOR)


def test_compiled_code_mutates_as_eager_code_does(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.compiled_code_mutates_as_eager_code_does)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_results(triton_ops: TritonOps, layout: ScaleLayout) -> None:
    triton_ops.run(bodies.fakes_have_the_strides_of_results, layout)


def test_opcheck(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.opcheck)


def test_graph_replays(triton_ops: TritonOps) -> None:
    if triton_ops.device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    triton_ops.run(bodies.graph_replays)
