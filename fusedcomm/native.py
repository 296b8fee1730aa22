"""The compiled library: loading it, its control interface, and the fakes of its operators."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIBRARY_NAME = "libfusedcomm_native.so"


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


class Native:
    """The loaded library: ``ops`` are its torch operators, the other attributes its control functions."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.path = path
        self.ops = torch.ops.fusedcomm
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _CONTROL.items():
            function = getattr(library, f"fusedcomm_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        _register_fakes()

    def operator(self, name: str) -> Callable[..., Any]:
        """The torch operator of this name, for the hot path: without the Python frame of OpOverload.__call__."""
        overload = getattr(self.ops, name).default
        bound: Callable[..., Any] = getattr(overload, "_op", overload)
        return bound

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the native library has no function {name!r}")


def library_path() -> Path | None:
    """Where the compiled library lies, or None if the package was installed without it."""
    import fusedcomm

    # an editable install has two folders: the sources and what was built from them
    for folder in fusedcomm.__path__:
        path = Path(folder) / LIBRARY_NAME
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


def _register_fakes() -> None:
    register: Callable[..., Any] = torch.library.register_fake

    def nothing(*args: object) -> None:
        """An operator that only writes to tensors its caller allocated has nothing to make."""

    for name in ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_quant", "per_group_quant_fp8"):
        register(f"fusedcomm::{name}_out", nothing)

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


def empty_quant(
    x: torch.Tensor, group_size: int, column_major: bool, packed: bool, fnuz: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a quantising operator, uninitialised (empty_quant of csrc/bind/ops.cpp)."""
    dtype = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    # an empty tensor is contiguous whatever its strides are (those of NumPy's are 0)
    fp8 = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    groups = x.shape[-1] // group_size
    if not (column_major or packed):
        return fp8, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    rows = x.numel() // x.shape[-1]
    shape = (rows, (groups + 3) // 4 if packed else groups)
    stride = (rows + 3) // 4 * 4
    return fp8, x.new_empty_strided(shape, (1, stride), dtype=torch.int32 if packed else torch.float32)
