"""The processes of the other ranks: noticing that one is gone."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence


def open_pidfd(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; -1 for this process itself, or where there is none."""
    if pid == os.getpid():
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # a kernel or sandbox without pidfd: a dead peer is then noticed at the deadline


def is_gone(pidfd: int) -> bool:
    """Whether the process has ended; without a descriptor nobody can tell (its number may mean another one here)."""
    if pidfd < 0:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def close_all(fds: Sequence[int]) -> None:
    """Closes descriptors; -1 is none."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)
