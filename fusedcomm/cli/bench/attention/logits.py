"""fp8_paged_mqa_logits: 64 heads, one query a request, both layouts of the cache.

    torch    eager: the keys gathered and widened to bf16, a batched product, relu, a weighted sum (``unfused``)
    compile  that through torch.compile (the plain layout)

A call has to read the keys and scales of the context, and to write a logit a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fusedcomm import platform
from fusedcomm.cli.bench.attention import indexer_cache as cache_of
from fusedcomm.cli.bench.attention.indexer_cache import BLOCK_SIZE, HEAD_DIM, LAYOUTS, TOKEN_BYTES
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.ops.attention import fp8_paged_mqa_logits

OP = "indexer_logits"
HEADS = 64
BATCHES, CONTEXTS = (1, 16, 64), (4096, 16384)
TINY_BATCHES, TINY_CONTEXTS = (2,), (96,)


class LogitsSet:
    """Queries, weights, and a cache filled with the contexts of all requests."""

    def __init__(self, batch: int, context: int, preshuffle: bool, place: Place, seed: int) -> None:
        device = place.device
        self.context, self.preshuffle = context, preshuffle
        self.fp8_dtype = platform.fp8_dtype(device)
        self.q = place.normal((batch, 1, HEADS, HEAD_DIM), seed).to(self.fp8_dtype)
        self.weights = place.normal((batch, HEADS), seed + 1, torch.float32).abs()
        columns = cache_of.num_blocks(context)
        blocks = batch * columns
        self.cache = cache_of.new_cache(blocks, device)
        every = torch.arange(blocks * BLOCK_SIZE, device=device)
        for number, slots in enumerate(every.split(1 << 18)):  # bounds the memory of the fill
            keys = place.normal((len(slots), HEAD_DIM), seed + 10 + number)
            cache_of.write(keys, self.cache, slots, preshuffle, self.fp8_dtype)
        order = cache_of.shuffled_blocks(blocks, place.generator(seed + 3), device)
        self.block_table = order.to(torch.int32).view(batch, columns)
        self.context_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.out = torch.empty(batch, context, device=device)

    def check(self, results: Results) -> None:
        """Holds the logits against fp32, request by request."""
        [got] = results
        found = cache_of.views(self.cache, self.preshuffle)
        for r, blocks in enumerate(self.block_table.long()):
            codes = found.codes[blocks].reshape(-1, HEAD_DIM)[: self.context]
            scale = found.scales[blocks].flatten()[: self.context]
            q, k = self.q[r, 0].float(), codes.view(self.fp8_dtype).float()
            weights = self.weights[r].unsqueeze(-1)
            expected = (weights * (q @ k.T).relu()).sum(0) * scale
            magnitude = (weights * (q.abs() @ k.abs().T)).sum(0) * scale
            # scores rounded to bf16, and matrix units that add FP8 products with 13 bits below the largest
            bound = 2**-7 * expected + 2**-11 * magnitude
            check_close("logits", got[r], expected, bound)


def workloads(spec: Spec) -> list[Workload]:
    """A size for each batch, context and layout."""
    found = []
    contexts, batches = (TINY_CONTEXTS, TINY_BATCHES) if spec.tiny else (CONTEXTS, BATCHES)
    for context in contexts:
        for batch in batches:
            for layout, preshuffle in LAYOUTS.items():
                moved = batch * context * (TOKEN_BYTES + 4)
                peers = functools.partial(_peers, batch, context, preshuffle, moved)
                sizes: dict[str, int | str] = {"batch": batch, "context": context, "heads": HEADS, "layout": layout}
                flops = 2 * batch * context * HEADS * HEAD_DIM
                found.append(Workload(OP, f"b{batch}/{context}/{layout}", sizes, peers, moved, flops))
    return found


def unfused(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context: int,
    preshuffle: bool,
) -> torch.Tensor:
    """Logits ``[B, context]`` of requests that all have this context."""
    batch = q.shape[0]
    found = cache_of.views(cache, preshuffle)
    blocks = block_table.long()
    keys = found.codes[blocks].reshape(batch, -1, HEAD_DIM)[:, :context].view(q.dtype).to(torch.bfloat16)
    scale = found.scales[blocks].reshape(batch, -1)[:, :context]
    scores = torch.bmm(q.squeeze(1).to(torch.bfloat16), keys.transpose(1, 2)).relu()
    return (scores * weights.unsqueeze(-1)).sum(1) * scale


def _peers(batch: int, context: int, preshuffle: bool, moved: int, place: Place) -> list[Peer]:
    sets = place.make_sets(lambda seed: LogitsSet(batch, context, preshuffle, place, seed))

    def plain(own: LogitsSet, read: Callable[..., torch.Tensor]) -> Results:
        return (read(own.q, own.cache, own.weights, own.block_table, context, preshuffle),)

    def ours(own: LogitsSet) -> Results:
        fp8_paged_mqa_logits(
            own.q, own.cache, own.weights, own.context_lens, own.block_table, context, preshuffle, out=own.out
        )
        return (own.out,)

    ways: dict[str, Callable[[LogitsSet], Results]] = {
        "torch": functools.partial(plain, read=unfused),
        "compile": lambda own: plain(own, compiled(unfused)),
        OURS: ours,
    }
    if preshuffle:
        del ways["compile"]
    calls = [Peer(name, functools.partial(Calls, sets, run, LogitsSet.check)) for name, run in ways.items()]
    return [copy_peer(place, moved), *calls]
