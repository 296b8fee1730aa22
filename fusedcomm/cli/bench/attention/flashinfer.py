"""FlashInfer's forms of the attention ops, where ``flashinfer-python`` (0.6.12) is installed and has them.

What it does not have on Hopper: a sparse decode over FP8 caches with a scale for every few values (its
``trtllm_batch_decode_sparse_mla_dsv4`` is for Blackwell, and for bf16 or FP8 with one scale a tensor); the indexer's
cache. Its ``fused_qk_rmsnorm_rope`` norms over all heads together, for video models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedcomm.cli.bench.single.flashinfer import library

WORKSPACE_BYTES = 128 << 20


def norm_and_rope() -> tuple[Callable[..., Any], Callable[..., None]]:
    """``rmsnorm`` and ``apply_rope_with_cos_sin_cache_inplace``; AbsentError where there are none."""
    return library("norm").rmsnorm, library("rope").apply_rope_with_cos_sin_cache_inplace


class DenseMLA:
    """One decode step of BatchMLAPagedAttentionWrapper with pages of one token: a sparse decode of a bf16 cache.

    ``q [B, H, 576]``, ``keys [slots, 1, 512]``, ``rope [slots, 1, 64]``, ``indices`` int32 ``[B, K]``; scores by all
    576 elements of a key, sums the first 512. It reads 1152 bytes a token and dequantises nothing. Its plan is made on
    the host beforehand, which is not timed.
    """

    def __init__(
        self, q: torch.Tensor, keys: torch.Tensor, rope: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> None:
        """AbsentError without FlashInfer."""
        wrapper = library("mla").BatchMLAPagedAttentionWrapper
        batch, top_k = indices.shape
        self.parts = (*(part.contiguous() for part in q.split([512, 64], dim=-1)), keys, rope)
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        lens = torch.full((batch,), top_k, dtype=torch.int32, device=q.device)
        flat = indices.flatten()
        self.wrapper = wrapper(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device),
            use_cuda_graph=True,
            qo_indptr=torch.empty_like(ends),
            kv_indptr=torch.empty_like(ends),
            kv_indices=torch.empty_like(flat),
            kv_len_arr=torch.empty_like(lens),
        )
        self.wrapper.plan(ends, ends * top_k, flat, lens, q.shape[1], 512, 64, 1, False, scale, q.dtype, keys.dtype)

    def run(self, out: torch.Tensor) -> None:
        """Writes ``out [B, H, 512]``."""
        self.wrapper.run(*self.parts, out=out)
