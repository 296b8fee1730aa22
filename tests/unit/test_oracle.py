"""tests/oracle.py, which judges large tensors, against tests/spec.py, which judges everything."""

from __future__ import annotations

import oracle
import pytest
import spec
import torch
from cases import DTYPES, FP8_DTYPES, GROUP_SIZES, KINDS, NormRecipe, make, norm_recipes
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedcomm import ScaleLayout


@given(norm_recipes())
@settings(max_examples=100)
def test_norms(recipe: NormRecipe) -> None:
    x, residual, weight, eps, bias = recipe.make()
    want = spec.add_norm(spec.widen(x), residual, weight, eps, x.dtype, bias)
    got = oracle.add_norm(x, residual, weight, oracle.Options(eps=eps, weight_bias=bias))
    spec.assert_same(got["residual"], want.residual, "residual")
    spec.assert_same(got["norm"], want.norm, "norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_sums(dtype: torch.dtype, kind: str) -> None:
    parts = [make(seed, (5, 333), dtype, kind) for seed in range(5)]
    spec.assert_same(oracle.rank_order_sum(parts), spec.rank_order_sum(parts))


@given(
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.sampled_from(FP8_DTYPES),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(list(ScaleLayout)),
    st.integers(1, 6),
    st.integers(0, 99),
)
@settings(max_examples=100)
def test_quantisation(
    kind: str, dtype: torch.dtype, fp8: torch.dtype, group_size: int, layout: ScaleLayout, groups: int, seed: int
) -> None:
    hidden = groups * group_size
    y = make(seed, (hidden,) if seed % 7 == 6 else (seed % 7, hidden), dtype, kind)
    options = oracle.Options(group_size=group_size, scale_layout=layout, fp8_dtype=fp8)
    got = oracle.quantised(y, options)
    want = spec.quantise(spec.widen(y), group_size, fp8, ue8m0=layout is ScaleLayout.UE8M0_PACKED)
    spec.assert_codes(got["fp8"], want.codes)
    # as a tensor of the layout's strides, which is what the check of the specification looks at
    scale = got["scale"]
    if layout is not ScaleLayout.ROW_MAJOR:
        scale = torch.empty_strided(scale.shape, (1, (len(scale) + 3) // 4 * 4), dtype=scale.dtype).copy_(scale)
    spec.assert_scale(scale, want, layout.value)


def test_complaints_say_what_is_wrong() -> None:
    want = {"out": torch.tensor([[1.0, float("nan")], [3.0, 0.0]])}
    assert oracle.complaint(want["out"].clone(), want) == ""
    wrong = want["out"].clone()
    wrong[1, 1] = -0.0
    text = oracle.complaint(wrong, want)
    for part in ("out: 1 of 4 differ", "first at (1, 1)", "-0.0", "rows [1]"):
        assert part in text
    assert "float16" in oracle.complaint(want["out"].half(), want)
    assert "strides" in oracle.complaint(want["out"].t().contiguous().t(), want)
