"""How much longer a replayed graph of calls takes while something else runs on the device."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from fusedcomm.cli.bench.gpu.harness import Device, Entry, Ranks

MARGIN_S = 3e-3
"""How much longer than the graph alone the load runs at first; doubled where it ended too early."""


class Load(Protocol):
    """Something that runs beside the main stream."""

    def run(self, seconds: float) -> Any:
        """Starts now, for at least ``seconds``; returns a mark of its end."""


class LoadTooShortError(RuntimeError):
    """The load never lasted as long as a graph did; raised by all ranks."""


class Interference(NamedTuple):
    """Seconds a call, the slowest rank's medians."""

    alone_s: float
    loaded_s: float


def measure_loaded(
    entries: Sequence[Entry], load: Load, ranks: Ranks, device: Device, calls: int, rounds: int = 15
) -> list[Interference]:
    """Each entry's graph alone and beside ``load``, in turn, once a round.

    Raises:
        LoadTooShortError: the load never lasted as long as a graph did.
    """
    alone: list[list[float]] = [[] for _ in entries]
    loaded: list[list[float]] = [[] for _ in entries]
    for _ in range(rounds):
        for i, entry in enumerate(entries):
            alone[i].append(_once(entry, ranks, device, None)[0])
            loaded[i].append(_beside(entry, ranks, device, load, alone[i][-1]))
    return [
        Interference(_slowest(ranks, a, calls), _slowest(ranks, b, calls)) for a, b in zip(alone, loaded, strict=True)
    ]


def _slowest(ranks: Ranks, samples: list[float], calls: int) -> float:
    return max(ranks.of_all_ranks(statistics.median(samples) / calls))


def _beside(entry: Entry, ranks: Ranks, device: Device, load: Load, alone_s: float) -> float:
    length = 10 * alone_s + MARGIN_S
    for _ in range(8):
        seconds, slack = _once(entry, ranks, device, functools.partial(load.run, length))
        # ranks repeat together: one that went on alone would wait for the others
        if min(ranks.of_all_ranks(slack)) > 0:
            return seconds
        length *= 2
    raise LoadTooShortError("load: expected to last as long as a graph beside it, got one that ends before")


def _once(entry: Entry, ranks: Ranks, device: Device, start_load: Callable[[], Any] | None) -> tuple[float, float]:
    """Seconds of one replay, and how much longer the load lasted."""
    if entry.case is None or entry.replay is None:
        raise RuntimeError("entry: expected one that is prepared")
    entry.case.reset()
    device.finish()
    load_end = None if start_load is None else start_load()
    device.hold()  # long enough for the load to be under way on every rank
    ranks.align()
    start = device.mark()
    entry.replay()
    end = device.mark()
    device.finish()
    slack = 0.0 if load_end is None else device.seconds(end, load_end)
    return device.seconds(start, end), slack
