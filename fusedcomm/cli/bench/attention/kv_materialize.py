"""fused_kv_materialize: the keys and values of 5 draft layers, 8 heads of 128, bf16 (DFlash drafts for Qwen3-8B).

    torch    eager: RMSNorm, rotary embedding and copies, all layers together (``unfused``)
    compile  that through torch.compile

A call has to read and to write all keys and values once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fusedcomm.cli.bench.attention.rope import random_positions, rope_table, rotate
from fusedcomm.cli.bench.cases import check_close
from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload
from fusedcomm.ops.attention import KV, fused_kv_materialize

OP = "kv_materialize"
LAYERS, HEADS, HEAD_DIM = 5, 8, 128
EPS = 1e-6
TOKENS = (16, 4096)
TINY_TOKENS = (3,)


class KVSet:
    """Projected keys and values of all layers, and where they go."""

    def __init__(self, tokens: int, cos_sin: torch.Tensor, place: Place, seed: int) -> None:
        self.kv = place.normal((tokens, LAYERS, 2, HEADS, HEAD_DIM), seed)
        self.weight = 1 + 0.1 * place.normal((LAYERS, HEAD_DIM), seed + 1)
        self.positions = random_positions(tokens, place.generator(seed + 2), place.device)
        self.cos_sin = cos_sin
        shape = (LAYERS, tokens, HEADS, HEAD_DIM)
        self.out = KV(*(torch.empty(shape, dtype=torch.bfloat16, device=place.device) for _ in "kv"))

    def check(self, results: Results) -> None:
        """Holds the keys against the formula in fp64; the values are copies."""
        keys, values = self.kv.transpose(0, 1).unbind(2)
        rows = keys.double()
        normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)
        normed = normed * self.weight.double()[:, None, None]
        cos, sin = self.cos_sin[self.positions].double().unsqueeze(1).chunk(2, dim=-1)
        a, b = normed.chunk(2, dim=-1)
        expected = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        # three roundings to bf16, as in qk_norm_rope
        bound = 3 * 2**-8 * (a.abs() + b.abs()).repeat(1, 1, 1, 2) + 1e-6
        check_close("k", results[0], expected.float(), bound.float())
        check_close("v", results[1], values, 0.0)


def workloads(spec: Spec) -> list[Workload]:
    """A size for each number of tokens."""
    found = []
    for tokens in spec.tokens or (TINY_TOKENS if spec.tiny else TOKENS):
        moved = 2 * tokens * LAYERS * 2 * HEADS * HEAD_DIM * 2
        sizes: dict[str, int | str] = {"tokens": tokens, "layers": LAYERS}
        found.append(Workload(OP, str(tokens), sizes, functools.partial(_peers, tokens, moved), moved))
    return found


def unfused(kv: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> Results:
    """Keys and values in the order of layers."""
    keys, values = kv.unbind(2)
    normed = (F.rms_norm(keys.float(), (HEAD_DIM,), None, EPS) * weight.unsqueeze(1)).to(kv.dtype)
    rotated = rotate(normed.flatten(1, 2), cos_sin, positions).view_as(normed)
    return rotated.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()


def _peers(tokens: int, moved: int, place: Place) -> list[Peer]:
    cos_sin = rope_table(HEAD_DIM, place.device)
    sets = place.make_sets(lambda seed: KVSet(tokens, cos_sin, place, seed))

    def plain(own: KVSet, materialize: Callable[..., Results]) -> Results:
        return materialize(own.kv, own.weight, own.cos_sin, own.positions)

    def ours(own: KVSet) -> Results:
        return fused_kv_materialize(own.kv, own.weight, own.cos_sin, own.positions, EPS, out=own.out)

    ways: dict[str, Callable[[KVSet], Results]] = {
        "torch": functools.partial(plain, materialize=unfused),
        "compile": lambda own: plain(own, compiled(unfused)),
        OURS: ours,
    }
    calls = [Peer(name, functools.partial(Calls, sets, run, KVSet.check)) for name, run in ways.items()]
    return [copy_peer(place, moved), *calls]
