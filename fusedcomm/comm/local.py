"""The local part of a staged collective, by the backend its group agreed on."""

from __future__ import annotations

from typing import Protocol

import torch

from fusedcomm import ops
from fusedcomm.ops import reference
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout


class LocalOps(Protocol):
    """The functions of fusedcomm.ops that the stages use."""

    def fused_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
    ) -> AddRMSNorm: ...

    def fused_add_rms_norm_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        group_size: int = 128,
        emit_bf16: bool = False,
        scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
        weight_bias: float = 0.0,
    ) -> AddRMSNormQuant: ...

    def per_group_quant_fp8(
        self, x: torch.Tensor, *, group_size: int = 128, scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    ) -> GroupQuant: ...


def local_ops(backend: str) -> LocalOps:
    """``"native"``: the compiled ops; ``"torch"``: the reference, the same bits."""
    return reference if backend == "torch" else ops
