"""Per-group FP8 quantisation."""

from __future__ import annotations

import torch

from fusedcomm.ops import reference
from fusedcomm.ops.checks import check_fp8_dtype, check_group_size, check_x
from fusedcomm.ops.dispatch import local_backend
from fusedcomm.ops.types import GroupQuant, ScaleLayout


def empty_quant(
    x: torch.Tensor, group_size: int, scale_layout: ScaleLayout, fp8_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised ``fp8 [..., H]`` and ``scale`` of the given layout for x ``[..., H]``."""
    fp8 = torch.empty_like(x, dtype=fp8_dtype, memory_format=torch.contiguous_format)
    groups = x.shape[-1] // group_size
    if scale_layout is ScaleLayout.ROW_MAJOR:
        return fp8, x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)
    rows = x.numel() // x.shape[-1]
    columns, dtype = (
        (groups, torch.float32)
        if scale_layout is ScaleLayout.COLUMN_MAJOR
        else (
            (groups + 3) // 4,
            torch.int32,
        )
    )
    stride = (rows + 3) // 4 * 4
    return fp8, x.new_empty(columns * stride, dtype=dtype).as_strided((rows, columns), (1, stride))


def check_quant_out(
    x: torch.Tensor, group_size: int, scale_layout: ScaleLayout, fp8_dtype: torch.dtype, out: GroupQuant
) -> None:
    """The caller's ``fp8`` and ``scale`` have the shape, dtype and strides that empty_quant would give them."""
    with torch.device("meta"):
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    expected = empty_quant(like, group_size, scale_layout, fp8_dtype)
    for name, want, got in zip(("out.fp8", "out.scale"), expected, (out.fp8, out.scale), strict=True):
        facts = (tuple(want.shape), want.dtype, want.stride(), x.device)
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
    check_fp8_dtype(fp8_dtype)
    x = x.contiguous()
    if out is not None:
        check_quant_out(x, group_size, scale_layout, fp8_dtype, out)
    if local_backend(x.device.type) == "torch":
        result = reference.per_group_quant_fp8(x, group_size=group_size, scale_layout=scale_layout, fp8_dtype=fp8_dtype)
        if out is None:
            return result
        out.fp8.copy_(result.fp8)
        out.scale.copy_(result.scale)
        return GroupQuant(out.fp8, out.scale, scale_layout)
    fp8, scale = (out.fp8, out.scale) if out is not None else empty_quant(x, group_size, scale_layout, fp8_dtype)
    torch.ops.fusedcomm.per_group_quant_fp8_out(x, group_size, fp8, scale)
    return GroupQuant(fp8, scale, scale_layout)
