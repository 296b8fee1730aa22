"""The parallel layers on real ranks, against the same layers undivided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import RankPool
from torch import nn

import fusedcomm
from fusedcomm import GroupCoordinator
from fusedcomm.layers import (
    BlockFP8Linear,
    ColumnParallelLinear,
    GemmaRMSNorm,
    LayerCommunicator,
    LayerInput,
    MergedColumnParallelLinear,
    ParallelLMHead,
    PartialSum,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from fusedcomm.models.tiny import quantize_blocks
from fusedcomm.ops import reference

WORLD_SIZES = [2, 3, 8]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(module: nn.Module, tensors: dict[str, torch.Tensor], *sources: str) -> None:
    """Fills a layer from full tensors as a checkpoint does."""
    for part in module.weight_slices(*sources):
        assert tensors[part.source].shape == part.full_shape
        part.target.copy_(tensors[part.source][part.index])


def same_on_all_ranks(group: GroupCoordinator, x: torch.Tensor) -> bool:
    gathered = group.all_gather(x.contiguous().view(torch.uint8).unsqueeze(0), dim=0)
    return all(torch.equal(gathered[0], other) for other in gathered)


# A sum over ranks in another order than the undivided product's: fp32 rounding of some thousand terms of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def linears() -> None:
    group = fusedcomm.init_distributed()
    w = group.world_size
    x = random(5, 48)
    full = {"a.weight": random(16 * w, 48, seed=1), "a.bias": random(16 * w, seed=2)}
    full |= {"b.weight": random(4 * w, 48, seed=3), "b.bias": random(4 * w, seed=4)}

    column = ColumnParallelLinear(48, 16 * w, group, bias=True, gather_output=True)
    load(column, full, "a")
    expected_a = nn.functional.linear(x, full["a.weight"], full["a.bias"])
    torch.testing.assert_close(column(x), expected_a, **CLOSE)
    assert same_on_all_ranks(group, column(x))

    merged = MergedColumnParallelLinear(48, [16 * w, 4 * w], group, bias=True)
    load(merged, full, "a", "b")
    assert merged.local_sizes == [16, 4]
    a, b = merged(x).split(merged.local_sizes, dim=-1)
    torch.testing.assert_close(group.all_gather(a), expected_a, **CLOSE)
    expected_b = nn.functional.linear(x, full["b.weight"], full["b.bias"])
    torch.testing.assert_close(group.all_gather(b), expected_b, **CLOSE)

    down = {"d.weight": random(24, 16 * w, seed=5), "d.bias": random(24, seed=6)}
    expected = nn.functional.linear(expected_a, down["d.weight"], down["d.bias"])
    for reduce_results in (True, False):
        row = RowParallelLinear(16 * w, 24, group, bias=True, reduce_results=reduce_results)
        load(row, down, "d")
        y = row(a)
        assert isinstance(y, PartialSum) is not reduce_results
        y = y.reduce() if isinstance(y, PartialSum) else y
        torch.testing.assert_close(y, expected, **CLOSE)
        assert same_on_all_ranks(group, y)


def qkv_heads(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    group = fusedcomm.init_distributed()
    head_dim = 8
    full = {
        "q.weight": random(num_heads * head_dim, 32, seed=1),
        "k.weight": random(num_kv_heads * head_dim, 32, seed=2),
        "v.weight": random(num_kv_heads * head_dim, 32, seed=3),
    }
    qkv = QKVParallelLinear(32, head_dim, num_heads, num_kv_heads, group)
    load(qkv, full, "q", "k", "v")
    x = random(4, 32)
    q, k, v = qkv(x).split(qkv.local_sizes, dim=-1)
    heads, kv_heads = qkv.num_local_heads, qkv.num_local_kv_heads
    full_q = (x @ full["q.weight"].T).view(4, num_heads, head_dim)
    first = group.rank * heads
    torch.testing.assert_close(q.view(4, heads, head_dim), full_q[:, first : first + heads], **CLOSE)
    # What the rank's queries need: head h reads key/value head h * num_kv_heads // num_heads.
    needed = sorted({h * num_kv_heads // num_heads for h in range(first, first + heads)})
    assert len(needed) == kv_heads
    for got, source in ((k, "k"), (v, "v")):
        full_kv = (x @ full[f"{source}.weight"].T).view(4, num_kv_heads, head_dim)
        torch.testing.assert_close(got.view(4, kv_heads, head_dim), full_kv[:, needed], **CLOSE)
    return heads, kv_heads


def vocabulary(vocab_size: int) -> None:
    group = fusedcomm.init_distributed()
    table = {"e.weight": random(vocab_size, 64, seed=1).bfloat16()}
    ids = torch.randint(vocab_size, (3, 7), generator=torch.Generator().manual_seed(2))
    ids[0, :2] = torch.tensor([0, vocab_size - 1])
    for reduce_results in (True, False):
        embedding = VocabParallelEmbedding(vocab_size, 64, group, reduce_results=reduce_results, dtype=torch.bfloat16)
        load(embedding, table, "e")
        rows = embedding(ids)
        rows = rows.reduce() if isinstance(rows, PartialSum) else rows
        assert torch.equal(rows, table["e.weight"][ids])  # one rank has the row, the others add zeros: exact
    head = ParallelLMHead(vocab_size, 64, group, dtype=torch.bfloat16)
    head.tie_to(embedding)
    x = random(3, 64, seed=3).bfloat16()
    logits = head(x)
    assert logits.shape == (3, vocab_size)
    assert same_on_all_ranks(group, logits)
    # bf16 of one fp32 sum of 64 terms, in another order: one ulp (2^-7 relative) at most.
    torch.testing.assert_close(logits, x @ table["e.weight"].T, rtol=2**-7, atol=1e-2)
    with pytest.raises(ValueError, match=f"ids: expected 0 to {vocab_size - 1}"):
        embedding(torch.tensor([vocab_size]))


def fp8_column_then_row() -> None:
    group = fusedcomm.init_distributed()
    w = group.world_size
    full: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in {"g": (128 * w, 256), "u": (256 * w, 256), "d": (192, 128 * w)}.items():
        weight = random(rows, columns, seed=rows) * random(rows, 1, seed=7).exp()
        full[f"{name}.weight"], full[f"{name}.weight_scale_inv"] = quantize_blocks(weight)
    undivided = {}
    for name in "gud":
        rows, columns = full[f"{name}.weight"].shape
        undivided[name] = BlockFP8Linear(columns, rows, dtype=torch.float32)
        undivided[name].weight.copy_(full[f"{name}.weight"])
        undivided[name].weight_scale.copy_(full[f"{name}.weight_scale_inv"])
    merged = MergedColumnParallelLinear(256, [128 * w, 256 * w], group, dtype=torch.float32, block_fp8=True)
    load(merged, full, "g", "u")
    row = RowParallelLinear(128 * w, 192, group, dtype=torch.float32, block_fp8=True)
    load(row, full, "d")
    x = random(5, 256)
    g, u = merged(x).split(merged.local_sizes, dim=-1)
    torch.testing.assert_close(group.all_gather(g), undivided["g"](x), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(group.all_gather(u), undivided["u"](x), rtol=1e-5, atol=1e-3)
    # The same rows on both sides, so that they quantise alike: groups of 128 do not cross ranks.
    h = undivided["g"](x)
    mine = h[:, group.rank * 128 : (group.rank + 1) * 128]
    torch.testing.assert_close(row(mine), undivided["d"](h), rtol=1e-5, atol=1e-2)
    with pytest.raises(
        ValueError, match="in_features: expected a multiple of 128 a rank for block-FP8 weights, got 64"
    ):
        RowParallelLinear(64 * w, 192, group, block_fp8=True)


def norms(dtype: torch.dtype, gemma: bool) -> None:
    group = fusedcomm.init_distributed()
    norm = (GemmaRMSNorm if gemma else RMSNorm)(512, 1e-5, dtype=dtype)
    norm.weight.copy_(random(512, seed=1))
    mine = random(7, 512, seed=100 + group.rank).to(dtype)  # differs by rank
    residual = random(7, 512, seed=3).to(dtype)
    # The spec's arithmetic, in plain torch: fp32 sum in rank order from +0, rounded once.
    total = torch.zeros(7, 512)
    for part in group.all_gather(mine.unsqueeze(0), dim=0):
        total = total + part.float()
    expected = reference.fused_add_rms_norm(total.to(dtype), residual, norm.weight, 1e-5, weight_bias=norm.weight_bias)
    for addend in (mine, PartialSum(mine, group)):
        y, r = norm.forward_with_allreduce_fusion(addend, residual)
        assert torch.equal(y, expected.norm)
        assert torch.equal(r, expected.residual)
    quantised = reference.per_group_quant_fp8(expected.norm)
    (y, fp8, scale), r = norm.forward_with_allreduce_fusion_quant_per_group(mine, residual, keep_bf16=True)
    assert torch.equal(y, expected.norm)
    assert torch.equal(fp8.float(), quantised.fp8.float())
    assert torch.equal(scale, quantised.scale)
    assert torch.equal(r, expected.residual)


def flat(result: LayerInput) -> list[torch.Tensor]:
    hidden = result.hidden_states
    return [*(hidden if isinstance(hidden, tuple) else [hidden]), result.residual]


def two_layers(form: dict[str, Any], fusion: bool) -> tuple[list[list[torch.Tensor]], dict[str, int]]:
    """Two layers of norms whose attention and MLP are this rank's random addends."""
    group = fusedcomm.init_distributed()
    norms = [RMSNorm(256, dtype=torch.bfloat16) for _ in range(4)]
    for i, norm in enumerate(norms):
        norm.weight.copy_(random(256, seed=i))
    layers = [
        LayerCommunicator(group, *norms[:2], enable_fusion=fusion, **form),
        LayerCommunicator(group, *norms[2:], enable_fusion=fusion, is_last_layer=True, **form),
    ]
    hidden: Any = PartialSum(random(5, 256, seed=50 + group.rank).bfloat16(), group)
    residual: Any = None
    seen = []
    for i, layer in enumerate(layers):
        seen.append(flat(got := layer.prepare_attn(hidden, residual)))
        attn = PartialSum(random(5, 256, seed=60 + 10 * i + group.rank).bfloat16(), group)
        seen.append(flat(got := layer.prepare_mlp(attn, got.residual)))
        mlp = PartialSum(random(5, 256, seed=160 + 10 * i + group.rank).bfloat16(), group)
        hidden, residual = layer.postprocess_layer(mlp, got.residual)
    seen.append([hidden, residual])
    for tensors in seen:
        for tensor in tensors:
            assert same_on_all_ranks(group, tensor)
    # float8 tensors do not pickle
    return [[t.float() for t in tensors] for tensors in seen], group.stats()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("body", "args"),
    [
        (linears, ()),
        (vocabulary, (257,)),
        (vocabulary, (17,)),  # at 8 ranks three each: the last two hold two and none
        (fp8_column_then_row, ()),
        (norms, (torch.bfloat16, False)),
        (norms, (torch.float32, True)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value)),
)
def test_layer(ranks: RankPool, world_size: int, body: Callable[..., None], args: Sequence[Any]) -> None:
    ranks(world_size).run(body, *args)


@pytest.mark.parametrize(
    ("world_size", "num_heads", "num_kv_heads", "local"),
    [(2, 8, 2, (4, 1)), (8, 8, 2, (1, 1)), (8, 16, 1, (2, 1)), (3, 6, 3, (2, 1)), (2, 8, 8, (4, 4))],
)
def test_queries_meet_their_keys(
    ranks: RankPool, world_size: int, num_heads: int, num_kv_heads: int, local: tuple[int, int]
) -> None:
    assert ranks(world_size).run(qkv_heads, num_heads, num_kv_heads) == [local] * world_size


FORMS: dict[str, dict[str, Any]] = {
    "rows": {},
    "quantised": {"enable_fused_ar_quant": True, "enable_fused_ar_quant_mlp": True},
    "both": {"enable_fused_ar_quant": True, "fused_ar_quant_keep_bf16": True},
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_fused_and_separate_layers_have_the_same_bits(ranks: RankPool, world_size: int, form: dict[str, Any]) -> None:
    fused = ranks(world_size).run(two_layers, form, True)
    separate = ranks(world_size).run(two_layers, form, False)
    for (a, _), (b, _) in zip(fused, separate, strict=True):
        for x, y in zip(a, b, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    # Four norms, each with its all-reduce inside, and the last layer's own all-reduce.
    quantised = {"rows": 0, "quantised": 4, "both": 2}[next(k for k, v in FORMS.items() if v is form)]
    stats = fused[0][1]
    assert stats.get("allreduce_rmsnorm_quant.fused", 0) == quantised
    assert stats.get("allreduce_rmsnorm.fused_norm", 0) == 4 - quantised
    assert stats["all_reduce.custom"] == 1
    assert separate[0][1]["all_reduce.custom"] == 5
