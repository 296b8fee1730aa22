"""The kernels of the QK and MLA ops compiled for GPUs that need not be here: how they touch memory, what they round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from launched import TARGETS, Compiled, Launch, Target, record

BF16, F32 = torch.bfloat16, torch.float32
targets = pytest.mark.parametrize("target", TARGETS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch_of(monkeypatch: pytest.MonkeyPatch, target: Target, function: str, *arguments: Any) -> Launch:
    from fusedcomm.kernels.attention import qk_operators

    return record(monkeypatch, qk_operators, target, function, *arguments)


def norm(
    monkeypatch: pytest.MonkeyPatch, target: Target, heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> Launch:
    rows = [zeros(3, n, dim, dtype=dtype) for n in heads]
    weights = zeros(dim, dtype=dtype), zeros(dim, dtype=F32)
    return launch_of(monkeypatch, target, "_qk_rmsnorm", *rows, *weights, 1e-6, 0.0, *rows)


class Shape:
    """Heads of fused_qk_norm_rope; those of Qwen3-8B by default."""

    def __init__(self, heads: tuple[int, int] = (32, 8), dim: int = 128, rotary: int = 128, neox: bool = True) -> None:
        self.heads, self.dim, self.rotary, self.neox = heads, dim, rotary, neox

    def __str__(self) -> str:
        return f"{self.heads[0]}+{self.heads[1]}x{self.dim}-{self.rotary}-{'neox' if self.neox else 'gptj'}"


def rope(
    monkeypatch: pytest.MonkeyPatch,
    target: Target,
    shape: Shape,
    dtype: torch.dtype = BF16,
    *,
    cache: torch.dtype | None = None,
    x: int | None = None,
) -> Launch:
    """With a cache of a dtype, plain or shuffled by x elements, if one is given."""
    (heads_q, heads_k), dim = shape.heads, shape.dim
    caches: list[torch.Tensor | None] = [None, None]
    scale = None if cache in (None, dtype) else zeros(1, dtype=F32)
    if cache is not None and x is None:
        caches = [zeros(2, 64, heads_k, dim, dtype=cache) for _ in "kv"]
    elif cache is not None and x is not None:
        caches = [zeros(2, heads_k, dim // x, 64, x, dtype=cache), zeros(2, heads_k, 64 // x, dim, x, dtype=cache)]
    return launch_of(
        monkeypatch,
        target,
        "_qk_norm_rope",
        zeros(3, (heads_q + 2 * heads_k) * dim, dtype=dtype),
        zeros(dim, dtype=dtype),
        zeros(dim, dtype=dtype),
        zeros(9, shape.rotary, dtype=F32),
        zeros(3, dtype=torch.int64),
        1e-6,
        0.0,
        shape.neox,
        zeros(3, heads_q, dim, dtype=dtype),
        zeros(3, heads_k, dim, dtype=dtype),
        None,
        *caches,
        None if cache is None else zeros(3, dtype=torch.int64),
        scale,
        scale,
    )


def materialize(monkeypatch: pytest.MonkeyPatch, target: Target, neox: bool) -> Launch:
    rows = zeros(5, 3, 8, 128), zeros(5, 3, 8, 128)
    table = zeros(9, 128, dtype=F32), zeros(3, dtype=torch.int64)
    kv, weight = zeros(3, 5, 2, 8, 128), zeros(5, 128)
    return launch_of(monkeypatch, target, "_kv_materialize", kv, weight, *table, 1e-6, 0.0, neox, *rows)


def mla(
    monkeypatch: pytest.MonkeyPatch, target: Target, neox: bool, cache: torch.dtype = BF16, heads: int = 128
) -> Launch:
    """As DeepSeek has it: the query from a batched product over heads, its pe part from a packed one."""
    q_nope, q_pe = zeros(heads, 3, 512).transpose(0, 1), zeros(3, heads, 192)[..., 128:]
    k_nope, k_pe = zeros(3, 576).split([512, 64], dim=-1)
    scale = None if cache is BF16 else zeros(1, dtype=F32)
    tokens = zeros(3, dtype=torch.int64), zeros(3, dtype=torch.int64)
    parts = q_nope, q_pe, k_nope, k_pe, zeros(2, 64, 576, dtype=cache)
    return launch_of(
        monkeypatch, target, "_mla_prepare", *parts, *tokens, zeros(9, 64, dtype=F32), scale, neox, zeros(3, heads, 576)
    )


# ---- memory ----


def check_lean(compiled: Compiled) -> None:
    """No value goes from thread to thread but in the sums, and all of them are in registers."""
    compiled.check_registers()
    assert compiled.shared_bytes == 0


@targets
@pytest.mark.parametrize("neox", [True, False])
def test_qwen3_moves_16_bytes_at_a_time(target: Target, neox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the position, once for queries and once for keys."""
    compiled = rope(monkeypatch, target, Shape(neox=neox)).compile(target)
    check_lean(compiled)
    accesses = compiled.accesses()
    assert set(accesses) == {"load 16", "store 16", "load 8"}
    # A thread has 16 elements: of queries two times, of keys once.
    assert accesses["store 16"] == 2 * 3
    # Weights and 8 cosines and sines in fp32, for queries and for keys; AMD's compiler loads in one place what both do.
    assert accesses["load 16"] <= 2 * 3 + 2 * (2 + 4)
    assert accesses["load 8"] <= 2


@targets
@pytest.mark.parametrize(
    "shape", [Shape((96, 8), 128, 64), Shape((16, 2), 256, 64), Shape((96, 8), 128, 64, neox=False)], ids=str
)
def test_partial_rotation_needs_no_shared_memory(target: Target, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-4.5 and Qwen3-Next. The tiles of a wave of 64 lanes are wider, so there is less for each lane."""
    compiled = rope(monkeypatch, target, shape).compile(target)
    check_lean(compiled)
    assert min(int(name.split()[1]) for name in compiled.accesses()) >= (8 if compiled.on_nvidia else 4)


@targets
@pytest.mark.parametrize("neox", [True, False])
def test_materialization_moves_16_bytes_at_a_time(target: Target, neox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = materialize(monkeypatch, target, neox).compile(target)
    check_lean(compiled)
    accesses = compiled.accesses()
    assert set(accesses) == {"load 16", "store 16", "load 8"}
    assert accesses["store 16"] == 2 + 2
    assert accesses["load 8"] == 1


@targets
def test_qk_norm_moves_16_bytes_at_a_time(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = norm(monkeypatch, target, (32, 8), 128, BF16).compile(target)
    check_lean(compiled)
    assert set(compiled.accesses()) == {"load 16", "store 16"}


@targets
@pytest.mark.parametrize("neox", [True, False])
def test_mla_copies_16_bytes_at_a_time(target: Target, neox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 heads of 512 by 64 threads, and the 512 of the key; what is narrower is the 64 of the pe parts."""
    compiled = mla(monkeypatch, target, neox).compile(target)
    compiled.check_registers()
    accesses = compiled.accesses()
    assert accesses["load 16"] >= 8 + 1
    assert accesses["store 16"] >= 8 + 1
    if not neox:  # 8 heads of 64 elements are 16 bytes a thread too
        assert accesses["load 16"] >= 8 + 1 + 1
        assert accesses["store 16"] == 8 + 1 + 1


# ---- arithmetic ----


def check_rounding(launch: Launch, target: Target, elements: int) -> None:
    """Each product is rounded: two of the norm and two of the rotation for each of a thread's elements."""
    compiled = launch.compile(target)
    compiled.check_arithmetic()
    assert compiled.products() >= 4 * elements
    assert launch.compile(target, enable_fp_fusion=True).products() < 4 * elements, "this test sees no contraction"


@targets
@pytest.mark.parametrize("neox", [True, False])
def test_no_product_is_contracted(target: Target, neox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rounding(rope(monkeypatch, target, Shape(neox=neox)), target, 3 * 16)
    check_rounding(materialize(monkeypatch, target, neox), target, 16)


@targets
@pytest.mark.parametrize("neox", [True, False])
def test_no_product_of_mla_is_contracted(target: Target, neox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = mla(monkeypatch, target, neox)
    compiled = launch.compile(target)
    compiled.check_arithmetic()
    # Two for each of 8 elements a thread of the query, and for those of the key: one, and its partner.
    assert compiled.products() == 2 * (8 + 2)
    assert launch.compile(target, enable_fp_fusion=True).products() < 2 * (8 + 2)


@targets
@pytest.mark.parametrize("x", [None, 16])
def test_conversion_to_fp8(target: Target, x: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the instruction where Triton has it, and by integers anywhere."""
    for fp8 in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        expected = target.hardware_fp8 and fp8 is target.fp8
        for launch in (rope(monkeypatch, target, Shape(), cache=fp8, x=x), mla(monkeypatch, target, False, fp8)):
            compiled = launch.compile(target)
            compiled.check_registers()
            assert compiled.converts_to_fp8() == expected


# ---- every path ----


@targets
@pytest.mark.parametrize(
    "shape",
    [
        Shape((5, 3), 80, 24),
        Shape((4, 2), 96, 96),
        Shape((4, 2), 1024, 16),
        Shape((2, 1), 1024, 1024, neox=False),
        Shape((1, 1), 2, 2),
        Shape((20, 3), 128, 128),
    ],
    ids=str,
)
def test_odd_sizes_compile(target: Target, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    rope(monkeypatch, target, shape).compile(target).check_registers()


@targets
@pytest.mark.parametrize("dtype", [torch.float16, F32])
def test_other_types_and_caches_compile(target: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [
        norm(monkeypatch, target, (5, 3), 1, dtype),
        norm(monkeypatch, target, (3, 5), 576, dtype),
        rope(monkeypatch, target, Shape(), dtype, cache=dtype),
        rope(monkeypatch, target, Shape(neox=False), dtype, cache=dtype, x=16 // dtype.itemsize),
        mla(monkeypatch, target, True, heads=3),
    ]
    for launch in launches:
        launch.compile(target).check_registers()
