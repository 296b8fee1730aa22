"""Measuring: peers take turns in one run, and a peer is as fast as its slowest rank.

A round gives every peer one batch: reset (results poisoned), some calls that absorb the ranks' different starts and
what the peer before left in caches and in the scheduler's books, the timed calls back to back, a check of the result.
What a machine does to the clock meanwhile, it does to all peers. A rank's figure is the median of its rounds; a peer's
figure is that of the slowest rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fusedcomm.cli.bench.registry import Runner

MAX_CALLS = 2000
CALIBRATION_CALLS = 3
WARM_UP_SHARE = 4
"""A batch of n timed calls starts with 1 + n / WARM_UP_SHARE that are not."""


class Ranks(Protocol):
    """What measuring needs of the ranks it runs on."""

    def barrier(self) -> None: ...

    def from_first_rank(self, number: int) -> int:
        """The number of rank 0, on all ranks."""

    def of_all_ranks(self, number: float) -> list[float]:
        """The numbers of all ranks, in rank order, on all ranks."""


class OneRank:
    """A process alone."""

    def barrier(self) -> None:
        return None

    def from_first_rank(self, number: int) -> int:
        return number

    def of_all_ranks(self, number: float) -> list[float]:
        return [number]


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 9
    batch_s: float = 0.04
    """What a timed batch should last, at least; long against the clock and a time slice of the machine."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    rank_medians_s: tuple[float, ...]
    calls: int
    rounds: int

    @property
    def slowest_s(self) -> float:
        return max(self.rank_medians_s)


def measure(
    runners: Sequence[Runner],
    ranks: Ranks,
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """The timing of each runner; every rank calls it with its own runners, in the same order.

    Raises:
        WrongResultError: a runner's result is wrong, in any round.
    """
    calls = [_calibrate(runner, ranks, effort, clock) for runner in runners]
    samples: list[list[float]] = [[] for _ in runners]
    for _ in range(effort.rounds):
        for i, runner in enumerate(runners):
            samples[i].append(_batch(runner, calls[i], ranks, clock) / calls[i])
            runner.check()
    return [
        Timing(tuple(ranks.of_all_ranks(statistics.median(own))), n, effort.rounds)
        for own, n in zip(samples, calls, strict=True)
    ]


def _calibrate(runner: Runner, ranks: Ranks, effort: Effort, clock: Callable[[], float]) -> int:
    """How many calls make a batch, the same on all ranks; also the warm-up."""
    _batch(runner, 1, ranks, clock)
    runner.check()
    calls = CALIBRATION_CALLS
    wanted = _wanted_calls(runner, calls, ranks, effort, clock)
    if wanted > 10 * calls:  # too short a look to go by
        wanted = _wanted_calls(runner, wanted // 5, ranks, effort, clock)
    return wanted


def _wanted_calls(runner: Runner, calls: int, ranks: Ranks, effort: Effort, clock: Callable[[], float]) -> int:
    seconds = _batch(runner, calls, ranks, clock) / calls
    return ranks.from_first_rank(min(int(effort.batch_s / max(seconds, 1e-9)) + 1, MAX_CALLS))


def _batch(runner: Runner, calls: int, ranks: Ranks, clock: Callable[[], float]) -> float:
    """Seconds that ``calls`` calls take, after the warm-up that a batch starts with."""
    warm_up = 1 + calls // WARM_UP_SHARE
    runner.reset(warm_up + calls)
    ranks.barrier()
    for index in range(warm_up):
        runner.call(index)
    start = clock()
    for index in range(warm_up, warm_up + calls):
        runner.call(index)
    return clock() - start
