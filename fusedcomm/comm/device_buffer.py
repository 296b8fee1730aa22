"""GPU memory that every rank of a group allocates, exports (CUDA or HIP IPC) and maps, and a page of host memory each.

The slab is the library's own allocation, never from torch's caching allocator, and holds the data; the page tells peers
how the rank is (csrc/include/fusedcomm/layout.h). Memory that a peer still has mapped must not be freed: a rank says in
its page that it has unmapped the others' slabs, and a slab whose peers have not all said so waits in a graveyard, which
is swept when a buffer is made or closed. At exit the driver frees everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Sequence

from fusedcomm.comm.processes import close_all, is_gone, open_pidfd
from fusedcomm.comm.symmetric_buffer import Exchange, SetupError, SymmetricBuffer
from fusedcomm.native import ERROR_BYTES, Native, NativeGpu, error_text

PAGE_BYTES = 4096
UNMAPPED_OFFSET = 4088
"""The byte of a rank's page that is 1 once it has unmapped the slabs of its peers; behind the header of layout.h."""
_HANDLE_BYTES = 64
_MOMENT_S = 0.2
_SLAB = struct.Struct(f"<{_HANDLE_BYTES}s{ERROR_BYTES}s")  # handle, error


class DeviceBuffer:
    """The slabs and pages of all ranks, mapped here. Owns them; ``close()`` unmaps and frees.

    ``slabs[r]`` is the address on this rank's device of rank r's slab, ``pages[r]`` that of its page in this process,
    ``pidfds[r]`` a descriptor of its process (-1: none).
    """

    def __init__(
        self,
        native: NativeGpu,
        device: int,
        rank: int,
        slabs: Sequence[int],
        pages: SymmetricBuffer,
        pidfds: Sequence[int],
    ) -> None:
        self._native, self._device, self._rank = native, device, rank
        self._pages = pages
        self._closed = False
        self.slabs = list(slabs)
        self.pages = list(pages.addresses)
        self.pidfds = list(pidfds)

    @classmethod
    def create(
        cls,
        native: Native,
        gpu: NativeGpu,
        exchange: Exchange,
        rank: int,
        device: int,
        num_bytes: int,
        pids: Sequence[int],
    ) -> DeviceBuffer:
        """Allocates a slab of ``num_bytes`` on every rank's ``device`` and maps them all on all; all ranks call it.

        Args:
            native: prepares the pages.
            gpu: allocates, exports and maps device memory.
            exchange: all-gather of bytes over the group.
            rank: this rank.
            device: index of its GPU in this process.
            num_bytes: of a slab, the same on all ranks.
            pids: the ranks' processes.

        Raises:
            SetupError: a step failed on some rank; on all ranks alike, naming the first that failed and why. What was
                allocated is freed again.
        """
        sweep()
        with contextlib.ExitStack() as undo:
            # Before the exchanges: a peer that is gone by now makes them fail, so none is missed.
            pidfds = [open_pidfd(pid) for pid in pids]
            undo.callback(close_all, pidfds)
            pages = SymmetricBuffer.create(exchange, rank, PAGE_BYTES, native.segment_init)
            undo.callback(pages.close)
            # Whoever is here has closed its earlier buffers: their slabs go before there are new ones.
            sweep()
            slabs = _create_slabs(gpu, exchange, rank, device, num_bytes)
            undo.pop_all()
        return cls(gpu, device, rank, slabs, pages, pidfds)

    def close(self) -> None:
        """Unmaps the peers' slabs, and frees the own one once no peer maps it. Closing twice is fine.

        Where peers do not close within a moment, it is freed when a buffer is next made or closed.
        """
        if self._closed:
            return
        self._closed = True
        for rank, slab in enumerate(self.slabs):
            if rank != self._rank:
                self._native.slab_close(self._device, slab)
        ctypes.c_uint8.from_address(self.pages[self._rank] + UNMAPPED_OFFSET).value = 1
        _graveyard.append((os.getpid(), self))
        deadline = time.monotonic() + _MOMENT_S
        sweep()
        # by the list alone: once it is freed, nothing of it may be looked at
        while any(buffer is self for _, buffer in _graveyard) and time.monotonic() < deadline:
            time.sleep(0.001)
            sweep()

    def _is_free(self) -> bool:
        """Whether no peer maps the own slab any more."""
        peers = (r for r in range(len(self.slabs)) if r != self._rank)
        return all(self._is_unmapped_by(r) for r in peers)

    def _bury(self) -> None:
        self._native.slab_free(self._device, self.slabs[self._rank])
        self._pages.close()
        close_all(self.pidfds)

    def _is_unmapped_by(self, rank: int) -> bool:
        flag = ctypes.c_uint8.from_address(self.pages[rank] + UNMAPPED_OFFSET).value
        return flag == 1 or is_gone(self.pidfds[rank])


# Closed buffers whose slabs peers may still map, by process: a child inherits the list, and frees nothing of it.
_graveyard: list[tuple[int, DeviceBuffer]] = []


def sweep() -> int:
    """Frees the slabs of closed buffers that no peer maps any more; how many are left."""
    for _ in range(len(_graveyard)):
        try:
            # taken out first: the garbage collector, or another thread, may close a buffer meanwhile
            pid, buffer = _graveyard.pop(0)
        except IndexError:
            break
        if pid != os.getpid():
            continue
        if buffer._is_free():
            buffer._bury()
        else:
            _graveyard.append((pid, buffer))
    return len(_graveyard)


def _create_slabs(gpu: NativeGpu, exchange: Exchange, rank: int, device: int, num_bytes: int) -> list[int]:
    handle, error = ctypes.create_string_buffer(_HANDLE_BYTES), ctypes.create_string_buffer(ERROR_BYTES)
    own = gpu.slab_allocate(device, num_bytes, handle, error)
    problem = "" if own else f"cannot allocate {num_bytes} bytes on GPU {device}: {error_text(error)}"
    opened: list[int] = []
    try:
        records = [_SLAB.unpack(data) for data in exchange(_SLAB.pack(handle.raw, _clip(problem)))]
        _raise_first_error([text for _, text in records])
        slabs = []
        for r, (peer, _) in enumerate(records):
            slab = own if r == rank else gpu.slab_open(device, peer, error)
            if not slab:
                problem = f"cannot map the memory of rank {r}: {error_text(error)}"
                break
            slabs.append(slab)
            if r != rank:
                opened.append(slab)
        _raise_first_error(exchange(_clip(problem).ljust(ERROR_BYTES, b"\0")))
        return slabs
    except BaseException as failure:
        for slab in opened:
            gpu.slab_close(device, slab)
        if isinstance(failure, SetupError):
            exchange(b"\0")  # all have unmapped
        # After any other error peers may still map it: then it is theirs until this process ends.
        if own and isinstance(failure, SetupError):
            gpu.slab_free(device, own)
        raise


def _clip(text: str) -> bytes:
    return text.encode()[:ERROR_BYTES]


def _raise_first_error(errors: Sequence[bytes]) -> None:
    for rank, data in enumerate(errors):
        text = data.rstrip(b"\0").decode(errors="replace")
        if text:
            raise SetupError(f"rank {rank}: {text}")
