"""What the doctor says of GPUs, as far as it can be told without one."""

from __future__ import annotations

import pytest
import torch

from fusedcomm.cli.doctor import gpu
from fusedcomm.cli.doctor.check import Level


def test_without_a_gpu_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = gpu.check_gpus()
    assert finding.level is Level.INFO
    assert "groups run on the CPU" in finding.text


def test_peer_access_names_the_pairs_that_miss_it() -> None:
    assert gpu.check_peer_access([[True]]) == []
    (finding,) = gpu.check_peer_access([[True, True], [True, True]])
    assert (finding.level, finding.text) == (Level.OK, "all 2 reach each other's memory")
    (finding,) = gpu.check_peer_access([[True, True, False], [True] * 3, [False, True, True]])
    assert finding.level is Level.WARN
    assert finding.text.startswith("not from GPU 0 to 2, 2 to 0:")
