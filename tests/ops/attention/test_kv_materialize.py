"""fused_kv_materialize against transformers' Qwen3, fp64 and the op on one layer; its kernel against it, to the bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import qk_bodies as bodies
import spec
import torch
from cases import DTYPES, KINDS, make
from qk_bodies import all_same, call, same
from qk_cases import EPS, NUM_POSITIONS, check_rotated, norm_in_fp64, random_positions, rotate_in_fp64, table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import TritonOps

from fusedcomm.ops.attention import KV, fused_kv_materialize, fused_qk_norm_rope


class Case(NamedTuple):
    """N, L, heads, and how much of a head is rotated."""

    rows: int
    layers: int
    heads: int
    head_dim: int
    rotary_dim: int
    neox: bool = True


CASES = [
    Case(3, 5, 8, 128, 128),
    Case(3, 2, 8, 128, 128, neox=False),
    Case(2, 3, 19, 128, 64),  # two rounds of 8 heads a program, then three heads of them
    Case(4, 1, 3, 80, 24),
    Case(2, 2, 1, 256, 64),
    Case(1, 4, 2, 96, 6, neox=False),
]


def arguments(case: Case, dtype: torch.dtype, kind: str = "ordinary", seed: int = 1) -> tuple[Any, ...]:
    rows, layers, heads, head_dim, rotary_dim, _ = case
    kv = make(seed, (rows, layers, 2, heads, head_dim), dtype, kind)
    weight = make(2, (layers, head_dim), torch.float32 if layers % 2 else dtype, "ordinary")
    return kv, weight, table(NUM_POSITIONS, rotary_dim), random_positions(seed, rows), EPS


def options(case: Case) -> dict[str, Any]:
    return {"neox": case.neox, "rotary_dim": case.rotary_dim}


# ---- numbers ----


def test_transformers_qwen3() -> None:
    """What each of three Qwen3Attention layers would put into its cache, from the same hidden states."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    config = transformers.Qwen3Config(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32, num_hidden_layers=3, vocab_size=8
    )
    config._attn_implementation = "eager"
    torch.manual_seed(6)
    layers = [qwen3.Qwen3Attention(config, i) for i in range(3)]
    hidden, positions = torch.randn(1, 7, 96), torch.tensor([[3, 1, 2, 50, 51, 7, 300]])
    rotary = qwen3.Qwen3RotaryEmbedding(config)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        for layer in layers:
            torch.nn.init.uniform_(layer.k_norm.weight, 0.5, 1.5)
            layer(hidden, rotary(hidden, positions), None, past_key_values=cache)
        pairs = [torch.stack((layer.k_proj(hidden[0]), layer.v_proj(hidden[0])), dim=1) for layer in layers]
    kv = torch.stack(pairs, dim=1).unflatten(-1, (2, 32))
    cos, sin = rotary(torch.zeros(1), torch.arange(301)[None])
    cos_sin = torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=-1)
    weights = torch.stack([layer.k_norm.weight.detach() for layer in layers])
    got = fused_kv_materialize(kv, weights, cos_sin, positions[0], config.rms_norm_eps)
    for i, (k, v) in enumerate(zip(got.k, got.v, strict=True)):
        theirs = cache.layers[i]
        # in fp32, of which they take another sum of squares: a few units of numbers up to 5
        torch.testing.assert_close(k, theirs.keys[0].transpose(0, 1), atol=3e-6, rtol=0)
        assert torch.equal(v, theirs.values[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, dtype: torch.dtype) -> None:
    given = arguments(case, dtype)
    kv, weight, cos_sin, positions, _ = given
    got = fused_kv_materialize(*given, **options(case))
    shape = (case.layers, case.rows, case.heads, case.head_dim)
    for t in got:
        assert t.shape == shape
        assert t.is_contiguous()
    for i in range(case.layers):
        exact = rotate_in_fp64(norm_in_fp64(kv[:, i, 0], weight[i]), cos_sin, positions, case.neox)
        check_rotated(got.k[i], exact, normed=True)
        assert same(got.v[i], kv[:, i, 1].contiguous())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_op_on_one_layer(dtype: torch.dtype, kind: str) -> None:
    case = Case(4, 3, 2, 64, 64)
    kv, weight, cos_sin, positions, eps = arguments(case, dtype, kind)
    got = fused_kv_materialize(kv, weight, cos_sin, positions, eps, weight_bias=0.5)
    for i in range(3):
        qkv = torch.cat((kv[:, i, 0], kv[:, i, 0], kv[:, i, 1]), dim=1).flatten(1)
        one = fused_qk_norm_rope(qkv, weight[i], weight[i], cos_sin, positions, 2, 2, 64, eps, weight_bias=0.5)
        for a, b in ((got.k[i], one.k), (got.v[i], one.v)):
            spec.assert_same(a, spec.widen(b))


def test_positions_outside_of_the_table() -> None:
    """Are not read; what they would have rotated is NaN and nothing else is."""
    case = Case(4, 2, 2, 64, 32)
    given = arguments(case, torch.bfloat16)
    want = fused_kv_materialize(*given, **options(case))
    given[3][1], given[3][3] = -1, NUM_POSITIONS
    got = fused_kv_materialize(*given, **options(case))
    assert got.k[:, [1, 3], :, :32].isnan().all()
    assert all_same(
        (got.k[:, [1, 3], :, 32:], got.k[:, [0, 2]], got.v), (want.k[:, [1, 3], :, 32:], want.k[:, [0, 2]], want.v)
    )


# ---- memory ----


def strided(kv: torch.Tensor) -> list[torch.Tensor]:
    """The same values as a piece of a wider row, with layers first, and with elements apart."""
    rows, layers, _, heads, head_dim = kv.shape
    wide = torch.zeros(rows, layers, 2, heads, head_dim + 16, dtype=kv.dtype)[..., 16:]
    across = torch.zeros(layers, 2, rows, heads, head_dim, dtype=kv.dtype).permute(2, 0, 1, 3, 4)
    apart = torch.zeros(*kv.shape, 2, dtype=kv.dtype)[..., 0]
    return [t.copy_(kv) for t in (wide, across, apart)]


def test_strided_views() -> None:
    given = arguments(Case(3, 2, 3, 64, 64), torch.bfloat16)
    want = fused_kv_materialize(*given)
    for view in strided(given[0]):
        assert not view.is_contiguous()
        assert all_same(fused_kv_materialize(view, *given[1:]), want)


def buffers(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, KV]:
    """Poisoned memory ``[L, N + 2, 2, Hk, D]`` of contexts, and the middle of it."""
    memory = torch.full((case.layers, case.rows + 2, 2, case.heads, case.head_dim), 7.0, dtype=dtype)
    return memory, KV(memory[:, 1:-1, 0], memory[:, 1:-1, 1])


def test_buffers_of_the_caller() -> None:
    case = Case(3, 2, 3, 96, 64)
    given = arguments(case, torch.bfloat16)
    memory, out = buffers(case, torch.bfloat16)
    assert fused_kv_materialize(*given, **options(case), out=out) is out
    assert all_same(out, fused_kv_materialize(*given, **options(case)))
    assert (memory[:, [0, -1]] == 7).all()


def test_no_tokens() -> None:
    got = fused_kv_materialize(*arguments(Case(0, 2, 3, 64, 64), torch.bfloat16))
    assert (got.k.shape, got.v.shape) == ((2, 0, 3, 64), (2, 0, 3, 64))


# ---- inside torch ----


def test_compile_without_graph_breaks() -> None:
    bodies.materialize_compiles("cpu")


def test_fakes() -> None:
    with FakeTensorMode():
        kv, weight = torch.empty(3, 2, 2, 4, 64, dtype=torch.float16), torch.empty(2, 64)
        got = fused_kv_materialize(kv, weight, torch.empty(9, 64), torch.empty(3, dtype=torch.int64), EPS)
        for t in got:
            assert (t.shape, t.dtype, t.is_contiguous()) == ((2, 3, 4, 64), torch.float16, True)


# ---- Triton ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, Case(0, 2, 3, 64, 64)], ids=str)
def test_triton_to_the_bit(triton_ops: TritonOps, case: Case, dtype: torch.dtype) -> None:
    for bias in (0.0, 1.0):
        given, passed = arguments(case, dtype, seed=3), options(case) | {"weight_bias": bias}
        got, _, _ = triton_ops.run(call, "fused_kv_materialize", given, passed)
        assert all_same(got, fused_kv_materialize(*given, **passed))


@pytest.mark.parametrize("kind", KINDS)
def test_triton_of_every_kind_of_values(triton_ops: TritonOps, kind: str) -> None:
    given = arguments(Case(4, 2, 2, 96, 64), torch.bfloat16, kind)
    given[3][1], given[3][3] = -1, NUM_POSITIONS
    got, _, _ = triton_ops.run(call, "fused_kv_materialize", given, {"rotary_dim": 64})
    for a, b in zip(got, fused_kv_materialize(*given, rotary_dim=64), strict=True):
        spec.assert_same(a, spec.widen(b))


def test_triton_of_strided_views(triton_ops: TritonOps) -> None:
    given = arguments(Case(3, 2, 3, 64, 64), torch.bfloat16)
    want = fused_kv_materialize(*given)
    for view in strided(given[0]):
        got, _, _ = triton_ops.run(call, "fused_kv_materialize", (view, *given[1:]), {})
        assert all_same(got, want)


def test_triton_writes_where_it_is_told(triton_ops: TritonOps) -> None:
    case = Case(3, 2, 3, 96, 64)
    given = arguments(case, torch.bfloat16)
    _, out = buffers(case, torch.bfloat16)
    got, _, _ = triton_ops.run(call, "fused_kv_materialize", given, options(case) | {"out": out})
    assert all_same(got, fused_kv_materialize(*given, **options(case)))
    if triton_ops.device == "cpu":  # memory between the results comes back with them
        memory = torch.empty(0, dtype=torch.bfloat16).set_(got.k.untyped_storage()).view(2, 5, 2, 3, 96)
        assert (memory[:, [0, -1]] == 7).all()


def test_triton_compiles_without_graph_breaks(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.materialize_compiles)


def test_triton_graph_replays(triton_ops: TritonOps) -> None:
    if triton_ops.device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    triton_ops.run(bodies.materialize_replays)


# ---- refusals ----

GOOD = dict(
    zip(("kv", "k_weight", "cos_sin", "positions", "eps"), arguments(Case(4, 3, 2, 64, 64), torch.float32), strict=True)
)
SHAPE = (3, 4, 2, 64)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kv": 1}, r"kv: expected a torch\.Tensor, got int"),
        ({"kv": GOOD["kv"].double()}, r"kv: expected dtype bfloat16, float16 or float32, got torch\.float64"),
        ({"kv": GOOD["kv"][0]}, r"kv: expected dimensions \[N, L, 2, Hk, D\], got shape \(3, 2, 2, 64\)"),
        ({"kv": GOOD["kv"][:, :, :1]}, r"kv: expected shape \[N, L >= 1, 2, Hk >= 1, D\], got \(4, 3, 1, 2, 64\)"),
        ({"kv": GOOD["kv"][:, :0]}, r"kv: expected shape \[N, L >= 1, 2, Hk >= 1, D\], got \(4, 0, 2, 2, 64\)"),
        ({"kv": GOOD["kv"][:, :, :, :0]}, r"kv: expected shape .* got \(4, 3, 2, 0, 64\)"),
        ({"kv": torch.ones(1, 1, 2, 1, 1025)}, r"kv: expected a head dimension between 1 and 1024, got 1025"),
        ({"k_weight": GOOD["k_weight"][0]}, r"k_weight: expected shape \(3, 64\), got \(64,\)"),
        ({"k_weight": GOOD["k_weight"].half()}, r"k_weight: expected dtype torch\.float32, got torch\.float16"),
        ({"cos_sin": table(NUM_POSITIONS, 32)}, r"cos_sin: expected shape \(50, 64\), got \(50, 32\)"),
        ({"positions": GOOD["positions"].int()}, r"positions: expected dtype torch\.int64, got torch\.int32"),
        ({"positions": GOOD["positions"][:3]}, r"positions: expected shape \(4,\), got \(3,\)"),
        ({"eps": -1.0}, r"eps: expected a finite number >= 0, got -1\.0"),
        ({"neox": None}, r"neox: expected a bool, got None"),
        ({"rotary_dim": 128}, r"rotary_dim: expected an even int between 2 and 64, got 128"),
        ({"weight_bias": float("inf")}, r"weight_bias: expected a finite number, got inf"),
        ({"out": KV(torch.ones(SHAPE), torch.ones(3, 4, 2, 32))}, r"out\.v: expected shape \(3, 4, 2, 64\), got"),
        ({"out": KV(torch.ones(SHAPE).half(), torch.ones(SHAPE))}, r"out\.k: expected dtype torch\.float32, got"),
        ({"out": KV(torch.ones(SHAPE), GOOD["kv"][:, :, 0].transpose(0, 1))}, r"out\.v: expected memory apart from kv"),
        ({"out": KV(torch.ones(SHAPE), torch.ones(1, 1, 1, 64).expand(SHAPE))}, r"out\.v: expected no stride of 0"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    """Refused before anything is written."""
    before = GOOD["kv"].clone()
    with pytest.raises(ValueError, match=message):
        fused_kv_materialize(**(GOOD | bad))
    assert same(GOOD["kv"], before)


def test_keys_and_values_in_one_tensor() -> None:
    one = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"out\.v: expected a tensor of its own"):
        fused_kv_materialize(**GOOD, out=KV(one, one))
    assert (one == 0).all()
