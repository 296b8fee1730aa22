"""Per-group FP8 quantisation: every conversion, the scales, and where they lie in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import spec
import torch
from cases import (
    DTYPES,
    FP8_DTYPES,
    GROUP_SIZES,
    NormRecipe,
    dtypes,
    grouped,
    kinds,
    leading_shapes,
    make,
    norm_recipes,
    seeds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedcomm import ScaleLayout, ops
from fusedcomm.ops import reference

IMPLEMENTATIONS = [pytest.param(ops, id="native"), pytest.param(reference, id="reference")]
LAYOUTS = list(ScaleLayout)


def check(got: Any, y: np.ndarray, group_size: int, fp8: torch.dtype, layout: ScaleLayout) -> None:
    """fp8 and scale of a result are those of the rows y."""
    want = spec.quantise(y, group_size, fp8, ue8m0=layout is ScaleLayout.UE8M0_PACKED)
    assert got.scale_layout is layout
    assert got.fp8.dtype is fp8
    assert got.fp8.is_contiguous()
    spec.assert_codes(got.fp8, want.codes)
    spec.assert_scale(got.scale, want, layout.value)


# ---- every conversion ----


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit type."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def fp32_sample() -> torch.Tensor:
    """Every rounding boundary of both formats with its neighbours, and a million bit patterns."""
    boundaries = []
    for fp8 in FP8_DTYPES:
        table = spec.fp8_values(fp8)[:128]
        table = table[np.isfinite(table)]
        middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)  # exact: one bit more than FP8 has
        for values in (middles, table.astype(np.float32)):
            boundaries += [values, np.nextafter(values, np.float32(1e9)), np.nextafter(values, np.float32(-1e9))]
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = (rng.standard_normal(1 << 18) * 100).astype(np.float32)
    values = np.concatenate([*boundaries, bits, near])
    return torch.from_numpy(np.concatenate([values, -values]))


def values_of(dtype: torch.dtype) -> torch.Tensor:
    return fp32_sample() if dtype is torch.float32 else all_values(dtype)


def in_groups_of_scale_one(values: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """Rows of 32 whose first is FP8_MAX, so the scale is exactly 1; values that a scale of 1 can hold, and NaN."""
    limit = spec.FP8_MAX[fp8]
    values = values[(values.abs() <= limit)]
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    return torch.cat([torch.full((len(values), 1), limit, dtype=values.dtype), values], dim=1)


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_conversion_at_scale_one(module: Any, fp8: torch.dtype, dtype: torch.dtype) -> None:
    x = in_groups_of_scale_one(values_of(dtype), fp8)
    got = module.per_group_quant_fp8(x, group_size=32, fp8_dtype=fp8)
    assert (got.scale == 1).all()
    # against the definition of the format, and against torch
    spec.assert_codes(got.fp8, spec.to_fp8(spec.widen(x), fp8))
    spec.assert_codes(got.fp8, x.float().to(fp8).view(torch.uint8).numpy())


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_every_value_in_groups_of_its_like_and_of_any(
    module: Any, fp8: torch.dtype, dtype: torch.dtype, order: str
) -> None:
    """All values, infinities and NaN too, divided by the scales that their groups have."""
    values = values_of(dtype)
    if order == "sorted":
        values = values[torch.argsort(values.abs())]
    else:
        values = values[torch.from_numpy(np.random.default_rng(3).permutation(len(values)))]
    x = values[: len(values) // 32 * 32].view(-1, 32)
    got = module.per_group_quant_fp8(x, group_size=32, fp8_dtype=fp8)
    want = spec.quantise(spec.widen(x), 32, fp8)
    spec.assert_same(got.scale, want.scale, "scale")
    spec.assert_codes(got.fp8, want.codes)
    limit = spec.FP8_MAX[fp8]
    by_torch = (x.float() / got.scale).clamp(-limit, limit).to(fp8)
    spec.assert_codes(got.fp8, by_torch.view(torch.uint8).numpy())


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_our_own_table_of_fp8_is_that_of_torch(fp8: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    np.testing.assert_array_equal(codes.view(fp8).double().numpy(), spec.fp8_values(fp8))


# ---- shapes, kinds of values, layouts ----


@given(grouped(), dtypes, kinds, seeds, st.sampled_from(FP8_DTYPES), st.sampled_from(LAYOUTS), st.data())
@settings(max_examples=250)
def test_quantisation_to_the_bit(
    sizes: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    seed: int,
    fp8: torch.dtype,
    layout: ScaleLayout,
    data: st.DataObject,
) -> None:
    group_size, hidden = sizes
    x = make(seed, (*data.draw(leading_shapes(hidden)), hidden), dtype, kind)
    for module in (ops, reference):
        got = module.per_group_quant_fp8(x, group_size=group_size, scale_layout=layout, fp8_dtype=fp8)
        check(got, spec.widen(x), group_size, fp8, layout)


@given(
    norm_recipes(st.sampled_from([256, 512, 768, 1280, 4096, 7168, 32768])),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(FP8_DTYPES),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
@settings(max_examples=250)
def test_fused_norm_and_quantisation_to_the_bit(
    recipe: NormRecipe, group_size: int, fp8: torch.dtype, layout: ScaleLayout, emit: bool
) -> None:
    x, residual, weight, eps, bias = recipe.make()
    want = spec.add_norm(spec.widen(x), residual, weight, eps, x.dtype, bias)
    for module in (ops, reference):
        got = module.fused_add_rms_norm_quant(
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
        check(got, want.norm, group_size, fp8, layout)
        assert (got.norm is not None) == emit
        if got.norm is not None:
            spec.assert_same(got.norm, want.norm, "norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_is_norm_then_quantisation(layout: ScaleLayout) -> None:
    x, weight = make(1, (37, 1280), torch.bfloat16, "ordinary"), make(2, (1280,), torch.bfloat16, "ordinary")
    fused = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=True)
    norm, residual = ops.fused_add_rms_norm(x, x, weight, 1e-6)
    quant = ops.per_group_quant_fp8(norm, scale_layout=layout)
    assert torch.equal(fused.norm, norm)
    assert torch.equal(fused.residual, residual)
    assert torch.equal(fused.fp8.view(torch.uint8), quant.fp8.view(torch.uint8))
    assert torch.equal(fused.scale, quant.scale)
    assert fused.scale.stride() == quant.scale.stride()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 63])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 56])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_scales_lie(rows: int, groups: int, layout: ScaleLayout) -> None:
    """By the formulas of the specification, element by element; the memory starts poisoned."""
    x = make(rows * 100 + groups, (rows, groups * 128), torch.bfloat16, "ordinary")
    exact = spec.quantise(spec.widen(x), 128, ue8m0=layout is ScaleLayout.UE8M0_PACKED)
    got = ops.per_group_quant_fp8(x, scale_layout=layout)
    if layout is ScaleLayout.ROW_MAJOR:
        assert got.scale.shape == (rows, groups)
        assert got.scale.is_contiguous()
        return
    padded = (rows + 3) // 4 * 4
    columns = groups if layout is ScaleLayout.COLUMN_MAJOR else (groups + 3) // 4
    assert got.scale.shape == (rows, columns)
    assert got.scale.stride() == (1, padded)
    poison = torch.full((columns * padded + 1,), -7, dtype=torch.int32)
    memory = poison[: columns * padded]
    out = ops.GroupQuant(got.fp8, memory.view(got.scale.dtype).as_strided((rows, columns), (1, padded)), layout)
    ops.per_group_quant_fp8(x, scale_layout=layout, out=out)
    for column in range(columns):
        for row in range(padded):
            word = int(memory[row + column * padded]) & 0xFFFFFFFF
            if row >= rows:
                assert word == -7 & 0xFFFFFFFF  # padding is nobody's: it is not written
            elif layout is ScaleLayout.COLUMN_MAJOR:
                assert word == int(exact.scale[row, column : column + 1].view(np.uint32)[0])
            else:
                bytes_of_row = [int(e) for e in exact.exponents[row, 4 * column : 4 * column + 4]]
                assert list(word.to_bytes(4, "little")) == [*bytes_of_row, 0, 0, 0][:4]
    assert int(poison[-1]) == -7


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", [ScaleLayout.COLUMN_MAJOR, ScaleLayout.UE8M0_PACKED])
@pytest.mark.parametrize("shape", [(256,), (1, 128), (1, 768), (2, 768), (3, 768), (2, 2, 768), (5, 768), (16, 768)])
def test_memory_under_columns_is_of_whole_fours_of_rows(
    module: Any, layout: ScaleLayout, shape: tuple[int, ...]
) -> None:
    """Products on GPUs take rows in fours: those beyond the last are memory of the same tensor."""
    x, weight = make(1, shape, torch.bfloat16, "ordinary"), torch.ones(shape[-1])
    norm = module.fused_add_rms_norm(x, x, weight, 1e-6).norm
    alone = module.per_group_quant_fp8(norm, scale_layout=layout)
    fused = [
        module.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=emit)
        for emit in (False, True)
    ]
    for got in (alone, *fused):
        check(got, spec.widen(norm), 128, torch.float8_e4m3fn, layout)
        check_room(got.fp8, got.scale)


def check_room(fp8: torch.Tensor, scale: torch.Tensor) -> None:
    """Both begin their memory, which goes on to a multiple of four rows and not further."""
    padded = (fp8.numel() // fp8.shape[-1] + 3) // 4 * 4
    assert fp8.is_contiguous()
    assert (fp8.storage_offset(), scale.storage_offset()) == (0, 0)
    assert fp8.untyped_storage().nbytes() == padded * fp8.shape[-1]
    assert scale.untyped_storage().nbytes() == 4 * padded * scale.shape[-1]


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_row_major_results_have_no_memory_to_spare(module: Any) -> None:
    got = module.per_group_quant_fp8(make(1, (3, 256), torch.bfloat16, "ordinary"))
    assert got.fp8.untyped_storage().nbytes() == 3 * 256
    assert got.scale.untyped_storage().nbytes() == 3 * 2 * 4


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_scales_of_special_groups(module: Any, fp8: torch.dtype) -> None:
    limit = spec.FP8_MAX[fp8]
    x = torch.zeros(6, 32)
    x[1] = 1e-20  # below the least amax
    x[2, 3] = 1e-10 * 1.5
    x[3, 4] = float("inf")
    x[4, 5] = float("nan")
    x[5, 6] = -limit
    got = module.per_group_quant_fp8(x, group_size=32, fp8_dtype=fp8)
    least = np.float32(1e-10) / np.float32(limit)
    scale = got.scale[:, 0].numpy()
    assert scale[0] == scale[1] == least
    assert scale[2] == np.float32(1e-10 * 1.5) / np.float32(limit)
    assert np.isinf(scale[3])
    assert np.isnan(scale[4])
    assert scale[5] == 1
    q = got.fp8.float()
    assert (q[0] == 0).all()
    assert q[2, 3] == limit
    assert q[3, 4].isnan()  # inf / inf
    assert (q[3, :4] == 0).all()
    assert q[4].isnan().all()
    assert q[5, 6] == -limit


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_ue8m0_rounds_scales_up_to_powers_of_two(module: Any, fp8: torch.dtype) -> None:
    limit = spec.FP8_MAX[fp8]
    exact = np.array([1.0, 2.0, 0.5, 2.0**-40], dtype=np.float32)
    cases = np.concatenate([exact, np.nextafter(exact, np.float32(9e9)), np.nextafter(exact, np.float32(0))])
    x = torch.zeros(len(cases), 32)
    x[:, 0] = torch.from_numpy(cases) * limit
    scale = (x[:, 0] / limit).numpy()  # what the group's scale is before it is rounded up
    got = module.per_group_quant_fp8(x, group_size=32, fp8_dtype=fp8, scale_layout=ScaleLayout.UE8M0_PACKED)
    exponents = got.scale[:, 0].numpy() & 0xFF
    rounded = 2.0 ** (exponents.astype(np.float64) - 127)
    assert (rounded >= scale).all()
    assert (rounded < 2.0 * scale.astype(np.float64)).all()
    assert (rounded[:4] == exact).all()
    np.testing.assert_array_equal(
        got.fp8.float()[:, 0].numpy(), torch.from_numpy((x[:, 0].numpy() / rounded).astype(np.float32)).to(fp8).float()
    )


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_within_half_a_step(dtype: torch.dtype, fp8: torch.dtype) -> None:
    x = make(8, (64, 4096), dtype, "ordinary")
    got = ops.per_group_quant_fp8(x, fp8_dtype=fp8)
    back = (got.fp8.double().unflatten(-1, (-1, 128)) * got.scale.double().unsqueeze(-1)).flatten(-2)
    # Three mantissa bits: half a step is 2^-4 of the value; below the least normal number steps are even, half of
    # them 2^-10 (e4m3fn) or 2^-11 (fnuz) of the scale. The fp32 quotient and scale add 2^-23.
    half = {torch.float8_e4m3fn: 2.0**-10, torch.float8_e4m3fnuz: 2.0**-11}[fp8]
    bound = x.double().abs() * (2.0**-4 + 2.0**-22) + got.scale.double().repeat_interleave(128, -1) * half
    assert ((back - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_groups_do_not_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full((1, 256), largest, dtype=dtype)
    got = ops.per_group_quant_fp8(x, group_size=256)
    assert got.scale.isfinite().all()
    assert (got.fp8.float() == 448).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_row_does_not_depend_on_the_others(group_size: int) -> None:
    x = make(4, (300, 1024), torch.bfloat16, "ordinary")
    together = ops.per_group_quant_fp8(x, group_size=group_size)
    for row in (0, 150, 299):
        alone = ops.per_group_quant_fp8(x[row], group_size=group_size)
        assert alone.scale.shape == (1024 // group_size,)
        assert torch.equal(alone.scale, together.scale[row])
        assert torch.equal(alone.fp8.view(torch.uint8), together.fp8[row].view(torch.uint8))
