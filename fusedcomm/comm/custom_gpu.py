"""The custom all-reduce and its fused forms over GPU memory that the ranks share (csrc/gpu)."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusedcomm import errors
from fusedcomm.comm.device_buffer import DeviceBuffer
from fusedcomm.comm.native_collectives import FAILURES, NativeCollectives
from fusedcomm.comm.streams import StreamOrder
from fusedcomm.comm.symmetric_buffer import Exchange, SetupError
from fusedcomm.comm.tuning import GpuTuning
from fusedcomm.native import ERROR_BYTES, GpuConfig, GpuTraceRecord, Native, NativeGpu, error_text

_MAX_TRACE_RECORDS = 4096
_OPS = {1: "all_reduce", 2: "allreduce_rmsnorm", 3: "allreduce_rmsnorm_quant"}
_ALGORITHMS = {1: "one_shot", 2: "two_shot"}
# c10::ScalarType
_DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


class TraceRecord(NamedTuple):
    """One call as this rank's device ran it."""

    op_number: int
    """Counts the calls of the group on this device, replayed ones included."""
    op: str
    algorithm: str
    dtype: torch.dtype | None
    rows: int
    hidden: int


class GpuCustomAllReduce(NativeCollectives):
    """One rank's end of the collectives over device memory. Owns the buffer and the native communicator.

    Every method launches on the current stream of its device and returns; it can be captured in a graph. The operators
    raise what an earlier call found on the device (a deadline, a dead peer) before they launch anything.
    """

    def __init__(
        self,
        native: Native,
        gpu: NativeGpu,
        exchange: Exchange,
        rank: int,
        world_size: int,
        *,
        device: torch.device,
        buffer_bytes: int,
        tuning: GpuTuning,
        timeout_s: float,
        pids: Sequence[int],
    ) -> None:
        """Sets up together with all ranks.

        Raises:
            SetupError: on all ranks alike, if it fails on one.
        """
        slab_bytes = gpu.slab_bytes(world_size, buffer_bytes)
        buffer = DeviceBuffer.create(native, gpu, exchange, rank, device.index, slab_bytes, pids)
        config = GpuConfig(
            rank=rank,
            world_size=world_size,
            device=device.index,
            slab_bytes=slab_bytes,
            buffer_bytes=buffer_bytes,
            one_shot_max_bytes=tuning.one_shot_max_bytes,
            timeout_ns=int(timeout_s * 1e9),
        )
        error = ctypes.create_string_buffer(ERROR_BYTES)
        addresses = ctypes.c_int64 * world_size
        handle = gpu.comm_create(
            ctypes.byref(config),
            addresses(*buffer.slabs),
            addresses(*buffer.pages),
            (ctypes.c_int32 * world_size)(*buffer.pidfds),
            error,
        )
        problem = "" if handle else f"cannot make the communicator: {error_text(error)}"
        order = StreamOrder(device.index, functools.partial(gpu.comm_admit, handle)) if handle else None
        super().__init__(gpu, handle, None if order is None else order.before_call)
        self._release = weakref.finalize(self, _release, gpu, handle, buffer)
        # Not when the interpreter exits: CUDA may be gone by then. The driver frees everything, and peers see that the
        # process is gone.
        self._release.atexit = False
        self._rank = rank
        try:
            for r, data in enumerate(exchange(problem.encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0"))):
                if text := data.rstrip(b"\0").decode(errors="replace"):
                    raise SetupError(f"rank {r}: {text}")
        except BaseException:
            self.close()
            raise

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Part ``rank`` of the sum over ranks of x ``[world_size, ...]`` into out, to the bit that of all_reduce."""
        out.copy_(self.all_reduce(x)[self._rank])

    def check(self) -> None:
        """Raises what the device has found so far: a wait past its deadline, a peer that is gone. Does not wait."""
        failure = self._native.comm_failure(self._handle)
        if failure:
            text = ctypes.create_string_buffer(4 * ERROR_BYTES)
            self._native.comm_failure_text(self._handle, text, len(text))
            raise FAILURES.get(failure, errors.GroupBrokenError)(error_text(text))

    def trace(self) -> list[TraceRecord]:
        """The last calls on the device, oldest first; waits for the device."""
        records = (GpuTraceRecord * _MAX_TRACE_RECORDS)()
        count = self._native.comm_trace(self._handle, records, _MAX_TRACE_RECORDS)
        return [_trace_record(record) for record in records[:count]]


def _trace_record(record: GpuTraceRecord) -> TraceRecord:
    return TraceRecord(
        record.op_number,
        _OPS.get(record.op, str(record.op)),
        _ALGORITHMS.get(record.algorithm, str(record.algorithm)),
        _DTYPES.get(record.dtype),
        record.rows,
        record.hidden,
    )


def _release(gpu: NativeGpu, handle: int, buffer: DeviceBuffer) -> None:
    if handle:
        gpu.comm_close(handle)
        gpu.comm_destroy(handle)
    buffer.close()
