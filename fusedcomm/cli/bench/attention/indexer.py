"""indexer_k_quant_and_cache and cp_gather_indexer_k_quant_cache, both layouts, blocks of 64 tokens.

    torch    eager: quantise and scatter by index (``indexer_cache.write``); gather by index, where the places of the
             tokens are known beforehand
    compile  that through torch.compile (the plain layout)

The tokens of a request lie in order, in blocks that lie anywhere. For each token a write has to read a bf16 key and its
slot and to write 132 bytes; a gather has to read and to write 132 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fusedcomm import platform
from fusedcomm.cli.bench.attention import indexer_cache as cache_of
from fusedcomm.cli.bench.attention.indexer_cache import BLOCK_SIZE, HEAD_DIM, LAYOUTS, TOKEN_BYTES
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.ops.attention import cp_gather_indexer_k_quant_cache, indexer_k_quant_and_cache

WRITE, GATHER = "indexer_write", "indexer_gather"
TOKENS = (1024, 16384, 65536)
TINY_TOKENS = (70,)
REQUESTS = 4
COUNTED_TOKENS = 1024


class WriteSet:
    """Keys, their slots, and the cache that they go to."""

    def __init__(self, tokens: int, place: Place, seed: int) -> None:
        self.k = place.normal((tokens, HEAD_DIM), seed)
        blocks = cache_of.num_blocks(tokens)
        order = cache_of.shuffled_blocks(blocks, place.generator(seed + 1), place.device)
        token = torch.arange(tokens, device=place.device)
        self.slots = order[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE
        self.cache = cache_of.new_cache(blocks, place.device)

    def check(self, preshuffle: bool) -> None:
        """Holds what the cache stands for against the keys, by the definition of FP8 and of the scales."""
        fp8_dtype = platform.fp8_dtype(self.cache.device)
        limit = torch.finfo(fp8_dtype).max
        block, offset = self.slots // BLOCK_SIZE, self.slots % BLOCK_SIZE
        found = cache_of.views(self.cache, preshuffle)
        scale = found.scales[block, offset]
        needed = self.k.float().abs().amax(-1) / limit
        if not bool(((scale >= needed * (1 - 1e-6)) & (scale <= 2 * needed) & (scale.frexp().mantissa == 0.5)).all()):
            raise WrongResultError("scale: expected the power of two that is needed")
        stored = cache_of.token_codes(found.codes, block, offset).view(fp8_dtype).float()
        wanted = self.k.float() / scale.unsqueeze(-1)
        # half a step: 2^-4 of a value with three bits behind the point, and half of the smallest one
        if not bool(((stored - wanted).abs() <= wanted.abs() * 2**-4 + 2**-10).all()):
            raise WrongResultError("codes: not the keys over their scales, rounded to nearest")


def write_workloads(spec: Spec) -> list[Workload]:
    """A size for each number of tokens and each layout."""
    moved_bytes = HEAD_DIM * 2 + 8 + TOKEN_BYTES
    return _workloads(spec, WRITE, moved_bytes, _write_peers)


def gather_workloads(spec: Spec) -> list[Workload]:
    """A size for each number of tokens, those of four requests, and each layout."""
    return _workloads(spec, GATHER, 2 * TOKEN_BYTES, _gather_peers)


def _workloads(
    spec: Spec, op: str, token_bytes: int, op_peers: Callable[[Place, int, bool], list[Peer]]
) -> list[Workload]:
    found = []
    for tokens in spec.tokens or (TINY_TOKENS if spec.tiny else TOKENS):
        for layout, preshuffle in LAYOUTS.items():
            moved = tokens * token_bytes

            def peers(place: Place, tokens: int = tokens, preshuffle: bool = preshuffle) -> list[Peer]:
                return [copy_peer(place, tokens * token_bytes), *op_peers(place, tokens, preshuffle)]

            sizes: dict[str, int | str] = {"tokens": tokens, "layout": layout}
            counts = spec.tiny or tokens == COUNTED_TOKENS
            found.append(Workload(op, f"{tokens}/{layout}", sizes, peers, moved, counts_kernels=counts))
    return found


def _write_peers(place: Place, tokens: int, preshuffle: bool) -> list[Peer]:
    sets = place.make_sets(lambda seed: WriteSet(tokens, place, seed))
    fp8_dtype = platform.fp8_dtype(place.device)

    def plain(own: WriteSet, write: Callable[..., None]) -> Results:
        write(own.k, own.cache, own.slots, preshuffle, fp8_dtype)
        return (own.cache,)

    def ours(own: WriteSet) -> Results:
        indexer_k_quant_and_cache(own.k, own.cache, own.slots, scale_fmt="ue8m0", preshuffle=preshuffle)
        return (own.cache,)

    def check(own: WriteSet, results: Results) -> None:
        own.check(preshuffle)

    ways: dict[str, Callable[[WriteSet], Results]] = {
        "torch": functools.partial(plain, write=cache_of.write),
        "compile": lambda own: plain(own, compiled(cache_of.write)),
        OURS: ours,
    }
    if preshuffle:
        del ways["compile"]
    return [Peer(name, functools.partial(Calls, sets, run, check)) for name, run in ways.items()]


class GatherSet:
    """A filled cache, the blocks of four requests in it, and where their tokens go."""

    def __init__(self, tokens: int, preshuffle: bool, place: Place, seed: int) -> None:
        generator = place.generator(seed)
        per_request = -(-tokens // REQUESTS)
        columns = cache_of.num_blocks(per_request)
        blocks = REQUESTS * columns
        shape = (blocks, BLOCK_SIZE, TOKEN_BYTES)
        self.cache = torch.randint(0, 120, shape, dtype=torch.uint8, device=place.device, generator=generator)
        self.views = cache_of.views(self.cache, preshuffle)
        self.views.scales.uniform_(0.5, 2, generator=generator)
        order = cache_of.shuffled_blocks(blocks, generator, place.device)
        self.block_table = order.to(torch.int32).view(REQUESTS, columns)
        ends = [min(r * per_request, tokens) for r in range(REQUESTS + 1)]
        self.cu_seq_lens = torch.tensor(ends, dtype=torch.int32, device=place.device)
        token = torch.arange(tokens, device=place.device)
        request, column = token // per_request, token % per_request // BLOCK_SIZE
        self.block = self.block_table[request, column].long()
        self.offset = token % per_request % BLOCK_SIZE
        self.dst_k = torch.empty(tokens, HEAD_DIM, dtype=torch.uint8, device=place.device)
        self.dst_scale = torch.empty(tokens, 1, device=place.device)

    def check(self, results: Results) -> None:
        """Compares bytes, token by token."""
        if not torch.equal(self.dst_k, cache_of.token_codes(self.views.codes, self.block, self.offset)):
            raise WrongResultError("dst_k: differs from the cache")
        if not torch.equal(self.dst_scale.squeeze(1), self.views.scales[self.block, self.offset]):
            raise WrongResultError("dst_scale: differs from the cache")


def gather(
    cache: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    preshuffle: bool,
) -> None:
    """The gather by index."""
    found = cache_of.views(cache, preshuffle)
    dst_k.copy_(cache_of.token_codes(found.codes, block, offset))
    dst_scale.copy_(found.scales[block, offset].unsqueeze(1))


def _gather_peers(place: Place, tokens: int, preshuffle: bool) -> list[Peer]:
    sets = place.make_sets(lambda seed: GatherSet(tokens, preshuffle, place, seed))

    def plain(own: GatherSet, read: Callable[..., None]) -> Results:
        read(own.cache, own.block, own.offset, own.dst_k, own.dst_scale, preshuffle)
        return own.dst_k, own.dst_scale

    def ours(own: GatherSet) -> Results:
        cp_gather_indexer_k_quant_cache(
            own.cache, own.dst_k, own.dst_scale, own.block_table, own.cu_seq_lens, preshuffle
        )
        return own.dst_k, own.dst_scale

    ways: dict[str, Callable[[GatherSet], Results]] = {
        "torch": functools.partial(plain, read=gather),
        "compile": lambda own: plain(own, compiled(gather)),
        OURS: ours,
    }
    if preshuffle:
        del ways["compile"]
    return [Peer(name, functools.partial(Calls, sets, run, GatherSet.check)) for name, run in ways.items()]
