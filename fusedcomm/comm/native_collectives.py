"""What the custom all-reduce of every device has in common: its torch operators, and how their errors are told."""

from __future__ import annotations

import abc
import ctypes
import operator
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

_MAX_NORM_CALLS = 1024

_new: Callable[..., Any] = tuple.__new__
"""Makes a NamedTuple from a tuple, in half the time that its class takes."""


class NormCall(ctypes.Structure):
    """``NormCall`` of csrc/bind/norm_call.h: what stays the same from call to call of a fused collective."""

    _fields_ = [
        ("comm", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("weight_bias", ctypes.c_double),
        ("group_size", ctypes.c_int64),
        ("emit_norm", ctypes.c_int64),
        ("column_major", ctypes.c_int64),
        ("packed", ctypes.c_int64),
    ]


class NativeCollectives(abc.ABC):
    """One rank's end of the native collectives; a subclass sets up and owns the memory that they work in.

    The operators check every argument before anything is sent; what they say is short (RuntimeError), and the caller
    turns it into a ValueError.
    """

    _release: weakref.finalize[..., Any]

    def __init__(self, native: NativeLibrary, handle: int, before_retry: Callable[[], None] | None = None) -> None:
        """``native`` made the communicator ``handle``. The operators are the same for CPU and GPU tensors.

        ``before_retry``: called where an all-reduce, plain or fused, came back undone, before it is called again.
        """
        self._native = native
        self._handle = handle
        self._before_retry = before_retry
        self._norm_calls: dict[tuple[object, ...], int] = {}
        self._kept: list[NormCall] = []  # what the addresses in _norm_calls are those of
        self._comm_all_reduce = native.operator("comm_all_reduce")
        self._comm_all_reduce_out = native.operator("comm_all_reduce_out")
        self._comm_allreduce_rmsnorm = native.operator("comm_allreduce_rmsnorm")
        self._comm_allreduce_rmsnorm_out = native.operator("comm_allreduce_rmsnorm_out")
        self._comm_allreduce_rmsnorm_quant = native.operator("comm_allreduce_rmsnorm_quant")
        self._comm_allreduce_rmsnorm_quant_out = native.operator("comm_allreduce_rmsnorm_quant_out")

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over ranks of x ``[...]``, into out if given."""
        handle = self._handle
        try:
            if out is None:
                out, done = self._comm_all_reduce(handle, x)
            else:
                done = self._comm_all_reduce_out(handle, x, out)
            while not done:
                done = self._retry(self._comm_all_reduce_out, handle, x, out)
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
        out: AddRMSNorm | None = None,
    ) -> AddRMSNorm:
        """All-reduce + add + RMSNorm in one launch, into out if given."""
        key = (eps, weight_bias)
        call = self._norm_calls.get(key) or self._prepare(*key)
        try:
            if out is None:
                norm, residual_out, done = self._comm_allreduce_rmsnorm(call, x, residual, weight)
                while not done:
                    done = self._retry(self._comm_allreduce_rmsnorm_out, call, x, residual, weight, norm, residual_out)
                result: AddRMSNorm = _new(AddRMSNorm, (norm, residual_out))
                return result
            if type(out) is not AddRMSNorm:
                raise TypeError("out: expected an AddRMSNorm")
            norm, residual_out = out
            done = self._comm_allreduce_rmsnorm_out(call, x, residual, weight, norm, residual_out)
            while not done:
                done = self._retry(self._comm_allreduce_rmsnorm_out, call, x, residual, weight, norm, residual_out)
            return out
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
        out: AddRMSNormQuant | None = None,
    ) -> AddRMSNormQuant:
        """All-reduce + add + RMSNorm + per-group quantisation in one launch, into out if given."""
        key = (eps, weight_bias, group_size, emit_norm, scale_layout)
        call = self._norm_calls.get(key) or self._prepare(*key)
        try:
            quant_out = self._comm_allreduce_rmsnorm_quant_out
            if out is None:
                fp8, scale, residual_out, norm, done = self._comm_allreduce_rmsnorm_quant(call, x, residual, weight)
                while not done:
                    done = self._retry(quant_out, call, x, residual, weight, fp8, scale, residual_out, norm)
                result: AddRMSNormQuant = _new(AddRMSNormQuant, (fp8, scale, residual_out, norm, scale_layout))
                return result
            if type(out) is not AddRMSNormQuant or out[4] is not scale_layout:
                raise TypeError("out: expected an AddRMSNormQuant of scale_layout")
            fp8, scale, residual_out, norm, _ = out
            done = quant_out(call, x, residual, weight, fp8, scale, residual_out, norm)
            while not done:
                done = self._retry(quant_out, call, x, residual, weight, fp8, scale, residual_out, norm)
            return out
        except BaseException as error:
            raise self._translate(error) from None

    def _retry(self, op: Callable[..., bool], *arguments: Any) -> bool:
        """Again what came back undone: on the CPU after a while asleep, so that Python's signal handlers run in between
        (here, between two calls); on GPUs because streams have to be put in order first."""
        if self._before_retry is not None:
            self._before_retry()
        return op(*arguments)

    def _prepare(self, eps: float, weight_bias: float, *quant: Any) -> int:
        """The address of a NormCall, which is kept. ``quant``: group_size, emit_norm, scale_layout; or nothing."""
        # A tensor is a number as well: it is looked at now, and never found again.
        numbers: tuple[Any, ...] = (float(eps), float(weight_bias))
        key, flags = numbers, (False, False)
        if quant:
            group_size, emit_norm, scale_layout = quant
            flags = _LAYOUT_FLAGS[scale_layout]
            numbers = (*numbers, operator.index(group_size), bool(emit_norm))
            key = (*numbers, scale_layout)
        if address := self._norm_calls.get(key):
            return address
        if len(self._kept) >= _MAX_NORM_CALLS:
            self._norm_calls.clear()
            self._kept.clear()
        call = NormCall(self._handle, *numbers)
        call.column_major, call.packed = flags
        self._kept.append(call)
        address = self._norm_calls[key] = ctypes.addressof(call)
        return address

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
