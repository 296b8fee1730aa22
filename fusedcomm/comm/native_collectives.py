"""What the custom all-reduce of every device has in common: its torch operators, and how their errors are told."""

from __future__ import annotations

import abc
import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fusedcomm import errors
from fusedcomm.native import NativeLibrary
from fusedcomm.ops.quant import layout_flags
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

# cpu::Failure of csrc/cpu/communicator.h, for GPUs as well
FAILURES: dict[int, type[errors.GroupBrokenError]] = {
    1: errors.PeerTimeoutError,
    2: errors.PeerDiedError,
    3: errors.CallMismatchError,
    4: errors.GroupBrokenError,
}


# column_major, packed: as the native operators take a layout
_LAYOUT_FLAGS = {layout: layout_flags(layout)[:2] for layout in ScaleLayout}


class NativeCollectives(abc.ABC):
    """One rank's end of the native collectives; a subclass sets up and owns the memory that they work in.

    The operators check every argument before anything is sent; what they say is short (RuntimeError), and the caller
    turns it into a ValueError.
    """

    _release: weakref.finalize[..., Any]

    def __init__(self, native: NativeLibrary, handle: int) -> None:
        """``native`` made the communicator ``handle``. The operators are the same for CPU and GPU tensors."""
        self._native = native
        self._handle = handle
        self._comm_all_reduce = native.operator("comm_all_reduce")
        self._comm_all_reduce_out = native.operator("comm_all_reduce_out")
        self._comm_allreduce_rmsnorm = native.operator("comm_allreduce_rmsnorm")
        self._comm_allreduce_rmsnorm_out = native.operator("comm_allreduce_rmsnorm_out")
        self._comm_allreduce_rmsnorm_quant = native.operator("comm_allreduce_rmsnorm_quant")
        self._comm_allreduce_rmsnorm_quant_out = native.operator("comm_allreduce_rmsnorm_quant_out")

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

    @abc.abstractmethod
    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Part ``rank`` of the sum over ranks of x ``[world_size, ...]`` into out."""

    def has_failed(self) -> bool:
        """Whether a call has failed, or a kernel on the device has; waits for nothing."""
        return bool(self._native.comm_failure(self._handle))

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
        failure = FAILURES.get(self._native.comm_failure(handle))
        if failure is None or not isinstance(error, RuntimeError):
            return error
        return failure(str(error).partition("\n")[0])
