"""fused_qk_rope_cat_and_cache_mla: what is done to queries and keys before MLA attends, FP8 cache, 64-token blocks.

    torch    eager: rotary embedding of q and of k, both concatenated, k quantised and scattered (``unfused``)
    compile  that through torch.compile

Kernels are counted too; attention takes the concatenated q as it is. A call has to read both parts of q and k, and to
write q and a byte for each element of k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fusedcomm import platform
from fusedcomm.cli.bench.attention.rope import random_positions, rope_table, rotate
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.ops.attention import fused_qk_rope_cat_and_cache_mla

OP = "mla_prepare"
NOPE, ROPE = 512, 64
BLOCK_SIZE = 64
NUM_BLOCKS = 64
BATCHES, HEADS = (1, 16, 128), (16, 128)
TINY_BATCHES, TINY_HEADS = (3,), (4,)
COUNTED_BATCH = 16


class PrepareSet:
    """The parts of q and k, where k goes, and where q goes."""

    def __init__(self, batch: int, heads: int, cos_sin: torch.Tensor, place: Place, seed: int) -> None:
        device = place.device
        self.q_nope, self.q_pe = (place.normal((batch, heads, n), seed + n) for n in (NOPE, ROPE))
        self.k_nope, self.k_pe = (place.normal((batch, 1, n), seed + n + 1) for n in (NOPE, ROPE))
        self.fp8_dtype = platform.fp8_dtype(device)
        shape = (NUM_BLOCKS, BLOCK_SIZE, NOPE + ROPE)
        self.cache = torch.zeros(shape, dtype=torch.uint8, device=device).view(self.fp8_dtype)
        generator = place.generator(seed + 3)
        self.slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator, device=device)[:batch]
        self.positions = random_positions(batch, generator, device)
        self.cos_sin = cos_sin
        self.k_scale = torch.full((1,), 0.03125, device=device)
        self.out = torch.empty(batch, heads, NOPE + ROPE, dtype=torch.bfloat16, device=device)

    def check(self, results: Results) -> None:
        """Holds q against the formula, and what the cache stands for against k."""
        cos, sin = self.cos_sin[self.positions].double().unsqueeze(1).chunk(2, dim=-1)
        whole = {}
        for name, nope, pe in (("q", self.q_nope, self.q_pe), ("k", self.k_nope, self.k_pe)):
            a, b = pe.double()[..., 0::2], pe.double()[..., 1::2]
            rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
            whole[name] = torch.cat((nope.double(), rotated), dim=-1).float()
        # one rounding to bf16
        check_close("q", results[0], whole["q"], 2**-8 * whole["q"].abs() + 1e-6)
        flat = self.cache.view(torch.uint8).view(-1, NOPE + ROPE)[self.slots].view(self.fp8_dtype).float()
        # that, and half a step of FP8: 2^-4 of a value, half of the smallest one below
        k, scale = whole["k"].squeeze(1), self.k_scale.item()
        check_close("k", flat * scale, k, (2**-4 + 2**-8) * k.abs() + 2**-10 * scale)


def workloads(spec: Spec) -> list[Workload]:
    """A size for each batch and number of heads."""
    batches, every_heads = (TINY_BATCHES, TINY_HEADS) if spec.tiny else (BATCHES, HEADS)
    found = []
    for heads in every_heads:
        for batch in batches:
            moved = batch * (NOPE + ROPE) * (2 * 2 * heads + 2 + 1)
            sizes: dict[str, int | str] = {"batch": batch, "heads": heads}
            peers = functools.partial(_peers, batch, heads, moved)
            counts = spec.tiny or batch == COUNTED_BATCH
            found.append(Workload(OP, f"h{heads}/b{batch}", sizes, peers, moved, counts_kernels=counts))
    return found


def unfused(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_scale: torch.Tensor,
) -> torch.Tensor:
    """The concatenated q; k is scattered to the cache."""
    q = torch.cat((q_nope, rotate(q_pe, cos_sin, positions, neox=False)), dim=-1)
    k = torch.cat((k_nope, rotate(k_pe, cos_sin, positions, neox=False)), dim=-1).squeeze(1)
    limit = torch.finfo(cache.dtype).max
    codes = (k.float() / k_scale).clamp(-limit, limit).to(cache.dtype)
    flat = cache.view(torch.uint8).flatten(0, 1)
    flat[slots] = codes.view(torch.uint8)
    return q


def _peers(batch: int, heads: int, moved: int, place: Place) -> list[Peer]:
    cos_sin = rope_table(ROPE, place.device, theta=1e4)
    sets = place.make_sets(lambda seed: PrepareSet(batch, heads, cos_sin, place, seed))

    def plain(own: PrepareSet, prepare: Callable[..., torch.Tensor]) -> Results:
        parts = own.q_nope, own.q_pe, own.k_nope, own.k_pe
        return prepare(*parts, own.cache, own.slots, own.positions, own.cos_sin, own.k_scale), own.cache

    def ours(own: PrepareSet) -> Results:
        parts = own.q_nope, own.q_pe, own.k_nope, own.k_pe
        q = fused_qk_rope_cat_and_cache_mla(
            *parts, own.cache, own.slots, own.positions, own.cos_sin, own.k_scale, False, out=own.out
        )
        return q, own.cache

    ways: dict[str, Callable[[PrepareSet], Results]] = {
        "torch": functools.partial(plain, prepare=unfused),
        "compile": lambda own: plain(own, compiled(unfused)),
        OURS: ours,
    }
    calls = [Peer(name, functools.partial(Calls, sets, run, PrepareSet.check)) for name, run in ways.items()]
    return [copy_peer(place, moved), *calls]
