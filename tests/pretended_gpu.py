"""A GPU library without a GPU, and threads as ranks, for the unit tests of what stands around it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fusedcomm.comm.symmetric_buffer import SetupError


class PretendedGpu:
    """Device memory as numbers: knows what is allocated, what is mapped by whom, and notes what must not happen."""

    def __init__(self) -> None:
        self.allocated: dict[int, bytes] = {}  # by address: its handle
        self.mapped: list[tuple[int, int]] = []  # (device that maps, address)
        self.mistakes: list[str] = []
        self.fails: Callable[[str, int], bool] = lambda what, device: False
        self._next = 0x1000
        self._lock = threading.Lock()

    def slab_allocate(self, device: int, size: int, handle: Any, error: Any) -> int:
        if self.fails("allocate", device):
            error.value = b"out of memory"
            return 0
        with self._lock:
            self._next += 0x1000
            address = self._next
            self.allocated[address] = address.to_bytes(8, "little").ljust(64, b"\1")
        ctypes.memmove(handle, self.allocated[address], 64)
        return address

    def slab_open(self, device: int, handle: bytes, error: Any) -> int:
        if self.fails("open", device):
            error.value = b"invalid device context"
            return 0
        address = int.from_bytes(handle[:8], "little")
        with self._lock:
            if self.allocated.get(address) != handle:
                self.mistakes.append(f"GPU {device} maps {address:#x}, which is not there")
            self.mapped.append((device, address))
        return address

    def slab_close(self, device: int, address: int) -> None:
        with self._lock:
            self.mapped.remove((device, address))

    def slab_free(self, device: int, address: int) -> None:
        with self._lock:
            if any(address == other for _, other in self.mapped):
                self.mistakes.append(f"GPU {device} frees {address:#x}, which is mapped")
            del self.allocated[address]


def ranks(body: Callable[[int, Callable[[bytes], list[bytes]]], Any], world: int) -> list[Any]:
    """body(rank, exchange) on a thread a rank; results or SetupErrors in rank order."""
    barrier, slots = threading.Barrier(world, timeout=20), [b""] * world

    def one(rank: int) -> Any:
        def exchange(data: bytes) -> list[bytes]:
            slots[rank] = data
            barrier.wait()
            received = list(slots)
            barrier.wait()
            assert len({len(part) for part in received}) == 1
            return received

        try:
            return body(rank, exchange)
        except SetupError as error:
            return error
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))
