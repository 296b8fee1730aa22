"""The caches that fused_qk_norm_rope writes, byte by byte as the specification's formulas have them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import spec
import torch
from cases import FP8_DTYPES, KINDS
from qk_bodies import all_same, call
from qk_cases import Case, arguments, options
from triton_backend import TritonOps

from fusedcomm.ops.attention import PagedKV, fused_qk_norm_rope

# (x or None for the plain layout, block size, dtype of the cache or None for that of qkv)
CACHES = [
    (None, 1, None),
    (None, 5, None),
    (None, 16, torch.float8_e4m3fn),
    (None, 3, torch.float8_e4m3fnuz),
    (None, 4, torch.uint8),
    (8, 16, None),
    (8, 8, None),
    (16, 16, torch.float8_e4m3fn),
    (16, 32, torch.float8_e4m3fnuz),
    (16, 16, torch.uint8),
]
HEADS, DIM, BLOCKS, PAD = 3, 32, 4, 48


class Memory(NamedTuple):
    """A poisoned cache of four blocks with a padded stride, and the slots of seven tokens."""

    cache: PagedKV
    slots: torch.Tensor


def paged(x: int | None, block: int, dtype: torch.dtype, scales: tuple[float | None, float | None]) -> Memory:
    stride = block * HEADS * DIM + PAD

    def poisoned(inner: tuple[int, ...]) -> torch.Tensor:
        raw = torch.full((BLOCKS * stride * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype)
        inner_strides = torch.empty(inner, device="meta").stride()
        return raw.as_strided((BLOCKS, *inner), (stride, *inner_strides))

    k_inner = (block, HEADS, DIM) if x is None else (HEADS, DIM // x, block, x)
    v_inner = (block, HEADS, DIM) if x is None else (HEADS, block // x, DIM, x)
    made = [None if s is None else torch.tensor([s]) for s in scales]
    end = BLOCKS * block
    slots = torch.tensor([end - 1, -1, 0, end, 2 % end, 1 << 40, -(1 << 40)])
    return Memory(PagedKV(poisoned(k_inner), poisoned(v_inner), *made), slots)


def expected_bytes(memory: Memory, k: torch.Tensor, v: torch.Tensor, x: int | None, block: int) -> list[np.ndarray]:
    """The bytes under both caches by the specification's formulas, one element at a time."""
    found = []
    for which, values in (("k", k), ("v", v)):
        cache: torch.Tensor = getattr(memory.cache, which)
        scale = getattr(memory.cache, f"{which}_scale")
        if cache.dtype is values.dtype:
            elements = values.view(torch.int16).numpy()
        else:
            fp8 = torch.float8_e4m3fn if cache.dtype is torch.uint8 else cache.dtype
            by = np.float32(1 if scale is None else scale.item())
            elements = spec.to_fp8((spec.widen(values) / by).astype(np.float32), fp8).view(np.int8)
        size = BLOCKS * (block * HEADS * DIM + PAD)
        flat = np.full(size * cache.element_size(), 0x5A, np.uint8).view(elements.dtype)
        for t, slot in enumerate(memory.slots.tolist()):
            if not 0 <= slot < BLOCKS * block:
                continue
            start, o = slot // block * (block * HEADS * DIM + PAD), slot % block
            for h in range(HEADS):
                for d in range(DIM):
                    if x is None:
                        at = (o * HEADS + h) * DIM + d
                    elif which == "k":
                        at = ((h * (DIM // x) + d // x) * block + o) * x + d % x
                    else:
                        at = ((h * (block // x) + o // x) * DIM + d) * x + o % x
                    flat[start + at] = elements[t, h, d]
        found.append(flat.view(np.uint8))
    return found


def bytes_under(cache: torch.Tensor) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).numpy()


@pytest.mark.parametrize(("x", "block", "dtype"), CACHES)
def test_every_byte_of_the_cache(x: int | None, block: int, dtype: torch.dtype | None) -> None:
    """Skipped slots, those past the end, and what lies between blocks: untouched. Twice, with other values."""
    case = Case(7, 6, HEADS, DIM, 16)
    memory = paged(x, block, dtype or torch.bfloat16, (None, None) if dtype is None else (0.037, 2.5))
    for seed in (1, 2):
        given = arguments(case, torch.bfloat16, seed=seed)
        got = fused_qk_norm_rope(*given, **options(case), cache=memory.cache, slot_mapping=memory.slots)
        assert all_same(got, fused_qk_norm_rope(*given, **options(case)))
        want = expected_bytes(memory, got.k, got.v, x, block)
        assert (bytes_under(memory.cache.k) == want[0]).all()
        assert (bytes_under(memory.cache.v) == want[1]).all()


@pytest.mark.parametrize("dtype", [*FP8_DTYPES, torch.uint8])
def test_fp8_of_every_kind_of_values(dtype: torch.dtype) -> None:
    """Without a scale, which is 1; saturating, NaN as NaN."""
    for kind in KINDS:
        case = Case(7, 1, HEADS, DIM, 16)
        memory = paged(None, 2, dtype, (None, None))
        got = fused_qk_norm_rope(
            *arguments(case, torch.bfloat16, kind), **options(case), cache=memory.cache, slot_mapping=memory.slots
        )
        fp8 = torch.float8_e4m3fn if dtype is torch.uint8 else dtype
        for values, cache in ((got.k, memory.cache.k), (got.v, memory.cache.v)):
            codes = spec.to_fp8(spec.widen(values), fp8)
            for t, slot in ((0, 7), (2, 0), (4, 2)):
                spec.assert_codes(cache[slot // 2, slot % 2].view(fp8), codes[t], f"{kind} at {slot}")


def test_no_slot_at_all() -> None:
    case = Case(7, 2, HEADS, DIM, 32)
    memory = paged(8, 8, torch.bfloat16, (None, None))
    memory.slots.fill_(-1)
    fused_qk_norm_rope(*arguments(case, torch.bfloat16), cache=memory.cache, slot_mapping=memory.slots)
    for cache in memory.cache[:2]:
        assert cache is not None
        assert (bytes_under(cache) == 0x5A).all()


def test_a_cache_without_blocks_and_no_tokens() -> None:
    case = Case(3, 2, HEADS, DIM, 32)
    given = arguments(case, torch.bfloat16)
    nothing = torch.empty(0, 4, HEADS, DIM, dtype=torch.bfloat16)
    slots = torch.tensor([0, 1, -1])
    got = fused_qk_norm_rope(*given, cache=PagedKV(nothing, nothing.clone()), slot_mapping=slots)
    assert all_same(got, fused_qk_norm_rope(*given))
    memory = paged(None, 4, torch.bfloat16, (None, None))
    given = arguments(Case(0, 2, HEADS, DIM, 32), torch.bfloat16)
    empty = fused_qk_norm_rope(*given, cache=memory.cache, slot_mapping=memory.slots[:0])
    assert [tuple(t.shape) for t in empty] == [(0, 2, DIM), (0, HEADS, DIM), (0, HEADS, DIM)]


@pytest.mark.parametrize(("x", "block", "dtype"), CACHES)
def test_triton_writes_every_byte_of_the_cache(
    triton_ops: TritonOps, x: int | None, block: int, dtype: torch.dtype | None
) -> None:
    if triton_ops.device == "cuda" and dtype is torch.uint8:
        dtype = torch.float8_e4m3fn  # what bytes mean depends on the GPU
    case = Case(7, 6, HEADS, DIM, 16)
    scales = (None, None) if dtype is None else (0.037, None)
    memory = paged(x, block, dtype or torch.bfloat16, scales)
    given = arguments(case, torch.bfloat16)
    passed = options(case) | {"cache": memory.cache, "slot_mapping": memory.slots}
    got, _, after = triton_ops.run(call, "fused_qk_norm_rope", given, passed)
    want = expected_bytes(memory, got.k, got.v, x, block)
    fused_qk_norm_rope(*given, **passed)
    assert all_same(after["cache"], memory.cache)
    if triton_ops.device == "cpu":
        assert (bytes_under(after["cache"].k) == want[0]).all()
        assert (bytes_under(after["cache"].v) == want[1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_triton_fp8_of_every_kind_of_values(triton_ops: TritonOps, fp8: torch.dtype, kind: str) -> None:
    """What the op without Triton writes, which the tests above hold to the specification; any NaN for a NaN."""
    case = Case(7, 1, HEADS, DIM, 16)
    memory = paged(16, 16, fp8, (0.5, None))
    given = arguments(case, torch.bfloat16, kind)
    passed = options(case) | {"cache": memory.cache, "slot_mapping": memory.slots}
    _, _, after = triton_ops.run(call, "fused_qk_norm_rope", given, passed)
    fused_qk_norm_rope(*given, **passed)
    for got, want in zip(after["cache"][:2], memory.cache[:2], strict=True):
        spec.assert_codes(got, want.contiguous().view(torch.uint8).numpy())
