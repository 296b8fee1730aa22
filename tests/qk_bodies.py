"""Bodies of tests of the QK and MLA ops: they run where a backend does, in a child under Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from cases import make
from qk_cases import table
from torch.utils._python_dispatch import TorchDispatchMode
from triton_backend import GpuOps, InterpretedOps, TritonOps, to

from fusedcomm.kernels.attention import sparse_mla_hopper
from fusedcomm.ops import attention
from fusedcomm.ops.attention import dispatch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def triton_backends(which: str) -> Iterator[TritonOps]:
    """The Triton backend ``"interpreter"`` or ``"gpu"``; skips the test where there is no GPU."""
    if which == "interpreter":
        interpreted = InterpretedOps()
        try:
            yield interpreted
        finally:
            interpreted.close()
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    with pytest.MonkeyPatch.context() as monkeypatch:
        # the setting itself would refuse the CPU, on which the tests work out what they expect
        monkeypatch.setattr(dispatch, "_chosen", {"cuda": "triton"})
        monkeypatch.setattr(sparse_mla_hopper, "is_wanted", lambda: False)
        yield GpuOps()


def call(device: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The result of an attention op, and its arguments as they are after it, all on the CPU."""
    assert dispatch.attention_backend(device) == "triton"
    args, options = to((args, options), device)
    return to((getattr(attention, name)(*args, **options), args, options), "cpu")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same shape and bits."""
    bits = BITS[a.element_size()]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def all_same(a: Any, b: Any) -> bool:
    """Two structures have the same tensors."""
    a, b = ([t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)] for x in (a, b))
    return len(a) == len(b) > 0 and all(same(x, y) for x, y in zip(a, b, strict=True))


def split(qkv: torch.Tensor, heads_q: int, heads_k: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """q, k and v of a packed qkv ``[T, (Hq + 2 Hk) D]``, as views."""
    heads = qkv.unflatten(-1, (-1, head_dim))
    return heads.split([heads_q, heads_k, heads_k], dim=1)


def compiles(device: str, body: Callable[..., Any], make_arguments: Callable[[int], tuple[Any, ...]]) -> None:
    """A compiled body, without graph breaks and for numbers of rows that become dynamic, does what it does eagerly."""
    torch._dynamo.reset()
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    for rows in (4, 4, 7):
        eager, given = (to(make_arguments(rows), device) for _ in range(2))
        want, got = body(*eager), compiled(*given)
        assert all_same((got, given), (want, eager))


def replays(device: str, body: Callable[..., Any], make_arguments: Callable[[int, int], tuple[Any, ...]]) -> None:
    """A CUDA graph replayed on other arguments of the same shapes (rows, seed) does what the body does eagerly."""
    captured = to(make_arguments(5, 1), device)
    body(*captured)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body(*captured)
    for seed in (2, 3):
        fresh = to(make_arguments(5, seed), device)
        for old, new in zip(captured, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        want = body(*fresh)
        assert all_same((result, captured), (want, fresh))


def registered(device: str, samples: dict[str, list[tuple[Any, ...]]]) -> None:
    """Operators of fusedcomm_triton by torch's own checks: schema, registration, fakes, tracing."""
    for module in ("qk", "indexer", "sparse_mla"):  # importing them registers the operators
        importlib.import_module(f"fusedcomm.kernels.attention.{module}_operators")
    for name, every in samples.items():
        for arguments in every:
            torch.library.opcheck(getattr(torch.ops.fusedcomm_triton, name).default, to(arguments, device))


# ---- fused_qk_rmsnorm ----


def norm_arguments(rows: int) -> tuple[Any, ...]:
    q, k, _ = split(make(rows, (rows, 8 * 64), torch.bfloat16, "ordinary"), 4, 2, 64)
    weights = make(8, (64,), torch.bfloat16, "ordinary"), make(9, (64,), torch.bfloat16, "ordinary")
    return q, k, *weights


def norm_body(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> tuple[Any, ...]:
    first = attention.fused_qk_rmsnorm(q, k, q_weight, k_weight, 1e-6)
    again = attention.QK(torch.empty_like(first.q), torch.empty_like(first.k))
    attention.fused_qk_rmsnorm(first.q * 2, first.k + 1, q_weight, k_weight, 1e-6, weight_bias=1.0, out=again)
    return *first, *again


def norm_compiles(device: str) -> None:
    compiles(device, norm_body, norm_arguments)


# ---- fused_qk_norm_rope ----


def rope_arguments(rows: int, seed: int = 1) -> tuple[Any, ...]:
    qkv = make(rows + seed, (rows, 8 * 64), torch.bfloat16, "ordinary")
    weights = make(8, (64,), torch.bfloat16, "ordinary"), make(9, (64,), torch.bfloat16, "ordinary")
    positions = (torch.arange(rows) + seed) * 2 % 11
    fp8 = torch.zeros(3, 2, 4, 16, 16, dtype=torch.uint8), torch.zeros(3, 2, 1, 64, 16, dtype=torch.uint8)
    plain = torch.zeros(5, 4, 2, 64, dtype=torch.bfloat16), torch.zeros(5, 4, 2, 64, dtype=torch.bfloat16)
    slots = torch.tensor([3, -1, 17, 40, 0, 999, 5]).roll(seed)[:rows]
    return qkv, *weights, table(11, 64), positions, *fp8, *plain, slots, torch.tensor([0.5 * seed])


def rope_body(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_fp8: torch.Tensor,
    v_fp8: torch.Tensor,
    k_plain: torch.Tensor,
    v_plain: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[Any, ...]:
    common = (q_weight, k_weight, cos_sin, positions, 4, 2, 64, 1e-6)
    cache = attention.PagedKV(k_plain, v_plain)
    first = attention.fused_qk_norm_rope(qkv * 2, *common, cache=cache, slot_mapping=slots)
    out = attention.QKV(*(torch.empty_like(t) for t in first))
    cache = attention.PagedKV(k_fp8, v_fp8, k_scale=scale)
    attention.fused_qk_norm_rope(qkv, *common, neox=False, cache=cache, slot_mapping=slots, out=out)
    return *first, *out


def rope_compiles(device: str) -> None:
    compiles(device, rope_body, rope_arguments)


def rope_replays(device: str) -> None:
    replays(device, rope_body, rope_arguments)


# ---- fused_kv_materialize ----


def materialize_arguments(rows: int, seed: int = 1) -> tuple[Any, ...]:
    kv = make(rows + seed, (rows, 3, 2, 2, 64), torch.bfloat16, "ordinary")
    return kv, make(8, (3, 64), torch.bfloat16, "ordinary"), table(11, 64), (torch.arange(rows) + seed) * 2 % 11


def materialize_body(
    kv: torch.Tensor, k_weight: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor
) -> tuple[Any, ...]:
    first = attention.fused_kv_materialize(kv * 2, k_weight, cos_sin, positions, 1e-6)
    out = attention.KV(torch.empty_like(first.k), torch.empty_like(first.v))
    attention.fused_kv_materialize(kv, k_weight, cos_sin, positions, 1e-6, neox=False, weight_bias=1.0, out=out)
    return *first, *out


def materialize_compiles(device: str) -> None:
    compiles(device, materialize_body, materialize_arguments)


def materialize_replays(device: str) -> None:
    replays(device, materialize_body, materialize_arguments)


# ---- fused_qk_rope_cat_and_cache_mla ----


def mla_arguments(rows: int, seed: int = 1) -> tuple[Any, ...]:
    """The query's parts as a model has them: a transposed product, and a slice of what was packed."""
    q_nope = make(rows + seed, (4, rows, 512), torch.bfloat16, "ordinary").transpose(0, 1)
    q_pe = make(rows + seed + 1, (rows, 4, 192), torch.bfloat16, "ordinary")[..., 128:]
    k_nope, k_pe = make(rows + seed + 2, (rows, 1, 576), torch.bfloat16, "ordinary").split([512, 64], dim=-1)
    slots = torch.tensor([3, -1, 17, 40, 0, 999, 5]).roll(seed)[:rows]
    positions = (torch.arange(rows) + seed) * 2 % 11
    fp8, plain = torch.zeros(5, 4, 1, 576, dtype=torch.uint8), torch.zeros(5, 4, 576, dtype=torch.bfloat16)
    return q_nope, q_pe, k_nope, k_pe, fp8, plain, slots, positions, table(11, 64), torch.tensor([0.5 * seed])


def mla_body(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    fp8: torch.Tensor,
    plain: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[Any, ...]:
    keys, rest = (k_nope, k_pe), (slots, positions, cos_sin)
    q = attention.fused_qk_rope_cat_and_cache_mla(q_nope * 2, q_pe, *keys, fp8, *rest, scale, False)
    out = torch.empty_like(q)
    attention.fused_qk_rope_cat_and_cache_mla(q_nope, q_pe, *keys, plain, *rest, None, True, out=out)
    return q, out


def mla_compiles(device: str) -> None:
    compiles(device, mla_body, mla_arguments)


def mla_replays(device: str) -> None:
    replays(device, mla_body, mla_arguments)


class Dispatched(TorchDispatchMode):
    """The operators that were called and that are no views: on a GPU each is a kernel, or memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def unfused_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> torch.Tensor:
    """fused_qk_rope_cat_and_cache_mla of neighbours and slots that the cache has, as a model writes it down."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)

    kv_cache.view(-1, kv_cache.shape[-1])[slots] = torch.cat((k_nope, rotate(k_pe)), dim=-1).squeeze(1)
    return torch.cat((q_nope, rotate(q_pe)), dim=-1)


class Counts(NamedTuple):
    """Operators of the fused op, of it with a given result, of what attention does first, and of the unfused op."""

    fused: list[str]
    into: list[str]
    taken: list[str]
    unfused: list[str]


def mla_counts(device: str) -> Counts:
    """What is dispatched to prepare the same queries and caches."""
    q_nope, q_pe, k_nope, k_pe, _, cache, _, positions, cos_sin, _ = to(mla_arguments(4), device)
    slots = torch.tensor([7, 0, 13, 2], device=device)
    given = (q_nope, q_pe, k_nope, k_pe)
    rest = (slots, positions, cos_sin)
    expected_cache, out = cache.clone(), torch.empty(4, 4, 576, dtype=torch.bfloat16, device=device)
    with Dispatched() as unfused:
        expected = unfused_mla(*given, expected_cache, *rest)
    with Dispatched() as fused:
        q = attention.fused_qk_rope_cat_and_cache_mla(*given, cache, *rest, None, False)
    assert all_same((q, cache), (expected, expected_cache))
    cache.fill_(3)
    with Dispatched() as into:
        attention.fused_qk_rope_cat_and_cache_mla(*given, cache, *rest, None, False, out=out)
    assert same(out, expected)
    with Dispatched() as taken:  # rows of 576 one behind the other: what kernels of attention ask for
        rows = q.reshape(-1, 576).contiguous()
    assert rows.data_ptr() == q.data_ptr()
    return Counts(fused.names, into.names, taken.names, unfused.names)


def mla_registered(device: str) -> None:
    q_nope, q_pe, k_nope, k_pe, _, cache, slots, positions, cos_sin, _ = mla_arguments(4)
    keys, out = (k_nope.squeeze(1), k_pe.squeeze(1)), torch.empty(4, 4, 576, dtype=torch.bfloat16)
    samples = [(q_nope, q_pe, *keys, cache, slots, positions, cos_sin, None, neox, out) for neox in (False, True)]
    registered(device, {"mla_prepare_out": samples})


def qk_registered(device: str) -> None:
    """The other operators; caches in bf16, since torch compares no FP8 tensors."""
    q, k, *weights = norm_arguments(3)
    results = torch.empty(3, 4, 64, dtype=torch.bfloat16), torch.empty(3, 2, 64, dtype=torch.bfloat16)
    qkv, *rest = rope_arguments(3)
    table_and_positions, caches, slots = rest[2:4], rest[6:8], rest[8]
    kv, weight, *of_kv = materialize_arguments(3)
    context = [torch.empty(3, 3, 2, 64, dtype=torch.bfloat16) for _ in "kv"]
    numbers = (1e-6, 0.5)
    registered(
        device,
        {
            "qk_rmsnorm_out": [(q, k, *weights, *numbers, *results)],
            "qk_norm_rope_out": [
                (qkv, *weights, *table_and_positions, *numbers, True, *results, *[None] * 6),
                (
                    *(qkv, *weights, *table_and_positions, *numbers, False, *results, torch.empty_like(results[1])),
                    *(*caches, slots, None, None),
                ),
            ],
            "kv_materialize_out": [(kv, weight, *of_kv, *numbers, True, *context)],
        },
    )
