"""What the sparse MLA ops refuse: the argument, what was expected, what came; and before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedcomm.ops.attention import sparse_mla_decode, sparse_mla_quant_and_cache

BF16, U8, I32, I64 = torch.bfloat16, torch.uint8, torch.int32, torch.int64


def cache(blocks: int = 3, block_size: int = 4, token_bytes: int = 584) -> torch.Tensor:
    """Blocks that lie 2880 bytes apart."""
    return torch.full((blocks, 2880), 0x5A, dtype=U8).as_strided(
        (blocks, block_size, token_bytes), (2880, token_bytes, 1)
    )


CACHE, V32, EXTRA = cache(), cache(token_bytes=656), cache(block_size=2)
KV, SLOTS = torch.ones(3, 512), torch.tensor([0, 1, 2])
Q, OUT = torch.ones(2, 16, 512, dtype=BF16), torch.full((2, 16, 512), 7.0, dtype=BF16)
DENSE, LENS = torch.zeros(2, 5, dtype=I32), torch.tensor([5, 1], dtype=I32)
RAGGED, INDPTR = torch.zeros(6, dtype=I32), torch.tensor([0, 5, 6], dtype=I32)
SINK = torch.zeros(16)

CACHES = [
    (None, r"expected a torch\.Tensor, got NoneType"),
    (CACHE.short(), r"expected dtype uint8, float8_e4m3fn or float8_e4m3fnuz, got torch\.int16"),
    (CACHE[..., :583], r"expected shape \[blocks, block_size, 584 or 656\], got \(3, 4, 583\)"),
    (CACHE[0], r"expected shape \[blocks, block_size, 584 or 656\], got \(4, 584\)"),
    (CACHE[:, :0], r"expected shape \[blocks, block_size, 584 or 656\], got \(3, 0, 584\)"),
    (
        torch.zeros(3, 2888, dtype=U8).as_strided((3, 4, 584), (2888, 584, 1)),
        r"expected strides \(at least 2336 and a multiple of 16, 584, 1\), got \(2888, 584, 1\)",
    ),
    (CACHE[:1].expand(3, 4, 584), r"expected strides \(at least 2336 and a multiple of 16, 584, 1\)"),
    (torch.zeros(3, 4, 640, dtype=U8)[..., :584], r"expected strides \(at least 2336 and a multiple of 16, 584, 1\)"),
    (
        torch.zeros(9000, dtype=U8)[8:].as_strided((3, 4, 584), (2880, 584, 1), 8),
        r"expected an address that is a multiple of 16, got one 8 after",
    ),
]


@pytest.mark.parametrize(("bad", "message"), CACHES)
def test_caches(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^cache: " + message):
        sparse_mla_quant_and_cache(KV, bad, SLOTS)
    with pytest.raises(ValueError, match="^main_cache: " + message):
        sparse_mla_decode(Q, bad, DENSE, LENS, scale=1.0)
    if bad is not None:
        with pytest.raises(ValueError, match="^extra_cache: " + message.replace("584 or 656", "584")):
            sparse_mla_decode(Q, CACHE, DENSE, LENS, extra_cache=bad, extra_indices=DENSE, extra_lens=LENS, scale=1.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kv": 1}, r"kv: expected a torch\.Tensor, got int"),
        ({"kv": KV.long()}, r"kv: expected dtype bfloat16, float16 or float32, got torch\.int64"),
        ({"kv": torch.ones(3, 576)}, r"kv: expected shape \[T, 512\], got \(3, 576\)"),
        ({"kv": KV, "cache": V32}, r"kv: expected shape \[T, 576\], got \(3, 512\)"),
        ({"kv": KV[0]}, r"kv: expected shape \[T, 512\], got \(512,\)"),
        ({"kv": KV.to("meta")}, r"kv: expected device cpu like the cache, got meta"),
        ({"slot_mapping": SLOTS.int()}, r"slot_mapping: expected dtype torch\.int64, got torch\.int32"),
        ({"slot_mapping": SLOTS[:2]}, r"slot_mapping: expected shape \[3\], got \(2,\)"),
        ({"slot_mapping": torch.arange(6)[::2]}, r"slot_mapping: expected a last dimension of stride 1"),
        ({"slot_mapping": SLOTS.to("meta")}, r"slot_mapping: expected device cpu like the cache, got meta"),
    ],
)
def test_bad_input_of_the_writer(bad: dict[str, Any], message: str) -> None:
    target = cache()
    with pytest.raises(ValueError, match="^" + message):
        sparse_mla_quant_and_cache(**({"kv": KV, "cache": target, "slot_mapping": SLOTS} | bad))
    assert (target == 0x5A).all()


def dense_extra(**changes: Any) -> dict[str, Any]:
    return {"extra_cache": EXTRA, "extra_indices": DENSE, "extra_lens": LENS} | changes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": None}, r"q: expected a torch\.Tensor, got NoneType"),
        ({"q": Q.half()}, r"q: expected dtype torch\.bfloat16, got torch\.float16"),
        ({"q": Q[0]}, r"q: expected shape \[B, H from 1 to 128, 512\] for this cache, got \(16, 512\)"),
        ({"q": Q[:, :0]}, r"q: expected shape \[B, H from 1 to 128, 512\] for this cache, got \(2, 0, 512\)"),
        ({"q": torch.ones(2, 129, 512, dtype=BF16)}, r"q: expected shape .*, got \(2, 129, 512\)"),
        ({"q": torch.ones(2, 16, 576, dtype=BF16)}, r"q: expected shape .*512\] for this cache, got \(2, 16, 576\)"),
        ({"main_cache": V32}, r"q: expected shape .*576\] for this cache, got \(2, 16, 512\)"),
        ({"q": Q.to("meta")}, r"q: expected device cpu, got meta"),
        ({"main_lens": None}, r"main_lens: expected either it or main_indptr, got neither"),
        ({"main_indptr": INDPTR}, r"main_lens: expected either it or main_indptr, got both"),
        ({"main_indices": None}, r"main_indices: expected a torch\.Tensor, got NoneType"),
        ({"main_indices": DENSE.long()}, r"main_indices: expected dtype torch\.int32, got torch\.int64"),
        ({"main_indices": RAGGED}, r"main_indices: expected shape \[2, any\], got \(6,\)"),
        ({"main_indices": DENSE[:1]}, r"main_indices: expected shape \[2, any\], got \(1, 5\)"),
        ({"main_indices": torch.zeros(5, 2, dtype=I32).t()}, r"main_indices: expected a last dimension of stride 1"),
        ({"main_indices": DENSE.to("meta")}, r"main_indices: expected device cpu like the cache, got meta"),
        ({"main_lens": LENS.long()}, r"main_lens: expected dtype torch\.int32, got torch\.int64"),
        ({"main_lens": LENS[:1]}, r"main_lens: expected shape \[2\], got \(1,\)"),
        ({"main_lens": [5, 1]}, r"main_lens: expected a torch\.Tensor, got list"),
        (
            {"main_lens": None, "main_indptr": INDPTR},
            r"main_indices: expected shape \[any\], got \(2, 5\)",
        ),
        (
            {"main_indices": RAGGED, "main_lens": None, "main_indptr": INDPTR[:2]},
            r"main_indptr: expected shape \[3\], got \(2,\)",
        ),
        (
            {"main_indices": RAGGED, "main_lens": None, "main_indptr": INDPTR.long()},
            r"main_indptr: expected dtype torch\.int32, got torch\.int64",
        ),
        ({"extra_indices": DENSE}, r"extra_indices: expected None without extra_cache, got Tensor"),
        ({"extra_lens": LENS}, r"extra_lens: expected None without extra_cache, got Tensor"),
        ({"extra_indptr": INDPTR}, r"extra_indptr: expected None without extra_cache, got Tensor"),
        (dense_extra(extra_lens=None), r"extra_lens: expected either it or extra_indptr, got neither"),
        (dense_extra(extra_indptr=INDPTR), r"extra_lens: expected either it or extra_indptr, got both"),
        (dense_extra(extra_indices=None), r"extra_indices: expected a torch\.Tensor, got NoneType"),
        (dense_extra(extra_indices=DENSE.short()), r"extra_indices: expected dtype torch\.int32, got torch\.int16"),
        (dense_extra(extra_lens=LENS[:1]), r"extra_lens: expected shape \[2\], got \(1,\)"),
        (dense_extra(extra_cache=V32), r"extra_cache: expected shape \[blocks, block_size, 584\], got \(3, 4, 656\)"),
        (
            dense_extra(extra_cache=EXTRA.view(torch.float8_e4m3fnuz)),
            r"extra_cache: expected torch\.float8_e4m3fn on cpu like main_cache, got torch\.float8_e4m3fnuz on cpu",
        ),
        ({"attn_sink": SINK.half()}, r"attn_sink: expected dtype torch\.float32, got torch\.float16"),
        ({"attn_sink": SINK[:8]}, r"attn_sink: expected shape \(16,\), got \(8,\)"),
        ({"attn_sink": 0.0}, r"attn_sink: expected a torch\.Tensor, got float"),
        ({"scale": float("nan")}, r"scale: expected a finite number, got nan"),
        ({"scale": float("inf")}, r"scale: expected a finite number, got inf"),
        ({"scale": None}, r"scale: expected a finite number, got None"),
        ({"scale": True}, r"scale: expected a finite number, got True"),
        ({"num_splits": 0}, r"num_splits: expected None or an int from 1 to 16, got 0"),
        ({"num_splits": 17}, r"num_splits: expected None or an int from 1 to 16, got 17"),
        ({"num_splits": 2.0}, r"num_splits: expected None or an int from 1 to 16, got 2\.0"),
        ({"num_splits": True}, r"num_splits: expected None or an int from 1 to 16, got True"),
        ({"out": OUT.float()}, r"out: expected dtype torch\.bfloat16, got torch\.float32"),
        ({"out": OUT[:1]}, r"out: expected shape \(2, 16, 512\), got \(1, 16, 512\)"),
        ({"out": torch.empty(2, 512, 16, dtype=BF16).mT}, r"out: expected a last dimension of stride 1"),
        ({"out": OUT[:1].expand(2, 16, 512)}, r"out: expected no stride of 0"),
        ({"out": Q}, r"out: expected memory apart from q, got a tensor that overlaps q"),
        (
            {"out": torch.zeros(3, 28800, dtype=U8)[:, :16384].view(BF16).view(3, 16, 512)[:2], "main_cache": None},
            r"main_cache: expected a torch\.Tensor, got NoneType",
        ),
    ],
)
def test_bad_input_of_decode(bad: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": Q,
        "main_cache": CACHE,
        "main_indices": DENSE,
        "main_lens": LENS,
        "scale": 0.1,
        "out": OUT,
    }
    with pytest.raises(ValueError, match="^" + message):
        sparse_mla_decode(**(given | bad))
    assert (OUT == 7).all()
    assert (Q == 1).all()


@pytest.mark.parametrize("name", ["main_cache", "extra_cache", "main_indices", "extra_indices", "attn_sink"])
def test_results_over_inputs(name: str) -> None:
    """A result that lies, in part, where an input does."""
    memory = torch.zeros(2 * 16 * 512 * 2 + 64, dtype=U8)
    out = memory[:-64].view(BF16).view(2, 16, 512)
    over = {
        "main_cache": memory[16 : 16 + 3 * 2880].as_strided((3, 4, 584), (2880, 584, 1), 16),
        "extra_cache": memory[32 : 32 + 3 * 2880].as_strided((3, 2, 584), (2880, 584, 1), 32),
        "main_indices": memory[:40].view(I32).view(2, 5),
        "extra_indices": memory[-104:-64].view(I32).view(2, 5),
        "attn_sink": memory[128:192].view(torch.float32),
    }[name]
    given: dict[str, Any] = {"main_cache": CACHE, "main_indices": DENSE, "attn_sink": SINK, **dense_extra(), name: over}
    with pytest.raises(ValueError, match=f"^out: expected memory apart from {name}, got a tensor that overlaps {name}"):
        sparse_mla_decode(Q, main_lens=LENS, **given, scale=0.1, out=out)
    assert (memory == 0).all()


def test_the_good_arguments_are_good() -> None:
    """Or the refusals above would prove nothing."""
    for token_bytes in (584, 656):
        target = cache(token_bytes=token_bytes)
        width = 512 if token_bytes == 584 else 576
        sparse_mla_quant_and_cache(torch.ones(3, width), target, SLOTS)
        assert (target != 0x5A).any()
        q = torch.ones(2, 16, width, dtype=BF16)
        extra = dense_extra(extra_cache=cache(block_size=2, token_bytes=token_bytes))
        for keys in ((DENSE, LENS), (RAGGED, None, INDPTR)):
            for options in ({}, extra, {"attn_sink": SINK}):
                out = torch.full((2, 16, 512), 7.0, dtype=BF16)
                sparse_mla_decode(q, target, *keys, **options, scale=0.1, out=out)
                assert not (out == 7).any()
