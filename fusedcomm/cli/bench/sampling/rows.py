"""Sizes, rows of probabilities, and ops on them with their peers.

Probabilities are softmax(2 z) with z standard normal: the largest of 128,256 has about 0.7%, and 0.9 of the mass is in
a quarter of the tokens. Results do not depend on that, but the times of rejection samplers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu.harness import Case, Eager
from fusedcomm.cli.bench.sampling.checks import EXACT, FP32, Band, Filter, Precision
from fusedcomm.cli.bench.single.flashinfer import FLASHINFER, library
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload

Numbers = tuple[int, ...]
VOCABS: Numbers = (32768, 128256, 151936)
BATCHES: Numbers = (1, 4, 16, 64, 256)
CPU_VOCABS: Numbers = (128256,)
CPU_BATCHES: Numbers = (1, 4, 16)
TINY_VOCABS: Numbers = (97, 2048)
TINY_BATCHES: Numbers = (1, 3)
LOGIT_SCALE = 2.0
TOP_K, TOP_P = 50, 0.9
TORCH, LOOP, TWO_CALLS = "torch", "loop", "two_calls"
FP32_BYTES = 4

S = TypeVar("S")


class Size(NamedTuple):
    """B rows of V probabilities."""

    vocab: int
    batch: int

    @property
    def label(self) -> str:
        return f"{self.vocab}/{self.batch}"

    @property
    def row_bytes(self) -> int:
        return self.vocab * FP32_BYTES

    @property
    def rows_bytes(self) -> int:
        return self.batch * self.row_bytes

    @property
    def fields(self) -> dict[str, int | str]:
        """What records say of it."""
        return {"vocab": self.vocab, "batch": self.batch}

    @property
    def is_counted(self) -> bool:
        """Whether the kernels of its peers are counted."""
        return (self.vocab, self.batch) == (VOCABS[1], 16)


def sizes(spec: Spec) -> list[Size]:
    """Every vocabulary with every number of rows."""
    vocabs, batches = (CPU_VOCABS, CPU_BATCHES) if spec.device == "cpu" else (VOCABS, BATCHES)
    if spec.tiny:
        vocabs, batches = TINY_VOCABS, TINY_BATCHES
    if spec.vocabs and min(spec.vocabs) <= TOP_K:
        raise ValueError(f"--vocabs: expected more than {TOP_K} tokens, as k is {TOP_K}, got {min(spec.vocabs)}")
    return [Size(vocab, batch) for vocab in spec.vocabs or vocabs for batch in spec.tokens or batches]


def logits(shape: tuple[int, ...], place: Place, seed: int) -> torch.Tensor:
    """fp32, normal."""
    return place.normal(shape, seed, torch.float32).mul_(LOGIT_SCALE)


def probabilities(shape: tuple[int, ...], place: Place, seed: int) -> torch.Tensor:
    """fp32; every row of the last dimension adds up to 1."""
    return logits(shape, place, seed).softmax(-1)


class Rows:
    """Probabilities ``[B, V]``, uniforms, and places for results."""

    def __init__(self, size: Size, place: Place, seed: int) -> None:
        self.probs = probabilities((size.batch, size.vocab), place, seed)
        generator = place.generator(seed + 1)
        self.uniforms = torch.rand(size.batch, generator=generator, device=place.device)
        self.first, self.out = torch.empty_like(self.probs), torch.empty_like(self.probs)
        self.tokens = torch.empty(size.batch, dtype=torch.int32, device=place.device)
        self.philox = philox(place.device, seed)
        self._bands: dict[tuple[Filter, float], Band] = {}

    def band(self, kept: Filter, precision: Precision) -> Band:
        """The filter's thresholds; of the same function always the same."""
        key = (kept, precision.slack)
        if key not in self._bands:
            self._bands[key] = kept(self.probs, precision.slack)
        return self._bands[key]


def philox(device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """``seed`` and ``offset`` as FlashInfer takes them where a graph is captured."""
    return {name: torch.tensor([n], device=device) for name, n in (("seed", seed), ("offset", 0))}


Way = Callable[[S], Results]
Check = Callable[[S, Results, Precision, str], None]
"""``check(set, results, precision, peer)``."""
OfFlashInfer = Callable[[Any], Callable[[S], Results]]
"""The way of ``flashinfer.sampling``, when that is there."""


@dataclass(frozen=True)
class RowsOp(Generic[S]):
    """An op on rows of V values, at every size."""

    op: str
    moved_rows: int
    """How often a call has to move each row: 1 if it is only read, 2 if one is written."""
    make_set: Callable[[Size, Place, int], S]
    check: Check[S]
    ways: Mapping[str, Way[S]]
    of_flashinfer: OfFlashInfer[S] | None = None

    def workloads(self, spec: Spec) -> list[Workload]:
        """Each size."""
        return [self._workload(size) for size in sizes(spec)]

    def _workload(self, size: Size) -> Workload:
        moved = self.moved_rows * size.rows_bytes

        def peers(place: Place) -> list[Peer]:
            sets = place.make_sets(lambda seed: self.make_set(size, place, seed))
            return [copy_peer(place, moved), *peers_of(sets, self.ways, self.check, self.of_flashinfer)]

        return Workload(self.op, size.label, size.fields, peers, moved, counts_kernels=size.is_counted)


def peers_of(
    sets: Sequence[S], ways: Mapping[str, Way[S]], check: Check[S], of_flashinfer: OfFlashInfer[S] | None = None
) -> list[Peer]:
    """A peer for each way over the same sets, this library's own last, FlashInfer's before it.

    This library's ways are held to the precision that it promises.
    """

    def calls(name: str, way: Way[S]) -> Case:
        precision = EXACT if name in (OURS, TWO_CALLS) else FP32
        case = Calls(sets, way, lambda own, results: check(own, results, precision, name))
        return Eager(case) if name == LOOP else case

    peers = {name: Peer(name, functools.partial(calls, name, way)) for name, way in ways.items()}
    ours = peers.pop(OURS)
    if of_flashinfer is not None:
        peers[FLASHINFER] = Peer(FLASHINFER, lambda: calls(FLASHINFER, of_flashinfer(library("sampling"))))
    return [*peers.values(), ours]
