"""The collectives as functions on the tensor-parallel group, under the names that engines call."""

from __future__ import annotations

import torch

from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.groups.world import get_tp_group
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout


def allreduce_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    out: AddRMSNorm | None = None,
    group: GroupCoordinator | None = None,
) -> AddRMSNorm:
    """All-reduce, residual addition and RMSNorm by the fastest eligible stage, as GroupCoordinator's.

    ``out``: written and returned, see GroupCoordinator.fused_allreduce_rmsnorm.
    """
    group = get_tp_group() if group is None else group
    return group.allreduce_rmsnorm(x, residual, weight, eps, weight_bias=weight_bias, out=out)


def allreduce_rmsnorm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    group_size: int = 128,
    emit_bf16: bool = False,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    weight_bias: float = 0.0,
    out: AddRMSNormQuant | None = None,
    group: GroupCoordinator | None = None,
) -> AddRMSNormQuant:
    """As allreduce_rmsnorm, quantised per group; see GroupCoordinator.allreduce_rmsnorm_quant."""
    group = get_tp_group() if group is None else group
    return group.allreduce_rmsnorm_quant(
        x,
        residual,
        weight,
        eps,
        group_size=group_size,
        emit_bf16=emit_bf16,
        scale_layout=scale_layout,
        weight_bias=weight_bias,
        out=out,
    )


def tensor_model_parallel_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over the tensor-parallel group."""
    return get_tp_group().all_reduce(x)


def tensor_model_parallel_fused_allreduce_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
) -> AddRMSNorm | None:
    """GroupCoordinator.fused_allreduce_rmsnorm on the tensor-parallel group; None where no fused kernel is eligible."""
    return get_tp_group().fused_allreduce_rmsnorm(x, residual, weight, eps, weight_bias=weight_bias)


def tensor_model_parallel_fused_allreduce_rmsnorm_quant_per_group(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    group_size: int = 128,
    emit_bf16: bool = False,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    weight_bias: float = 0.0,
) -> AddRMSNormQuant | None:
    """The GroupCoordinator method of this name on the tensor-parallel group; None where not eligible."""
    return get_tp_group().fused_allreduce_rmsnorm_quant_per_group(
        x,
        residual,
        weight,
        eps,
        group_size=group_size,
        emit_bf16=emit_bf16,
        scale_layout=scale_layout,
        weight_bias=weight_bias,
    )
