"""A linear layer with block-scaled FP8 weights."""

from __future__ import annotations

import torch
from torch import nn

from fusedcomm import ops
from fusedcomm.layers.activation import Fp8Activation, HiddenStates, NormFp8Activation
from fusedcomm.layers.fp8_matmul import DecodedWeight, block_fp8_matmul, decode_weight, unpack_scales
from fusedcomm.layers.sharding import FP8_BLOCK, ceil_div
from fusedcomm.ops.types import ScaleLayout


class BlockFP8Linear(nn.Module):
    """``y = x Wᵀ + bias`` with W in FP8 e4m3 and a scale for each 128 by 128 block, as DeepSeek-V3 stores it.

    weight is e4m3 ``[out_features, in_features]``, weight_scale fp32 ``[ceil(out / 128), ceil(in / 128)]``; a
    weight is ``weight * weight_scale``. x is ``[..., in_features]`` in bf16, fp16 or fp32, quantised here
    with one scale for each 128 neighbours, or ``(fp8, scale)`` (Fp8Activation, NormFp8Activation or a plain
    pair with row-major scales). Returns ``[..., out_features]`` in ``dtype``, rounded once from fp32;
    block_fp8_matmul has the arithmetic.

    The first call keeps the weight decoded to fp32 (4 bytes a weight): the CPU has no FP8 arithmetic, and decoding
    takes ten times as long as the product with one row. Under torch.compile each call decodes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        shape = (out_features, in_features)
        scales = (ceil_div(out_features, FP8_BLOCK), ceil_div(in_features, FP8_BLOCK))
        weight = torch.zeros(shape, dtype=torch.float8_e4m3fn, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(scales, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None
        self._decoded: tuple[tuple[tuple[int, int], ...], DecodedWeight] | None = None

    def forward(self, x: HiddenStates | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        fp8, scale, layout = self._quantized(x)
        groups = ceil_div(self.in_features, FP8_BLOCK)
        y = block_fp8_matmul(
            fp8.reshape(-1, self.in_features),
            unpack_scales(scale, layout, groups),
            self._decoded_weight(),
        )
        if self.bias is not None:
            y += self.bias.float()
        return y.to(self.dtype).view(*fp8.shape[:-1], self.out_features)

    def _quantized(
        self, x: HiddenStates | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, ScaleLayout]:
        if isinstance(x, torch.Tensor):
            if x.shape[-1:] != (self.in_features,):
                raise ValueError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
            if padding := -self.in_features % FP8_BLOCK:  # zeros do not change the scale of a short last group
                x = torch.nn.functional.pad(x, (0, padding))
            fp8, scale, layout = ops.per_group_quant_fp8(x, group_size=FP8_BLOCK)
            return fp8[..., : self.in_features], scale, layout
        if isinstance(x, NormFp8Activation):
            x = x.quantized
        layout = x.scale_layout if isinstance(x, Fp8Activation) else ScaleLayout.ROW_MAJOR
        fp8, scale = x
        self._check_quantized(fp8, scale, layout)
        return fp8, scale, layout

    def _check_quantized(self, fp8: torch.Tensor, scale: torch.Tensor, layout: ScaleLayout) -> None:
        if fp8.dtype is not self.weight.dtype or fp8.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"fp8: expected {self.weight.dtype} [..., {self.in_features}], got {fp8.dtype} {list(fp8.shape)}"
            )
        groups = ceil_div(self.in_features, FP8_BLOCK)
        packed = layout is ScaleLayout.UE8M0_PACKED
        tokens = fp8.shape[:-1].numel()
        columns, dtype = (ceil_div(groups, 4), torch.int32) if packed else (groups, torch.float32)
        if scale.dtype is not dtype or scale.shape[-1:] != (columns,) or scale.numel() != tokens * columns:
            raise ValueError(
                f"scale: expected {dtype} [{tokens}, {columns}] ({layout.value}), got {scale.dtype} {list(scale.shape)}"
            )

    def _decoded_weight(self) -> DecodedWeight:
        if torch.compiler.is_compiling():  # what the key is made of cannot be traced
            return decode_weight(self.weight, self.weight_scale)
        key = (_version(self.weight), _version(self.weight_scale))
        if self._decoded is None or self._decoded[0] != key:
            self._decoded = (key, decode_weight(self.weight, self.weight_scale))
        return self._decoded[1]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _version(parameter: torch.Tensor) -> tuple[int, int]:
    """Changes when the parameter is replaced or written to; tensors made in inference mode count no writes."""
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version
