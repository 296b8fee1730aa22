"""The compiled libraries: loading them, their control interfaces, and the fakes of the operators."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

LIBRARY_NAME = "libfusedcomm_native.so"
GPU_LIBRARY_NAME = "libfusedcomm_gpu.so"
ERROR_BYTES = 256
"""Room for the text of a failure, wherever a function of the GPU library takes ``error``."""

SAMPLING_OPERATORS = (
    "top_k_renorm_probs_out",
    "top_p_renorm_probs_out",
    "top_k_top_p_renorm_probs_out",
    "min_p_renorm_probs_out",
    "softmax_temperature_out",
    "sampling_from_probs_out",
    "top_k_top_p_sampling_from_probs_out",
    "chain_speculative_sampling_out",
    "dflash_chain_verify_out",
    "greedy_chain_verify_out",
    "tree_speculative_sampling_target_only",
)
"""Those of csrc/bind/sampling_schemas.cpp; they write to tensors of their caller and return nothing."""


class CommConfig(ctypes.Structure):
    """``FusedcommConfig`` of csrc/bind/control.cpp; sizes in bytes, times in nanoseconds."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "rank",
            "world_size",
            "slot_bytes",
            "piece_bytes",
            "one_shot_max_bytes",
            "min_chunk_bytes",
            "max_chunk_bytes",
            "spins",
            "yield_ns",
            "timeout_ns",
        )
    ]


class GpuConfig(ctypes.Structure):
    """``FusedcommGpuConfig`` of csrc/bind/gpu_control.cpp; sizes in bytes, times in nanoseconds."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "rank",
            "world_size",
            "device",
            "slab_bytes",
            "buffer_bytes",
            "one_shot_max_bytes",
            "timeout_ns",
        )
    ]


class GpuDeviceFacts(ctypes.Structure):
    """What the GPU library says of a device."""

    _fields_ = [
        ("uuid", ctypes.c_uint8 * 16),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("num_sms", ctypes.c_int32),
        ("warp_size", ctypes.c_int32),
        ("arch", ctypes.c_char * 32),
        ("name", ctypes.c_char * 64),
    ]


class GpuTraceRecord(ctypes.Structure):
    """One call as the device saw it."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("op_number", "op", "algorithm", "dtype", "rows", "hidden")]


# name: (result, arguments) of the C functions in csrc/bind/control.cpp
_CONTROL: dict[str, tuple[Any, list[Any]]] = {
    "build_id": (ctypes.c_char_p, []),
    "isa": (ctypes.c_char_p, []),
    "segment_bytes": (ctypes.c_int64, [ctypes.c_int64]),
    "segment_init": (None, [ctypes.c_void_p]),
    "segment_is_valid": (ctypes.c_int32, [ctypes.c_void_p]),
    "comm_create": (
        ctypes.c_int64,
        [ctypes.POINTER(CommConfig), ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32)],
    ),
    "comm_close": (None, [ctypes.c_int64]),
    "comm_destroy": (None, [ctypes.c_int64]),
    "comm_in_call": (ctypes.c_int32, [ctypes.c_int64]),
    "comm_failure": (ctypes.c_int32, [ctypes.c_int64]),
    "comm_fail": (None, [ctypes.c_int64, ctypes.c_char_p]),
    "comm_counts": (None, [ctypes.c_int64, ctypes.POINTER(ctypes.c_uint64)]),
}


# the same of the GPU library, csrc/bind/gpu_control.cpp
_GPU_CONTROL: dict[str, tuple[Any, list[Any]]] = {
    "build_id": (ctypes.c_char_p, []),
    "device_facts": (ctypes.c_int32, [ctypes.c_int32, ctypes.POINTER(GpuDeviceFacts), ctypes.c_char_p]),
    "peer_access": (ctypes.c_int32, [ctypes.c_int32, ctypes.c_char_p]),
    "slab_bytes": (ctypes.c_int64, [ctypes.c_int32, ctypes.c_int64]),
    "slab_allocate": (ctypes.c_int64, [ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p]),
    "slab_open": (ctypes.c_int64, [ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p]),
    "slab_close": (None, [ctypes.c_int32, ctypes.c_int64]),
    "slab_free": (None, [ctypes.c_int32, ctypes.c_int64]),
    "comm_create": (
        ctypes.c_int64,
        [
            ctypes.POINTER(GpuConfig),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_char_p,
        ],
    ),
    "comm_close": (None, [ctypes.c_int64]),
    "comm_destroy": (None, [ctypes.c_int64]),
    "comm_in_call": (ctypes.c_int32, [ctypes.c_int64]),
    "comm_failure": (ctypes.c_int32, [ctypes.c_int64]),
    "comm_failure_text": (None, [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int32]),
    "comm_fail": (None, [ctypes.c_int64, ctypes.c_char_p]),
    "comm_counts": (None, [ctypes.c_int64, ctypes.POINTER(ctypes.c_uint64)]),
    "comm_admit": (None, [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]),
    "comm_trace": (ctypes.c_int32, [ctypes.c_int64, ctypes.POINTER(GpuTraceRecord), ctypes.c_int32]),
}


class NativeLibrary:
    """A loaded library: ``operator`` gives its torch operators, the attributes are its control functions."""

    def __init__(self, path: Path, prefix: str, control: dict[str, tuple[Any, list[Any]]]) -> None:
        torch.ops.load_library(str(path))
        self.path = path
        self.ops = torch.ops.fusedcomm
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in control.items():
            function = getattr(library, f"{prefix}{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}" if hasattr(type(self), name) else name, function)

    def operator(self, name: str) -> Callable[..., Any]:
        """The torch operator of this name, for the hot path: without the Python frame of OpOverload.__call__."""
        overload = getattr(self.ops, name).default
        bound: Callable[..., Any] = getattr(overload, "_op", overload)
        return bound

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the native library has no function {name!r}")


class Native(NativeLibrary):
    """The library for CPUs, which also declares the operators that both libraries implement."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "fusedcomm_", _CONTROL)
        _register_fakes()


class NativeGpu(NativeLibrary):
    """The library for GPUs: the same operators for CUDA (or HIP) tensors, and device memory that ranks share."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "fusedcomm_gpu_", _GPU_CONTROL)

    def device_facts(self, index: int) -> GpuDeviceFacts:
        """The facts of device ``index``; OSError if it cannot be used."""
        facts, error = GpuDeviceFacts(), ctypes.create_string_buffer(ERROR_BYTES)
        if self._device_facts(index, ctypes.byref(facts), error):
            raise OSError(f"GPU {index}: {error_text(error)}")
        return facts


def error_text(error: ctypes.Array[ctypes.c_char]) -> str:
    """What a function of the GPU library wrote."""
    return error.value.decode(errors="replace") or "no reason given"


def library_path(name: str = LIBRARY_NAME) -> Path | None:
    """Where a compiled library lies, or None if the package was installed without it."""
    import fusedcomm

    # an editable install has two folders: the sources and what was built from them
    for folder in fusedcomm.__path__:
        path = Path(folder) / name
        if path.exists():
            return path
    return None


@functools.cache
def load() -> Native | None:
    """Loads the library at the first call; None if it is not there.

    Raises:
        OSError: the library is there and cannot be loaded (a torch older than 2.11, say).
    """
    path = library_path()
    return None if path is None else Native(path)


@functools.cache
def load_gpu() -> NativeGpu | None:
    """Loads the GPU library at the first call; None if it is not there, or torch sees no GPU.

    Raises:
        OSError: the library is there and cannot be loaded, or is of another build than the CPU's.
    """
    path = library_path(GPU_LIBRARY_NAME)
    declared = None if path is None else load()  # the operators that it implements
    if path is None or declared is None or not torch.cuda.is_available():
        return None
    library = NativeGpu(path)
    builds = [bytes(one.build_id()).decode() for one in (library, declared)]
    if builds[0] != builds[1]:
        raise OSError(f"{path} is build {builds[0]}, {declared.path.name} beside it {builds[1]}")
    return library


def _register_fakes() -> None:
    register: Callable[..., Any] = torch.library.register_fake

    def nothing(*args: object) -> None:
        """An operator that only writes to tensors its caller allocated has nothing to make."""

    for name in ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_quant", "per_group_quant_fp8"):
        register(f"fusedcomm::{name}_out", nothing)
    for name in SAMPLING_OPERATORS:
        register(f"fusedcomm::{name}", nothing)

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> torch.Tensor:
        return torch.empty_like(x)

    def fused_add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    def fused_add_rms_norm_quant(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        column_major: bool,
        packed: bool,
        fnuz: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return *empty_quant(x, group_size, column_major, packed, fnuz), torch.empty_like(x)

    for fake in (rms_norm, fused_add_rms_norm, fused_add_rms_norm_quant):
        register(f"fusedcomm::{fake.__name__}", fake)
    register("fusedcomm::per_group_quant_fp8", empty_quant)


class ScaleExtent(NamedTuple):
    """What a quantising operator makes of its scales."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """None: contiguous."""
    dtype: torch.dtype


def scale_extent(shape: Sequence[int], group_size: int, column_major: bool, packed: bool) -> ScaleExtent:
    """The scales of rows ``[..., H]`` (scale_extent of csrc/bind/arguments.cpp)."""
    groups, dtype = shape[-1] // group_size, torch.int32 if packed else torch.float32
    if not (column_major or packed):
        return ScaleExtent((*shape[:-1], groups), None, dtype)
    rows = math.prod(shape[:-1])
    return ScaleExtent((rows, (groups + 3) // 4 if packed else groups), (1, (rows + 3) // 4 * 4), dtype)


def empty_quant(
    x: torch.Tensor, group_size: int, column_major: bool, packed: bool, fnuz: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a quantising operator, uninitialised (empty_quant of csrc/bind/ops.cpp)."""
    fp8_dtype = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    # an empty tensor is contiguous whatever its strides are (those of NumPy's are 0)
    fp8 = torch.empty_like(x, dtype=fp8_dtype, memory_format=torch.contiguous_format)
    shape, strides, dtype = scale_extent(x.shape, group_size, column_major, packed)
    if strides is None:
        return fp8, x.new_empty(shape, dtype=dtype)
    return fp8, x.new_empty_strided(shape, strides, dtype=dtype)
