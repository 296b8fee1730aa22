"""Closing an NCCL group ends, whatever NCCL waits for; no GPU is needed to see that."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch

from fusedcomm.comm import process_group

DEVICE = torch.device("cuda", 0)


class StuckGroup:
    """Its abort() waits until it is let go, as NCCL's does for captured graphs."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.released.wait(20)
        self.aborted.set()


@pytest.fixture(autouse=True)
def _nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_is_nccl", lambda group: True)


def test_close_goes_on_without_nccl_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_ABORT_S", 0.1)
    group = StuckGroup()
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match="captured graph"):
        process_group.close(group, DEVICE, is_healthy=False)  # type: ignore[arg-type]
    assert time.monotonic() - start < 10
    assert not group.aborted.is_set()
    group.released.set()
    assert group.aborted.wait(10), "abort() goes on in the background"


def test_close_waits_for_an_abort_that_ends() -> None:
    group = StuckGroup()
    group.released.set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process_group.close(group, DEVICE, is_healthy=False)  # type: ignore[arg-type]
    assert group.aborted.is_set()
