"""Closing an NCCL group ends, whatever NCCL waits for; no GPU is needed to see that."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch

from fusedcomm import GroupCoordinator
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


class Recorded:
    """Stands for what a group owns; notes when it is closed."""

    def __init__(self, log: list[str], failed: bool) -> None:
        self.log, self.failed = log, failed

    def has_failed(self) -> bool:
        return self.failed

    def close(self) -> None:
        self.log.append("custom")


@pytest.mark.parametrize("failed", [False, True])
def test_a_group_lets_nccl_go_before_it_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    """NCCL may wait on the device for a peer that is gone, also where only the device knows of that as yet."""
    log: list[str] = []

    def close(group: object, device: torch.device, *, is_healthy: bool) -> None:
        log.append(f"nccl, healthy: {is_healthy}")

    group = GroupCoordinator(device="cpu")
    monkeypatch.setattr(process_group, "close", close)
    group._custom, group._group = Recorded(log, failed), object()  # type: ignore[assignment]
    group.close()
    assert log == [f"nccl, healthy: {not failed}", "custom"]
