"""Measuring on a device: cases take turns, each as a replayed graph of many calls, and the slowest rank counts.

A round replays the graph of every case once. Before each replay, outside the clock, its inputs are restored, its
results poisoned, and the ranks aligned on the device. A rank's figure is the median of its rounds divided by the calls
in a graph; a case's figure is that of the slowest rank. A whole round is queued at once, and the device is held up
while that begins, so that no replay waits for the host. A case that itself waits for the device (``Eager``) starts on
an idle one, and the device is held up again behind it.

What cannot be measured on one rank is dropped on all of them, with the reason, before ranks could wait for each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fusedcomm.cli.bench.harness import Timing
from fusedcomm.cli.bench.registry import WrongResultError


class AbsentError(Exception):
    """A peer cannot do a case here; the text says why."""


class Case(Protocol):
    """One peer, ready to run one shape over and over."""

    def reset(self) -> None:
        """Restores inputs that calls change, and poisons the results."""

    def call(self, index: int) -> None:
        """Call ``index`` of a graph, queued on the current stream."""

    def check(self) -> None:
        """Raises WrongResultError unless the last call's results are right; the device is idle."""

    def facts(self) -> Mapping[str, object]:
        """What else the record of this case says."""


@dataclass(frozen=True)
class Eager:
    """A case that waits for the device on the host, so no graph holds it: its calls are made again and again."""

    case: Case
    calls: int = 1
    """In place of a graph's."""

    def reset(self) -> None:
        self.case.reset()

    def call(self, index: int) -> None:
        self.case.call(index)

    def check(self) -> None:
        self.case.check()

    def facts(self) -> Mapping[str, object]:
        return {**self.case.facts(), "eager": True}


class Device(Protocol):
    """What measuring needs of a device."""

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """A function that replays, as one graph, what ``queue`` queues."""

    def hold(self) -> None:
        """Queues something that keeps the device busy for about a millisecond."""

    def mark(self) -> Any:
        """Queues a point in time."""

    def seconds(self, start: Any, end: Any) -> float:
        """The time between two marks that have been reached."""

    def finish(self) -> None:
        """Waits until nothing is queued."""


class Ranks(Protocol):
    """What measuring needs of the ranks."""

    def align(self) -> None:
        """Queues something on the device that no rank passes before all have come to it."""

    def align_beside_load(self) -> None:
        """As align, by a kernel that runs beside one that keeps the multiprocessors occupied."""

    def first_reason(self, reason: str) -> str:
        """The first reason that a rank gives, with its rank, on all ranks; empty if none gives one."""

    def from_first_rank(self, number: int) -> int: ...

    def of_all_ranks(self, number: float) -> list[float]: ...


@dataclass(frozen=True)
class Effort:
    """How long to measure a shape."""

    calls: int = 20
    """In one graph."""
    budget_s: float = 1.5
    min_rounds: int = 7
    max_rounds: int = 400
    warm_up_calls: int = 3

    def rounds(self, round_s: float) -> int:
        return max(self.min_rounds, min(self.max_rounds, int(self.budget_s / max(round_s, 1e-6))))


@dataclass
class Entry:
    """A case on its way through a measurement; ``absent`` says why it ended early."""

    op: str
    name: str
    case: Case | None = None
    absent: str = ""
    is_wrong: bool = False
    """It is absent because its results are wrong."""
    replay: Callable[[], None] | None = None
    calls: int = 0
    """In a replay."""
    timing: Timing | None = None
    facts: dict[str, object] = field(default_factory=dict)


def prepare(
    peers: Sequence[tuple[str, str, Callable[[], Case]]], ranks: Ranks, device: Device, effort: Effort
) -> list[Entry]:
    """Makes each ``(op, name, make)``, runs it eagerly and as a graph, and checks the results of both."""
    entries = []
    for op, name, make in peers:
        entry = Entry(op, name)
        entries.append(entry)
        _attempt(entry, ranks, lambda entry=entry, make=make: _make(entry, make))  # type: ignore[misc]
        _attempt(entry, ranks, lambda entry=entry: _run_eagerly(entry, device, effort))  # type: ignore[misc]
        _attempt(entry, ranks, lambda entry=entry: _capture(entry, device, effort))  # type: ignore[misc]
        _attempt(entry, ranks, lambda entry=entry: _check_replay(entry, device))  # type: ignore[misc]
    return entries


def measure(
    entries: Sequence[Entry],
    ranks: Ranks,
    device: Device,
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Times the entries that are not absent, in turn, and checks their results once more."""
    present = [e for e in entries if not e.absent]
    if not present:
        return
    _round(present, ranks, device)
    start = clock()
    _round(present, ranks, device)
    rounds = ranks.from_first_rank(effort.rounds(clock() - start))
    samples = [_round(present, ranks, device) for _ in range(rounds)]
    for i, entry in enumerate(present):
        median = statistics.median(sample[i] for sample in samples) / entry.calls
        entry.timing = Timing(tuple(ranks.of_all_ranks(median)), entry.calls, rounds)
    for entry in present:
        _attempt(entry, ranks, lambda entry=entry: _check_replay(entry, device))  # type: ignore[misc]


def host_seconds(
    case: Case,
    device: Device,
    ranks: Ranks,
    batches: int = 15,
    calls: int = 100,
    clock: Callable[[], float] | None = None,
    call: Callable[[int], None] | None = None,
) -> float:
    """What an eager call costs the host that queues it, on the slowest rank: the median over batches of ``calls``.

    ``call``: in place of the case's own. A batch is short enough for the device's queue to take it, so the host never
    waits for the device.
    """
    clock = time.perf_counter if clock is None else clock
    call = case.call if call is None else call
    samples = []
    for _ in range(batches):
        case.reset()
        ranks.align()
        device.finish()
        start = clock()
        for _ in range(calls):
            call(0)
        samples.append((clock() - start) / calls)
        device.finish()
    return max(ranks.of_all_ranks(statistics.median(samples)))


def _attempt(entry: Entry, ranks: Ranks, step: Callable[[], None]) -> None:
    """Runs one step of an entry on all ranks; if any fails, the entry is absent on all."""
    if entry.absent:
        return
    reason = ""
    try:
        step()
    except Exception as error:  # whatever a peer's library raises: the others are measured all the same
        entry.is_wrong = isinstance(error, WrongResultError)
        text = str(error).strip() or repr(error)
        reason = text if isinstance(error, AbsentError) else f"{type(error).__name__}: {text}"
    entry.absent = ranks.first_reason(reason)
    if entry.absent:
        entry.case = entry.replay = entry.timing = None


def _make(entry: Entry, make: Callable[[], Case]) -> None:
    entry.case = make()


def _run_eagerly(entry: Entry, device: Device, effort: Effort) -> None:
    case = _present(entry.case)
    case.reset()
    for index in range(min(effort.warm_up_calls, effort.calls)):
        case.call(index)
    device.finish()
    case.check()
    entry.facts.update(case.facts())


def _capture(entry: Entry, device: Device, effort: Effort) -> None:
    case = _present(entry.case)
    case.reset()
    device.finish()

    entry.calls = case.calls if isinstance(case, Eager) else effort.calls

    def queue() -> None:
        for index in range(entry.calls):
            case.call(index)

    entry.replay = queue if isinstance(case, Eager) else device.capture(queue)


def _check_replay(entry: Entry, device: Device) -> None:
    case = _present(entry.case)
    case.reset()
    _present(entry.replay)()
    device.finish()
    case.check()


def _round(entries: Sequence[Entry], ranks: Ranks, device: Device) -> list[float]:
    """Seconds that each entry's graph takes."""
    marks = []
    is_held = False
    for entry in entries:
        is_eager = isinstance(entry.case, Eager)
        if not is_held and not is_eager:
            device.hold()
        is_held = not is_eager  # an eager case leaves nothing queued
        _present(entry.case).reset()
        ranks.align()
        if is_eager:
            device.finish()
        start = device.mark()
        _present(entry.replay)()
        marks.append((start, device.mark()))
    device.finish()
    return [device.seconds(start, end) for start, end in marks]


def _present(value: Any) -> Any:
    if value is None:
        raise RuntimeError("case: expected one that is prepared")
    return value
