"""Bodies of tests of the QK and MLA ops: they run where a backend does, in a child under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import make
from triton_backend import GpuOps, InterpretedOps, TritonOps, to

from fusedcomm.ops import attention
from fusedcomm.ops.attention import dispatch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
        monkeypatch.setenv("FUSEDCOMM_BACKEND", "triton")
        monkeypatch.setattr(dispatch, "_chosen", {})
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
