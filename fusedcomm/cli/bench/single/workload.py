"""An op at one size: sets of inputs that calls take turns with, and the peers that do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from fusedcomm.cli.bench.gpu.harness import Case
from fusedcomm.cli.bench.gpu.shape import poison

S = TypeVar("S")
Results = tuple[torch.Tensor, ...]

BYTES_PER_S, FLOPS_PER_S = 4e12, 5e14
"""About what a current GPU does: enough to say how many calls make a graph."""
GRAPH_S = 1e-3
MOST_CALLS, FEWEST_CALLS = 64, 5
WARM_SETS = 4
CACHES = 3
"""So many times the last cache, one after the other, leave nothing in it that will be read again."""


class Plan(NamedTuple):
    """How one size is measured."""

    calls: int
    """In a graph."""
    sets: int
    """Of inputs that the calls take turns with."""
    is_cold: bool
    """Whether the sets together are too much for the last cache."""


@dataclass(frozen=True)
class Place:
    """Where a workload's tensors go, and how many sets of them are made."""

    device: torch.device
    plan: Plan

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator(seed), device=self.device).to(dtype)

    def make_sets(self, make: Callable[[int], S]) -> list[S]:
        """``make(seed)`` for each set."""
        return [make(1000 * index) for index in range(self.plan.sets)]


class Peer(NamedTuple):
    """A way to do a workload; ``make`` readies it for a measurement."""

    name: str
    make: Callable[[], Case]


@dataclass(frozen=True)
class Workload:
    """An op at one size."""

    op: str
    label: str
    sizes: Mapping[str, int | str]
    """What the label stands for."""
    peers: Callable[[Place], Sequence[Peer]]
    """Makes the inputs, and what runs on them."""
    moved_bytes: int
    """What a call has to read and to write, however it does it."""
    flops: int = 0
    """Of matrix products; 0 where they are not what counts."""
    counts_kernels: bool = False
    """Whether to count what its peers launch."""

    @property
    def name(self) -> str:
        return f"{self.op}/{self.label}"

    def plan(self, cache_bytes: int) -> Plan:
        """Calls for a graph of about a millisecond; sets that the last cache does not hold, where that can be."""
        seconds = max(self.moved_bytes / BYTES_PER_S, self.flops / FLOPS_PER_S, 1e-9)
        calls = max(FEWEST_CALLS, min(MOST_CALLS, int(GRAPH_S / seconds)))
        wanted = max(2, -(-CACHES * cache_bytes // max(self.moved_bytes, 1)))
        is_cold = wanted <= calls
        return Plan(calls, wanted if is_cold else WARM_SETS, is_cold)


class Calls(Generic[S]):
    """A case from what a call does with one set, and what is to come out: calls take turns with the sets."""

    def __init__(self, sets: Sequence[S], run: Callable[[S], Results], check: Callable[[S, Results], None]) -> None:
        """``run`` returns the tensors that it has written, the set's or new ones; ``check`` raises WrongResultError."""
        self._sets, self._run, self._check = sets, run, check
        self._last = 0
        self._results: Results = ()

    def reset(self) -> None:
        """Poisons the results of the last call, which are those that check looks at."""
        poison(*self._results)

    def call(self, index: int) -> None:
        self._last = index % len(self._sets)
        self._results = self._run(self._sets[self._last])

    def check(self) -> None:
        self._check(self._sets[self._last], self._results)

    def facts(self) -> Mapping[str, object]:
        return {}
