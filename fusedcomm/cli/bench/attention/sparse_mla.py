"""sparse_mla_decode over both caches.

    torch       eager: gather, dequantise to bf16, two batched products around a softmax in fp32 (``unfused``)
    compile     that through torch.compile
    flashinfer  FlashInfer's MLA decode with pages of one token over a bf16 copy of the 656-byte cache: more bytes, and
                nothing to dequantise

Large sizes have the top-k of one cache; what a request reads lies anywhere among four times as many tokens of its own.
Small ones are a decode step of DeepSeek V4: a window in one cache and a top-k in another, with a sink.

A call has to read the cache's bytes of every index, and q, and to write the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedcomm.cli.bench.attention import flashinfer, sparse_cache
from fusedcomm.cli.bench.attention.sparse_cache import V4, V32, VALUE_DIM, Layout
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.gpu.harness import AbsentError
from fusedcomm.cli.bench.single.flashinfer import FLASHINFER, library
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.ops.attention.sparse_mla import sparse_mla_decode

OP = "sparse_mla_decode"
SPREAD = 4
"""The tokens of a request, over those that it reads."""
CHECKED_ROWS = 32
"""At a time: bounds the memory of the check."""


class Size(NamedTuple):
    """One decode step."""

    layout: Layout
    heads: int
    batch: int
    main: int
    """Tokens that a row reads of the main cache."""
    extra: int = 0
    """And of the other one; 0: there is none."""

    @property
    def label(self) -> str:
        keys = f"{self.main}+{self.extra}" if self.extra else str(self.main)
        return f"{self.layout.token_bytes}/h{self.heads}/b{self.batch}/{keys}"

    @property
    def keys(self) -> int:
        return self.main + self.extra

    @property
    def moved_bytes(self) -> int:
        """Gathered bytes, q and the result."""
        row = self.heads * (self.layout.query_dim + VALUE_DIM) * 2
        return self.batch * (self.keys * self.layout.token_bytes + row)

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 2 * self.batch * self.heads * (self.layout.query_dim + VALUE_DIM) * self.keys

    @property
    def scale(self) -> float:
        """Of the scores: the head dimension before MLA's absorption, 192, for V3.2."""
        return float((VALUE_DIM if self.layout is V4 else 192) ** -0.5)


GATHERING = tuple(Size(layout, 16, 256, 2048) for layout in (V4, V32))
COMPUTING = tuple(Size(layout, 128, 128, 2048) for layout in (V4, V32))
SMALL = tuple(Size(V4, heads, batch, 128, 512) for heads in (64, 128) for batch in (1, 2, 4))
TINY = (Size(V4, 16, 2, 40, 24), Size(V32, 16, 3, 50))


class Caches:
    """The caches of a size, and the sink; the same for all sets."""

    def __init__(self, size: Size, place: Place) -> None:
        self.size = size
        self.main = sparse_cache.new_cache(size.layout, size.batch * SPREAD * size.main, place)
        self.extra = (
            sparse_cache.new_cache(size.layout, size.batch * SPREAD * size.extra, place) if size.extra else None
        )
        self.sink = place.normal((size.heads,), 5, torch.float32) if size.layout is V4 else None


class DecodeSet:
    """Queries and the slots that they read."""

    def __init__(self, caches: Caches, place: Place, seed: int) -> None:
        size = self.size = caches.size
        self.caches = caches
        self.q = place.normal((size.batch, size.heads, size.layout.query_dim), seed)
        self.main, self.main_lens = _indices(size.batch, size.main, place, seed + 1)
        self.extra: torch.Tensor | None = None
        self.extra_lens: torch.Tensor | None = None
        if size.extra:
            self.extra, self.extra_lens = _indices(size.batch, size.extra, place, seed + 2)
        self.out = torch.empty(size.batch, size.heads, VALUE_DIM, dtype=torch.bfloat16, device=place.device)

    def sources(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each cache with the slots that are read of it."""
        found = [(self.caches.main, self.main)]
        if self.caches.extra is not None and self.extra is not None:
            found.append((self.caches.extra, self.extra))
        return found

    def check(self, results: Results) -> None:
        """Holds the result against fp32: within 2% of its largest value."""
        [got] = results
        for first in range(0, self.size.batch, CHECKED_ROWS):
            rows = slice(first, first + CHECKED_ROWS)
            sources = [(cache, slots[rows]) for cache, slots in self.sources()]
            expected = unfused(self.q[rows].float(), sources, self.caches.sink, self.size.layout, self.size.scale)
            check_close("out", got[rows], expected, 0.02 * expected.abs().max())


def workloads(spec: Spec) -> list[Workload]:
    """Sizes where gathering counts, where products count, and small ones."""
    sizes = TINY if spec.tiny else (*GATHERING, *COMPUTING, *SMALL)
    found = []
    for size in sizes:
        fields: dict[str, int | str] = {
            "token_bytes": size.layout.token_bytes,
            "heads": size.heads,
            "batch": size.batch,
            "main": size.main,
            "extra": size.extra,
        }
        peers = functools.partial(_peers, size)
        counts = size.batch <= 4
        found.append(Workload(OP, size.label, fields, peers, size.moved_bytes, size.flops, counts_kernels=counts))
    return found


def unfused(
    q: torch.Tensor,
    sources: list[tuple[torch.Tensor, torch.Tensor]],
    sink: torch.Tensor | None,
    layout: Layout,
    scale: float,
) -> torch.Tensor:
    """The decode by the lines of torch that a user would write, keys in the dtype of q."""
    keys = torch.cat([sparse_cache.dequantise(layout, cache, slots, q.dtype) for cache, slots in sources], dim=1)
    scores = torch.bmm(q, keys.transpose(1, 2)).float() * scale
    if sink is not None:
        scores = torch.cat((scores, sink.view(1, -1, 1).expand(len(q), -1, 1)), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[1]].to(q.dtype)
    return torch.bmm(weights, keys[..., :VALUE_DIM])


def _indices(batch: int, count: int, place: Place, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots int32 ``[batch, count]``, none twice, each row's of its own tokens; and how many they are."""
    tokens = SPREAD * count
    order = torch.rand(batch, tokens, generator=place.generator(seed), device=place.device).argsort(-1)[:, :count]
    slots = order + tokens * torch.arange(batch, device=place.device).unsqueeze(-1)
    lens = torch.full((batch,), count, dtype=torch.int32, device=place.device)
    return slots.to(torch.int32).contiguous(), lens


def _peers(size: Size, place: Place) -> list[Peer]:
    caches = Caches(size, place)
    sets = place.make_sets(lambda seed: DecodeSet(caches, place, seed))

    def plain(own: DecodeSet, decode: Callable[..., torch.Tensor]) -> Results:
        return (decode(own.q, own.sources(), caches.sink, size.layout, size.scale),)

    ways: dict[str, Callable[[], Calls[DecodeSet]]] = {
        "torch": lambda: Calls(sets, functools.partial(plain, decode=unfused), DecodeSet.check),
        "compile": lambda: Calls(sets, functools.partial(plain, decode=compiled(unfused)), DecodeSet.check),
        FLASHINFER: lambda: _flashinfer(caches, sets),
        OURS: lambda: Calls(sets, _ours, DecodeSet.check),
    }
    return [copy_peer(place, size.moved_bytes), *(Peer(name, make) for name, make in ways.items())]


def _flashinfer(caches: Caches, sets: list[DecodeSet]) -> Calls[DecodeSet]:
    size = caches.size
    if size.layout is V4:
        raise AbsentError(
            "its sparse MLA for keys of 512 is for Blackwell, and for caches of bf16 or of FP8 with one scale a tensor"
        )
    library("mla")
    tokens = len(caches.main) * sparse_cache.BLOCK_SIZE
    pattern = min(tokens, sparse_cache.PATTERN_BLOCKS * sparse_cache.BLOCK_SIZE)
    slots = torch.arange(pattern, device=caches.main.device)
    whole = sparse_cache.dequantise(size.layout, caches.main, slots, torch.bfloat16)
    copies = -(-tokens // pattern)
    keys, rope = (part.repeat(copies, 1)[:tokens].unsqueeze(1) for part in whole.split([VALUE_DIM, 64], dim=-1))
    runs = {own: flashinfer.DenseMLA(own.q, keys, rope, own.main, size.scale) for own in sets}

    def run(own: DecodeSet) -> Results:
        runs[own].run(own.out)
        return (own.out,)

    return Calls(sets, run, DecodeSet.check)


def _ours(own: DecodeSet) -> Results:
    caches = own.caches
    sparse_mla_decode(
        own.q,
        caches.main,
        own.main,
        own.main_lens,
        extra_cache=caches.extra,
        extra_indices=own.extra,
        extra_lens=own.extra_lens,
        attn_sink=caches.sink,
        scale=own.size.scale,
        out=own.out,
    )
    return (own.out,)
