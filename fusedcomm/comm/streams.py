"""Calls of one group on several streams of a GPU, one after the other.

Two kernels of a group that ran at the same time would use the same slots. So a call on another stream than the one
before waits on the device for that stream; the host waits for nothing.

Within the capture of a graph the same holds among its streams: the wait becomes an edge of the graph. A graph that is
replayed is out of this module's sight. It counts as calls of the stream that it is replayed on: whoever replays it on
another stream than the calls before and after orders the two, as for any other work that shares memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class StreamOrder:
    """Remembers the stream of a group's last call; ``before_call`` orders the next one after it.

    The kernels' side looks at the current stream by itself (csrc/gpu/stream_gate.h) and lets calls through on the
    stream that ``admit`` named last, so nothing is done here as long as it stays the same.
    """

    def __init__(self, device: int, admit: Callable[[int, bool], None]) -> None:
        """``admit(stream, once)``: calls on the stream need no ``before_call``; only one of them if ``once``."""
        self._device = device
        self._admit = admit
        self._current = torch._C._cuda_getCurrentRawStream
        self._last = self._current(device)
        """The stream of the last call that ran (or the current one, before there is any)."""
        self._captured: int | None = None
        """The stream of the last call that was captured, as far as it was seen."""
        self._fast: int | None = self._last
        """The stream on which the next call needs no look; None while a capture uses several streams."""
        admit(self._last, False)

    def before_call(self) -> None:
        """Called before a launch on a current stream that is not admitted.

        Raises:
            RuntimeError: a capture is going on in the stream of the last call, and this call is outside of it.
        """
        stream = self._current(self._device)
        if stream != self._fast:
            self._switch(stream)
        self._admit(stream, self._fast is None)

    def _switch(self, stream: int) -> None:
        if not self._is_capturing(stream):
            if stream != self._last:
                if self._is_capturing(self._last):
                    raise RuntimeError(
                        "a graph is being captured in the stream of this group's last call, and this call is on "
                        "another stream outside of the capture: make it before or after"
                    )
                self._wait(stream, self._last)
            self._last = self._fast = stream
            return
        before = self._captured
        if before is None or before == stream or not self._is_capturing(before):
            # The call before was not seen: it was captured on the stream of the last eager call, or there is none. (Of
            # a capture that has ended nothing runs by itself, and nothing can be waited for.)
            before = self._last if self._fast is not None and self._is_capturing(self._last) else None
        if before is not None and before != stream:
            self._wait(stream, before)
        self._captured, self._fast = stream, None

    def _wait(self, stream: int, for_stream: int) -> None:
        event = torch.cuda.Event()
        event.record(self._stream(for_stream))
        self._stream(stream).wait_event(event)

    def _is_capturing(self, stream: int) -> bool:
        with torch.cuda.stream(self._stream(stream)):
            return torch.cuda.is_current_stream_capturing()

    def _stream(self, stream: int) -> torch.cuda.Stream:
        device = torch.device("cuda", self._device)
        # torch takes the pointer 0 for none, and would make a new stream
        return torch.cuda.ExternalStream(stream, device=device) if stream else torch.cuda.default_stream(device)


class GraphCapture(NamedTuple):
    """What GroupCoordinator.graph_capture gives: the stream to capture in, current meanwhile; None on CPU."""

    stream: torch.cuda.Stream | None


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[GraphCapture]:
    """Makes a stream of its own the current one, ordered after and before the one that is current outside."""
    outside, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield GraphCapture(stream)
    outside.wait_stream(stream)
