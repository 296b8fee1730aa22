"""The tensor-parallel group of this process: made by init_distributed, found by get_tp_group."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from fusedcomm.env import Settings
from fusedcomm.errors import FusedCommError
from fusedcomm.groups import bootstrap
from fusedcomm.groups.coordinator import GroupCoordinator, check_timeout
from fusedcomm.groups.device import check_device

_tp_group: GroupCoordinator | None = None
_initializing_pid: int | None = None  # of the process that initialised torch.distributed here; a fork inherits it


def init_distributed(
    tp_size: int | None = None, device: torch.device | str | None = None, timeout: float | None = None
) -> GroupCoordinator:
    """Makes the tensor-parallel group of this process; every rank of the job calls it.

    Works under torchrun, mpirun (mpi4py), srun, and alone; a torch.distributed that is already initialised is used.

    Args:
        tp_size: ranks per group; the job's ranks are cut into consecutive groups of this size. None: one group of all.
        device: where tensors live, as for GroupCoordinator: ``"cpu"``, ``"cuda"``, or a GPU by its index. None: a GPU
            where torch sees one, else the CPU. A GPU becomes torch's current device.
        timeout: deadline of every wait in seconds; None takes ``FUSEDCOMM_TIMEOUT_S``.

    Raises:
        ValueError: tp_size does not divide the number of ranks, or another bad argument.
        FusedCommError: there is a group already, or the launcher's variables make no sense.
    """
    global _tp_group, _initializing_pid
    if _tp_group is not None and not _tp_group.closed:
        raise FusedCommError("init_distributed: there is a tensor-parallel group already; destroy_distributed() first")
    # before ranks meet: one that stopped half-way would leave the others waiting for it
    check_device(device)
    check_timeout(timeout)
    if tp_size is not None and not isinstance(tp_size, int):
        raise ValueError(f"tp_size: expected a whole number, got {tp_size!r}")
    # how long to wait for the others; a malformed setting is reported by all ranks together, when the group is made
    seconds = timeout
    if seconds is None:
        try:
            seconds = Settings.from_environ().timeout_s
        except FusedCommError:
            seconds = Settings().timeout_s
    if dist.is_initialized():
        rank, world, local_rank = (
            dist.get_rank(),
            dist.get_world_size(),
            dist.get_node_local_rank(dist.get_rank()),
        )
    else:
        facts = bootstrap.detect()
        rank, world, local_rank = facts.rank, facts.world_size, facts.local_rank
    size = world if tp_size is None else tp_size
    if size < 1 or world % size:
        raise ValueError(f"tp_size: expected a divisor of the number of ranks ({world}), got {tp_size}")
    if not dist.is_initialized() and world > 1:
        bootstrap.initialize(facts, seconds)
        _initializing_pid = os.getpid()
    first = rank // size * size
    try:
        _tp_group = GroupCoordinator(range(first, first + size), device=device, timeout=timeout, local_rank=local_rank)
    except BaseException:
        destroy_distributed()
        raise
    if _tp_group.device.type == "cuda":
        # or what the caller makes on "cuda" next would all be on the first GPU
        torch.cuda.set_device(_tp_group.device)
    return _tp_group


def get_tp_group() -> GroupCoordinator:
    """The group that init_distributed made; RuntimeError if there is none."""
    if _tp_group is None:
        raise FusedCommError("there is no tensor-parallel group: call fusedcomm.init_distributed() first")
    return _tp_group


def destroy_distributed() -> None:
    """Closes the tensor-parallel group, and torch.distributed if init_distributed initialised it. Twice is fine."""
    global _tp_group, _initializing_pid
    if _tp_group is not None:
        _tp_group.close()
        _tp_group = None
    if _initializing_pid == os.getpid() and dist.is_initialized():
        dist.destroy_process_group()
    _initializing_pid = None
