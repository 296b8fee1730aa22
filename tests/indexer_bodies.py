"""The indexer's cache as the specification has it, byte by byte, and bodies of tests that run where a backend does.

The positions, the quantisation and the reads are written down again here, in loops, and share nothing with the library.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import spec
import torch
from cases import make
from numpy.typing import NDArray
from qk_bodies import compiles, triton_backends
from triton_backend import TritonOps

from fusedcomm.ops import attention
from fusedcomm.ops.attention import dispatch

HEAD_DIM, TOKEN_BYTES = 128, 132
# (block_size, preshuffle)
LAYOUTS = [(1, False), (4, False), (64, False), (16, True), (32, True), (64, True)]


class TorchOps(TritonOps):
    """The torch backend, in this process."""

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        return body(self.device, *args)


@contextmanager
def backends(which: str) -> Iterator[TritonOps]:
    """``"torch"`` on the CPU, or Triton on ``"interpreter"`` or ``"gpu"``."""
    if which == "torch":
        yield TorchOps()
        return
    with triton_backends(which) as found:
        yield found


# ---- the specification ----


def value_position(offset: int, element: int, preshuffle: bool) -> int:
    """Byte of a block where an element of the token at an offset lies."""
    if preshuffle:
        return (offset // 16) * (16 * 128) + (element // 16) * 256 + (offset % 16) * 16 + element % 16
    return offset * 128 + element


def scale_position(offset: int, block_size: int) -> int:
    """Byte of a block where the scale of the token at an offset begins."""
    return block_size * 128 + offset * 4


class Keys(NamedTuple):
    """Quantised keys: codes ``[T, 128]`` and scales ``[T]``."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]


def quantised(k: torch.Tensor, fp8: torch.dtype, ue8m0: bool) -> Keys:
    """scale = max(amax, 1e-4) / FP8_MAX, rounded up to a power of two for ue8m0."""
    x, f32 = spec.widen(k), np.float32
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(x).max(-1), f32(1e-4)) / f32(spec.FP8_MAX[fp8])  # both keep NaN
        if ue8m0:
            finite = np.isfinite(scale)
            mantissa, exponent = np.frexp(np.where(finite, scale, f32(1)))
            power = np.ldexp(f32(1), exponent - (mantissa == 0.5))
            scale = np.where(finite, power, f32(np.nan)).astype(np.float32)
        return Keys(spec.to_fp8(x / scale[:, None], fp8), scale)


def put(memory: NDArray[np.uint8], keys: Keys, slots: torch.Tensor, block_size: int, preshuffle: bool) -> None:
    """Writes keys to the blocks ``memory [blocks, stride]``, byte by byte."""
    for token, slot in enumerate(slots.tolist()):
        if not 0 <= slot < len(memory) * block_size:
            continue
        block, offset = memory[slot // block_size], slot % block_size
        for element in range(HEAD_DIM):
            block[value_position(offset, element, preshuffle)] = keys.codes[token, element]
        for i, byte in enumerate(keys.scale[token].tobytes()):
            block[scale_position(offset, block_size) + i] = byte


def get(memory: NDArray[np.uint8], slots: list[int], block_size: int, preshuffle: bool) -> Keys:
    """Reads keys from the blocks ``memory [blocks, stride]``, byte by byte."""
    codes, scales = np.zeros((len(slots), HEAD_DIM), np.uint8), np.zeros((len(slots), 4), np.uint8)
    for token, slot in enumerate(slots):
        block, offset = memory[slot // block_size], slot % block_size
        for element in range(HEAD_DIM):
            codes[token, element] = block[value_position(offset, element, preshuffle)]
        for i in range(4):
            scales[token, i] = block[scale_position(offset, block_size) + i]
    return Keys(codes, scales.view(np.float32)[:, 0])


def slot_of(table: torch.Tensor, request: int, token: int, num_blocks: int, block_size: int) -> int | None:
    """The slot of a token of a request; None where the table has no block of the cache for it."""
    column = token // block_size
    if not 0 <= column < table.shape[1]:
        return None
    block = int(table[request, column])
    return block * block_size + token % block_size if 0 <= block < num_blocks else None


def blocks_of(num_blocks: int, block_size: int, padding: int, seed: int = 5) -> torch.Tensor:
    """Blocks of random bytes, ``[num_blocks, stride]``, with bytes between them that belong to nobody."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (num_blocks, block_size * TOKEN_BYTES + padding), dtype=np.uint8))


def table_of(lens: list[int], num_blocks: int, block_size: int, seed: int = 6) -> torch.Tensor:
    """A table ``[R, max_blocks]`` with blocks of its own, in no order, for each request; elsewhere far past the end."""
    order = iter(np.random.default_rng(seed).permutation(num_blocks).tolist())
    width = max((-(-n // block_size) for n in lens), default=0) + 1
    table = torch.full((len(lens), width), 1 << 30, dtype=torch.int32)
    for request, n in enumerate(lens):
        for column in range(-(-n // block_size)):
            table[request, column] = next(order)
    return table


# ---- the ops ----


def paged(memory: torch.Tensor, block_size: int, fp8: torch.dtype | None) -> torch.Tensor:
    """The cache in ``memory [blocks, stride]``: FP8, or bytes where fp8 is None."""
    expected = "triton" if memory.is_cuda else os.environ.get("FUSEDCOMM_BACKEND", "torch")
    assert dispatch.attention_backend(memory.device.type) == expected
    blocks, stride = memory.shape
    cache = memory.as_strided((blocks, block_size, TOKEN_BYTES), (stride, TOKEN_BYTES, 1))
    return cache if fp8 is None else cache.view(fp8)


def write(
    device: str,
    memory: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    fp8: torch.dtype | None,
    ue8m0: bool,
    preshuffle: bool,
    columns: slice = slice(None),
) -> torch.Tensor:
    """The memory after indexer_k_quant_and_cache of these columns of k."""
    memory = memory.clone().to(device)
    cache = paged(memory, block_size, fp8)
    scale_fmt: Any = "ue8m0" if ue8m0 else None
    k = k.to(device)[:, columns]
    attention.indexer_k_quant_and_cache(k, cache, slots.to(device), scale_fmt=scale_fmt, preshuffle=preshuffle)
    return memory.cpu()


def gather(
    device: str,
    memory: torch.Tensor,
    table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    num_rows: int,
    block_size: int,
    preshuffle: bool,
    scale_as_bytes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the bytes of the scales by cp_gather_indexer_k_quant_cache; 0xA5 where it wrote nothing."""
    cache = paged(memory.to(device), block_size, None)
    codes = torch.full((num_rows, HEAD_DIM), 0xA5, dtype=torch.uint8, device=device)
    scale = torch.full((num_rows, 4), 0xA5, dtype=torch.uint8, device=device)
    dst_scale = scale if scale_as_bytes else scale.view(torch.float32)
    attention.cp_gather_indexer_k_quant_cache(
        cache, codes, dst_scale, table.to(device), cu_seq_lens.to(device), preshuffle
    )
    return codes.cpu(), scale.cpu()


def logits(
    device: str,
    memory: torch.Tensor,
    q: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    table: torch.Tensor,
    max_context_len: int,
    block_size: int,
    preshuffle: bool,
) -> torch.Tensor:
    """fp8_paged_mqa_logits for q in FP8, into memory that was full of other numbers."""
    cache = paged(memory.to(device), block_size, q.dtype)
    out = torch.full((weights.shape[0], max_context_len), 7777.0, device=device)
    arguments = (weights.to(device), context_lens.to(device), table.to(device), max_context_len, preshuffle)
    assert attention.fp8_paged_mqa_logits(q.to(device), cache, *arguments, out=out) is out
    return out.cpu()


def logits_in_tiles(device: str, num_tiles: int, *arguments: Any) -> torch.Tensor:
    """``logits`` where a program of Triton's scores so many tiles."""
    if dispatch.attention_backend(device) == "torch":
        return logits(device, *arguments)
    operators = importlib.import_module("fusedcomm.kernels.attention.indexer_operators")
    with mock.patch.object(operators, "_tiles", return_value=num_tiles):
        return logits(device, *arguments)


def far_apart(device: str, stride: int, block: int) -> tuple[torch.Tensor, ...]:
    """What is written to blocks 0 and ``block``, a stride apart each, gathered and scored; little of it is touched."""
    num_blocks = block + 1
    memory = torch.empty(num_blocks, stride, dtype=torch.uint8, device=device)
    cache = paged(memory, 16, torch.float8_e4m3fn)
    k, slots = make(1, (30, HEAD_DIM), torch.bfloat16, "ordinary"), torch.arange(30)
    slots[10:] += (block - 1) * 16
    slots[10:16] = torch.arange(10, 16)
    attention.indexer_k_quant_and_cache(k.to(device), cache, slots.to(device), preshuffle=True)
    table = torch.tensor([[0, block]], dtype=torch.int32, device=device)
    lens = torch.tensor([30], dtype=torch.int32, device=device)
    codes, scale = torch.zeros(30, HEAD_DIM, dtype=torch.uint8, device=device), torch.zeros(30, 1, device=device)
    bounds = torch.nn.functional.pad(lens, (1, 0))
    attention.cp_gather_indexer_k_quant_cache(cache, codes, scale, table, bounds, preshuffle=True)
    q = make(2, (1, 1, 16, HEAD_DIM), torch.float32, "ordinary").clamp(-400, 400).to(torch.float8_e4m3fn).to(device)
    weights = torch.ones(1, 16, device=device)
    scores = attention.fp8_paged_mqa_logits(q, cache, weights, lens, table, 30, True)
    return codes.cpu(), scale.cpu(), scores.cpu()


# ---- torch.compile, fake tensors and graphs ----


def chain_arguments(rows: int) -> tuple[Any, ...]:
    """What chain takes, for a number of keys."""
    k = make(rows, (rows, HEAD_DIM), torch.bfloat16, "ordinary")
    slots = torch.tensor([3, -1, 17, 40, 0, 999, 5])[:rows]
    q = make(4, (2, 2, 16, HEAD_DIM), torch.float32, "ordinary").clamp(-400, 400).to(torch.float8_e4m3fn)
    weights = make(5, (4, 16), torch.float32, "ordinary")
    table, lens = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32), torch.tensor([20, 0], dtype=torch.int32)
    return k, torch.zeros(3, 16, TOKEN_BYTES, dtype=torch.uint8), slots, q, weights, lens, table


def chain(
    k: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    weights: torch.Tensor,
    lens: torch.Tensor,
    table: torch.Tensor,
) -> tuple[Any, ...]:
    """Write, gather and score, with what is computed before and after each."""
    attention.indexer_k_quant_and_cache(k * 2, cache, slots, scale_fmt="ue8m0", preshuffle=True)
    codes = torch.zeros(24, HEAD_DIM, dtype=torch.uint8, device=k.device)
    scale = torch.zeros(24, 1, device=k.device)
    bounds = torch.cumsum(torch.nn.functional.pad(lens, (1, 0)), 0, dtype=torch.int32)
    attention.cp_gather_indexer_k_quant_cache(cache, codes, scale, table, bounds, preshuffle=True)
    out = torch.empty(4, 30, device=k.device)
    attention.fp8_paged_mqa_logits(q, cache, weights, lens, table, 30, True, out=out)
    again = attention.fp8_paged_mqa_logits(q, cache, weights * 2, lens, table, 30, True)
    return codes, scale + 1, out, again


def chain_compiles(device: str) -> None:
    """Without graph breaks, and to the bit as it is eagerly."""
    compiles(device, chain, chain_arguments)


def chain_in_a_graph(device: str) -> list[tuple[Any, Any]]:
    """(replayed, eager) results and caches of a captured chain whose keys, slots and lengths change between replays."""
    given = [t.to(device) for t in chain_arguments(7)]
    chain(*given)  # compiles the kernels
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = chain(*given)
    found = []
    for replay in range(3):
        fresh = [t.to(device) for t in chain_arguments(7)]
        fresh[0].mul_(replay + 1)
        fresh[2].copy_(fresh[2].roll(replay))
        fresh[5].copy_(torch.tensor([7 * replay, 30 - replay], dtype=torch.int32))
        for static, new in zip(given, fresh, strict=True):
            static.copy_(new)
        for result in results:
            result.fill_(99)
        graph.replay()
        want = chain(*fresh)
        torch.cuda.synchronize()
        found.append(([t.cpu() for t in (*results, given[1])], [t.cpu() for t in (*want, fresh[1])]))
    return found
