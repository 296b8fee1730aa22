"""How much longer a replayed graph of calls takes while something else runs on the device.

Ranks align beside the load by a kernel that finds room there: NCCL's may have to wait for the load's end, and then so
would everything that comes after.
"""

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


TOO_SHORT = "load: expected to last as long as the graph beside it, got one that ends before"
"""Why there is no figure: the graph's kernels found no room beside the load, and waited for its end."""


class Interference(NamedTuple):
    """Seconds a call, the slowest rank's medians."""

    alone_s: float
    loaded_s: float


def measure_loaded(
    entries: Sequence[Entry], load: Load, ranks: Ranks, device: Device, calls: int, rounds: int = 15
) -> list[Interference | None]:
    """Each entry's graph alone and beside ``load``, in turn, once a round.

    None for an entry whose graph the load never outlasted (TOO_SHORT), on all ranks.
    """
    alone: list[list[float]] = [[] for _ in entries]
    loaded: list[list[float]] = [[] for _ in entries]
    present = dict(enumerate(entries))
    for _ in range(rounds):
        for i, entry in list(present.items()):
            alone[i].append(_once(entry, ranks, device, None)[0])
            beside = _beside(entry, ranks, device, load, alone[i][-1])
            if beside is None:
                del present[i]
            else:
                loaded[i].append(beside)
    return [
        Interference(_slowest(ranks, alone[i], calls), _slowest(ranks, loaded[i], calls)) if i in present else None
        for i in range(len(entries))
    ]


def _slowest(ranks: Ranks, samples: list[float], calls: int) -> float:
    return max(ranks.of_all_ranks(statistics.median(samples) / calls))


def _beside(entry: Entry, ranks: Ranks, device: Device, load: Load, alone_s: float) -> float | None:
    length = 10 * alone_s + MARGIN_S
    for _ in range(8):
        seconds, slack = _once(entry, ranks, device, functools.partial(load.run, length))
        # ranks repeat together: one that went on alone would wait for the others
        if min(ranks.of_all_ranks(slack)) > 0:
            return seconds
        length *= 2
    return None


def _once(entry: Entry, ranks: Ranks, device: Device, start_load: Callable[[], Any] | None) -> tuple[float, float]:
    """Seconds of one replay, and how much longer the load lasted."""
    if entry.case is None or entry.replay is None:
        raise RuntimeError("entry: expected one that is prepared")
    entry.case.reset()
    device.finish()
    load_end = None if start_load is None else start_load()
    device.hold()  # long enough for the load to be under way on every rank
    if start_load is None:
        ranks.align()
    else:
        ranks.align_beside_load()
    start = device.mark()
    entry.replay()
    end = device.mark()
    device.finish()
    slack = 0.0 if load_end is None else device.seconds(end, load_end)
    return device.seconds(start, end), slack
