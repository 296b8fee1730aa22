"""What fused_qk_rope_cat_and_cache_mla refuses, before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make
from qk_bodies import same
from qk_cases import NUM_POSITIONS, random_positions, table

from fusedcomm.ops.attention import fused_qk_rope_cat_and_cache_mla

GOOD: dict[str, Any] = {
    "q_nope": make(1, (4, 3, 32), torch.float32, "ordinary"),
    "q_pe": make(2, (4, 3, 16), torch.float32, "ordinary"),
    "k_nope": make(3, (4, 1, 32), torch.float32, "ordinary"),
    "k_pe": make(4, (4, 1, 16), torch.float32, "ordinary"),
    "kv_cache": torch.zeros(4, 4, 48),
    "slot_mapping": torch.tensor([5, 0, 15, 7]),
    "positions": random_positions(1, 4),
    "cos_sin": table(NUM_POSITIONS, 16),
    "k_scale": None,
    "neox": False,
}
Q, PE, K, K_PE, CACHE = (GOOD[name] for name in ("q_nope", "q_pe", "k_nope", "k_pe", "kv_cache"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q_nope": Q.double()}, r"q_nope: expected dtype bfloat16, float16 or float32, got torch\.float64"),
        ({"q_nope": Q[0]}, r"q_nope: expected dimensions \[B, H, N\], got shape \(3, 32\)"),
        ({"q_nope": Q[:, :0]}, r"q_nope: expected at least one head, got shape \(4, 0, 32\)"),
        ({"q_nope": torch.ones(4, 3, 1025)}, r"q_nope: expected a head dimension between 1 and 1024, got 1025"),
        ({"q_pe": PE[:3]}, r"q_pe: expected shape \(4, 3, 16\), got \(3, 3, 16\)"),
        ({"q_pe": PE[..., :15]}, r"q_pe: expected an even last dimension between 2 and N = 32, got 15"),
        ({"q_pe": torch.ones(4, 3, 34)}, r"q_pe: expected an even last dimension between 2 and N = 32, got 34"),
        ({"q_pe": PE.half()}, r"q_pe: expected dtype torch\.float32, got torch\.float16"),
        ({"k_nope": K.squeeze(1)}, r"k_nope: expected shape \(4, 1, 32\), got \(4, 32\)"),
        ({"k_nope": K.to("meta")}, r"k_nope: expected device cpu, got meta"),
        ({"k_pe": K_PE[..., :8]}, r"k_pe: expected shape \(4, 1, 16\), got \(4, 1, 8\)"),
        ({"kv_cache": None}, r"kv_cache: expected a torch\.Tensor, got NoneType"),
        ({"kv_cache": CACHE[0]}, r"kv_cache: expected shape \[blocks, block_size, 48\] or .* got \(4, 48\)"),
        ({"kv_cache": CACHE[..., :47]}, r"kv_cache: expected shape .* got \(4, 4, 47\)"),
        ({"kv_cache": CACHE[:, :0]}, r"kv_cache: expected shape .* got \(4, 0, 48\)"),
        ({"kv_cache": CACHE.view(4, 2, 2, 48)}, r"kv_cache: expected shape .* got \(4, 2, 2, 48\)"),
        ({"kv_cache": CACHE.bfloat16()}, r"kv_cache: expected dtype torch\.float32 or .*, got torch\.bfloat16"),
        ({"kv_cache": torch.zeros(4, 48, 4).mT}, r"kv_cache: expected a last dimension of stride 1"),
        ({"kv_cache": CACHE[:1].expand(4, 4, 48)}, r"kv_cache: expected no stride of 0"),
        ({"slot_mapping": GOOD["slot_mapping"].int()}, r"slot_mapping: expected dtype torch\.int64, got torch\.int32"),
        ({"slot_mapping": GOOD["slot_mapping"][:2]}, r"slot_mapping: expected shape \(4,\), got \(2,\)"),
        ({"positions": GOOD["positions"][:, None]}, r"positions: expected shape \(4,\), got \(4, 1\)"),
        ({"cos_sin": table(50, 32)}, r"cos_sin: expected shape \(50, 16\), got \(50, 32\)"),
        ({"cos_sin": table(50, 16).half()}, r"cos_sin: expected dtype torch\.float32, got torch\.float16"),
        ({"k_scale": torch.ones(1)}, r"k_scale: expected None for a cache of torch\.float32, got a scale"),
        ({"kv_cache": CACHE.byte(), "k_scale": 2.0}, r"k_scale: expected a torch\.Tensor, got float"),
        ({"kv_cache": CACHE.byte(), "k_scale": torch.ones(2)}, r"k_scale: expected one element, got shape \(2,\)"),
        ({"neox": 0}, r"neox: expected a bool, got 0"),
        ({"out": torch.ones(4, 3, 32)}, r"out: expected shape \(4, 3, 48\), got \(4, 3, 32\)"),
        ({"out": torch.ones(4, 3, 48).half()}, r"out: expected dtype torch\.float32, got torch\.float16"),
        ({"out": torch.ones(3, 4, 48).transpose(0, 1)}, r"out: expected a contiguous tensor, got strides"),
        ({"out": CACHE[:, :3]}, r"out: expected memory apart from kv_cache"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    """Refused before anything is written."""
    before = CACHE.clone()
    with pytest.raises(ValueError, match=message):
        fused_qk_rope_cat_and_cache_mla(**(GOOD | bad))
    assert same(CACHE, before)


def test_the_good_arguments_are_good() -> None:
    """Or the refusals above would prove nothing."""
    fresh = GOOD | {"kv_cache": CACHE.clone()}
    fused_qk_rope_cat_and_cache_mla(**fresh)
    assert not same(fresh["kv_cache"], CACHE)
