"""A linear layer with block-scaled FP8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from fusedcomm import ops, platform
from fusedcomm.layers import fp8_matmul_gpu
from fusedcomm.layers.activation import Fp8Activation, HiddenStates, NormFp8Activation
from fusedcomm.layers.fp8_matmul import block_fp8_matmul, decode_weight, unpack_scales
from fusedcomm.layers.sharding import FP8_BLOCK, ceil_div
from fusedcomm.ops.types import ScaleLayout

_Prepared = TypeVar("_Prepared")


class BlockFP8Linear(nn.Module):
    """``y = x Wᵀ + bias`` with W in FP8 e4m3 and a scale for each 128 by 128 block, as DeepSeek-V3 stores it.

    weight is e4m3 ``[out_features, in_features]``, weight_scale fp32 ``[ceil(out / 128), ceil(in / 128)]``; a
    weight is ``weight * weight_scale``. x is ``[..., in_features]`` in bf16, fp16 or fp32, quantised here
    with one scale for each 128 neighbours, or ``(fp8, scale)`` (Fp8Activation, NormFp8Activation or a plain
    pair with row-major scales). Returns ``[..., out_features]`` in ``dtype``, rounded once from fp32;
    block_fp8_matmul has the arithmetic.

    On CPU the first call keeps the weight decoded to fp32 (4 bytes a weight): the CPU has no FP8 arithmetic, and
    decoding takes ten times as long as the product with one row. Under torch.compile each call decodes.

    On Hopper GPUs torch's block-scaled product (cuBLAS) takes FP8 and scales as they are, column-major ones without
    conversion (fp8_matmul_gpu says when); it sums each block in the tensor cores' own order. On other GPUs, and for
    weights that cuBLAS does not take (K no multiple of 128 or N none of 16), x and the weight are decoded to ``dtype``
    and multiplied in it; the first call keeps the decoded weight.
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
        self._prepared: tuple[tuple[tuple[int, int], ...], object] | None = None

    def forward(self, x: HiddenStates | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        fp8, scale, layout = self._quantized(x)
        rows = fp8.reshape(-1, self.in_features)
        scales = unpack_scales(scale, layout, ceil_div(self.in_features, FP8_BLOCK))
        y = self._product(rows, scales) if rows.device.type == "cpu" else self._product_on_gpu(rows, scales)
        return y.view(*fp8.shape[:-1], self.out_features)

    def _product(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = block_fp8_matmul(x, scale, self._prepare(decode_weight))
        if self.bias is not None:
            y += self.bias.float()
        return y.to(self.dtype)

    def _product_on_gpu(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if fp8_matmul_gpu.has_block_scaled_mm(x.device) and fp8_matmul_gpu.can_scale(*self.weight.shape):
            weight = self._prepare(fp8_matmul_gpu.scaled_weight)
            return fp8_matmul_gpu.scaled_mm(x, scale, weight, self.bias, self.dtype)
        decoded = self._prepare(self._decode)
        return fp8_matmul_gpu.decoded_mm(x, scale, decoded, self.bias)

    def _decode(self, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        return fp8_matmul_gpu.decoded_weight(weight, weight_scale, self.dtype)

    def _quantized(
        self, x: HiddenStates | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, ScaleLayout]:
        if isinstance(x, torch.Tensor):
            if x.shape[-1:] != (self.in_features,):
                raise ValueError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
            if padding := -self.in_features % FP8_BLOCK:  # zeros do not change the scale of a short last group
                x = torch.nn.functional.pad(x, (0, padding))
            fp8, scale, layout = ops.per_group_quant_fp8(
                x,
                group_size=FP8_BLOCK,
                scale_layout=fp8_matmul_gpu.scale_layout_of(x.device),
                fp8_dtype=platform.fp8_dtype(x.device),
            )
            return fp8[..., : self.in_features] if padding else fp8, scale, layout
        if isinstance(x, NormFp8Activation):
            x = x.quantized
        layout = x.scale_layout if isinstance(x, Fp8Activation) else ScaleLayout.ROW_MAJOR
        fp8, scale = x
        self._check_quantized(fp8, scale, layout)
        return fp8, scale, layout

    def _check_quantized(self, fp8: torch.Tensor, scale: torch.Tensor, layout: ScaleLayout) -> None:
        expected = platform.fp8_dtype(fp8.device)
        if fp8.dtype is not expected or fp8.shape[-1:] != (self.in_features,):
            raise ValueError(f"fp8: expected {expected} [..., {self.in_features}], got {fp8.dtype} {list(fp8.shape)}")
        groups = ceil_div(self.in_features, FP8_BLOCK)
        packed = layout is ScaleLayout.UE8M0_PACKED
        tokens = fp8.shape[:-1].numel()
        columns, dtype = (ceil_div(groups, 4), torch.int32) if packed else (groups, torch.float32)
        if scale.dtype is not dtype or scale.shape[-1:] != (columns,) or scale.numel() != tokens * columns:
            raise ValueError(
                f"scale: expected {dtype} [{tokens}, {columns}] ({layout.value}), got {scale.dtype} {list(scale.shape)}"
            )

    def _prepare(self, prepare: Callable[[torch.Tensor, torch.Tensor], _Prepared]) -> _Prepared:
        """``prepare(weight, weight_scale)``, made again only when one of them changed.

        A change through ``.data`` leaves no trace: ``forget_prepared()`` after it.
        """
        # What the key is made of cannot be traced; and what a graph records is not there yet.
        if torch.compiler.is_compiling() or (self.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return prepare(self.weight, self.weight_scale)
        key = (_version(self.weight), _version(self.weight_scale))
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = (key, prepare(self.weight, self.weight_scale))
        return cast(_Prepared, self._prepared[1])

    def forget_prepared(self) -> None:
        """After weights were written through ``.data`` (loaders, weight updates): the next call prepares them anew."""
        self._prepared = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _version(parameter: torch.Tensor) -> tuple[int, int]:
    """Changes when the parameter is replaced or written to; tensors made in inference mode count no writes."""
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version
