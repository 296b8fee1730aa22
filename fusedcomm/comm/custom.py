"""The custom all-reduce and its fused forms over a symmetric buffer (csrc/cpu/communicator.h)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

from fusedcomm.comm.native_collectives import NativeCollectives
from fusedcomm.comm.processes import close_all, open_pidfd
from fusedcomm.comm.symmetric_buffer import Exchange, SymmetricBuffer
from fusedcomm.comm.tuning import Tuning
from fusedcomm.native import CommConfig, Native


class CustomAllReduce(NativeCollectives):
    """One rank's end of the shared-memory collectives. Owns the buffer and the native communicator."""

    def __init__(
        self,
        native: Native,
        exchange: Exchange,
        rank: int,
        world_size: int,
        *,
        slot_bytes: int,
        tuning: Tuning,
        timeout_s: float,
        pids: Sequence[int],
    ) -> None:
        """Sets up together with all ranks.

        Raises:
            SetupError: on all ranks alike, if it fails on one.
        """
        size = native.segment_bytes(slot_bytes)
        # Before the exchanges of the buffer: a peer that is gone by now makes them fail, so none is missed.
        pidfds = [open_pidfd(pid) for pid in pids]
        try:
            buffer = SymmetricBuffer.create(exchange, rank, size, native.segment_init)
        except BaseException:
            close_all(pidfds)
            raise
        config = CommConfig(
            rank=rank,
            world_size=world_size,
            slot_bytes=slot_bytes,
            piece_bytes=tuning.piece_bytes,
            one_shot_max_bytes=tuning.one_shot_max_bytes,
            min_chunk_bytes=tuning.min_chunk_bytes,
            max_chunk_bytes=tuning.max_chunk_bytes,
            spins=tuning.spins,
            yield_ns=tuning.yield_ns,
            timeout_ns=int(timeout_s * 1e9),
        )
        addresses = (ctypes.c_void_p * world_size)(*buffer.addresses)
        handle = native.comm_create(ctypes.byref(config), addresses, (ctypes.c_int32 * world_size)(*pidfds))
        super().__init__(native, handle)
        self.buffer_kind = buffer.kind
        self._comm_all_gather = native.operator("comm_all_gather")
        self._comm_barrier = native.operator("comm_barrier")
        self._comm_broadcast = native.operator("comm_broadcast")
        self._comm_reduce_scatter = native.operator("comm_reduce_scatter")
        self._release = weakref.finalize(self, _release, native, self._handle, buffer, pidfds)
        # Not when the interpreter exits: a daemon thread may be in a call. The kernel frees everything then, and peers
        # see that the process is gone.
        self._release.atexit = False

    def all_gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x of every rank, in rank order, into out ``[world_size, ...]``; any dtype."""
        self._complete(self._comm_all_gather, x, out)

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Part ``rank`` of the sum over ranks of x ``[world_size, ...]`` into out."""
        self._complete(self._comm_reduce_scatter, x, out)

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        """x of rank ``src`` into x of the others; any dtype."""
        self._complete(self._comm_broadcast, x, src)

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._complete(self._comm_barrier)


def _release(native: Native, handle: int, buffer: SymmetricBuffer, pidfds: Sequence[int]) -> None:
    native.comm_close(handle)
    native.comm_destroy(handle)
    buffer.close()
    close_all(pidfds)
