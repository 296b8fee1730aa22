"""A process forked off a rank leaves the rank's group alone, whatever it does with its copy."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
from harness import run_ranks

import fusedcomm
from fusedcomm import GroupClosedError
from fusedcomm.groups import world


def in_a_child(action: str, group: fusedcomm.GroupCoordinator) -> None:
    if action == "call":
        with pytest.raises(GroupClosedError, match="fork"):
            group.all_reduce(torch.ones(4))
    elif action == "close":
        group.close()
        group.close()
    elif action == "destroy":
        fusedcomm.destroy_distributed()
    else:
        world._tp_group = None


def fork_and_go_on(action: str) -> None:
    group = fusedcomm.init_distributed(timeout=10)
    group.all_reduce(torch.ones(4))
    if group.rank == 1:
        child = os.fork()
        if child == 0:
            signal.alarm(8)  # a hang ends, and fails the test
            code = 1
            try:
                in_a_child(action, group)
                del group
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert group.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
    fusedcomm.destroy_distributed()


@pytest.mark.parametrize("action", ["call", "close", "destroy", "forget"])
def test_a_forked_child(action: str) -> None:
    run_ranks(2, fork_and_go_on, action, launcher="spawn")
