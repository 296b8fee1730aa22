"""fused_qk_norm_rope with the shapes of Qwen3-8B: 32 query heads over 8 key heads of 128, bf16.

    torch          eager: RMSNorm of q, of k, and rotary embedding (``unfused``)
    compile        that through torch.compile
    separate       this library's rms_norm on q, on k, into given results, then a compiled rotary embedding of both;
                   q and k lie contiguous beforehand, which spares it two copies
    separate+eager the same, with the rotary embedding in eager torch
    flashinfer     FlashInfer's RMSNorm on q, on k, and its rotary embedding of both in place: three launches

A call has to read and to write q and k once; the values stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fusedcomm import ops
from fusedcomm.cli.bench.attention import flashinfer
from fusedcomm.cli.bench.attention.rope import random_positions, rope_table, rotate
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.single.flashinfer import FLASHINFER
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.ops.attention import fused_qk_norm_rope

OP = "qk_norm_rope"
HEADS_Q, HEADS_K, HEAD_DIM = 32, 8, 128
HEADS = (HEADS_Q, HEADS_K, HEADS_K)
EPS = 1e-6
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
TINY_TOKENS = (1, 3)
COUNTED_TOKENS = 16


class Weights:
    """What all sets share: a weight for q and one for k, and the rotary table."""

    def __init__(self, place: Place) -> None:
        self.q, self.k = (1 + 0.1 * place.normal((HEAD_DIM,), seed) for seed in (1, 2))
        self.cos_sin = rope_table(HEAD_DIM, place.device)


class QKVSet:
    """A packed qkv, its positions, and contiguous places for what is made of it."""

    def __init__(self, tokens: int, weights: Weights, place: Place, seed: int) -> None:
        self.weights = weights
        self.qkv = place.normal((tokens, sum(HEADS) * HEAD_DIM), seed + 3)
        self.positions = random_positions(tokens, place.generator(seed + 4), place.device)
        q, k, _ = split(self.qkv)
        self.q, self.k = q.contiguous(), k.contiguous()
        self.q_out, self.k_out = torch.empty_like(self.q), torch.empty_like(self.k)

    def check(self, results: Results) -> None:
        """Holds q and k against the formula in fp64."""
        for name, x, weight, got in zip("qk", (self.q, self.k), (self.weights.q, self.weights.k), results, strict=True):
            rows = x.double()
            normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS) * weight.double()
            cos, sin = self.weights.cos_sin[self.positions].double().unsqueeze(1).chunk(2, dim=-1)
            a, b = normed.chunk(2, dim=-1)
            expected = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            # bf16 (2^-8) after the norm, its weight and the rotation, each of which mixes a and b at most
            bound = 3 * 2**-8 * (a.abs() + b.abs()).repeat(1, 1, 2) + 1e-6
            check_close(name, got, expected.float(), bound.float())


def workloads(spec: Spec) -> list[Workload]:
    """A size for each number of tokens."""
    found = []
    for tokens in spec.tokens or (TINY_TOKENS if spec.tiny else TOKENS):
        moved = 2 * tokens * (HEADS_Q + HEADS_K) * HEAD_DIM * 2

        def peers(place: Place, tokens: int = tokens, moved: int = moved) -> list[Peer]:
            return [copy_peer(place, moved), *op_peers(place, tokens)]

        counts = tokens == COUNTED_TOKENS or spec.tiny
        found.append(Workload(OP, str(tokens), {"tokens": tokens}, peers, moved, counts_kernels=counts))
    return found


def op_peers(place: Place, tokens: int) -> list[Peer]:
    """Every way to do it, over the same sets."""
    weights = Weights(place)
    sets = place.make_sets(lambda seed: QKVSet(tokens, weights, place, seed))
    ways = {
        "torch": lambda own: unfused(own.qkv, weights.q, weights.k, weights.cos_sin, own.positions),
        "compile": lambda own: compiled(unfused)(own.qkv, weights.q, weights.k, weights.cos_sin, own.positions),
        "separate": lambda own: _separate(own, compiled(rotate_both)),
        "separate+eager": lambda own: _separate(own, rotate_both),
    }
    peers = [Peer(name, lambda run=run: Calls(sets, run, QKVSet.check)) for name, run in ways.items()]  # type: ignore[misc]
    peers.append(Peer(FLASHINFER, lambda: Calls(sets, _flashinfer(), QKVSet.check)))
    return [*peers, Peer(OURS, lambda: Calls(sets, _ours, QKVSet.check))]


def split(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views ``[T, heads, D]``."""
    q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split(HEADS, dim=1)
    return q, k, v


def unfused(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor
) -> Results:
    """q and k after norm and rotary embedding."""
    q, k, _ = split(qkv)
    q, k = F.rms_norm(q, (HEAD_DIM,), q_weight, EPS), F.rms_norm(k, (HEAD_DIM,), k_weight, EPS)
    return rotate_both(q, k, cos_sin, positions)


def rotate_both(q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> Results:
    """The rotary embedding of q and k."""
    return rotate(q, cos_sin, positions), rotate(k, cos_sin, positions)


def _separate(own: QKVSet, rotation: Callable[..., Results]) -> Results:
    weights = own.weights
    ops.rms_norm(own.q, weights.q, EPS, out=own.q_out)
    ops.rms_norm(own.k, weights.k, EPS, out=own.k_out)
    return rotation(own.q_out, own.k_out, weights.cos_sin, own.positions)


def _flashinfer() -> Callable[[QKVSet], Results]:
    rmsnorm, rotate_in_place = flashinfer.norm_and_rope()

    def run(own: QKVSet) -> Results:
        q, k, _ = split(own.qkv)
        rmsnorm(q, own.weights.q, EPS, out=own.q_out)
        rmsnorm(k, own.weights.k, EPS, out=own.k_out)
        rows = own.q_out.flatten(1), own.k_out.flatten(1)
        rotate_in_place(own.positions, *rows, HEAD_DIM, own.weights.cos_sin)
        return own.q_out, own.k_out

    return run


def _ours(own: QKVSet) -> Results:
    weights = own.weights
    result = fused_qk_norm_rope(
        own.qkv, weights.q, weights.k, weights.cos_sin, own.positions, HEADS_Q, HEADS_K, HEAD_DIM, EPS
    )
    return result.q, result.k
