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
        super().__init__(0)

    def call(self, stream: int) -> list[tuple[int, int]]:
        """A collective on this stream; the waits that it brought."""
        self.now, before = stream, len(self.waits)
        self.before_call()
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
