"""Where there is no GPU: a device that is its host, timed by the wall clock. And ranks, where there is one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import torch

from fusedcomm.cli.bench.gpu.device import CudaDevice
from fusedcomm.cli.bench.harness import OneRank


class Alone(OneRank):
    """The process alone, as gpu.harness asks its ranks."""

    def align(self) -> None:
        return None

    def align_beside_load(self) -> None:
        return None

    def first_reason(self, reason: str) -> str:
        return reason


class WallClock:
    """The CPU in place of a GPU: a graph is its calls again, a mark is the time.

    What it times is the host's Python too: calls as an engine makes them.
    """

    device = torch.device("cpu")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        return queue

    def hold(self) -> None:
        return None

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def finish(self) -> None:
        return None


AnyDevice = CudaDevice | WallClock


def open_device(name: str) -> AnyDevice:
    """The current GPU for ``"cuda"``, else the CPU."""
    return CudaDevice(torch.device("cuda", torch.cuda.current_device())) if name == "cuda" else WallClock()


def cache_bytes(device: torch.device) -> int:
    """How much the last cache of a device holds; of a CPU that does not tell, 0."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0)
    except (ValueError, OSError):  # not glibc
        return 0
