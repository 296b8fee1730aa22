"""The indexer of DeepSeek V3.2 beside its query path, at a decode step: one after the other, and with Overlap.

The indexer projects queries (1536 to 64 heads of 128), a key (7168 to 128) and the heads' weights (7168 to 64), norms
the key, rotates queries and key, quantises both, writes the key to its cache and scores the context. The query path
projects the queries (1536 to H heads of 192), absorbs the key's projection (128 to 512, a head) and prepares q and k
for MLA. Matrices are bf16. Both ways queue the same operations.

    one_stream  Overlap, off
    ours        Overlap, on: fork before the query projection, join behind the preparation
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F

from fusedcomm import platform
from fusedcomm.cli.bench.attention import indexer_cache as cache_of
from fusedcomm.cli.bench.attention.rope import random_positions, rope_table, rotate
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.env import Settings
from fusedcomm.ops.attention import (
    fp8_paged_mqa_logits,
    fused_qk_rope_cat_and_cache_mla,
    indexer_k_quant_and_cache,
)
from fusedcomm.ops.overlap import Overlap

OP = "dual_stream"
ONE_STREAM = "one_stream"
HIDDEN, LATENT = 7168, 1536
INDEX_HEADS, INDEX_DIM, ROPE = 64, cache_of.HEAD_DIM, 64
QUERY_DIM, QUERY_NOPE, NOPE = 192, 128, 512
CONTEXT, BATCHES, HEADS = 4096, (1, 16, 128), (16, 128)
TINY_CONTEXT, TINY_BATCHES, TINY_HEADS = 64, (2,), (2,)
MLA_BLOCKS, MLA_BLOCK_SIZE = 64, 64


def weight_shapes(heads: int) -> dict[str, tuple[int, ...]]:
    """The matrices of both chains."""
    return {
        "index_q": (INDEX_HEADS * INDEX_DIM, LATENT),
        "index_k": (INDEX_DIM, HIDDEN),
        "index_weights": (INDEX_HEADS, HIDDEN),
        "query": (heads * QUERY_DIM, LATENT),
        "absorb": (heads, QUERY_NOPE, NOPE),
    }


class StepSet:
    """A decode step of one layer: its matrices, its inputs, both caches, and what one stream makes of it."""

    def __init__(self, batch: int, heads: int, context: int, cos_sin: torch.Tensor, place: Place, seed: int) -> None:
        device = place.device
        self.batch, self.heads, self.context, self.cos_sin = batch, heads, context, cos_sin
        self.fp8_dtype = platform.fp8_dtype(device)
        self.weights = {
            name: place.normal(shape, seed + i) * shape[-1] ** -0.5
            for i, (name, shape) in enumerate(weight_shapes(heads).items())
        }
        self.norm = 1 + 0.1 * place.normal((INDEX_DIM,), seed + 10), 0.1 * place.normal((INDEX_DIM,), seed + 11)
        self.hidden, self.latent = (place.normal((batch, n), seed + 12 + n) for n in (HIDDEN, LATENT))
        self.k_nope, self.k_pe = (place.normal((batch, 1, n), seed + 14 + n) for n in (NOPE, ROPE))
        generator = place.generator(seed + 16)
        self.positions = random_positions(batch, generator, device)
        columns = cache_of.num_blocks(context)
        blocks = batch * columns
        self.index_cache = cache_of.new_cache(blocks, device)
        slots = torch.arange(blocks * cache_of.BLOCK_SIZE, device=device)
        cache_of.write(place.normal((len(slots), INDEX_DIM), seed + 17), self.index_cache, slots, False, self.fp8_dtype)
        order = cache_of.shuffled_blocks(blocks, generator, device)
        self.block_table = order.to(torch.int32).view(batch, columns)
        # the step's own token is the last of each context
        last = context - 1
        self.index_slots = order.view(batch, columns)[:, last // cache_of.BLOCK_SIZE] * cache_of.BLOCK_SIZE
        self.index_slots = self.index_slots + last % cache_of.BLOCK_SIZE
        self.context_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.logits = torch.empty(batch, context, device=device)
        shape = (MLA_BLOCKS, MLA_BLOCK_SIZE, NOPE + ROPE)
        self.mla_cache = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.mla_slots = torch.randperm(MLA_BLOCKS * MLA_BLOCK_SIZE, generator=generator, device=device)[:batch]
        self.q = torch.empty(batch, heads, NOPE + ROPE, dtype=torch.bfloat16, device=device)
        self.expected = tuple(t.clone() for t in step(self, overlap(device, is_on=False)))

    def check(self, results: Results) -> None:
        """Compares with one stream: the same operations, so what differs was not there when it was read."""
        for name, got, expected in zip(("q", "logits"), results, self.expected, strict=True):
            # a matrix product may be cut up differently where it has fewer multiprocessors: bf16 sums in another order
            check_close(name, got, expected.float(), 2**-6 * expected.float().abs().max())


def overlap(device: torch.device, *, is_on: bool) -> Overlap:
    """An owner of a side stream, or of none, whatever the environment says."""
    return Overlap(device, dataclasses.replace(Settings(), dual_stream=is_on))


def step(own: StepSet, overlapping: Overlap) -> Results:
    """q as MLA takes it, and the logits of the indexer."""
    with overlapping.fork(index, own) as forked:
        q = query(own)
        logits = forked.join()
    return q, logits


def index(own: StepSet) -> torch.Tensor:
    """The indexer's chain."""
    weights = own.weights
    q = F.linear(own.latent, weights["index_q"]).unflatten(-1, (INDEX_HEADS, INDEX_DIM))
    k = F.layer_norm(F.linear(own.hidden, weights["index_k"]), (INDEX_DIM,), *own.norm)
    q = torch.cat((rotate(q[..., :ROPE], own.cos_sin, own.positions), q[..., ROPE:]), dim=-1)
    k = torch.cat((rotate(k[:, None, :ROPE], own.cos_sin, own.positions).squeeze(1), k[:, ROPE:]), dim=-1)
    indexer_k_quant_and_cache(k, own.index_cache, own.index_slots, scale_fmt="ue8m0")
    codes, scale = cache_of.quantise(q, own.fp8_dtype)
    head_weights = F.linear(own.hidden, weights["index_weights"]).float() * scale * (INDEX_HEADS * INDEX_DIM) ** -0.5
    queries = codes.view(own.fp8_dtype).unsqueeze(1)
    return fp8_paged_mqa_logits(
        queries, own.index_cache, head_weights, own.context_lens, own.block_table, own.context, out=own.logits
    )


def query(own: StepSet) -> torch.Tensor:
    """The query path, and the cache of MLA."""
    q = F.linear(own.latent, own.weights["query"]).unflatten(-1, (own.heads, QUERY_DIM))
    nope, pe = q.split([QUERY_NOPE, ROPE], dim=-1)
    absorbed = torch.bmm(nope.transpose(0, 1), own.weights["absorb"]).transpose(0, 1)
    parts = absorbed, pe, own.k_nope, own.k_pe
    return fused_qk_rope_cat_and_cache_mla(
        *parts, own.mla_cache, own.mla_slots, own.positions, own.cos_sin, None, False, out=own.q
    )


def workloads(spec: Spec) -> list[Workload]:
    """A size for each batch and number of heads: those of a rank of 8 and all."""
    batches, every_heads = (TINY_BATCHES, TINY_HEADS) if spec.tiny else (BATCHES, HEADS)
    context = TINY_CONTEXT if spec.tiny else CONTEXT
    found = []
    for heads in every_heads:
        matrices = sum(2 * torch.Size(shape).numel() for shape in weight_shapes(heads).values())
        for batch in batches:
            moved = matrices + batch * context * cache_of.TOKEN_BYTES
            sizes: dict[str, int | str] = {"batch": batch, "heads": heads, "context": context}
            peers = functools.partial(_peers, batch, heads, context)
            found.append(Workload(OP, f"h{heads}/b{batch}", sizes, peers, moved))
    return found


def _peers(batch: int, heads: int, context: int, place: Place) -> list[Peer]:
    cos_sin = rope_table(ROPE, place.device, theta=1e4)
    sets = place.make_sets(lambda seed: StepSet(batch, heads, context, cos_sin, place, seed))
    ways = {ONE_STREAM: overlap(place.device, is_on=False), OURS: overlap(place.device, is_on=True)}
    return [
        Peer(name, functools.partial(Calls, sets, functools.partial(step, overlapping=way), StepSet.check))
        for name, way in ways.items()
    ]
