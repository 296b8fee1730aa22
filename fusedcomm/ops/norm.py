"""RMSNorm, with the residual addition before it and the quantisation after it."""

from __future__ import annotations

import torch

from fusedcomm.kernels.outputs import new_quant
from fusedcomm.ops.checks import check_fp8_dtype, check_group_size, check_norm, check_out, check_scale_layout
from fusedcomm.ops.dispatch import local_operators
from fusedcomm.ops.operators import Operators
from fusedcomm.ops.quant import check_quant_out, layout_flags
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019), computed in fp32 and rounded once.

    Args:
        x: ``[..., H]``, bf16, fp16 or fp32, H up to 32,768; made contiguous if it is not.
        weight: ``[H]``, dtype of x or fp32.
        eps: added to the mean of squares; >= 0.
        weight_bias: added to the weight (1 for Gemma).
        out: written and returned; like x, contiguous, may be x itself.

    Raises:
        ValueError: a bad argument, with what was expected.
    """
    check_norm(x, None, weight, eps, weight_bias)
    if out is not None:
        check_out(out, x, "out")
    operators = local_operators(x.device.type)
    x, weight = x.contiguous(), weight.contiguous()
    if out is None:
        return operators.rms_norm(x, weight, eps, weight_bias)
    operators.rms_norm_out(x, weight, eps, weight_bias, out)
    return out


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    out: AddRMSNorm | None = None,
) -> AddRMSNorm:
    """Adds the residual and norms the sum in one launch.

    ``residual' = round(x + residual)``, ``norm = rms_norm(residual')``; with ``residual=None``, ``residual' = x``.

    Args:
        x: ``[..., H]``, bf16, fp16 or fp32, H up to 32,768; made contiguous if it is not.
        residual: like x, or None.
        weight: ``[H]``, dtype of x or fp32.
        eps: added to the mean of squares; >= 0.
        weight_bias: added to the weight (1 for Gemma).
        out: written and returned; both like x, contiguous, two different tensors. ``out.residual`` may be the
            residual, ``out.norm`` may be x.

    Raises:
        ValueError: a bad argument, with what was expected.
    """
    check_norm(x, residual, weight, eps, weight_bias)
    if out is not None:
        check_rows_out(x, out.norm, out.residual)
    return run_add_rms_norm(local_operators(x.device.type), x, residual, weight, eps, weight_bias, out)


def run_add_rms_norm(
    operators: Operators,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    out: AddRMSNorm | None = None,
) -> AddRMSNorm:
    """fused_add_rms_norm by given operators, without checks."""
    x, residual, weight = _contiguous(x, residual, weight)
    if out is None:
        return AddRMSNorm(*operators.fused_add_rms_norm(x, residual, weight, eps, weight_bias))
    operators.fused_add_rms_norm_out(x, residual, weight, eps, weight_bias, *out)
    return out


def fused_add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    group_size: int = 128,
    emit_bf16: bool = False,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    weight_bias: float = 0.0,
    out: AddRMSNormQuant | None = None,
) -> AddRMSNormQuant:
    """Adds the residual, norms the sum and quantises it per group in one launch.

    The same bits as fused_add_rms_norm followed by per_group_quant_fp8.

    Args:
        x, residual, weight, eps, weight_bias: as for fused_add_rms_norm.
        group_size, scale_layout, fp8_dtype: as for per_group_quant_fp8.
        emit_bf16: also return the normed rows, in the dtype of x, as ``norm``; otherwise ``norm`` is None.
        out: written and returned; ``out.norm`` is a tensor exactly if ``emit_bf16``.

    Raises:
        ValueError: a bad argument, with what was expected.
    """
    check_norm(x, residual, weight, eps, weight_bias)
    check_group_size(x.shape[-1], group_size)
    check_scale_layout(scale_layout)
    check_fp8_dtype(fp8_dtype)
    x = x.contiguous()
    if out is not None:
        check_quant_out(x, group_size, scale_layout, fp8_dtype, GroupQuant(out.fp8, out.scale, scale_layout))
        check_emitted(out.norm, emit_bf16)
        check_rows_out(x, out.norm, out.residual)
    return run_add_rms_norm_quant(
        local_operators(x.device.type),
        x,
        residual,
        weight,
        eps,
        weight_bias,
        group_size,
        emit_bf16,
        scale_layout,
        fp8_dtype,
        out,
    )


def run_add_rms_norm_quant(
    operators: Operators,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    emit_bf16: bool,
    scale_layout: ScaleLayout,
    fp8_dtype: torch.dtype,
    out: AddRMSNormQuant | None = None,
) -> AddRMSNormQuant:
    """fused_add_rms_norm_quant by given operators, without checks."""
    x, residual, weight = _contiguous(x, residual, weight)
    flags = layout_flags(scale_layout, fp8_dtype)
    if out is None and not emit_bf16:
        fp8, scale, residual_out = operators.fused_add_rms_norm_quant(
            x, residual, weight, eps, weight_bias, group_size, *flags
        )
        return AddRMSNormQuant(fp8, scale, residual_out, None, scale_layout)
    if out is None:
        fp8, scale = new_quant(x, group_size, *flags)
        out = AddRMSNormQuant(fp8, scale, torch.empty_like(x), torch.empty_like(x), scale_layout)
    operators.fused_add_rms_norm_quant_out(
        x, residual, weight, eps, weight_bias, group_size, out.fp8, out.scale, out.residual, out.norm
    )
    return out


def _contiguous(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    return x.contiguous(), None if residual is None else residual.contiguous(), weight.contiguous()


def check_emitted(norm: torch.Tensor | None, emit_bf16: bool) -> None:
    """There is a tensor for the normed rows exactly if they are emitted."""
    if (norm is not None) != bool(emit_bf16):
        got = "None" if norm is None else "a tensor"
        raise ValueError(f"out.norm: expected a tensor exactly if emit_bf16, got {got} with emit_bf16={emit_bf16}")


def check_rows_out(x: torch.Tensor, norm: torch.Tensor | None, residual: torch.Tensor) -> None:
    """The outputs that are like x, where there are any."""
    check_out(residual, x, "out.residual")
    if norm is None:
        return
    check_out(norm, x, "out.norm")
    # r' is read again after the first norm has been written
    if norm is residual or (not torch.compiler.is_compiling() and norm.is_set_to(residual)):
        raise ValueError("out.norm: expected another tensor than out.residual, got the same")
