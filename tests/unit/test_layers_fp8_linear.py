"""BlockFP8Linear against the same product in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedcomm import ops
from fusedcomm.layers import BlockFP8Linear, Fp8Activation, NormFp8Activation, fp8_matmul
from fusedcomm.models.tiny import quantize_blocks
from fusedcomm.ops.types import ScaleLayout

BLOCK = 128


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_linear(
    in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> BlockFP8Linear:
    linear = BlockFP8Linear(in_features, out_features, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(in_features * 1000 + out_features)
    # Blocks of very different sizes, so that a scale taken from a neighbouring block shows.
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.rand(out_features, 1, generator=generator).mul(6).exp()
    fp8, scale = quantize_blocks(weight)
    linear.weight.copy_(fp8)
    linear.weight_scale.copy_(scale)
    if linear.bias is not None:
        linear.bias.copy_(torch.randn(out_features, generator=generator))
    return linear


def exact(linear: BlockFP8Linear, fp8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product in fp64, where it is exact but for the last bits."""
    rows = linear.weight_scale.repeat_interleave(BLOCK, 0)[: linear.out_features]
    weight = linear.weight.double() * rows.repeat_interleave(BLOCK, 1)[:, : linear.in_features].double()
    x = fp8.double() * scale.repeat_interleave(BLOCK, -1)[..., : linear.in_features].double()
    y = x @ weight.T
    return y if linear.bias is None else y + linear.bias.double()


def magnitude(linear: BlockFP8Linear, fp8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same with all terms positive: what the rounding errors are proportional to."""
    rows = linear.weight_scale.repeat_interleave(BLOCK, 0)[: linear.out_features]
    weight = linear.weight.double() * rows.repeat_interleave(BLOCK, 1)[:, : linear.in_features].double()
    x = fp8.double() * scale.repeat_interleave(BLOCK, -1)[..., : linear.in_features].double()
    return x.abs() @ weight.abs().T


@given(tokens=st.integers(0, 9), in_features=st.integers(1, 400), out_features=st.integers(1, 300), bias=st.booleans())
def test_any_shape_against_fp64(tokens: int, in_features: int, out_features: int, bias: bool) -> None:
    linear = make_linear(in_features, out_features, bias=bias, dtype=torch.float32)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens))
    padded = torch.nn.functional.pad(x, (0, -in_features % BLOCK))
    fp8, scale, _ = ops.per_group_quant_fp8(padded)
    fp8 = fp8[:, :in_features]
    # fp32 sums of at most 128 products, then 4 scaled blocks and the bias: some 140 roundings of half an ulp
    # at worst, of terms no larger than the magnitude.
    bound = magnitude(linear, fp8, scale) * 140 * 2**-24 + 1e-6
    assert ((linear(x).double() - exact(linear, fp8, scale)).abs() <= bound).all()


def test_bf16_output_is_the_fp32_one_rounded_once() -> None:
    wide, narrow = (make_linear(512, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    x = torch.randn(7, 512, dtype=torch.bfloat16)
    y = narrow(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, wide(x).bfloat16())


@pytest.mark.parametrize("layout", list(ScaleLayout))
def test_quantised_input_is_taken_as_it_is(layout: ScaleLayout) -> None:
    linear = make_linear(640, 256)
    x = torch.randn(6, 640, dtype=torch.bfloat16)
    quantised = ops.per_group_quant_fp8(x, scale_layout=layout)
    given_pair = linear(Fp8Activation(*quantised))
    assert torch.equal(given_pair, linear(NormFp8Activation(torch.full_like(x, torch.nan), *quantised)))
    if layout is ScaleLayout.UE8M0_PACKED:  # scales rounded up to powers of two: other values, the same product
        scale = torch.exp2((quantised.scale.contiguous().view(torch.uint8)[:, :5]).float() - 127)
        # One rounding to bf16, of an fp32 sum.
        torch.testing.assert_close(
            given_pair.double(), exact(linear, quantised.fp8, scale), rtol=2**-8 * 1.01, atol=1e-3
        )
    else:
        assert torch.equal(given_pair, linear(x))
        assert torch.equal(given_pair, linear((quantised.fp8, quantised.scale)))


def test_leading_dimensions_stay() -> None:
    linear = make_linear(256, 128)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    y = linear(x)
    assert y.shape == (2, 3, 128)
    assert torch.equal(y.flatten(0, 1), linear(x.flatten(0, 1)))
    quantised = ops.per_group_quant_fp8(x)
    assert torch.equal(y, linear(Fp8Activation(*quantised)))
    assert linear(x[:, :0]).shape == (2, 0, 128)


def test_long_inputs_are_walked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(256, 128)
    x = torch.randn(37, 256, dtype=torch.bfloat16)
    whole = linear(x)
    monkeypatch.setattr(fp8_matmul, "_MAX_PARTIALS", 2 * 128 * 5)
    # Pieces of 5 rows may take another fp32 summation order in the library's product: one bf16 ulp.
    torch.testing.assert_close(linear(x), whole, rtol=2**-8, atol=1e-3)


def test_a_changed_weight_is_noticed() -> None:
    linear = make_linear(128, 128, dtype=torch.float32)
    x = torch.randn(2, 128)
    before = linear(x)
    linear.weight_scale.mul_(2)
    assert torch.equal(linear(x), before * 2)
    linear.weight.copy_(torch.zeros(128, 128).to(torch.float8_e4m3fn))
    assert torch.equal(linear(x), torch.zeros(2, 128))
    linear.load_state_dict(make_linear(128, 128, dtype=torch.float32).state_dict())
    assert torch.equal(linear(x), before)


def test_a_change_through_data_is_seen_after_forget_prepared() -> None:
    linear = make_linear(128, 128, dtype=torch.float32)
    x = torch.randn(2, 128)
    before = linear(x)
    linear.weight_scale.data.mul_(2)
    linear.forget_prepared()
    assert torch.equal(linear(x), before * 2)


def test_nan_stays_in_its_row() -> None:
    linear = make_linear(256, 128)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    y = linear(x)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


def test_bad_input_is_named() -> None:
    linear = make_linear(256, 128)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    fp8, scale, _ = ops.per_group_quant_fp8(x)
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 256\], got \[4, 128\]"):
        linear(x[:, :128])
    with pytest.raises(ValueError, match=r"fp8: expected torch.float8_e4m3fn .* got torch.bfloat16"):
        linear((x, scale))
    with pytest.raises(ValueError, match=r"scale: expected torch.float32 \[4, 2\] .* got torch.float32 \[4, 1\]"):
        linear((fp8, scale[:, :1]))
    with pytest.raises(ValueError, match=r"scale: expected torch.int32"):
        linear(Fp8Activation(fp8, scale, ScaleLayout.UE8M0_PACKED))
