"""What of the GPU's FP8 products runs without one: layouts, padding, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedcomm import ScaleLayout, ops, platform
from fusedcomm.layers import BlockFP8Linear, RMSNorm
from fusedcomm.layers import fp8_matmul_gpu as gpu
from fusedcomm.layers.activation import Fp8Activation, HiddenStates
from fusedcomm.layers.fp8_matmul import block_fp8_matmul, decode_weight
from fusedcomm.models.tiny import quantize_blocks
from fusedcomm.ops import dispatch


def quantized(tokens: int, columns: int, layout: ScaleLayout) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    fp8, scale, _ = ops.per_group_quant_fp8(x, scale_layout=layout)
    return fp8, scale


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("columns", [128, 1280])
@pytest.mark.parametrize("layout", [ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR])
def test_rows_are_padded_to_a_multiple_of_four(tokens: int, columns: int, layout: ScaleLayout) -> None:
    fp8, scale = quantized(tokens, columns, layout)
    x, scales = gpu.padded_rows(fp8, scale)
    rows = (tokens + 3) // 4 * 4
    assert (x.shape, x.stride()) == ((rows, columns), (columns, 1))
    assert (scales.shape, scales.stride()) == ((rows, columns // 128), (1, rows))
    assert torch.equal(x[:tokens].float(), fp8.float())
    assert torch.equal(scales[:tokens], scale)
    if tokens % 4 == 0 or layout is ScaleLayout.COLUMN_MAJOR:
        assert x.data_ptr() == fp8.data_ptr()
    if layout is ScaleLayout.COLUMN_MAJOR:
        assert scales.data_ptr() == scale.data_ptr(), "goes in without conversion"


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_memory_that_ends_with_the_rows_is_copied(tokens: int) -> None:
    """What another library quantised."""
    fp8, scale = (t.clone() for t in quantized(tokens, 384, ScaleLayout.COLUMN_MAJOR))
    assert scale.untyped_storage().nbytes() < 4 * 3 * ((tokens + 3) // 4 * 4)
    x, scales = gpu.padded_rows(fp8, scale)
    rows = (tokens + 3) // 4 * 4
    assert (x.shape, scales.shape, scales.stride()) == ((rows, 384), (rows, 3), (1, rows))
    assert x.data_ptr() != fp8.data_ptr()
    assert scales.data_ptr() != scale.data_ptr()
    assert torch.equal(x[:tokens].float(), fp8.float())
    assert torch.equal(scales[:tokens], scale)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("columns", [128, 384])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16])
def test_a_linear_multiplies_the_memory_that_the_ops_wrote(
    monkeypatch: pytest.MonkeyPatch, tokens: int, columns: int, backend: str
) -> None:
    """From rows of the model's dtype, from a norm's result and from that of a norm that keeps its rows: no copy."""
    monkeypatch.setenv("FUSEDCOMM_BACKEND", backend)
    monkeypatch.setattr(dispatch, "_chosen", {})
    multiplied: list[tuple[torch.Tensor, torch.Tensor]] = []

    def product(self: BlockFP8Linear, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        multiplied.append(gpu.padded_rows(rows, scales))
        return rows.new_empty((rows.shape[0], self.out_features), dtype=self.dtype)

    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    quantise = ops.per_group_quant_fp8

    def seen(*args: Any, **options: Any) -> ops.GroupQuant:
        quant = quantise(*args, **options)
        written.append((quant.fp8, quant.scale))
        return quant

    monkeypatch.setattr(BlockFP8Linear, "_product", product)
    monkeypatch.setattr(ops, "per_group_quant_fp8", seen)
    monkeypatch.setattr(gpu, "scale_layout_of", lambda device: ScaleLayout.COLUMN_MAJOR)
    x = torch.randn(1, tokens, columns, dtype=torch.bfloat16)  # as models have it: [B, S, H]
    norm, linear = RMSNorm(columns, dtype=torch.bfloat16), BlockFP8Linear(columns, 128)
    inputs: list[HiddenStates] = [x]
    for keep_bf16 in (False, True):
        got = norm.forward_quant_per_group(x, x, keep_bf16=keep_bf16, scale_layout=ScaleLayout.COLUMN_MAJOR)
        assert not isinstance(got.hidden_states, torch.Tensor)
        pair = got.hidden_states if isinstance(got.hidden_states, Fp8Activation) else got.hidden_states.quantized
        written.append((pair.fp8, pair.scale))
        inputs.append(got.hidden_states)
    for one in (*inputs[1:], inputs[0]):
        assert linear(one).shape == (1, tokens, 128)
    padded = (tokens + 3) // 4 * 4
    for (fp8, scale), (rows, scales) in zip(written, multiplied, strict=True):
        assert (rows.data_ptr(), scales.data_ptr()) == (fp8.data_ptr(), scale.data_ptr())
        assert (rows.shape, rows.stride()) == ((padded, columns), (columns, 1))
        assert (scales.shape, scales.stride()) == ((padded, columns // 128), (1, padded))


def test_memory_with_room_behind_the_rows_is_not_copied() -> None:
    fp8 = torch.zeros(4, 256, dtype=torch.float8_e4m3fn)[:1]
    scale = torch.ones(2, 4).t()[:1]
    x, scales = gpu.padded_rows(fp8, scale)
    assert (x.data_ptr(), scales.data_ptr()) == (fp8.data_ptr(), scale.data_ptr())
    assert (x.shape, scales.shape) == ((4, 256), (4, 2))


def test_padding_is_compiled_without_graph_breaks() -> None:
    """The same code serves tensors whose memory has room and those whose memory ends with their rows."""
    torch._dynamo.reset()
    compiled = torch.compile(gpu.padded_rows, backend="aot_eager", fullgraph=True)
    fp8, scale = quantized(3, 384, ScaleLayout.COLUMN_MAJOR)
    for values, scales in ((fp8, scale), (fp8.clone(), scale.clone())):
        x, columns = compiled(values, scales)
        assert (x.shape, columns.shape, columns.stride()) == ((4, 384), (4, 3), (1, 4))
        assert torch.equal(x[:3].float(), fp8.float())
        assert torch.equal(columns[:3], scale)


@pytest.mark.parametrize("blocks", [1, 3, 4, 5])
def test_weight_scales_are_padded_along_k(blocks: int) -> None:
    weight, scale = quantize_blocks(torch.randn(256, 128 * blocks))
    prepared = gpu.scaled_weight(weight, scale)
    padded = (blocks + 3) // 4 * 4
    assert (prepared.scale.shape, prepared.scale.stride()) == ((padded, 2), (1, padded))
    assert torch.equal(prepared.scale[:blocks], scale.t())
    assert prepared.values.data_ptr() == weight.data_ptr()
    assert prepared.values.stride() == (1, 128 * blocks)


def test_weight_scales_that_need_no_padding_are_the_parameters_memory() -> None:
    """A write to the parameter, through .data too, is a write to what is multiplied."""
    weight, scale = quantize_blocks(torch.randn(256, 512))
    prepared = gpu.scaled_weight(weight, scale)
    scale.data.fill_(3.0)
    assert (prepared.scale == 3.0).all()


@pytest.mark.parametrize(("shape", "fits"), [((4096, 512), True), ((24, 128), False), ((16, 64), False)])
def test_what_cublas_takes(shape: tuple[int, int], fits: bool) -> None:
    assert gpu.can_scale(*shape) == fits


def test_only_hopper_multiplies_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.has_block_scaled_mm(torch.device("cpu"))
    assert gpu.scale_layout_of(torch.device("cpu")) is ScaleLayout.ROW_MAJOR
    device = torch.device("cuda", 0)
    for cuda, arch, has in [("13.0", "sm_90", True), ("12.8", "sm_90", False), ("13.0", "sm_100", False)]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(platform, "_gpu_facts", lambda index, arch=arch: platform.DeviceFacts(arch, "", b"", 1))
        assert gpu.has_block_scaled_mm(device) == has
        layout = ScaleLayout.COLUMN_MAJOR if has else ScaleLayout.ROW_MAJOR
        assert gpu.scale_layout_of(device) is layout


@pytest.mark.parametrize("layout", [ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR])
def test_the_decoded_product_is_the_block_scaled_one(layout: ScaleLayout) -> None:
    fp8, scale = quantized(5, 256, layout)
    weight, weight_scale = quantize_blocks(torch.randn(200, 256, generator=torch.Generator().manual_seed(1)))
    bias = torch.randn(200)
    got = gpu.decoded_mm(fp8, scale, gpu.decoded_weight(weight, weight_scale, torch.float32), bias)
    expected = block_fp8_matmul(fp8, scale, decode_weight(weight, weight_scale)) + bias
    # the same products in fp32, scaled before they are summed in place of after
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
