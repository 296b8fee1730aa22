"""Ops around attention: what is done to queries and keys, and the caches that attention reads."""

from fusedcomm.ops.attention.indexer import (
    cp_gather_indexer_k_quant_cache,
    fp8_paged_mqa_logits,
    indexer_k_quant_and_cache,
)
from fusedcomm.ops.attention.kv import KV, QK, QKV, PagedKV
from fusedcomm.ops.attention.qk_norm import fused_qk_rmsnorm

__all__ = [
    "KV",
    "QK",
    "QKV",
    "PagedKV",
    "cp_gather_indexer_k_quant_cache",
    "fp8_paged_mqa_logits",
    "fused_qk_rmsnorm",
    "indexer_k_quant_and_cache",
]
