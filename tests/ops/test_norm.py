"""rms_norm and fused_add_rms_norm: to the bit against the specification, within reason against fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import spec
import torch
from cases import DTYPES, NormRecipe, make, norm_recipes
from hypothesis import given, settings

from fusedcomm import ops
from fusedcomm.ops import reference

IMPLEMENTATIONS = [pytest.param(ops, id="native"), pytest.param(reference, id="reference")]
# half the distance between two neighbours, relative: what one rounding to T may move a value by
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SIZES = [1, 3, 17, 128, 1000, 1024, 4096, 5120, 7168, 12289, 32767, 32768]


def test_the_native_ops_are_what_is_tested() -> None:
    from fusedcomm.ops.dispatch import local_backend

    assert local_backend("cpu") == "native"


@given(norm_recipes())
@settings(max_examples=300)
def test_fused_add_rms_norm_to_the_bit(recipe: NormRecipe) -> None:
    x, residual, weight, eps, bias = recipe.make()
    want = spec.add_norm(spec.widen(x), residual, weight, eps, x.dtype, bias)
    for module in (ops, reference):
        got = module.fused_add_rms_norm(x, residual, weight, eps, weight_bias=bias)
        spec.assert_same(got.residual, want.residual, f"{module.__name__} residual")
        spec.assert_same(got.norm, want.norm, f"{module.__name__} norm")


@given(norm_recipes())
@settings(max_examples=150)
def test_rms_norm_to_the_bit(recipe: NormRecipe) -> None:
    x, _, weight, eps, bias = recipe.make()
    want = spec.add_norm(spec.widen(x), None, weight, eps, x.dtype, bias)
    for module in (ops, reference):
        spec.assert_same(module.rms_norm(x, weight, eps, weight_bias=bias), want.norm, module.__name__)


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", SIZES)
def test_against_fp64(module: Any, dtype: torch.dtype, hidden: int) -> None:
    x, residual = make(hidden, (5, hidden), dtype, "ordinary"), make(hidden + 1, (5, hidden), dtype, "ordinary")
    weight = make(hidden + 2, (hidden,), dtype, "ordinary")
    got = module.fused_add_rms_norm(x, residual, weight, 1e-5, weight_bias=1.0)
    u = UNIT_ROUNDOFF[dtype]

    exact = x.double() + residual.double()
    # fp32 addition, then rounding to T: half a step of each
    torch.testing.assert_close(got.residual.double(), exact, rtol=u + 2.0**-24, atol=torch.finfo(dtype).tiny)

    r = got.residual.double()  # the norm is of the rounded sum
    y = r / (r.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + 1.0)
    # Mean of squares: each square and each of at most 15 levels of the tree rounds once, so 16 steps, and the root
    # halves them; division by H, eps, root, reciprocal, two products and the bias are 7 more. Then one rounding to T.
    torch.testing.assert_close(
        got.norm.double(), y, rtol=u + (16 / 2 + 7) * 2.0**-24, atol=float(torch.finfo(dtype).tiny)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [7, 1000, 4096])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, hidden: int) -> None:
    """Alone, in the middle of many, from any thread: the same bits."""
    x, residual = make(1, (300, hidden), dtype, "ordinary"), make(2, (300, hidden), dtype, "ordinary")
    weight = make(3, (hidden,), dtype, "ordinary")
    together = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    for row in (0, 1, 17, 299):
        alone = ops.fused_add_rms_norm(x[row], residual[row], weight, 1e-6)
        assert torch.equal(alone.norm, together.norm[row])
        assert torch.equal(alone.residual, together.residual[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    x, weight = make(1, (500, 1024), dtype, "ordinary"), make(2, (1024,), dtype, "ordinary")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.rms_norm(x, weight, 1e-6)
        torch.set_num_threads(4)
        four = ops.rms_norm(x, weight, 1e-6)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_tree_is_the_specified_one(dtype: torch.dtype) -> None:
    """Big and small squares whose fp32 sum depends on the order; a serial or a blocked sum gives other bits."""
    x = torch.ones(1, 4096)
    x[0, ::2] = 2.0**-6
    x[0, 0] = 2.0**6
    x = (x * torch.linspace(0.5, 2.0, 4096)).to(dtype)
    squares = spec.widen(x) ** 2
    serial = np.add.accumulate(squares[0], dtype=np.float32)[-1]
    tree = spec.tree_sum(squares)[0]
    assert serial != tree, "these values cannot tell the orders apart"
    want = spec.add_norm(spec.widen(x), None, torch.ones(4096, dtype=dtype), 0.0, dtype)
    spec.assert_same(ops.rms_norm(x, torch.ones(4096, dtype=dtype), 0.0), want.norm)


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_reach_the_result(module: Any, dtype: torch.dtype) -> None:
    x = torch.ones(3, 64, dtype=dtype)
    x[0, 5], x[1, 6] = float("nan"), -float("inf")
    norm = module.rms_norm(x, torch.ones(64, dtype=dtype), 0.0)
    assert norm[0].isnan().all()  # the mean is NaN
    assert norm[1, 6].isnan()  # inf / inf
    assert (norm[1, :6] == 0).all()
    assert torch.equal(norm[2], torch.ones(64, dtype=dtype))


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 128), (3, 0, 128)])
def test_no_rows(module: Any, shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape, dtype=torch.bfloat16), torch.ones(128)
    got = module.fused_add_rms_norm(x, x, weight, 1e-6)
    assert got.norm.shape == got.residual.shape == shape
    assert module.rms_norm(x, weight, 1e-6).shape == shape


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_inputs_are_left_alone_and_outputs_are_new(module: Any) -> None:
    x, residual, weight = make(1, (3, 96), torch.float32, "ordinary"), torch.ones(3, 96), torch.ones(96)
    before = [t.clone() for t in (x, residual, weight)]
    got = module.fused_add_rms_norm(x, residual, weight, 1e-6)
    without = module.fused_add_rms_norm(x, None, weight, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip((x, residual, weight), before, strict=True))
    assert without.residual.data_ptr() != x.data_ptr()
    assert torch.equal(without.residual, x)
    assert len({t.data_ptr() for t in (x, residual, *got)}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_are_made_contiguous(dtype: torch.dtype) -> None:
    x = make(1, (6, 5, 64), dtype, "ordinary")
    wide = make(2, (64, 2), dtype, "ordinary")
    for view in (x.transpose(0, 1), x[::2], x[:, :, ::2].repeat(1, 1, 2), x.expand(2, 6, 5, 64), x.permute(1, 0, 2)):
        weight = wide[:, 1]
        got = ops.fused_add_rms_norm(view, view, weight, 1e-6)
        want = ops.fused_add_rms_norm(view.contiguous(), view.contiguous(), weight.contiguous(), 1e-6)
        assert torch.equal(got.norm, want.norm)
        assert torch.equal(got.residual, want.residual)
        assert got.norm.is_contiguous()
        assert got.norm.shape == view.shape


def test_an_fp32_weight_is_not_rounded_to_the_dtype_of_x() -> None:
    x, weight = make(1, (8, 64), torch.bfloat16, "ordinary"), make(2, (64,), torch.float32, "ordinary")
    got = ops.rms_norm(x, weight, 0.0)
    spec.assert_same(got, spec.add_norm(spec.widen(x), None, weight, 0.0, torch.bfloat16).norm)
    assert not torch.equal(got, ops.rms_norm(x, weight.bfloat16(), 0.0))
