"""Where the tests of the Triton backend run: Triton's interpreter in a process of its own, or a GPU.

Triton takes or leaves the interpreter when it is imported, so a process has either that or the compiler.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from fusedcomm import ops
from fusedcomm.ops import dispatch

_TIMEOUT_S = 240


class TritonOps:
    """fusedcomm.ops on the Triton backend: CPU tensors in and out, wherever it runs."""

    device = "cpu"

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        """Calls a module-level function with the device's name and args, where the Triton backend serves."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.run(_call, name, args, options)


class InterpretedOps(TritonOps):
    """In a child with TRITON_INTERPRET=1. Arguments and results are copied."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        payload = _pack((body.__module__, body.__name__, self.device, args))
        return _unpack(self._pool.submit(_run_packed, payload).result(_TIMEOUT_S))

    def close(self) -> None:
        self._pool.shutdown()


class GpuOps(TritonOps):
    """In this process, on its GPU."""

    device = "cuda"

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        return body(self.device, *args)


@contextmanager
def on_gpu(monkeypatch: Any) -> Iterator[GpuOps]:
    """GpuOps with the backend of the process's GPU tensors set to Triton."""
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "triton")
    monkeypatch.setattr(dispatch, "_chosen", {})
    yield GpuOps()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["FUSEDCOMM_BACKEND"] = "triton"
    # NumPy warns of what the tests are about
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.")


def _pack(value: Any) -> bytes:
    """By torch's own pickle: the plain one knows no FP8 tensors, that of multiprocessing shares their memory."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpack(payload: bytes) -> Any:
    return torch.load(io.BytesIO(payload), weights_only=False)


def _run_packed(payload: bytes) -> bytes:
    module, function, device, args = _unpack(payload)
    found = sys.modules.get(module) or importlib.import_module(module)
    return _pack(getattr(found, function)(device, *args))


def _call(device: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    args, options = to((args, options), device)
    assert dispatch.local_backend(device) == "triton"
    return to(getattr(ops, name)(*args, **options), "cpu")


def to(tree: Any, device: str) -> Any:
    """Every tensor of a structure on a device, strides and all."""
    return tree_map_only(torch.Tensor, lambda t: _copy_with_strides(t, device), tree)


def _copy_with_strides(t: torch.Tensor, device: str) -> torch.Tensor:
    if t.device.type == device:
        return t
    once = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]  # nothing is written twice
    copy = torch.empty_strided(once.shape, once.stride(), dtype=t.dtype, device=device).copy_(once)
    return copy.expand(t.shape)
