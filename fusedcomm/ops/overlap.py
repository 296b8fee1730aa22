"""A chain of operations on a side stream, beside what the current stream does.

What it is for: the indexer of sparse attention and the query path both start from the hidden states, and meet where
attention takes the indices. At decode sizes neither of them fills a GPU. Off by default; ``FUSEDCOMM_DUAL_STREAM=1``
turns it on.

The order that the capture of a graph wants is that of the data: fork before the query projection, join as late as the
data allows. A capture follows the two events to the side stream and back, and the graph gets a branch of its own there.

When it loses (by how streams work; measure a model before turning it on for it):

- Short chains. A fork and a join record two events and wait for two. Eagerly the host pays for each of the four, which
  is about a kernel launch together, and the side stream hears of the fork before it starts. In a graph the host pays
  nothing, but an edge between branches still costs the device time, and the kernel behind a join has two predecessors:
  it cannot start early by programmatic dependent launch.
- Kernels that fill the GPU, as in a prefill or a large batch. Side by side they share its multiprocessors, caches and
  bandwidth, take together what they took one after the other, and the query path may be the one that waits.
- Decoding without graphs, where the host is the bottleneck: it queues both branches one after the other anyway.

Collectives stay on the main stream: none in the forked function. They would be right there, as a group puts its calls
on several streams in order (fusedcomm/comm/streams.py). But then the main stream's next collective waits for the side
stream, which undoes the overlap; and a collective that waits for a slower rank holds multiprocessors meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from fusedcomm.env import Settings

P = ParamSpec("P")
R = TypeVar("R")


class Overlap:
    """Forks operations off to a side stream, which it owns; a model needs one for its device.

    ::

        overlap = Overlap(device, group.settings)

        with overlap.fork(indexer, hidden) as forked:  # before the query projection
            q = query_projection(hidden)
            indices = forked.join()  # as late as the data allows
        out = attention(q, indices)

    Off (without ``FUSEDCOMM_DUAL_STREAM=1``, with ``FUSEDCOMM_DISABLE=1``, on a CPU, inside of torch.compile) the
    function runs at once, in place: no streams, and the same results, errors and refusals.

    One fork at a time, none inside of another, all from one thread.
    """

    def __init__(self, device: torch.device | str, settings: Settings | None = None) -> None:
        """``settings``: in place of those of the environment, as a group's.

        Raises:
            SettingError: a malformed setting in the environment.
        """
        settings = Settings.from_environ() if settings is None else settings
        device = torch.device(device)
        wanted = settings.dual_stream and not settings.disable and device.type == "cuda"
        self._side = _SideStream(device) if wanted else None
        self._is_running = False
        self._open: Fork[Any] | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is a side stream."""
        return self._side is not None

    def fork(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Fork[R]:
        """Runs ``fn(*args, **kwargs)`` with the side stream current, behind all that the current stream has been given.

        The host has run fn when this returns; the device runs it beside what follows, until ``join``. What fn raises is
        raised here, with the streams joined. Can be captured in a graph; then it is joined within the same capture.

        Until the join, neither side may write what the other touches. The arguments are kept alive until then, so that
        nothing else gets their memory. Give fn its tensors as arguments: those that a closure refers to are kept only
        as long as its variables stay what they are.

        Raises:
            RuntimeError: inside of a forked function; or the fork before has not been joined (it is given up, so that
                the next one can go on).
        """
        if self._is_running:
            raise RuntimeError("fork: expected a call outside of forked functions, got one inside")
        if self._open is not None:
            name = self._open._name()
            self._open._give_up()
            raise RuntimeError(f"fork: expected the one before to be joined, got no join of that of {name}")
        side = None if torch.compiler.is_compiling() else self._side
        self._is_running = True
        try:
            result, branch = (fn(*args, **kwargs), None) if side is None else side.run(fn, args, kwargs)
        finally:
            self._is_running = False
        self._open = forked = Fork(self, result, branch, (fn, args, kwargs))
        return forked


class Fork(Generic[R]):
    """What runs on the side stream, until it is joined; leaving it as a context joins it where nobody has."""

    def __init__(
        self, owner: Overlap, result: R, branch: _Branch | None, kept: tuple[Callable[..., R], Any, Any]
    ) -> None:
        self._owner = owner
        self._result = result
        self._branch = branch
        self._kept: tuple[Callable[..., R], Any, Any] | None = kept
        self._is_given_up = False

    def join(self) -> R:
        """Makes the current stream wait for the fork, on the device, and returns the result; again: just the result.

        Raises:
            RuntimeError: the current stream is not the one that forked; a graph is being captured in it and was not at
                the fork, or the other way round; or the fork has been given up.
        """
        if self._is_given_up:
            raise RuntimeError("join: expected a fork that is open, got one that has been given up")
        if self._kept is not None:
            if self._branch is not None:
                self._branch.join()
            self._close()
        return self._result

    def __enter__(self) -> Fork[R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.join()
        finally:
            if self._kept is not None:
                self._give_up()

    def _name(self) -> str:
        """The forked function's, while it is open."""
        return "" if self._kept is None else getattr(self._kept[0], "__qualname__", repr(self._kept[0]))

    def _give_up(self) -> None:
        """Joins as far as that is possible."""
        self._is_given_up = True
        try:
            if self._branch is not None:
                self._branch.join_if_possible()
        finally:
            self._close()

    def _close(self) -> None:
        self._kept = None
        self._owner._open = None


class _Branch(NamedTuple):
    """The side stream's part of a fork."""

    main: torch.cuda.Stream
    """That forked."""
    done: torch.cuda.Event
    in_capture: bool

    def join(self) -> None:
        if torch.cuda.current_stream(self.main.device) != self.main:
            raise RuntimeError("join: expected the stream that forked to be current, got another one")
        if _is_capturing(self.main) != self.in_capture:
            there, here = ("inside", "outside") if self.in_capture else ("outside", "inside")
            raise RuntimeError(f"join: expected a fork {here} of the capture of a graph like the join, got one {there}")
        self.main.wait_event(self.done)

    def join_if_possible(self) -> None:
        # what is left of a capture that has ended cannot be waited for, nor can a capture wait for what began before it
        if _is_capturing(self.main) == self.in_capture:
            self.main.wait_event(self.done)


class _SideStream:
    """A stream and the two events of a fork, which serve every fork: there is one at a time.

    Memory of torch's caching allocator belongs to the stream that it was allocated on. Tensors of the main stream that
    fn reads are kept until the join, and what the main stream does with their memory then comes after fn. Those that fn
    allocates belong to the side stream, which reuses their memory only in a later fork, behind everything that every
    stream that ever forked had been given by then. So nothing needs ``record_stream``, with which a capture would not
    reuse the memory at all.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self._forked = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._mains: set[torch.cuda.Stream] = set()
        """The streams that forked outside of captures (within one, memory is the graph's own): nearly always one."""

    def run(self, fn: Callable[..., R], args: Any, kwargs: Any) -> tuple[R, _Branch | None]:
        """fn's result, and the branch it is on; None: it ran on the current stream."""
        main = torch.cuda.current_stream(self._device)
        if main == self._stream:  # torch has 32 streams a device and priority, and hands them out again
            return fn(*args, **kwargs), None
        self._forked.record(main)
        self._stream.wait_event(self._forked)
        with torch.cuda.stream(self._stream):
            in_capture = torch.cuda.is_current_stream_capturing()  # as main is
            if not in_capture:
                self._wait_for_others(main)
            try:
                result = fn(*args, **kwargs)
            except BaseException:
                self._done.record(self._stream)
                main.wait_event(self._done)
                raise
        self._done.record(self._stream)
        return result, _Branch(main, self._done, in_capture)

    def _wait_for_others(self, main: torch.cuda.Stream) -> None:
        """Orders a fork after what other streams that forked before do with results of their forks."""
        self._mains.add(main)
        for other in self._mains:
            # where a capture has begun since, torch has synchronised
            if other != main and not _is_capturing(other):
                self._stream.wait_stream(other)


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
