"""The compiled library: loading it, its control interface, and the fakes of its operators."""

from __future__ import annotations

import ctypes
import functools
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
            "chunk_bytes",
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
    # Every operator writes to tensors that its caller allocated, so a fake has nothing to make.
    def nothing(*args: object) -> None:
        return None

    for name in (
        "rms_norm_out",
        "fused_add_rms_norm_out",
        "fused_add_rms_norm_quant_out",
        "per_group_quant_fp8_out",
    ):
        torch.library.register_fake(f"fusedcomm::{name}", nothing)
