"""Ops around attention: what is done to queries and keys, and the caches that attention reads."""

from fusedcomm.ops.attention.backends import DraftBackend, DraftBackendFacts, choose_draft_backend, draft_backend
from fusedcomm.ops.attention.block import block_attention
from fusedcomm.ops.attention.indexer import (
    cp_gather_indexer_k_quant_cache,
    fp8_paged_mqa_logits,
    indexer_k_quant_and_cache,
)
from fusedcomm.ops.attention.kv import KV, QK, QKV, PagedKV
from fusedcomm.ops.attention.kv_materialize import fused_kv_materialize
from fusedcomm.ops.attention.mla_prepare import fused_qk_rope_cat_and_cache_mla
from fusedcomm.ops.attention.qk_norm import fused_qk_rmsnorm
from fusedcomm.ops.attention.qk_rope import fused_qk_norm_rope
from fusedcomm.ops.attention.sparse_mla import sparse_mla_decode, sparse_mla_quant_and_cache

__all__ = [
    "KV",
    "QK",
    "QKV",
    "DraftBackend",
    "DraftBackendFacts",
    "PagedKV",
    "block_attention",
    "choose_draft_backend",
    "cp_gather_indexer_k_quant_cache",
    "draft_backend",
    "fp8_paged_mqa_logits",
    "fused_kv_materialize",
    "fused_qk_norm_rope",
    "fused_qk_rmsnorm",
    "fused_qk_rope_cat_and_cache_mla",
    "indexer_k_quant_and_cache",
    "sparse_mla_decode",
    "sparse_mla_quant_and_cache",
]
