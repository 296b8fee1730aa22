"""Tensor-parallel communication for LLM inference: all-reduce fused with residual add, RMSNorm and FP8 quantisation."""

from fusedcomm import ops
from fusedcomm.collectives import (
    allreduce_rmsnorm,
    allreduce_rmsnorm_quant,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_fused_allreduce_rmsnorm,
    tensor_model_parallel_fused_allreduce_rmsnorm_quant_per_group,
)
from fusedcomm.comm.plan import Plan, Stage
from fusedcomm.env import Settings
from fusedcomm.errors import (
    CallMismatchError,
    FusedCommError,
    GroupBrokenError,
    GroupClosedError,
    PeerDiedError,
    PeerTimeoutError,
    SettingError,
    VersionMismatchError,
)
from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.groups.world import destroy_distributed, get_tp_group, init_distributed
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout

__version__ = "0.1.0"

__all__ = [
    "AddRMSNorm",
    "AddRMSNormQuant",
    "CallMismatchError",
    "FusedCommError",
    "GroupBrokenError",
    "GroupClosedError",
    "GroupCoordinator",
    "GroupQuant",
    "PeerDiedError",
    "PeerTimeoutError",
    "Plan",
    "ScaleLayout",
    "SettingError",
    "Settings",
    "Stage",
    "VersionMismatchError",
    "allreduce_rmsnorm",
    "allreduce_rmsnorm_quant",
    "destroy_distributed",
    "get_tp_group",
    "init_distributed",
    "ops",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_fused_allreduce_rmsnorm",
    "tensor_model_parallel_fused_allreduce_rmsnorm_quant_per_group",
]
