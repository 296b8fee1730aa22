"""The sparse MLA caches as the specification has them, byte by byte, attention over them in fp64, and bodies of tests.

Positions, quantisation, reads and the softmax are written down again here and share nothing with the library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import spec
import torch
from cases import make
from numpy.typing import NDArray
from qk_bodies import compiles
from triton_backend import to

from fusedcomm.ops import attention
from fusedcomm.ops.attention import dispatch

Bytes = NDArray[np.uint8]
F64 = NDArray[np.float64]

HEAD_DIM = {584: 512, 656: 576}
NOPE = {584: 448, 656: 512}
GROUP = {584: 64, 656: 128}
VALUES = 512
NAN_BYTE = 0xFF  # a NaN as FP8 e4m3fn, as a UE8M0 scale, in bf16 and in fp32


# ---- the specification ----


def positions(slot: int, block_size: int, token_bytes: int) -> tuple[int, int, list[int], list[int], list[int]]:
    """(block, offset, where its codes, the bytes of its scales and the bytes of its RoPE values lie in the block)."""
    block, o = slot // block_size, slot % block_size
    if token_bytes == 584:
        codes = [o * 576 + c for c in range(448)]
        rope = [o * 576 + 448 + c for c in range(128)]
        scales = [block_size * 576 + o * 8 + c for c in range(8)]
    else:
        codes = [o * 656 + c for c in range(512)]
        scales = [o * 656 + 512 + c for c in range(16)]
        rope = [o * 656 + 528 + c for c in range(128)]
    return block, o, codes, scales, rope


def indices_of(slots: NDArray[Any], block_size: int, token_bytes: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """What indexes blocks ``[blocks, stride]`` for codes, scales and RoPE values of slots, ``[n, bytes]``."""
    _, _, *first = positions(0, block_size, token_bytes)
    _, _, *second = positions(1, block_size, token_bytes)
    block, o = slots[:, None] // block_size, slots[:, None] % block_size
    # every part of a token lies as far on as that of the token before
    if block_size == 1:
        return [(block, np.broadcast_to(np.array(a), (len(slots), len(a)))) for a in first]
    return [(block, np.array(a) + o * (b[0] - a[0])) for a, b in zip(first, second, strict=True)]


def quantised(kv: torch.Tensor, token_bytes: int, fp8: torch.dtype) -> tuple[Bytes, Bytes, Bytes]:
    """(codes, bytes of scales, bytes of RoPE values) of each row of kv."""
    x, f32 = spec.widen(kv), np.float32
    nope, rope = x[:, : NOPE[token_bytes]], x[:, NOPE[token_bytes] :]
    groups = nope.reshape(len(x), -1, GROUP[token_bytes])
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(groups).max(-1), f32(1e-4)) / f32(spec.FP8_MAX[fp8])  # both keep NaN
        if token_bytes == 584:
            finite = np.isfinite(scale)
            exponent = np.ceil(np.log2(np.where(finite, scale, f32(1)).astype(np.float64)))
            scale = np.where(finite, np.exp2(exponent), np.nan).astype(np.float32)
            scales = np.zeros((len(x), 8), np.uint8)
            scales[:, :7] = np.where(finite, exponent + 127, 255)
        else:
            scales = scale.view(np.uint8).reshape(len(x), 16)
        codes = spec.to_fp8(groups / scale[..., None], fp8).reshape(len(x), -1)
        rope_bits = (spec.round_to(np.ascontiguousarray(rope), torch.bfloat16).view(np.uint32) >> 16).astype(np.uint16)
    return codes, scales, rope_bits.view(np.uint8).reshape(len(x), 128)


def put(memory: Bytes, kv: torch.Tensor, slots: list[int], block_size: int, token_bytes: int, fp8: torch.dtype) -> None:
    """Writes tokens to blocks ``memory [blocks, stride]``, byte by byte; slots of no block are skipped."""
    codes, scales, rope = quantised(kv, token_bytes, fp8)
    for token, slot in enumerate(slots):
        if not 0 <= slot < len(memory) * block_size:
            continue
        block, _, *parts = positions(slot, block_size, token_bytes)
        for at, values in zip(parts, (codes[token], scales[token], rope[token]), strict=True):
            for byte, value in zip(at, values, strict=True):
                memory[block, byte] = value


def keys_at(memory: Bytes, slots: NDArray[Any], block_size: int, token_bytes: int, fp8: torch.dtype) -> F64:
    """The keys ``[n, 512 or 576]`` that the bytes of slots stand for."""
    if len(slots) == 0:
        return np.zeros((0, HEAD_DIM[token_bytes]))
    parts = [np.ascontiguousarray(memory[at]) for at in indices_of(slots, block_size, token_bytes)]
    codes, scales, rope = parts
    if token_bytes == 584:
        scale = np.where(scales[:, :7] == 255, np.nan, np.exp2(scales[:, :7].astype(np.float64) - 127))
    else:
        scale = scales.view(np.float32).astype(np.float64)
    nope = spec.fp8_values(fp8)[codes] * np.repeat(scale, GROUP[token_bytes], axis=1)
    bits = rope.view(np.uint16).astype(np.uint32) << 16
    return np.concatenate((nope, bits.view(np.float32).astype(np.float64)), axis=1)


# ---- problems ----


@dataclass(frozen=True)
class Cache:
    """Blocks of bytes ``[blocks, stride]`` and what they are."""

    memory: torch.Tensor
    block_size: int
    token_bytes: int
    fp8: torch.dtype = torch.float8_e4m3fn

    def paged(self, memory: torch.Tensor, *, as_bytes: bool = False) -> torch.Tensor:
        """The cache in memory like this one's, by its FP8 dtype or as uint8."""
        shape = (len(memory), self.block_size, self.token_bytes)
        cache = memory.as_strided(shape, (memory.shape[1], self.token_bytes, 1))
        return cache if as_bytes else cache.view(self.fp8)

    @property
    def num_slots(self) -> int:
        return len(self.memory) * self.block_size


def cache_of(
    num_blocks: int,
    block_size: int,
    token_bytes: int,
    *,
    listed: NDArray[Any] | None = None,
    padding: int = 0,
    fp8: torch.dtype = torch.float8_e4m3fn,
    seed: int = 1,
) -> Cache:
    """Blocks that lie apart by a multiple of 576 bytes and ``padding`` of them more; NaN but for the slots listed.

    Values are random, of tokens of several magnitudes.
    """
    rng = np.random.default_rng(seed)
    stride = -(-block_size * token_bytes // 576) * 576 + padding * 576
    memory = np.full((num_blocks, stride), NAN_BYTE, np.uint8)
    slots = np.arange(num_blocks * block_size) if listed is None else np.unique(listed)
    values = rng.standard_normal((len(slots), HEAD_DIM[token_bytes])).astype(np.float32)
    values *= np.exp2(rng.integers(-4, 3, (len(slots), 1))).astype(np.float32)
    quantised_values = quantised(torch.from_numpy(values), token_bytes, fp8)
    for at, part in zip(indices_of(slots, block_size, token_bytes), quantised_values, strict=True):
        memory[at] = part
    return Cache(torch.from_numpy(memory), block_size, token_bytes, fp8)


@dataclass(frozen=True)
class Keys:
    """A list into a cache: dense with lengths, or ragged with bounds."""

    cache: Cache
    indices: torch.Tensor
    lens: torch.Tensor | None = None
    indptr: torch.Tensor | None = None

    def slots_of(self, row: int) -> NDArray[Any]:
        """What the row lists and the cache has."""
        if self.lens is not None:
            found = self.indices[row, : max(int(self.lens[row]), 0)]
        else:
            assert self.indptr is not None
            found = self.indices[int(self.indptr[row]) : int(self.indptr[row + 1])]
        slots = found.numpy().astype(np.int64)
        return slots[(slots >= 0) & (slots < self.cache.num_slots)]

    def with_poison(self, byte: int) -> Keys:
        """The same tokens, where every byte of no token that is listed is this one."""
        cache = self.cache
        listed = np.unique(np.concatenate([self.slots_of(row) for row in range(len(self.indices))]))
        memory = torch.full_like(cache.memory, byte)
        for at in indices_of(listed, cache.block_size, cache.token_bytes):
            memory.numpy()[at] = cache.memory.numpy()[at]
        return replace(self, cache=replace(cache, memory=memory))

    def ragged(self) -> Keys:
        """The same list, ragged."""
        assert self.lens is not None
        rows = [self.indices[row, :n] for row, n in enumerate(self.lens.tolist())]
        bounds = torch.tensor([0, *np.cumsum([len(r) for r in rows])], dtype=torch.int32)
        behind = torch.zeros(3, dtype=torch.int32)  # the last row, and nobody's
        return replace(self, indices=torch.cat((*rows, behind)), lens=None, indptr=bounds)


def keys_of(
    lens: list[int],
    capacity: int,
    block_size: int,
    token_bytes: int,
    *,
    padding: int = 0,
    fp8: torch.dtype = torch.float8_e4m3fn,
    seed: int = 2,
) -> Keys:
    """A dense list of random slots; every fifth is none (-1, or past the end), and what is behind a length is poison.

    Of the slots of the cache about half are listed; all others hold NaN.
    """
    rng = np.random.default_rng(seed)
    num_blocks = max(-(-2 * min(capacity, 512) // block_size), 2)
    num_slots = num_blocks * block_size
    good = rng.permutation(num_slots)[: num_slots // 2]
    poison = np.setdiff1d(np.arange(num_slots), good)
    indices = good[rng.integers(0, len(good), (len(lens), max(capacity, 1)))]
    nowhere = np.array([-1, num_slots, -(2**31), 2**31 - 1, num_slots + 7])
    indices = np.where(rng.random(indices.shape) < 0.2, nowhere[rng.integers(0, 5, indices.shape)], indices)
    behind = np.arange(indices.shape[1]) >= np.array(lens)[:, None]
    indices = np.where(behind, poison[rng.integers(0, len(poison), indices.shape)], indices)
    cache = cache_of(num_blocks, block_size, token_bytes, listed=good, padding=padding, fp8=fp8, seed=seed)
    found = torch.empty(indices.shape, dtype=torch.int32)  # NumPy's have strides of 0 where there is nothing
    return Keys(cache, found.copy_(torch.from_numpy(indices)), torch.tensor(lens, dtype=torch.int32))


@dataclass(frozen=True)
class Problem:
    """Arguments of sparse_mla_decode."""

    q: torch.Tensor
    main: Keys
    extra: Keys | None = None
    sink: torch.Tensor | None = None
    scale: float = 1.0


def problem(num_heads: int, main: Keys, extra: Keys | None = None, *, sink: bool = True, seed: int = 3) -> Problem:
    rng = np.random.default_rng(seed)
    rows = len(main.indices) if main.lens is not None else len(main.indptr) - 1  # type: ignore[arg-type]
    head_dim = HEAD_DIM[main.cache.token_bytes]
    q = torch.from_numpy(rng.standard_normal((rows, num_heads, head_dim)).astype(np.float32)).bfloat16()
    sinks = torch.from_numpy(rng.standard_normal(num_heads).astype(np.float32)) * 2 if sink else None
    return Problem(q, main, extra, sinks, 1.3 / math.sqrt(head_dim))


def in_fp64(p: Problem) -> F64:
    """Attention by its formula, row by row: one softmax over both lists and the sink, in fp64."""
    rows, num_heads, _ = p.q.shape
    result = np.zeros((rows, num_heads, VALUES))
    for row in range(rows):
        found = [
            keys_at(k.cache.memory.numpy(), k.slots_of(row), k.cache.block_size, k.cache.token_bytes, k.cache.fp8)
            for k in (p.main, p.extra)
            if k is not None
        ]
        keys = np.concatenate(found)
        if len(keys) == 0:
            continue
        s = spec.widen(p.q[row]).astype(np.float64) @ keys.T * p.scale
        sink = np.full((num_heads, 1), -np.inf) if p.sink is None else p.sink.numpy().astype(np.float64)[:, None]
        weights = np.exp(s - np.maximum(s.max(1, keepdims=True), sink))
        denominator = weights.sum(1, keepdims=True) + np.exp(sink - np.maximum(s.max(1, keepdims=True), sink))
        result[row] = weights @ keys[:, :VALUES] / denominator
    return result


def assert_close(got: torch.Tensor, want: F64) -> None:
    """The error against fp64 is up to 2e-2 of the largest result, and typically (in the mean) up to 4e-3 of it.

    Keys and weights are rounded to bf16 (2^-9 each) before their products, and the result once more.
    """
    assert got.dtype is torch.bfloat16
    assert tuple(got.shape) == want.shape
    error = np.abs(spec.widen(got).astype(np.float64) - want)
    scale = np.abs(want).max(initial=0.0)
    assert not np.isnan(error).any(), f"NaN in {np.argwhere(np.isnan(error))[:3].tolist()}"
    assert error.max(initial=0.0) <= 2e-2 * scale, f"{error.max() / scale:.1e}, {scale}"
    assert error.size == 0 or error.mean() <= 4e-3 * scale, f"{error.mean() / scale:.1e} in the mean"


# ---- the ops ----


def arguments(p: Problem, device: str, *, as_bytes: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of sparse_mla_decode, on a device."""

    def of(keys: Keys) -> tuple[torch.Tensor, ...]:
        memory, *rest = to((keys.cache.memory, keys.indices, keys.lens, keys.indptr), device)
        return keys.cache.paged(memory, as_bytes=as_bytes), *rest

    q, sink = to((p.q, p.sink), device)
    options: dict[str, Any] = {"attn_sink": sink, "scale": p.scale}
    if p.extra is not None:
        names = ("extra_cache", "extra_indices", "extra_lens", "extra_indptr")
        options |= dict(zip(names, of(p.extra), strict=True))
    return (q, *of(p.main)), options


def poison_workspace() -> None:
    """What calls before have left: NaN."""
    if dispatch.attention_backend("cpu") == "triton" or torch.cuda.is_available():
        from fusedcomm.kernels.attention.workspace import _held

        for memory in _held.memory.values():
            memory.fill_(torch.nan)


def decode(device: str, p: Problem, num_splits: int | None = None, as_bytes: bool = False) -> torch.Tensor:
    """The result into memory that was NaN, with a workspace that was."""
    given, options = arguments(p, device, as_bytes=as_bytes)
    poison_workspace()
    out = torch.full((*p.q.shape[:2], VALUES), torch.nan, dtype=torch.bfloat16, device=device)
    assert attention.sparse_mla_decode(*given, **options, out=out, num_splits=num_splits) is out
    return out.cpu()


def decode_splits(device: str, p: Problem, splits: list[int | None]) -> list[torch.Tensor]:
    """The results with each of these numbers of splits; so that the workspace has been used by others."""
    return [decode(device, p, n) for n in splits]


def decode_with_tile(device: str, p: Problem, tile: tuple[Any, ...], num_splits: int) -> torch.Tensor:
    """The result with a tile that this device would not take."""
    from fusedcomm.kernels.attention import sparse_mla_operators
    from fusedcomm.kernels.attention.sparse_mla_splits import Tile

    own = sparse_mla_operators.tile_of
    sparse_mla_operators.tile_of = lambda num_heads, arch: Tile(*tile)
    try:
        return decode(device, p, num_splits)
    finally:
        sparse_mla_operators.tile_of = own


def decode_changing(device: str, p: Problem, lens: list[list[int]], num_splits: int | None) -> list[torch.Tensor]:
    """The results of calls with the same tensors, after other lengths have been written to them."""
    given, options = arguments(p, device)
    found = []
    for row_lens in lens:
        given[3].copy_(torch.tensor(row_lens, dtype=torch.int32))
        poison_workspace()
        found.append(attention.sparse_mla_decode(*given, **options, num_splits=num_splits).cpu())
    return found


def graph_replays(device: str, p: Problem, lens: list[list[int]], num_splits: int | None) -> list[torch.Tensor]:
    """The results of replays of one graph; eager calls between them use the workspace that a graph must not."""
    given, options = arguments(p, device)
    out = torch.empty(*p.q.shape[:2], VALUES, dtype=torch.bfloat16, device=device)
    attention.sparse_mla_decode(*given, **options, out=out, num_splits=num_splits)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.sparse_mla_decode(*given, **options, out=out, num_splits=num_splits)
    found = []
    for row_lens in lens:
        given[3].copy_(torch.tensor(row_lens, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        found.append(out.cpu())
        attention.sparse_mla_decode(*given, **options, num_splits=7)
        poison_workspace()
    return found


def two_streams(device: str, a: Problem, b: Problem) -> list[torch.Tensor]:
    """The results of two problems that run beside each other, a hundred times."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    prepared = [arguments(p, device) for p in (a, b)]
    torch.cuda.synchronize()
    found: list[torch.Tensor] = []
    for _ in range(100):
        for stream, (given, options) in zip(streams, prepared, strict=True):
            with torch.cuda.stream(stream):
                found.append(attention.sparse_mla_decode(*given, **options, num_splits=5))
    torch.cuda.synchronize()
    return [t.cpu() for t in found]


def allocations(device: str, p: Problem) -> int:
    """How much more memory is allocated after fifty calls into the same result than after two."""
    given, options = arguments(p, device)
    out = torch.empty(*p.q.shape[:2], VALUES, dtype=torch.bfloat16, device=device)
    for calls in (2, 50):
        if calls == 50:
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(calls):
            attention.sparse_mla_decode(*given, **options, out=out, num_splits=4)
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)


def write(
    device: str,
    memory: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    token_bytes: int,
    fp8: torch.dtype | None,
    columns: slice = slice(None),
) -> torch.Tensor:
    """The memory after sparse_mla_quant_and_cache of these columns of kv; fp8 None: a cache of bytes."""
    memory = memory.clone().to(device)
    cache = memory.as_strided((len(memory), block_size, token_bytes), (memory.shape[1], token_bytes, 1))
    cache = cache if fp8 is None else cache.view(fp8)
    attention.sparse_mla_quant_and_cache(kv.to(device)[:, columns], cache, slots.to(device))
    return memory.cpu()


# ---- torch.compile ----


def compile_arguments(rows: int) -> tuple[Any, ...]:
    rows //= 2  # a program takes the interpreter a tenth of a second
    stride = 2 * 4 * 656 // 576 * 576
    memory = torch.zeros(8, stride, dtype=torch.uint8).as_strided((8, 4, 656), (stride, 656, 1))
    kv = make(rows, (8, 576), torch.bfloat16, "ordinary")
    q = make(5, (rows, 16, 576), torch.bfloat16, "ordinary")
    dense = (torch.arange(rows * 8) * 7 % 10).int().view(rows, 8)
    bounds = torch.arange(rows + 1).int() * 3
    return memory, kv, torch.arange(8), q, dense, torch.arange(rows).int() % 3, dense.flatten(), bounds


def compile_body(
    cache: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    dense: torch.Tensor,
    lens: torch.Tensor,
    ragged: torch.Tensor,
    bounds: torch.Tensor,
) -> torch.Tensor:
    attention.sparse_mla_quant_and_cache(kv + 1, cache, slots)
    found = attention.sparse_mla_decode(q * 2, cache, dense, lens, scale=0.05, num_splits=1)
    again = torch.empty_like(found)
    extra = {"extra_cache": cache, "extra_indices": dense, "extra_lens": lens}
    attention.sparse_mla_decode(q, cache, ragged, main_indptr=bounds, **extra, scale=0.1, out=again)
    return found + again


def op_compiles(device: str) -> None:
    compiles(device, compile_body, compile_arguments)


def opcheck(device: str) -> None:
    """Schemas, fakes and tracing of the operators."""
    cache, kv, slots, q, dense, lens, ragged, bounds = to(compile_arguments(4), device)
    attention.sparse_mla_quant_and_cache(kv, cache, slots)  # registers them
    out = torch.empty(2, 16, VALUES, dtype=torch.bfloat16, device=device)
    operators = torch.ops.fusedcomm_triton
    torch.library.opcheck(operators.sparse_mla_write.default, (kv, cache, slots, False))
    for main in ((dense, lens, None), (ragged, None, bounds)):
        given = (q, cache, *main, cache, dense, lens, None, None, 0.1, 1, False, out)
        torch.library.opcheck(operators.sparse_mla_decode_out.default, given)
