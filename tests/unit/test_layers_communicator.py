"""What LayerCommunicator hands to attention, to the MLP and to the next layer, on a group of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusedcomm import GroupCoordinator, ops
from fusedcomm.layers import (
    Fp8Activation,
    LayerCommunicator,
    LayerInput,
    NormFp8Activation,
    PartialSum,
    RMSNorm,
)

H = 256


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def group() -> Iterator[GroupCoordinator]:
    with GroupCoordinator() as group:
        yield group


def rows() -> torch.Tensor:
    return torch.randn(3, H, dtype=torch.bfloat16)


def norms() -> tuple[RMSNorm, RMSNorm]:
    pair = RMSNorm(H, dtype=torch.bfloat16), RMSNorm(H, dtype=torch.bfloat16)
    for norm in pair:
        norm.weight.copy_(torch.randn(H))
    return pair


def assert_same(got: LayerInput, expected: LayerInput) -> None:
    assert type(got.hidden_states) is type(expected.hidden_states)
    assert torch.equal(got.residual, expected.residual)
    if isinstance(got.hidden_states, torch.Tensor):
        assert torch.equal(got.hidden_states, expected.hidden_states)
        return
    assert got.hidden_states.scale_layout is expected.hidden_states.scale_layout
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", ["rows", "quantised", "both"])
def test_attention_receives(group: GroupCoordinator, form: str, first: bool, reduced: bool, fusion: bool) -> None:
    input_norm, post_norm = norms()
    communicator = LayerCommunicator(
        group,
        input_norm,
        post_norm,
        enable_fused_ar_quant=form != "rows",
        fused_ar_quant_keep_bf16=form == "both",
        enable_fusion=fusion,
    )
    x, residual = rows(), None if first else rows()
    total = x if residual is None else x + residual
    normed = input_norm(total)
    quantised = ops.per_group_quant_fp8(normed)
    hidden = {
        "rows": normed,
        "quantised": Fp8Activation(*quantised),
        "both": NormFp8Activation(normed, *quantised),
    }[form]
    got = communicator.prepare_attn(x if reduced else PartialSum(x, group), residual)
    assert_same(got, LayerInput(hidden, total))
    assert got.residual is not residual


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("quantise", [True, False])
def test_the_mlp_receives_rows_unless_asked(group: GroupCoordinator, quantise: bool, fusion: bool) -> None:
    input_norm, post_norm = norms()
    communicator = LayerCommunicator(
        group,
        input_norm,
        post_norm,
        enable_fused_ar_quant=True,
        fused_ar_quant_keep_bf16=True,
        enable_fused_ar_quant_mlp=quantise,
        enable_fusion=fusion,
    )
    x, residual = rows(), rows()
    normed = post_norm(x + residual)
    hidden = Fp8Activation(*ops.per_group_quant_fp8(normed)) if quantise else normed
    assert_same(communicator.prepare_mlp(PartialSum(x, group), residual), LayerInput(hidden, x + residual))


def test_only_the_last_layer_reduces(group: GroupCoordinator) -> None:
    partial, residual = PartialSum(rows(), group), rows()
    hidden, kept = LayerCommunicator(group, *norms()).postprocess_layer(partial, residual)
    assert hidden is partial
    assert kept is residual
    last = LayerCommunicator(group, *norms(), is_last_layer=True)
    hidden, kept = last.postprocess_layer(partial, residual)
    assert isinstance(hidden, torch.Tensor)
    assert torch.equal(hidden, partial.tensor)
    assert last.postprocess_layer(hidden, residual).hidden_states is hidden


def test_sums_over_another_group_are_refused(group: GroupCoordinator) -> None:
    with GroupCoordinator() as other:
        partial, residual = PartialSum(rows(), other), rows()
        communicator = LayerCommunicator(group, *norms(), is_last_layer=True)
        for call in (communicator.prepare_attn, communicator.prepare_mlp, communicator.postprocess_layer):
            with pytest.raises(ValueError, match="hidden_states: expected a PartialSum over this communicator's group"):
                call(partial, residual)
