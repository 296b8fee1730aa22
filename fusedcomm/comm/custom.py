"""The custom all-reduce and its fused forms over a symmetric buffer (csrc/cpu/communicator.h)."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedcomm import errors
from fusedcomm.comm.symmetric_buffer import Exchange, SymmetricBuffer
from fusedcomm.comm.tuning import Tuning
from fusedcomm.native import CommConfig, Native
from fusedcomm.ops.quant import layout_flags
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

# cpu::Failure of csrc/cpu/communicator.h
_FAILURES: dict[int, type[errors.GroupBrokenError]] = {
    1: errors.PeerTimeoutError,
    2: errors.PeerDiedError,
    3: errors.CallMismatchError,
    4: errors.GroupBrokenError,
}


# column_major, packed: as the native operators take a layout
_LAYOUT_FLAGS = {layout: layout_flags(layout)[:2] for layout in ScaleLayout}


class CustomAllReduce:
    """One rank's end of the shared-memory collectives. Owns the buffer and the native communicator.

    The operators check every argument before anything is sent; what they say is short (RuntimeError), and the caller
    turns it into a ValueError.
    """

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
        self._native = native
        size = native.segment_bytes(slot_bytes)
        # Before the exchanges of the buffer: a peer that is gone by now makes them fail, so none is missed.
        pidfds = [_open_pidfd(pid) for pid in pids]
        try:
            buffer = SymmetricBuffer.create(exchange, rank, size, native.segment_init)
        except BaseException:
            _close_all(pidfds)
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
        self._handle: int = native.comm_create(ctypes.byref(config), addresses, (ctypes.c_int32 * world_size)(*pidfds))
        self.buffer_kind = buffer.kind
        self._comm_all_gather = native.operator("comm_all_gather")
        self._comm_all_reduce = native.operator("comm_all_reduce")
        self._comm_all_reduce_out = native.operator("comm_all_reduce_out")
        self._comm_allreduce_rmsnorm = native.operator("comm_allreduce_rmsnorm")
        self._comm_allreduce_rmsnorm_out = native.operator("comm_allreduce_rmsnorm_out")
        self._comm_allreduce_rmsnorm_quant = native.operator("comm_allreduce_rmsnorm_quant")
        self._comm_allreduce_rmsnorm_quant_out = native.operator("comm_allreduce_rmsnorm_quant_out")
        self._comm_barrier = native.operator("comm_barrier")
        self._comm_broadcast = native.operator("comm_broadcast")
        self._comm_reduce_scatter = native.operator("comm_reduce_scatter")
        self._release = weakref.finalize(self, _release, native, self._handle, buffer, pidfds)
        # Not when the interpreter exits: a daemon thread may be in a call. The kernel frees everything then, and peers
        # see that the process is gone.
        self._release.atexit = False

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over ranks of x ``[...]``, into out if given."""
        handle, again = self._handle, self._comm_all_reduce_out
        if out is not None:
            self._complete(again, x, out)
            return out
        try:
            out, done = self._comm_all_reduce(handle, x)
            while not done:
                done = again(handle, x, out)
            return out
        except BaseException as error:
            raise self._translate(error) from None

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
    ) -> AddRMSNorm:
        """All-reduce + add + RMSNorm in one launch."""
        handle = self._handle
        try:
            norm, residual_out, done = self._comm_allreduce_rmsnorm(handle, x, residual, weight, eps, weight_bias)
            while not done:
                done = self._comm_allreduce_rmsnorm_out(
                    handle, x, residual, weight, eps, weight_bias, norm, residual_out
                )
            return AddRMSNorm(norm, residual_out)
        except BaseException as error:
            raise self._translate(error) from None

    def allreduce_rmsnorm_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_norm: bool,
        scale_layout: ScaleLayout,
    ) -> AddRMSNormQuant:
        """All-reduce + add + RMSNorm + per-group quantisation in one launch."""
        handle = self._handle
        try:
            fp8, scale, residual_out, norm, done = self._comm_allreduce_rmsnorm_quant(
                handle,
                x,
                residual,
                weight,
                eps,
                weight_bias,
                group_size,
                emit_norm,
                *_LAYOUT_FLAGS[scale_layout],
            )
            while not done:
                done = self._comm_allreduce_rmsnorm_quant_out(
                    handle, x, residual, weight, eps, weight_bias, group_size, fp8, scale, residual_out, norm
                )
            return AddRMSNormQuant(fp8, scale, residual_out, norm, scale_layout)
        except BaseException as error:
            raise self._translate(error) from None

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

    def counts(self) -> dict[str, int]:
        """How many all-reduces (plain or fused) took one-shot and two-shot."""
        counts = (ctypes.c_uint64 * 2)()
        self._native.comm_counts(self._handle, counts)
        return {"one_shot": counts[0], "two_shot": counts[1]}

    def give_up(self, error: BaseException) -> None:
        """Tells the peers that this rank makes no further call, so that none waits for it."""
        self._native.comm_fail(self._handle, f"a collective was interrupted by {type(error).__name__}".encode())

    def abandon(self) -> None:
        """After ``fork``, in the child: neither close() nor the garbage collector tells the peers anything."""
        self._release.detach()

    def close(self) -> None:
        """Unmaps everything; peers that still wait for this rank get an error. Closing twice is fine."""
        self._release()

    def _complete(self, op: Callable[..., bool], *arguments: Any) -> None:
        handle = self._handle
        try:
            # False after a while asleep: Python's signal handlers run here, between two calls.
            while not op(handle, *arguments):
                pass
        except BaseException as error:
            raise self._translate(error) from None

    def _translate(self, error: BaseException) -> BaseException:
        handle = self._handle
        if self._native.comm_in_call(handle) or not isinstance(error, Exception):
            # Ctrl-C, or an exception from a signal handler: this rank leaves a collective that the others are in, or
            # has lost the result of one that is just done. It refuses further calls: peers must not wait for it.
            self._native.comm_fail(handle, f"a collective was interrupted by {type(error).__name__}".encode())
            return error
        failure = _FAILURES.get(self._native.comm_failure(handle))
        if failure is None or not isinstance(error, RuntimeError):
            return error
        return failure(str(error).partition("\n")[0])


def _open_pidfd(pid: int) -> int:
    if pid == os.getpid():
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # a kernel or sandbox without pidfd: a dead peer is then noticed at the deadline


def _release(native: Native, handle: int, buffer: SymmetricBuffer, pidfds: Sequence[int]) -> None:
    native.comm_close(handle)
    native.comm_destroy(handle)
    buffer.close()
    _close_all(pidfds)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
