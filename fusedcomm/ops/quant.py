"""Per-group FP8 quantisation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.native import scale_extent
from fusedcomm.ops.checks import (
    check_fp8_dtype,
    check_group_size,
    check_scale_layout,
    check_x,
    contiguous_strides,
)
from fusedcomm.ops.dispatch import local_operators
from fusedcomm.ops.operators import Operators
from fusedcomm.ops.types import GroupQuant, ScaleLayout


class LayoutFlags(NamedTuple):
    """A scale layout and an FP8 format as the native operators take them."""

    column_major: bool
    packed: bool
    fnuz: bool


def layout_flags(scale_layout: ScaleLayout, fp8_dtype: torch.dtype = torch.float8_e4m3fn) -> LayoutFlags:
    """The flags of a layout and a format."""
    return LayoutFlags(
        scale_layout is ScaleLayout.COLUMN_MAJOR,
        scale_layout is ScaleLayout.UE8M0_PACKED,
        fp8_dtype is torch.float8_e4m3fnuz,
    )


def check_quant_out(
    x: torch.Tensor, group_size: int, scale_layout: ScaleLayout, fp8_dtype: torch.dtype, out: GroupQuant
) -> None:
    """The caller's ``fp8`` and ``scale`` have the shape, dtype and strides that empty_quant would give them."""
    flags = layout_flags(scale_layout, fp8_dtype)
    rows = (tuple(x.shape), fp8_dtype, contiguous_strides(x.shape), x.device)
    shape, strides, dtype = scale_extent(x.shape, group_size, flags.column_major, flags.packed)
    scales = (shape, dtype, contiguous_strides(shape) if strides is None else strides, x.device)
    for name, facts, got in (("out.fp8", rows, out.fp8), ("out.scale", scales, out.scale)):
        if not isinstance(got, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(got).__name__}")
        if (tuple(got.shape), got.dtype, got.stride(), got.device) != facts:
            raise ValueError(
                f"{name}: expected shape {facts[0]}, dtype {facts[1]}, strides {facts[2]} on {facts[3]}, "
                f"got {tuple(got.shape)}, {got.dtype}, {got.stride()} on {got.device}"
            )


def per_group_quant_fp8(
    x: torch.Tensor,
    *,
    group_size: int = 128,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    out: GroupQuant | None = None,
) -> GroupQuant:
    """Quantises each ``group_size`` neighbours of x to FP8 with a scale of their own.

    ``scale = max(amax, 1e-10) / FP8_MAX`` and ``fp8 = clamp(x / scale)``, rounded to nearest even and saturating. A
    group that holds a NaN has scale NaN.

    Args:
        x: ``[..., H]``, bf16, fp16 or fp32; made contiguous if it is not.
        group_size: 32, 64, 128 or 256; divides H.
        scale_layout: see ScaleLayout.
        fp8_dtype: float8_e4m3fn (FP8_MAX 448) or float8_e4m3fnuz (240).
        out: written and returned; as a call without it would allocate.

    Raises:
        ValueError: a bad argument, with what was expected.
    """
    check_x(x)
    check_group_size(x.shape[-1], group_size)
    check_scale_layout(scale_layout)
    check_fp8_dtype(fp8_dtype)
    x = x.contiguous()
    if out is not None:
        check_quant_out(x, group_size, scale_layout, fp8_dtype, out)
    return run_per_group_quant_fp8(local_operators(x.device.type), x, group_size, scale_layout, fp8_dtype, out)


def run_per_group_quant_fp8(
    operators: Operators,
    x: torch.Tensor,
    group_size: int,
    scale_layout: ScaleLayout,
    fp8_dtype: torch.dtype,
    out: GroupQuant | None = None,
) -> GroupQuant:
    """per_group_quant_fp8 of a contiguous x, by given operators and without checks."""
    if out is None:
        flags = layout_flags(scale_layout, fp8_dtype)
        return GroupQuant(*operators.per_group_quant_fp8(x, group_size, *flags), scale_layout)
    operators.per_group_quant_fp8_out(x, group_size, out.fp8, out.scale)
    return GroupQuant(out.fp8, out.scale, scale_layout)
