"""The last stage fails as the others do: a typed error, and then a group that refuses further calls."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from harness import DEAD, run_ranks

import fusedcomm
from fusedcomm import GroupBrokenError, PeerDiedError, PeerTimeoutError


def sum_with_a_missing_rank(end: str) -> str:
    group = fusedcomm.init_distributed(timeout=3)
    group.all_reduce(torch.ones(4))
    if group.rank == 1:
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "close":
            group.close()
        time.sleep(6 if end == "late" else 1)
        return ""
    with pytest.raises(GroupBrokenError) as failure:
        group.all_reduce(torch.ones(4))
    with pytest.raises(GroupBrokenError, match="refuses further calls"):
        group.barrier()
    group.close()
    return f"{type(failure.value).__name__}: {failure.value}"


@pytest.mark.parametrize("settings", [{"FUSEDCOMM_DISABLE": "1"}, {"FUSEDCOMM_DEBUG": "1"}], ids=["disable", "debug"])
@pytest.mark.parametrize(
    ("end", "error"), [("kill", PeerDiedError), ("close", PeerDiedError), ("late", PeerTimeoutError)]
)
def test_a_missing_rank(end: str, error: type[GroupBrokenError], settings: dict[str, str]) -> None:
    gone = {1} if end == "kill" else set()
    said, other = run_ranks(2, sum_with_a_missing_rank, end, launcher="spawn", env=settings, expect_dead=gone)
    assert said.startswith(f"{error.__name__}: all_")
    assert "\n" not in said
    assert other is DEAD if gone else other == ""
