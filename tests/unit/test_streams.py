"""Calls on several streams: what waits for what, with pretended streams."""

from __future__ import annotations

import pytest
import torch

from fusedcomm.comm.streams import StreamOrder

MAIN, SIDE, OTHER, CAPTURE = 0, 17, 18, 19


class Pretended(StreamOrder):
    """Notes the waits, as (who, for whom); ``capturing`` are the streams that capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = MAIN
        self.capturing: set[int] = set()
        self.waits: list[tuple[int, int]] = []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: self.now, raising=False)
        self.admitted: tuple[int, bool] | None = None
        self.looks = 0
        super().__init__(0, self.note)

    def note(self, stream: int, once: bool) -> None:
        self.admitted = stream, once

    def call(self, stream: int) -> list[tuple[int, int]]:
        """A collective on this stream; the waits that it brought. As csrc/gpu/stream_gate.h lets it through."""
        self.now, before = stream, len(self.waits)
        if self.admitted is None or self.admitted[0] != stream:
            self.looks += 1
            self.before_call()
        assert self.admitted is not None
        assert self.admitted[0] == stream
        if self.admitted[1]:
            self.admitted = None
        return self.waits[before:]

    def _wait(self, stream: int, for_stream: int) -> None:
        self.waits.append((stream, for_stream))

    def _is_capturing(self, stream: int) -> bool:
        return stream in self.capturing


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


def test_one_stream_waits_for_nothing(order: Pretended) -> None:
    assert [order.call(MAIN) for _ in range(3)] == [[], [], []]


def test_calls_on_one_stream_need_no_look(order: Pretended) -> None:
    for stream, looks in ((MAIN, 0), (MAIN, 0), (SIDE, 1), (SIDE, 1), (MAIN, 2), (MAIN, 2)):
        order.call(stream)
        assert order.looks == looks


def test_calls_in_a_capture_of_a_stream_beside_are_each_looked_at(order: Pretended) -> None:
    order.capturing = {CAPTURE}
    for looks in (1, 2, 3):
        order.call(CAPTURE)
        assert order.looks == looks
    order.capturing = set()
    order.call(MAIN)
    order.call(MAIN)
    assert order.looks == 4


def test_a_refused_call_admits_nothing(order: Pretended) -> None:
    order.call(SIDE)
    order.capturing = {SIDE}
    with pytest.raises(RuntimeError):
        order.call(MAIN)
    assert order.admitted == (SIDE, False)


def test_another_stream_waits_for_the_one_before(order: Pretended) -> None:
    assert order.call(SIDE) == [(SIDE, MAIN)]
    assert order.call(SIDE) == []
    assert order.call(OTHER) == [(OTHER, SIDE)]
    assert order.call(MAIN) == [(MAIN, OTHER)]


def test_a_capture_waits_for_no_stream_outside(order: Pretended) -> None:
    order.call(MAIN)
    order.capturing = {CAPTURE}
    assert order.call(CAPTURE) == []
    assert order.call(CAPTURE) == []
    order.capturing = set()
    # what was captured has not run: the calls before and after it are on one stream
    assert order.call(MAIN) == []


def test_streams_of_one_capture_are_ordered(order: Pretended) -> None:
    order.capturing = {CAPTURE, SIDE}
    assert order.call(CAPTURE) == []
    assert order.call(SIDE) == [(SIDE, CAPTURE)]
    assert order.call(CAPTURE) == [(CAPTURE, SIDE)]
    order.capturing = {OTHER}  # the next one
    assert order.call(OTHER) == []


def test_streams_of_a_capture_on_the_stream_of_the_eager_calls_are_ordered(order: Pretended) -> None:
    order.call(CAPTURE)  # warming up
    for _ in range(2):
        order.capturing = {CAPTURE, SIDE}
        assert order.call(CAPTURE) == []
        assert order.call(SIDE) == [(SIDE, CAPTURE)]
        assert order.call(CAPTURE) == [(CAPTURE, SIDE)]
        assert order.call(CAPTURE) == []
        order.capturing = set()
        assert order.call(CAPTURE) == []  # eager


def test_a_call_on_the_captures_stream_after_it(order: Pretended) -> None:
    order.call(MAIN)
    order.capturing = {SIDE}
    order.call(SIDE)
    order.capturing = set()
    assert order.call(SIDE) == [(SIDE, MAIN)]


def test_a_call_beside_a_capture_in_the_last_calls_stream_is_refused(order: Pretended) -> None:
    order.call(SIDE)  # a warm-up
    order.capturing = {SIDE}
    order.call(SIDE)
    with pytest.raises(RuntimeError, match="graph is being captured in the stream of this group's last call"):
        order.call(MAIN)
    order.capturing = set()
    assert order.call(MAIN) == [(MAIN, SIDE)]
