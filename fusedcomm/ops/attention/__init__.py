"""Ops around attention: what is done to queries and keys, and the caches that attention reads."""

from fusedcomm.ops.attention.kv import QK
from fusedcomm.ops.attention.qk_norm import fused_qk_rmsnorm

__all__ = [
    "QK",
    "fused_qk_rmsnorm",
]
