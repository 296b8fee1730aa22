"""The reference behind functions of the names and signatures of the compiled operators."""

from __future__ import annotations

import torch

from fusedcomm.ops import reference
from fusedcomm.ops.types import ScaleLayout


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> torch.Tensor:
    return reference.rms_norm(x, weight, eps, weight_bias=weight_bias)


def rms_norm_out(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float, out: torch.Tensor) -> None:
    out.copy_(rms_norm(x, weight, eps, weight_bias))


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.fused_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias)


def fused_add_rms_norm_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    norm: torch.Tensor,
    residual_out: torch.Tensor,
) -> None:
    result = reference.fused_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias)
    norm.copy_(result.norm)
    residual_out.copy_(result.residual)


def fused_add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    column_major: bool,
    packed: bool,
    fnuz: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norm, residual_out = fused_add_rms_norm(x, residual, weight, eps, weight_bias)
    return *per_group_quant_fp8(norm, group_size, column_major, packed, fnuz), residual_out


def fused_add_rms_norm_quant_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    fp8: torch.Tensor,
    scale: torch.Tensor,
    residual_out: torch.Tensor,
    norm: torch.Tensor | None,
) -> None:
    result = reference.fused_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias)
    per_group_quant_fp8_out(result.norm, group_size, fp8, scale)
    residual_out.copy_(result.residual)
    if norm is not None:
        norm.copy_(result.norm)


def per_group_quant_fp8(
    x: torch.Tensor, group_size: int, column_major: bool, packed: bool, fnuz: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = ScaleLayout.ROW_MAJOR
    if column_major:
        layout = ScaleLayout.COLUMN_MAJOR
    elif packed:
        layout = ScaleLayout.UE8M0_PACKED
    fp8_dtype = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    quant = reference.per_group_quant_fp8(x, group_size=group_size, scale_layout=layout, fp8_dtype=fp8_dtype)
    return quant.fp8, quant.scale


def per_group_quant_fp8_out(x: torch.Tensor, group_size: int, fp8: torch.Tensor, scale: torch.Tensor) -> None:
    packed, fnuz = scale.dtype is torch.int32, fp8.dtype is torch.float8_e4m3fnuz
    # copy_ puts the row-major scales where the strides of the caller's tensor say
    codes, scales = per_group_quant_fp8(x, group_size, False, packed, fnuz)
    fp8.copy_(codes)
    scale.copy_(scales.view(scale.shape))
