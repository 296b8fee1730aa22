"""RMSNorm as a module, with the collective that precedes it and the quantiser that follows it fused in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import nn

from fusedcomm import ops, platform
from fusedcomm.collectives import allreduce_rmsnorm, allreduce_rmsnorm_quant
from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers.activation import Fp8Activation, LayerInput, NormFp8Activation
from fusedcomm.layers.fp8_matmul_gpu import scale_layout_of
from fusedcomm.layers.partial_sum import PartialSum, refuse
from fusedcomm.layers.sharding import FP8_BLOCK, WeightSlice
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x²) + eps) · (weight + weight_bias)`` over the last dimension (Zhang, Sennrich).

    In fp32, rounded once. The weight is ``[hidden_size]``, of the dtype of x or fp32.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_bias: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight_bias = weight_bias
        initial = torch.full((hidden_size,), 1.0 - weight_bias, dtype=dtype, device=device)
        self.weight = nn.Parameter(initial, requires_grad=False)

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> AddRMSNorm: ...
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | AddRMSNorm:
        """Norm of ``x [..., H]``, or ``(norm, residual)`` of ``x + residual``; local, nothing is mutated."""
        if isinstance(x, PartialSum):
            refuse("RMSNorm.forward")
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, weight_bias=self.weight_bias)
        return ops.fused_add_rms_norm(x, residual, self.weight, self.eps, weight_bias=self.weight_bias)

    def forward_quant_per_group(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        group_size: int = FP8_BLOCK,
        keep_bf16: bool = False,
        *,
        scale_layout: ScaleLayout | None = None,
    ) -> LayerInput:
        """Add, norm and FP8 quantisation of rows ``[..., H]`` that are complete already, in one launch.

        ``scale_layout`` None: what a BlockFP8Linear on this device takes as it is (column-major on Hopper GPUs, else
        row-major).
        """
        if isinstance(x, PartialSum):
            refuse("RMSNorm.forward_quant_per_group")
        return _layer_input(
            ops.fused_add_rms_norm_quant(
                x,
                residual,
                self.weight,
                self.eps,
                group_size=group_size,
                emit_bf16=keep_bf16,
                scale_layout=scale_layout_of(x.device) if scale_layout is None else scale_layout,
                fp8_dtype=platform.fp8_dtype(x.device),
                weight_bias=self.weight_bias,
            )
        )

    def forward_with_allreduce_fusion(
        self,
        x: torch.Tensor | PartialSum,
        residual: torch.Tensor | None = None,
        *,
        group: GroupCoordinator | None = None,
    ) -> AddRMSNorm:
        """``(norm, residual)`` of the sum of ``x [..., H]`` over the ranks, plus this rank's residual.

        A collective call. x is this rank's addend: a PartialSum, or a tensor to be summed over ``group``
        (None: the tensor-parallel group). One launch where the group's plan allows it, else the next stage;
        the same bits either way.
        """
        tensor, group = _addend(x, group)
        return allreduce_rmsnorm(tensor, residual, self.weight, self.eps, weight_bias=self.weight_bias, group=group)

    def forward_with_allreduce_fusion_quant_per_group(
        self,
        x: torch.Tensor | PartialSum,
        residual: torch.Tensor | None = None,
        group_size: int = FP8_BLOCK,
        keep_bf16: bool = False,
        *,
        group: GroupCoordinator | None = None,
        scale_layout: ScaleLayout | None = None,
    ) -> LayerInput:
        """As forward_with_allreduce_fusion, then FP8 with a scale for each ``group_size`` neighbours.

        Returns ``((fp8, scale), residual)``, or ``((bf16, fp8, scale), residual)`` with ``keep_bf16``; the
        inner tuples are Fp8Activation and NormFp8Activation, which know their scales' layout. ``scale_layout``
        None: as for forward_quant_per_group.
        """
        tensor, group = _addend(x, group)
        return _layer_input(
            allreduce_rmsnorm_quant(
                tensor,
                residual,
                self.weight,
                self.eps,
                group_size=group_size,
                emit_bf16=keep_bf16,
                scale_layout=scale_layout_of(tensor.device) if scale_layout is None else scale_layout,
                weight_bias=self.weight_bias,
                group=group,
            )
        )

    def weight_slices(self, source: str) -> Iterator[WeightSlice]:
        """The checkpoint tensors this module reads; ``source`` is its name there."""
        yield WeightSlice(f"{source}.weight", (self.hidden_size,), (slice(None),), self.weight)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, weight_bias={self.weight_bias}"


class GemmaRMSNorm(RMSNorm):
    """RMSNorm whose stored weight is the deviation from one, as in Gemma: ``weight_bias`` is 1."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, weight_bias=1.0, dtype=dtype, device=device)


def _addend(
    x: torch.Tensor | PartialSum, group: GroupCoordinator | None
) -> tuple[torch.Tensor, GroupCoordinator | None]:
    if not isinstance(x, PartialSum):
        return x, group
    if group is not None and group is not x.group:
        raise ValueError("group: expected the group of the PartialSum, got another one")
    return x.tensor, x.group


def _layer_input(result: AddRMSNormQuant) -> LayerInput:
    if result.norm is None:
        return LayerInput(Fp8Activation(result.fp8, result.scale, result.scale_layout), result.residual)
    hidden = NormFp8Activation(result.norm, result.fp8, result.scale, result.scale_layout)
    return LayerInput(hidden, result.residual)
