"""The local part of a staged collective, by the backend its group agreed on."""

from __future__ import annotations

import torch

from fusedcomm.ops.norm import run_add_rms_norm, run_add_rms_norm_quant
from fusedcomm.ops.operators import Operators, operators_of
from fusedcomm.ops.quant import run_per_group_quant_fp8
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout


class LocalOps:
    """The functions of fusedcomm.ops that the stages use, without checks: the stages have made them."""

    def __init__(self, operators: Operators, fp8_dtype: torch.dtype) -> None:
        self._operators = operators
        self.fp8_dtype = fp8_dtype

    def fused_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        out: AddRMSNorm | None = None,
    ) -> AddRMSNorm:
        """Adds the residual and norms the sum in one launch, into out if given."""
        return run_add_rms_norm(self._operators, x, residual, weight, eps, weight_bias, out)

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
        out: AddRMSNormQuant | None = None,
    ) -> AddRMSNormQuant:
        """As fused_add_rms_norm, then FP8 of the normed rows in the same launch."""
        options = (weight_bias, group_size, emit_bf16, scale_layout, self.fp8_dtype)
        return run_add_rms_norm_quant(self._operators, x, residual, weight, eps, *options, out)

    def per_group_quant_fp8(
        self,
        x: torch.Tensor,
        *,
        group_size: int = 128,
        scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
        out: GroupQuant | None = None,
    ) -> GroupQuant:
        """FP8 with one scale for each ``group_size`` neighbours, into out if given."""
        return run_per_group_quant_fp8(self._operators, x.contiguous(), group_size, scale_layout, self.fp8_dtype, out)


def local_ops(backend: str, fp8_dtype: torch.dtype = torch.float8_e4m3fn) -> LocalOps:
    """The local ops of one backend (see choose_local_backend): native, triton or torch give the same bits."""
    return LocalOps(operators_of(backend), fp8_dtype)
