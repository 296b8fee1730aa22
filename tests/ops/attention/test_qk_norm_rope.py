"""fused_qk_norm_rope against transformers' Qwen3, fp64 and the separate ops; its kernel against it, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import qk_bodies as bodies
import spec
import torch
from cases import DTYPES, KINDS
from qk_bodies import all_same, call, split
from qk_cases import (
    CASES,
    EPS,
    Case,
    arguments,
    check_rotated,
    norm_in_fp64,
    options,
    rotate_in_fp64,
)
from triton_backend import TritonOps

from fusedcomm import ops
from fusedcomm.models.rope import apply_rope
from fusedcomm.ops.attention import QKV, fused_qk_norm_rope

# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_qwen3(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' Qwen3Attention hands to its attention function, from the same hidden states."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    config = transformers.Qwen3Config(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32, num_hidden_layers=1, vocab_size=8
    )
    config._attn_implementation = "recorded"
    seen = []

    def record(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        seen.append(QKV(*(t[0].transpose(0, 1) for t in (q, k, v))))  # [1, heads, T, D] to [T, heads, D]
        return q.transpose(1, 2), None

    monkeypatch.setitem(qwen3.ALL_ATTENTION_FUNCTIONS._global_mapping, "recorded", record)
    torch.manual_seed(5)
    layer = qwen3.Qwen3Attention(config, 0).to(dtype)
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    hidden, positions = torch.randn(1, 9, 96).to(dtype), torch.tensor([[0, 1, 2, 50, 51, 7, 300, 4, 1]])
    rotary = qwen3.Qwen3RotaryEmbedding(config)
    with torch.no_grad():
        layer(hidden, rotary(hidden, positions), None)
        qkv = torch.cat([p(hidden[0]) for p in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=-1)
    cos, sin = rotary(torch.zeros(1), torch.arange(301)[None])
    cos_sin = torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=-1)
    weights = layer.q_norm.weight.detach(), layer.k_norm.weight.detach()
    got = fused_qk_norm_rope(qkv, *weights, cos_sin, positions[0], 6, 2, 32, config.rms_norm_eps)
    # In bf16 theirs rounds the table, the norm before its weight, both products and their sum, where ours rounds twice:
    # numbers up to 4.4, which are 2^-5 apart there. So one step, and half of one where both round apart.
    tolerance = 3e-6 if dtype is torch.float32 else 1.5 * 2**-5
    for name, ours, theirs in zip(got._fields, got, seen[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(got.v, seen[0].v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, dtype: torch.dtype) -> None:
    given = arguments(case, dtype)
    qkv, q_weight, k_weight, cos_sin, positions = given[:5]
    got = fused_qk_norm_rope(*given, **options(case))
    q, k, v = split(qkv, case.heads_q, case.heads_k, case.head_dim)
    for x, weight, y in ((q, q_weight, got.q), (k, k_weight, got.k)):
        assert y.is_contiguous()
        check_rotated(y, rotate_in_fp64(norm_in_fp64(x, weight), cos_sin, positions, case.neox), normed=True)
    assert all_same(got.v, v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_separate_ops(dtype: torch.dtype, kind: str) -> None:
    """rms_norm and the rotation of the library's models, which round where this op rounds."""
    case = Case(6, 8, 2, 128, 128)
    given = arguments(case, dtype, kind)
    qkv, q_weight, k_weight, cos_sin, positions = given[:5]
    got = fused_qk_norm_rope(*given)
    q, k, _ = split(qkv, 8, 2, 128)
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    for x, weight, y in ((q, q_weight, got.q), (k, k_weight, got.k)):
        want = apply_rope(ops.rms_norm(x, weight, EPS).transpose(0, 1), cos, sin).transpose(0, 1)
        spec.assert_same(y, spec.widen(want))


def test_a_table_in_the_dtype_of_qkv() -> None:
    case = Case(5, 4, 2, 64, 64)
    given = arguments(case, torch.bfloat16)
    rounded = given[3].bfloat16()
    wide = (*given[:3], rounded.float(), *given[4:])
    assert all_same(fused_qk_norm_rope(*given[:3], rounded, *given[4:]), fused_qk_norm_rope(*wide))


def test_positions_outside_of_the_table() -> None:
    """Are not read; what they would have rotated is NaN and nothing else is."""
    case = Case(5, 4, 2, 64, 32)
    given = arguments(case, torch.bfloat16)
    want = fused_qk_norm_rope(*given, **options(case))
    given[4][1], given[4][3] = -1, 50
    got = fused_qk_norm_rope(*given, **options(case))
    for x, y in zip(got[:2], want[:2], strict=True):
        assert x[[1, 3], :, :32].isnan().all()
        assert all_same((x[[1, 3], :, 32:], x[[0, 2, 4]]), (y[[1, 3], :, 32:], y[[0, 2, 4]]))


# ---- memory ----


def test_rows_that_are_apart() -> None:
    case = Case(5, 4, 2, 64, 64)
    given = arguments(case, torch.bfloat16)
    want = fused_qk_norm_rope(*given)
    for memory in (torch.zeros(5, 2, 512, dtype=torch.bfloat16), torch.zeros(5, 512, 2, dtype=torch.bfloat16)):
        view = memory[:, 1] if memory.shape[1] == 2 else memory[..., 1]
        view.copy_(given[0])
        assert not view.is_contiguous()
        assert all_same(fused_qk_norm_rope(view, *given[1:]), want)


def buffers(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, QKV]:
    """Poisoned memory and q, k, v within it, with room between the heads of two tokens."""
    heads = case.heads_q + 2 * case.heads_k
    memory = torch.full((case.rows, heads + 3, case.head_dim), 7.0, dtype=dtype)
    q, _, k, _, v, _ = memory.split([case.heads_q, 1, case.heads_k, 1, case.heads_k, 1], dim=1)
    return memory, QKV(q, k, v)


def between(memory: torch.Tensor, case: Case) -> torch.Tensor:
    a, b = case.heads_q, case.heads_k
    return memory[:, [a, a + b + 1, a + 2 * b + 2]]


def test_buffers_of_the_caller() -> None:
    case = Case(5, 4, 2, 96, 64)
    given = arguments(case, torch.bfloat16)
    memory, out = buffers(case, torch.bfloat16)
    assert fused_qk_norm_rope(*given, **options(case), out=out) is out
    assert all_same(out, fused_qk_norm_rope(*given, **options(case)))
    assert (between(memory, case) == 7).all()


def test_compile_without_graph_breaks() -> None:
    bodies.rope_compiles("cpu")


# ---- Triton ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, Case(0, 4, 2, 64, 64)], ids=str)
def test_triton_to_the_bit(triton_ops: TritonOps, case: Case, dtype: torch.dtype) -> None:
    for seed in (1, 2):
        given = arguments(case, dtype, seed=seed)
        got, _, _ = triton_ops.run(call, "fused_qk_norm_rope", given, options(case))
        assert all_same(got, fused_qk_norm_rope(*given, **options(case)))


@pytest.mark.parametrize("case", [Case(5, 4, 2, 96, 64), Case(5, 4, 2, 96, 96), Case(5, 4, 2, 96, 64, neox=False)])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_of_every_kind_of_values(triton_ops: TritonOps, kind: str, case: Case) -> None:
    given = arguments(case, torch.bfloat16, kind)
    given[4][1], given[4][3] = -1, 50  # outside of the table
    got, _, _ = triton_ops.run(call, "fused_qk_norm_rope", given, options(case))
    for a, b in zip(got, fused_qk_norm_rope(*given, **options(case)), strict=True):
        spec.assert_same(a, spec.widen(b))


def test_triton_writes_where_it_is_told(triton_ops: TritonOps) -> None:
    case = Case(5, 4, 2, 96, 64)
    given = arguments(case, torch.bfloat16)
    _, out = buffers(case, torch.bfloat16)
    got, _, _ = triton_ops.run(call, "fused_qk_norm_rope", given, options(case) | {"out": out})
    assert all_same(got, fused_qk_norm_rope(*given, **options(case)))
    if triton_ops.device == "cpu":
        memory = torch.empty(0, dtype=torch.bfloat16).set_(got.q.untyped_storage())
        assert (between(memory.view(5, -1, 96), case) == 7).all()


def test_triton_compiles_without_graph_breaks(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.rope_compiles)


def test_triton_operators_are_registered(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.qk_registered)


def test_triton_graph_replays(triton_ops: TritonOps) -> None:
    if triton_ops.device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    triton_ops.run(bodies.rope_replays)
