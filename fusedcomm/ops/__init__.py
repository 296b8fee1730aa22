"""Ops on local tensors: they need no group."""

from fusedcomm.ops.norm import fused_add_rms_norm, fused_add_rms_norm_quant, rms_norm
from fusedcomm.ops.overlap import Overlap
from fusedcomm.ops.quant import per_group_quant_fp8
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout

__all__ = [
    "AddRMSNorm",
    "AddRMSNormQuant",
    "GroupQuant",
    "Overlap",
    "ScaleLayout",
    "fused_add_rms_norm",
    "fused_add_rms_norm_quant",
    "per_group_quant_fp8",
    "rms_norm",
]
