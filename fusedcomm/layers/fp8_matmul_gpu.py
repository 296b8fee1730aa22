"""Block-scaled FP8 matrix product on GPUs: torch's (cuBLAS) on Hopper, a product of decoded matrices elsewhere.

cuBLAS wants the scales of x as columns whose length is a multiple of 4: the library's column-major layout, so
``(fp8, scale)`` of a multiple of 4 rows goes in as it is. Other numbers of rows are padded, which is free where the
memory behind the tensors has room, as it has behind what the library's own ops quantise, and two small copies where it
has not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from fusedcomm import platform
from fusedcomm.layers.sharding import FP8_BLOCK, ceil_div
from fusedcomm.ops.types import ScaleLayout

_MIN_CUDA = (12, 9)  # whose cuBLAS has these scales
_ROWS = 4
_ALIGNMENT = 16


class ScaledWeight(NamedTuple):
    """A block-scaled FP8 weight ``[N, K]`` as cuBLAS reads it."""

    values: torch.Tensor  # [K, N], the transposed view
    scale: torch.Tensor  # fp32 [round_up(K / 128, 4), ceil(N / 128)], strides (1, round_up(K / 128, 4))


def has_block_scaled_mm(device: torch.device) -> bool:
    """Whether torch multiplies block-scaled FP8 on this device: Hopper, with cuBLAS 12.9 or later."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return version >= _MIN_CUDA and platform.device_facts(device).arch == "sm_90"


def scale_layout_of(device: torch.device) -> ScaleLayout:
    """The layout of activation scales that a BlockFP8Linear on this device takes without conversion."""
    return ScaleLayout.COLUMN_MAJOR if has_block_scaled_mm(device) else ScaleLayout.ROW_MAJOR


def can_scale(rows: int, columns: int) -> bool:
    """Whether cuBLAS takes a weight of this shape ``[N, K]``."""
    return rows % _ALIGNMENT == 0 and columns % FP8_BLOCK == 0 and rows > 0 and columns > 0


def scaled_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> ScaledWeight:
    """Lays out the scales fp32 ``[ceil(N / 128), K / 128]`` of FP8 ``weight [N, K]``, whose values stay as they are."""
    padded, missing = weight_scale.float().contiguous(), -weight_scale.shape[1] % _ROWS
    if missing:  # else a view, which follows what is written to the scales
        padded = functional.pad(padded, (0, missing))
    return ScaledWeight(weight.t(), padded.t())


def scaled_mm(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: ScaledWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x [T, K]`` FP8 with scales fp32 ``[T, K / 128]`` of any strides, times the weight: ``[T, N]`` in dtype."""
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty((0, weight.values.shape[1]), dtype=dtype)
    x, scale = padded_rows(x, scale)
    in_epilogue = bias is not None and dtype is not torch.float32
    y: torch.Tensor = functional.scaled_mm(
        x,
        weight.values,
        scale,
        functional.ScalingType.BlockWise1x128,
        weight.scale,
        functional.ScalingType.BlockWise128x128,
        bias=bias if in_epilogue else None,
        output_dtype=dtype,
    )
    y = y[:tokens]
    return y if bias is None or in_epilogue else y + bias


def padded_rows(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[T, K]`` and scales ``[T, G]`` with T rounded up to a multiple of 4, the scales as columns of that length.

    What the rows beyond T hold is of no matter: they have results of their own.
    """
    rows = ceil_div(x.shape[0], _ROWS) * _ROWS
    groups = scale.shape[1]
    x = _grown(x, (rows, x.shape[1]), (x.shape[1], 1))
    # a stride of a dimension of size 1 means nothing, and says nothing about the layout
    is_column_major = (scale.shape[0] == 1 or scale.stride(0) == 1) and (groups == 1 or scale.stride(1) == rows)
    if not is_column_major:
        columns = scale.new_empty_strided((rows, groups), (1, rows))
        columns[: scale.shape[0]].copy_(scale)
        return x, columns
    return x, _grown(scale, (rows, groups), (1, rows))


def _grown(t: torch.Tensor, size: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """A view of t's memory with this size and these strides, which agree with t's own; a copy where it ends before.

    Under torch.compile a copy always: where a tensor's memory ends cannot be traced.
    """
    if tuple(t.shape) == size and t.stride() == stride:
        return t
    if not torch.compiler.is_compiling():
        end = t.storage_offset() + (size[0] - 1) * stride[0] + (size[1] - 1) * stride[1] + 1
        if end * t.element_size() <= t.untyped_storage().nbytes():
            return t.as_strided(size, stride)
    grown = t.new_empty_strided(size, stride)
    grown[: t.shape[0]].copy_(t)
    return grown


def decoded_weight(weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP8 ``weight [N, K]`` times its block scales, in dtype."""
    rows, columns = weight.shape
    scale = weight_scale.float().repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return (weight.float() * scale).to(dtype)


def decoded_mm(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x [T, K]`` FP8 with scales fp32 ``[T, ceil(K / 128)]``, decoded to the dtype of ``weight [N, K]``, times it.

    Both factors are rounded to that dtype, which block-scaled products do not do: in bf16 that is a relative error of
    up to 2^-9 in each.
    """
    values = x.float() * scale.repeat_interleave(FP8_BLOCK, 1)[:, : x.shape[1]]
    return functional.linear(values.to(weight.dtype), weight, bias)
