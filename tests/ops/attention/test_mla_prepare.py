"""fused_qk_rope_cat_and_cache_mla against transformers' DeepSeek-V3 and fp64; its kernel against it, to the bit."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import qk_bodies as bodies
import spec
import torch
from cases import DTYPES, FP8_DTYPES, KINDS, make
from qk_bodies import all_same, call, same
from qk_cases import NUM_POSITIONS, check_rotated, random_positions, rotate_in_fp64, table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import TritonOps

from fusedcomm.ops.attention import fused_qk_rope_cat_and_cache_mla


class Case(NamedTuple):
    """B, H, and the sizes of both parts of a head."""

    batch: int
    heads: int
    nope: int = 512
    pe: int = 64
    neox: bool = False


CASES = [
    Case(5, 16),
    Case(5, 16, neox=True),
    Case(3, 1),
    Case(2, 11, 96, 48),  # heads and sizes that fill no tile
    Case(2, 11, 96, 48, neox=True),
    Case(2, 3, 2, 2),
]
BLOCKS, PAD = 4, 48


def parts(case: Case, dtype: torch.dtype, kind: str = "ordinary", seed: int = 1) -> tuple[torch.Tensor, ...]:
    """q_nope as a product over heads leaves it, q_pe and the key as slices of what was packed."""
    batch, heads, nope, pe, _ = case
    q_nope = make(seed, (heads, batch, nope), dtype, kind).transpose(0, 1)
    q_pe = make(seed + 1, (batch, heads, 32 + pe), dtype, kind)[..., 32:]
    k_nope, k_pe = make(seed + 2, (batch, 1, nope + pe), dtype, kind).split([nope, pe], dim=-1)
    return q_nope, q_pe, k_nope, k_pe


def arguments(
    case: Case, dtype: torch.dtype, kind: str = "ordinary", seed: int = 1, cache: torch.Tensor | None = None
) -> tuple[Any, ...]:
    """With slots in a cache of blocks of 4 where there is a cache; a new one otherwise."""
    if cache is None:
        cache = torch.zeros(BLOCKS, 4, case.nope + case.pe, dtype=dtype)
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(BLOCKS * 4)[: case.batch])
    rest = slots, random_positions(seed, case.batch), table(NUM_POSITIONS, case.pe)
    return *parts(case, dtype, kind, seed), cache, *rest, None, case.neox


def poisoned(block: int, width: int, dtype: torch.dtype, *, with_head: bool) -> torch.Tensor:
    """Four blocks of bytes 0x5A, with more of them between."""
    stride = block * width + PAD
    raw = torch.full((BLOCKS * stride * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype)
    cache = raw.as_strided((BLOCKS, block, width), (stride, width, 1))
    return cache.unsqueeze(2) if with_head else cache


def bytes_under(cache: torch.Tensor) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).numpy()


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_of_transformers(dtype: torch.dtype) -> None:
    """DeepSeek-V3's, which leaves the first of all pairs before the second ones."""
    pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    case = Case(6, 16)
    given = arguments(case, dtype)
    _, q_pe, _, k_pe, cache, slots, positions, cos_sin, *_ = given
    got = fused_qk_rope_cat_and_cache_mla(*given)
    cos, sin = (t.repeat(1, 2) for t in cos_sin[positions].to(dtype).chunk(2, dim=-1))
    theirs = apply_rotary_pos_emb_interleave(q_pe, k_pe, cos, sin)
    keys = cache.flatten(0, 1)[slots].unsqueeze(1)
    # Theirs rounds the table, both products and their sum; ours the result: four times half a unit of the largest.
    tolerance = 4 * 2.0**-8 if dtype is torch.bfloat16 else 4 * 2.0**-24
    for ours, other in zip((got[..., 512:], keys[..., 512:]), theirs, strict=True):
        ours = torch.cat((ours[..., 0::2], ours[..., 1::2]), dim=-1)
        torch.testing.assert_close(ours, other, atol=tolerance * other.abs().max().item(), rtol=0)


def test_the_attention_of_transformers() -> None:
    """DeepSeek-V3's layer, against attention over the cache in the absorbed form with the query as it is returned."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = transformers.DeepseekV3Config(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rope_interleave=True,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    layer = deepseek.DeepseekV3Attention(config, 0)
    hidden, positions = torch.randn(1, 9, 48), torch.tensor([[0, 1, 2, 3, 40, 41, 300, 301, 302]])
    rotary = deepseek.DeepseekV3RotaryEmbedding(config)
    mask = torch.full((9, 9), -torch.inf).triu(1)
    with torch.no_grad():
        want, _ = layer(hidden, rotary(hidden, positions), mask.view(1, 1, 9, 9))
        latent = layer.q_a_layernorm(layer.q_a_proj(hidden[0]))
        q_pass, q_pe = layer.q_b_proj(latent).view(9, 4, 24).split([16, 8], dim=-1)
        c, k_pe = layer.kv_a_proj_with_mqa(hidden[0]).unsqueeze(1).split([32, 8], dim=-1)
        expand_k, expand_v = layer.kv_b_proj.weight.view(4, 28, 32).split([16, 12], dim=1)
        q_nope = torch.bmm(q_pass.transpose(0, 1), expand_k).transpose(0, 1)
        cos, sin = rotary(torch.zeros(1), torch.arange(303)[None])
        cos_sin = torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=-1)
        cache, slots = torch.full((4, 4, 40), torch.nan), torch.tensor([9, 1, 15, 2, 0, 7, 8, 4, 12])
        q = fused_qk_rope_cat_and_cache_mla(
            q_nope, q_pe, layer.kv_a_layernorm(c), k_pe, cache, slots, positions[0], cos_sin, None, False
        )
        keys = cache.flatten(0, 1)[slots]
        scores = torch.einsum("qhd,kd->hqk", q, keys) * layer.scaling + mask
        out = torch.einsum("hqk,kc,hvc->qhv", scores.softmax(-1), keys[:, :32], expand_v)
        got = layer.o_proj(out.flatten(1))
    # fp32, but another order of products: some units of sums of 32 and 48 numbers around 1
    torch.testing.assert_close(got, want[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, dtype: torch.dtype) -> None:
    given = arguments(case, dtype)
    q_nope, q_pe, k_nope, k_pe, cache, slots, positions, cos_sin, *_ = given
    got = fused_qk_rope_cat_and_cache_mla(*given)
    assert got.shape == (case.batch, case.heads, case.nope + case.pe)
    assert got.is_contiguous()
    keys = cache.flatten(0, 1)[slots].unsqueeze(1)
    for ours, nope, pe in ((got, q_nope, q_pe), (keys, k_nope, k_pe)):
        assert same(ours[..., : case.nope], nope)
        check_rotated(ours[..., case.nope :], rotate_in_fp64(pe, cos_sin, positions, case.neox), normed=False)


def test_positions_outside_of_the_table() -> None:
    """Are not read; what they would have rotated is NaN and nothing else is."""
    given, other = (arguments(Case(5, 3), torch.bfloat16) for _ in range(2))
    given[6][1], given[6][3] = -1, NUM_POSITIONS
    got, want = fused_qk_rope_cat_and_cache_mla(*given), fused_qk_rope_cat_and_cache_mla(*other)
    keys, expected = (cache.flatten(0, 1)[given[5]] for cache in (given[4], other[4]))
    for ours, theirs in ((got, want), (keys, expected)):
        assert ours[[1, 3], ..., 512:].isnan().all()
        assert all_same((ours[[1, 3], ..., :512], ours[[0, 2, 4]]), (theirs[[1, 3], ..., :512], theirs[[0, 2, 4]]))


# ---- the cache ----

# (block size, dtype of the cache or None for that of q, scale, with a dimension of one head)
CACHES = [
    (1, None, None, False),
    (5, None, None, True),
    (4, torch.float8_e4m3fn, 0.037, False),
    (3, torch.float8_e4m3fnuz, 2.5, True),
    (64, torch.uint8, None, False),
]


def slots_of(block: int) -> torch.Tensor:
    end = BLOCKS * block
    return torch.tensor([end - 1, -1, 0, end, 2 % end, 1 << 40, -(1 << 40)])


def expected_bytes(given: tuple[Any, ...], rotated: torch.Tensor) -> np.ndarray:
    """The bytes under the cache: those of each known slot, and the poison."""
    k_nope, cache, slots, scale = given[2], given[4], given[5], given[8]
    key = torch.cat((k_nope.squeeze(1), rotated), dim=-1)
    if cache.dtype is key.dtype:
        elements = key.view(torch.int16).numpy()
    else:
        fp8 = torch.float8_e4m3fn if cache.dtype is torch.uint8 else cache.dtype
        by = np.float32(1 if scale is None else scale.item())
        elements = spec.to_fp8((spec.widen(key) / by).astype(np.float32), fp8).view(np.int8)
    block, width = cache.shape[1], cache.shape[-1]
    flat = np.full(BLOCKS * (block * width + PAD) * cache.element_size(), 0x5A, np.uint8).view(elements.dtype)
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < BLOCKS * block:
            start = slot // block * (block * width + PAD) + slot % block * width
            flat[start : start + width] = elements[t]
    return flat.view(np.uint8)


def rotated_key(given: tuple[Any, ...]) -> torch.Tensor:
    """The pe part of the key as the op has it for a query: rotated there, it needs no cache."""
    _, _, k_nope, k_pe, cache, _, positions, cos_sin, _, neox = given
    empty = k_nope.new_empty(0, cache.shape[1], cache.shape[-1])
    nowhere = torch.full_like(positions, -1)
    q = fused_qk_rope_cat_and_cache_mla(k_nope, k_pe, k_nope, k_pe, empty, nowhere, positions, cos_sin, None, neox)
    return q[:, 0, k_nope.shape[-1] :]


def cache_arguments(
    block: int, dtype: torch.dtype | None, scale: float | None, with_head: bool, seed: int = 1, kind: str = "ordinary"
) -> tuple[Any, ...]:
    case = Case(7, 3, 96, 32)
    cache = poisoned(block, 128, dtype or torch.bfloat16, with_head=with_head)
    given = list(arguments(case, torch.bfloat16, kind, seed, cache))
    given[5], given[8] = slots_of(block), None if scale is None else torch.tensor([scale])
    return tuple(given)


@pytest.mark.parametrize(("block", "dtype", "scale", "with_head"), CACHES)
def test_every_byte_of_the_cache(block: int, dtype: torch.dtype | None, scale: float | None, with_head: bool) -> None:
    """Skipped slots, those past the end, and what lies between blocks: untouched. Twice, with other values."""
    cache = None
    for seed in (1, 2):
        given = cache_arguments(block, dtype, scale, with_head, seed)
        cache = given[4] if cache is None else cache
        given = (*given[:4], cache, *given[5:])
        fused_qk_rope_cat_and_cache_mla(*given)
        assert (bytes_under(cache) == expected_bytes(given, rotated_key(given))).all()


@pytest.mark.parametrize("dtype", [*FP8_DTYPES, torch.uint8])
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_of_every_kind_of_values(dtype: torch.dtype, kind: str) -> None:
    """Saturating, NaN as NaN."""
    given = cache_arguments(2, dtype, None, False, kind=kind)
    fused_qk_rope_cat_and_cache_mla(*given)
    fp8 = torch.float8_e4m3fn if dtype is torch.uint8 else dtype
    key = torch.cat((given[2].squeeze(1), rotated_key(given)), dim=-1)
    with np.errstate(invalid="ignore"):
        codes = spec.to_fp8(spec.widen(key), fp8)
    for t, slot in ((0, 7), (2, 0), (4, 2)):
        spec.assert_codes(given[4][slot // 2, slot % 2].view(fp8), codes[t], f"{kind} at {slot}")


def test_no_slot_at_all() -> None:
    given = cache_arguments(4, None, None, False)
    given[5].fill_(-1)
    fused_qk_rope_cat_and_cache_mla(*given)
    assert (bytes_under(given[4]) == 0x5A).all()


def test_a_cache_without_blocks_and_no_tokens() -> None:
    given = arguments(Case(3, 2), torch.bfloat16)
    nothing = torch.empty(0, 4, 576, dtype=torch.bfloat16)
    got = fused_qk_rope_cat_and_cache_mla(*given[:4], nothing, *given[5:])
    assert same(got, fused_qk_rope_cat_and_cache_mla(*given))
    none = arguments(Case(0, 2), torch.bfloat16)
    assert fused_qk_rope_cat_and_cache_mla(*none).shape == (0, 2, 576)
    assert (none[4] == 0).all()


# ---- the query ----


def test_strided_parts() -> None:
    given = arguments(Case(5, 4), torch.bfloat16)
    want = fused_qk_rope_cat_and_cache_mla(*given)
    keys = given[4].clone()
    assert not any(t.is_contiguous() for t in given[:2])
    for make_view in (torch.clone, torch.Tensor.contiguous, lambda t: torch.stack((t, t), dim=-1)[..., 1]):
        given[4].zero_()
        assert same(fused_qk_rope_cat_and_cache_mla(*map(make_view, given[:4]), *given[4:]), want)
        assert same(given[4], keys)


def test_out() -> None:
    given = arguments(Case(5, 4), torch.bfloat16)
    want = fused_qk_rope_cat_and_cache_mla(*given)
    memory = torch.full((7, 4, 576), 7.0, dtype=torch.bfloat16)
    out = memory[1:6]
    assert fused_qk_rope_cat_and_cache_mla(*given, out=out) is out
    assert same(out, want)
    assert (memory[[0, 6]] == 7).all()


def test_attention_takes_the_query_as_it_is(triton_ops: TritonOps) -> None:
    """One kernel in place of 24, and nothing to be done to its result."""
    counts = triton_ops.run(bodies.mla_counts)
    assert counts.into == ["fusedcomm_triton::mla_prepare_out"]
    assert counts.fused == ["aten::new_empty", *counts.into]
    assert counts.taken == []
    rotation = Counter({"aten::mul.Tensor": 4, "aten::_to_copy": 3, "aten::sub.Tensor": 1, "aten::add.Tensor": 1})
    rotation["aten::stack"] = 1
    once = Counter({"aten::index.Tensor": 1, "aten::index_put_": 1, "aten::cat": 2})
    assert Counter(counts.unfused) == rotation + rotation + once


# ---- inside torch ----


def test_compile_without_graph_breaks() -> None:
    bodies.mla_compiles("cpu")


def test_fakes() -> None:
    with FakeTensorMode():
        half = {"dtype": torch.float16}
        q_nope, q_pe = torch.empty(8, 3, 512, **half).transpose(0, 1), torch.empty(3, 8, 192, **half)[..., 128:]
        k_nope, k_pe = torch.empty(3, 1, 576, **half).split([512, 64], dim=-1)
        cache, index = torch.empty(4, 16, 576, dtype=torch.uint8), torch.empty(3, dtype=torch.int64)
        got = fused_qk_rope_cat_and_cache_mla(
            q_nope, q_pe, k_nope, k_pe, cache, index, index, torch.empty(9, 64), torch.empty(1), True
        )
        assert (got.shape, got.dtype, got.is_contiguous()) == ((3, 8, 576), torch.float16, True)


# ---- Triton ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, Case(0, 4)], ids=str)
def test_triton_to_the_bit(triton_ops: TritonOps, case: Case, dtype: torch.dtype) -> None:
    given = arguments(case, dtype, seed=4)
    got, after, _ = triton_ops.run(call, "fused_qk_rope_cat_and_cache_mla", given, {})
    assert all_same((got, given[4]), (fused_qk_rope_cat_and_cache_mla(*given), given[4]))
    assert same(after[4], given[4])


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_of_every_kind_of_values(triton_ops: TritonOps, kind: str, neox: bool) -> None:
    given = arguments(Case(5, 3, 96, 48, neox), torch.bfloat16, kind)
    given[6][1], given[6][3] = -1, NUM_POSITIONS
    got, after, _ = triton_ops.run(call, "fused_qk_rope_cat_and_cache_mla", given, {})
    spec.assert_same(got, spec.widen(fused_qk_rope_cat_and_cache_mla(*given)))
    spec.assert_same(after[4], spec.widen(given[4]))


@pytest.mark.parametrize(("block", "dtype", "scale", "with_head"), CACHES)
def test_triton_writes_every_byte_of_the_cache(
    triton_ops: TritonOps, block: int, dtype: torch.dtype | None, scale: float | None, with_head: bool
) -> None:
    if triton_ops.device == "cuda" and dtype is torch.uint8:
        dtype = torch.float8_e4m3fn  # what bytes mean depends on the GPU
    given = cache_arguments(block, dtype, scale, with_head)
    got, after, _ = triton_ops.run(call, "fused_qk_rope_cat_and_cache_mla", given, {})
    want = expected_bytes(given, rotated_key(given))
    assert same(got, fused_qk_rope_cat_and_cache_mla(*given))
    assert same(after[4], given[4])
    if triton_ops.device == "cpu":  # memory between blocks comes back with them
        assert (bytes_under(after[4]) == want).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_triton_fp8_of_every_kind_of_values(triton_ops: TritonOps, fp8: torch.dtype, kind: str) -> None:
    """What the op without Triton writes, which the tests above hold to the specification; any NaN for a NaN."""
    given = cache_arguments(2, fp8, 0.5, False, kind=kind)
    _, after, _ = triton_ops.run(call, "fused_qk_rope_cat_and_cache_mla", given, {})
    fused_qk_rope_cat_and_cache_mla(*given)
    spec.assert_codes(after[4], given[4].contiguous().view(torch.uint8).numpy())


def test_triton_writes_where_it_is_told(triton_ops: TritonOps) -> None:
    given = arguments(Case(5, 4), torch.bfloat16)
    memory = torch.full((7, 4, 576), 7.0, dtype=torch.bfloat16)
    got, _, after = triton_ops.run(call, "fused_qk_rope_cat_and_cache_mla", given, {"out": memory[1:6]})
    assert same(got, fused_qk_rope_cat_and_cache_mla(*given))
    assert same(after["out"], got)
    if triton_ops.device == "cpu":
        around = torch.empty(0, dtype=torch.bfloat16).set_(after["out"].untyped_storage()).view(7, 4, 576)
        assert (around[[0, 6]] == 7).all()


def test_triton_compiles_without_graph_breaks(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.mla_compiles)


def test_triton_operator_is_registered(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.mla_registered)


def test_triton_graph_replays(triton_ops: TritonOps) -> None:
    if triton_ops.device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    triton_ops.run(bodies.mla_replays)
