"""The full checks of a collective's arguments: they say what the native operators refuse, and they guard the stages.

What is given as ``out`` is written while peers still read inputs, so it overlaps nothing that a copy does not replace.
"""

from __future__ import annotations

import torch

from fusedcomm.ops.checks import (
    check_apart,
    check_device,
    check_group_size,
    check_norm,
    check_out,
    check_scale_layout,
    check_x,
)
from fusedcomm.ops.norm import check_emitted, check_rows_out
from fusedcomm.ops.quant import check_quant_out
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout

_GPU_ALIGNMENT = 16  # kAlignment of csrc/bind/gpu_ops.cpp


def check_sum_call(x: torch.Tensor, out: torch.Tensor | None, device: torch.device) -> None:
    """The arguments of an all-reduce."""
    check_x(x)
    check_device(x, device)
    if out is not None:
        check_out(out, x, "out")
        # a piece of the result would overwrite a piece of x that has not been sent
        check_apart(out, "out", _as_read(x=x), or_same=True)


def check_norm_call(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    out: AddRMSNorm | None,
    device: torch.device,
) -> None:
    """The arguments of an all-reduce with RMSNorm."""
    check_x(x)
    check_device(x, device)
    check_norm(x, residual, weight, eps, weight_bias)
    if out is None:
        return
    if type(out) is not AddRMSNorm:
        raise ValueError(f"out: expected an AddRMSNorm, got {type(out).__name__}")
    _check_rows_out(x, residual, weight, out.norm, out.residual)


def check_quant_call(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    emit_bf16: bool,
    scale_layout: ScaleLayout,
    out: AddRMSNormQuant | None,
    *,
    device: torch.device,
    fp8_dtype: torch.dtype,
) -> None:
    """The arguments of an all-reduce with RMSNorm and quantisation."""
    check_norm_call(x, residual, weight, eps, weight_bias, None, device)
    check_group_size(x.shape[-1], group_size)
    check_scale_layout(scale_layout)
    if out is None:
        return
    if type(out) is not AddRMSNormQuant:
        raise ValueError(f"out: expected an AddRMSNormQuant, got {type(out).__name__}")
    if out.scale_layout is not scale_layout:
        raise ValueError(f"out.scale_layout: expected {scale_layout}, got {out.scale_layout}")
    check_quant_out(x, group_size, scale_layout, fp8_dtype, GroupQuant(out.fp8, out.scale, scale_layout))
    _check_aligned(out.fp8, "out.fp8")
    check_emitted(out.norm, emit_bf16)
    _check_rows_out(x, residual, weight, out.norm, out.residual)
    others = _as_read(x=x, residual=residual, weight=weight) | {"out.residual": out.residual}
    if out.norm is not None:
        others["out.norm"] = out.norm
    check_apart(out.scale, "out.scale", others)
    check_apart(out.fp8, "out.fp8", {**others, "out.scale": out.scale})


def _check_rows_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    residual_out: torch.Tensor,
) -> None:
    """Results that are like x."""
    check_rows_out(x, norm, residual_out)
    for name, t in (("out.norm", norm), ("out.residual", residual_out)):
        if t is not None:
            _check_aligned(t, name)
            check_apart(t, name, _as_read(x=x, residual=residual), or_same=True)
            check_apart(t, name, _as_read(weight=weight))
    if norm is not None:
        check_apart(norm, "out.norm", {"out.residual": residual_out})


def _as_read(**inputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Those that are read where they are: what is not contiguous is copied first."""
    return {name: t for name, t in inputs.items() if t is not None and t.is_contiguous()}


def _check_aligned(t: torch.Tensor, name: str) -> None:
    if t.device.type == "cuda" and (off := t.data_ptr() % _GPU_ALIGNMENT):
        raise ValueError(f"{name}: expected memory aligned to {_GPU_ALIGNMENT} bytes, got an address {off} bytes off")
