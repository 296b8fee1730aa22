"""What fused_qk_norm_rope refuses, before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qk_bodies import all_same
from qk_cases import Case, arguments, table

from fusedcomm.ops.attention import QKV, PagedKV, fused_qk_norm_rope

GOOD = arguments(Case(4, 4, 2, 64, 64), torch.float32)
NAMES = ("qkv", "q_weight", "k_weight", "cos_sin", "positions", "num_heads_q", "num_heads_k", "head_dim", "eps")
PLAIN = PagedKV(torch.zeros(3, 4, 2, 64), torch.zeros(3, 4, 2, 64))
SHUFFLED = PagedKV(torch.zeros(3, 2, 16, 8, 4), torch.zeros(3, 2, 2, 64, 4))
SLOTS = torch.arange(4)


def with_cache(cache: Any, slots: Any = SLOTS) -> dict[str, Any]:
    return {"cache": cache, "slot_mapping": slots}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"qkv": GOOD[0].double()}, r"qkv: expected dtype bfloat16, float16 or float32, got torch\.float64"),
        ({"qkv": GOOD[0][0]}, r"qkv: expected dimensions \[T, \(Hq \+ 2 Hk\) D\], got shape \(512,\)"),
        ({"qkv": GOOD[0][:, :-64]}, r"qkv: expected \(Hq \+ 2 Hk\) D = 512 columns, got 448"),
        ({"num_heads_q": 0}, r"num_heads_q: expected an int >= 1, got 0"),
        ({"num_heads_k": 2.0}, r"num_heads_k: expected an int >= 1, got 2\.0"),
        ({"head_dim": 2048}, r"head_dim: expected a head dimension between 1 and 1024, got 2048"),
        ({"q_weight": GOOD[1][:32]}, r"q_weight: expected shape \(64,\), got \(32,\)"),
        ({"cos_sin": table(50, 32)}, r"cos_sin: expected shape \(50, 64\), got \(50, 32\)"),
        ({"cos_sin": table(50, 64).half()}, r"cos_sin: expected dtype torch\.float32, got torch\.float16"),
        ({"cos_sin": torch.ones(0, 64)}, r"cos_sin: expected at least one position, got shape \(0, 64\)"),
        ({"cos_sin": torch.ones(64, 50).t()}, r"cos_sin: expected a last dimension of stride 1"),
        ({"positions": GOOD[4].int()}, r"positions: expected dtype torch\.int64, got torch\.int32"),
        ({"positions": GOOD[4][:3]}, r"positions: expected shape \(4,\), got \(3,\)"),
        ({"rotary_dim": 63}, r"rotary_dim: expected an even int between 2 and 64, got 63"),
        ({"rotary_dim": 66}, r"rotary_dim: expected an even int between 2 and 64, got 66"),
        ({"neox": 1}, r"neox: expected a bool, got 1"),
        ({"eps": float("inf")}, r"eps: expected a finite number >= 0, got inf"),
        ({"cache": PLAIN}, r"slot_mapping: expected one with cache, got None"),
        ({"slot_mapping": SLOTS}, r"cache: expected one with slot_mapping, got None"),
        (with_cache((PLAIN.k, PLAIN.v)), r"cache: expected a PagedKV, got tuple"),
        (with_cache(PLAIN, SLOTS.int()), r"slot_mapping: expected dtype torch\.int64, got torch\.int32"),
        (with_cache(PLAIN, SLOTS[:2]), r"slot_mapping: expected shape \(4,\), got \(2,\)"),
        (with_cache(PLAIN._replace(k=PLAIN.k[0])), r"cache\.k: expected \[blocks, block, Hk, D\] or .*got shape"),
        (with_cache(PLAIN._replace(k=None)), r"cache\.k: expected a torch\.Tensor, got NoneType"),
        (
            with_cache(PLAIN._replace(k=PLAIN.k[:, :, :1])),
            r"cache\.k: expected shape \(3, 4, 2, 64\), got \(3, 4, 1, 64\)",
        ),
        (with_cache(PLAIN._replace(v=PLAIN.v[:2])), r"cache\.v: expected shape \(3, 4, 2, 64\), got \(2, 4, 2, 64\)"),
        (with_cache(PLAIN._replace(v=PLAIN.k)), r"cache\.v: expected a tensor of its own, got cache\.k"),
        (
            with_cache(PLAIN._replace(k=PLAIN.k.bfloat16())),
            r"cache\.k: expected dtype torch\.float32 or .*got torch\.bfl",
        ),
        (with_cache(PLAIN._replace(v=PLAIN.v.byte())), r"cache\.v: expected dtype torch\.float32, got torch\.uint8"),
        (with_cache(PLAIN._replace(k=torch.zeros(3, 4, 64, 2).mT)), r"cache\.k: expected a last dimension of stride 1"),
        (
            with_cache(PLAIN._replace(k=torch.zeros(1, 4, 2, 64).expand(3, 4, 2, 64))),
            r"cache\.k: expected no stride of 0",
        ),
        (
            with_cache(PLAIN._replace(k_scale=torch.ones(1))),
            r"cache\.k_scale: expected None for a cache of torch\.float32",
        ),
        (
            with_cache(PagedKV(PLAIN.k.byte(), PLAIN.v.byte(), 2.0)),
            r"cache\.k_scale: expected a torch\.Tensor, got float",
        ),
        (
            with_cache(PagedKV(PLAIN.k.byte(), PLAIN.v.byte(), None, torch.ones(2))),
            r"cache\.v_scale: expected one element, got shape \(2,\)",
        ),
        (
            with_cache(PagedKV(PLAIN.k.byte(), PLAIN.v.byte(), torch.ones(1).half())),
            r"cache\.k_scale: expected dtype torch\.float32, got torch\.float16",
        ),
        (
            with_cache(SHUFFLED._replace(k=torch.zeros(3, 2, 16, 6, 4))),
            r"cache\.k: expected a block size that is a multiple of x = 4, got 6",
        ),
        (
            with_cache(SHUFFLED._replace(k=torch.zeros(3, 2, 16, 8, 3))),
            r"cache\.k: expected a last dimension that divides D = 64, got 3",
        ),
        (
            with_cache(SHUFFLED._replace(v=SHUFFLED.k)),
            r"cache\.v: expected shape \(3, 2, 2, 64, 4\), got \(3, 2, 16, 8, 4\)",
        ),
        ({"out": QKV(torch.ones(4, 4, 64), torch.ones(4, 2, 64), torch.ones(4, 2, 63))}, r"out\.v: expected shape"),
        (
            {"out": QKV(GOOD[0][:, :256].view(4, 4, 64), torch.ones(4, 2, 64), torch.ones(4, 2, 64))},
            r"out\.q: expected memory apart from qkv",
        ),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    """Refused before anything is written."""
    given = dict(zip(NAMES, GOOD, strict=True)) | {"rotary_dim": 64} | bad
    before = [t.clone() for t in (GOOD[0], *PLAIN[:2], *SHUFFLED[:2]) if t is not None]
    with pytest.raises(ValueError, match=message):
        fused_qk_norm_rope(**given)
    assert all_same([GOOD[0], *PLAIN[:2], *SHUFFLED[:2]], before)


def test_the_good_arguments_are_good() -> None:
    """Or the refusals above would prove nothing."""
    for cache in (PLAIN, SHUFFLED, PagedKV(PLAIN.k.byte(), PLAIN.v.byte(), torch.ones(1))):
        fresh = cache._replace(k=cache.k.clone(), v=cache.v.clone())
        fused_qk_norm_rope(*GOOD, cache=fresh, slot_mapping=SLOTS)
        assert not all_same(fresh.k, cache.k)
