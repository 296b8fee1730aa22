"""The norms' forms and result types, on a group of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import fusedcomm
from fusedcomm import GroupCoordinator, ops
from fusedcomm.layers import Fp8Activation, GemmaRMSNorm, NormFp8Activation, PartialSum, RMSNorm
from fusedcomm.ops.types import ScaleLayout

H = 384


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def group() -> Iterator[GroupCoordinator]:
    with GroupCoordinator() as group:
        yield group


@pytest.fixture
def norm() -> RMSNorm:
    norm = RMSNorm(H, 1e-5, dtype=torch.bfloat16)
    norm.weight.copy_(torch.randn(H))
    return norm


def rows() -> torch.Tensor:
    return torch.randn(5, H, dtype=torch.bfloat16)


def test_forward_against_fp64(norm: RMSNorm) -> None:
    x, residual = rows(), rows()
    y, r = norm(x, residual)
    assert torch.equal(r, x + residual)
    wide = r.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    # One rounding to bf16 (half an ulp, at most 2^-8 relative) of a value computed in fp32.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8 * 1.01, atol=1e-6)
    assert torch.equal(norm(r), y)


def test_gemma_stores_the_deviation_from_one(norm: RMSNorm) -> None:
    gemma = GemmaRMSNorm(H, 1e-5)
    plain = RMSNorm(H, 1e-5)
    assert torch.equal(gemma.weight, torch.zeros(H))
    assert torch.equal(plain.weight, torch.ones(H))
    x = torch.randn(3, H)
    assert torch.equal(gemma(x), plain(x))
    deviation = torch.randn(H) * 0.1
    gemma.weight.copy_(deviation)
    plain.weight.copy_(1 + deviation)
    assert torch.equal(gemma(x), plain(x))


def test_fused_forms_take_a_tensor_or_a_partial_sum(group: GroupCoordinator, norm: RMSNorm) -> None:
    x, residual = rows(), rows()
    expected = norm(x, residual)
    for addend in (x, PartialSum(x, group)):
        y, r = norm.forward_with_allreduce_fusion(addend, residual, group=group)
        assert torch.equal(y, expected.norm)
        assert torch.equal(r, expected.residual)
    started = norm.forward_with_allreduce_fusion(PartialSum(x, group))
    assert torch.equal(started.residual, x)
    assert torch.equal(started.norm, norm(x))


def test_without_a_group_the_tensor_parallel_group_serves(norm: RMSNorm) -> None:
    x, residual = rows(), rows()
    with pytest.raises(fusedcomm.FusedCommError, match="init_distributed"):
        norm.forward_with_allreduce_fusion(x, residual)
    fusedcomm.init_distributed()
    try:
        assert torch.equal(norm.forward_with_allreduce_fusion(x, residual).norm, norm(x, residual).norm)
    finally:
        fusedcomm.destroy_distributed()


def test_quantised_form_is_a_pair_or_a_triple(group: GroupCoordinator, norm: RMSNorm) -> None:
    x, residual = rows(), rows()
    normed, new_residual = norm(x, residual)
    quantised = ops.per_group_quant_fp8(normed)

    (fp8, scale), r = norm.forward_with_allreduce_fusion_quant_per_group(x, residual, group=group)
    assert torch.equal(fp8.view(torch.uint8), quantised.fp8.view(torch.uint8))
    assert torch.equal(scale, quantised.scale)
    assert torch.equal(r, new_residual)

    hidden, r = norm.forward_with_allreduce_fusion_quant_per_group(x, residual, keep_bf16=True, group=group)
    bf16, fp8, scale = hidden
    assert isinstance(hidden, NormFp8Activation)
    assert hidden.scale_layout is ScaleLayout.ROW_MAJOR
    assert torch.equal(bf16, normed)
    assert torch.equal(fp8.view(torch.uint8), quantised.fp8.view(torch.uint8))
    assert torch.equal(scale, quantised.scale)
    assert torch.equal(r, new_residual)

    local = norm.forward_quant_per_group(x, residual)
    assert isinstance(local.hidden_states, Fp8Activation)
    assert torch.equal(local.hidden_states.scale, quantised.scale)

    by_64 = norm.forward_with_allreduce_fusion_quant_per_group(x, residual, 64, group=group).hidden_states
    assert by_64[1].shape == (5, H // 64)


def test_another_groups_partial_sum_is_refused(group: GroupCoordinator, norm: RMSNorm) -> None:
    with (
        GroupCoordinator() as other,
        pytest.raises(ValueError, match="group: expected the group of the PartialSum"),
    ):
        norm.forward_with_allreduce_fusion(PartialSum(rows(), other), rows(), group=group)


def test_activations_keep_their_layout_when_copied() -> None:
    fp8, scale = torch.zeros(4, 128).to(torch.float8_e4m3fn), torch.ones(4, 1)
    pair = copy.deepcopy(Fp8Activation(fp8, scale, ScaleLayout.COLUMN_MAJOR))
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    assert pair.scale_layout is ScaleLayout.COLUMN_MAJOR
    triple = NormFp8Activation(fp8.float(), fp8, scale, ScaleLayout.COLUMN_MAJOR)
    assert len(triple) == 3
    assert triple.quantized.scale_layout is ScaleLayout.COLUMN_MAJOR
