"""Loading that all ranks finish, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.models.errors import CheckpointError

T = TypeVar("T")


def load_together(load: Callable[[], T], group: GroupCoordinator) -> T:
    """The result of ``load()``, or an error on every rank if any rank's ``load`` raised; a collective call.

    A rank that fails alone (its host lacks a file) would leave the others waiting in their first all-reduce.

    Raises:
        CheckpointError: ``load`` succeeded here and failed on other ranks, which are named.
        Exception: what ``load`` raised here.
    """
    failure: Exception | None = None
    try:
        result = load()
    except Exception as error:
        failure = error
    flag = torch.tensor([float(failure is not None)], device=group.device)
    failed = group.all_gather(flag, dim=0).nonzero().flatten().tolist()
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"loading failed on ranks {failed}; their own errors say why")
    return result
