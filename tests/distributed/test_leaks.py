"""Nothing is left: no descriptor, mapping, thread or name in /dev/shm, whatever ended the group or its ranks."""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool, run_ranks
from ranked import raises, works

import fusedcomm
from fusedcomm import CallMismatchError, GroupCoordinator, Settings
from fusedcomm.comm import symmetric_buffer


def shm_names(*pids: int) -> list[str]:
    """What these processes have in /dev/shm; other tests may run at the same time."""
    return [path.name for pid in pids for path in Path("/dev/shm").glob(f"fusedcomm-*-{pid}-*")]


def holdings() -> dict[str, Any]:
    """What this process holds, by kind."""
    gc.collect()
    fds: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]] += 1  # socket, pipe, anon_inode, a path
        except OSError:
            continue  # that of the listing itself
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "fds": dict(fds),
        "shared maps": [line.split()[-1] for line in maps if "memfd:fusedcomm" in line or "/dev/shm/fusedcomm" in line],
        "threads": len(os.listdir("/proc/self/task")),
        "names": shm_names(os.getpid()),
    }


def create_and_close(cycles: int, call: bool, kind: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if kind == "shm":

            def fails(*arguments: object) -> None:
                raise OSError("no memfd")

            monkeypatch.setattr(symmetric_buffer.os, "memfd_create", fails)
        for cycle in range(cycles):
            with GroupCoordinator(settings=Settings(buffer_mb=1 + cycle % 3)) as group:
                if call:
                    works(group)
    dist.barrier()
    return holdings()


def cycles_in_a_row(kind: str, cycles: int) -> None:
    create_and_close(3, True, kind)  # what is made once: threads of torch, the library
    before = holdings()
    after = create_and_close(cycles, True, kind)
    assert after["names"] == []
    assert after["shared maps"] == []
    assert after["fds"] == before["fds"]
    assert after["threads"] <= before["threads"]


@pytest.mark.parametrize(("kind", "cycles"), [("memfd", 200), ("shm", 30)])
def test_groups_that_are_closed_leave_nothing(ranks: RankPool, kind: str, cycles: int) -> None:
    ranks(2).run(cycles_in_a_row, kind, cycles, timeout=120)


def other_ends() -> None:
    """Groups that break, fall back, fail in set-up, or are dropped without close()."""

    def once() -> None:
        broken = GroupCoordinator()
        call = broken.barrier if broken.rank == 0 else lambda: broken.all_reduce(torch.ones(3))
        raises(CallMismatchError, call)
        broken.close()
        dropped = GroupCoordinator()
        works(dropped)
        dist.barrier()
        del dropped
        gc.collect()
        with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dist.get_rank() == 1:

                def fails(*arguments: object) -> None:
                    raise OSError("no space")

                monkeypatch.setattr(symmetric_buffer.os, "posix_fallocate", fails)
            with GroupCoordinator(settings=Settings(deterministic=True)) as fallen_back:
                works(fallen_back)
            library = fusedcomm.native.load()
            assert library is not None
            monkeypatch.setattr(library, "build_id", lambda: bytes([65 + dist.get_rank()] * 16))
            raises(fusedcomm.VersionMismatchError, GroupCoordinator)
        dist.barrier()

    once()
    before = holdings()
    for _ in range(10):
        once()
    after = holdings()
    assert after["names"] == []
    assert after["shared maps"] == []
    assert after["fds"] == before["fds"]
    assert after["threads"] <= before["threads"]


def test_groups_that_end_in_another_way_leave_nothing(ranks: RankPool) -> None:
    ranks(2).run(other_ends, timeout=120)


# ---- killed ----


def killed_in_use(dead: int) -> int:
    group = fusedcomm.init_distributed()
    works(group)
    if group.rank == dead:
        os.kill(os.getpid(), signal.SIGKILL)
    raises(fusedcomm.PeerDiedError, group.barrier)
    assert shm_names(os.getpid()) == []
    return os.getpid()


def test_ranks_killed_in_use_leave_nothing_in_dev_shm() -> None:
    before = set(Path("/dev/shm").glob("fusedcomm-*"))
    run_ranks(2, killed_in_use, 1, launcher="spawn", expect_dead={1})
    assert set(Path("/dev/shm").glob("fusedcomm-*")) <= before


def killed_in_set_up(when: str) -> tuple[int, list[int]]:
    """Rank 1 is killed with its name in /dev/shm: before the others know it, or after."""
    dist.init_process_group("gloo")
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(pids, torch.tensor([os.getpid()]))

    def no_memfd(*arguments: object) -> None:
        raise OSError("no memfd")

    symmetric_buffer.os.memfd_create = no_memfd  # type: ignore[assignment]  # this process ends with the test

    def die(*arguments: object) -> None:
        assert shm_names(os.getpid()), "it must have its name by now"
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        if when == "before the exchange":
            symmetric_buffer.os.posix_fallocate = die  # type: ignore[assignment]
        else:
            symmetric_buffer._attach = die  # type: ignore[assignment]
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            GroupCoordinator(timeout=30).close()
        except RuntimeError:
            pass
        else:
            raise AssertionError("expected an error: a rank has died")
    assert time.monotonic() - start < 25, "the survivors waited for the deadline"
    own = holdings()
    assert own["shared maps"] == []
    assert own["names"] == []
    return os.getpid(), [int(pid) for pid in pids]


@pytest.mark.parametrize("when", ["before the exchange", "after the exchange"])
def test_a_rank_killed_in_set_up_leaves_nothing_in_dev_shm(when: str) -> None:
    results = run_ranks(3, killed_in_set_up, when, launcher="spawn", expect_dead={1})
    assert shm_names(*results[0][1]) == []


def exits_without_closing() -> int:
    group = fusedcomm.init_distributed()
    works(group)
    return os.getpid()


@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_ranks_that_exit_without_closing_leave_nothing(launcher: str) -> None:
    """And they exit with status 0, in time: the harness checks that."""
    pids = run_ranks(2, exits_without_closing, launcher=launcher)
    assert shm_names(*pids) == []
